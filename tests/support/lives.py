"""Processes that work on one study and are killed at given moments.

Starting Python and torch takes longer than a whole small study. So one process, without threads and
with everything loaded, forks those that work: each is a process of its own, with connections and
files of its own, and dies by SIGKILL.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adq.search.folder import StudyFolder

TASK = "tiny_task:make_task"


def essence(folder: "StudyFolder") -> dict[str, Any]:
    """All that is recorded, but for how long it took."""
    found: dict[str, Any] = {}
    for kind in ("trials", "final"):
        for record in folder.records(kind):
            data = record.to_json()
            del data["seconds"]
            for rung in data["rungs"]:
                del rung["seconds"]
            found[f"{kind}/{record.id}"] = data
    return found


class Mother:
    """Forks processes that run a study. Use it as a context manager."""

    def __init__(self, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def __enter__(self) -> "Mother":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def live(self, options: dict[str, Any], deaths: Sequence[float | None] = (None,)) -> list[str]:
        """Run the study in one process for each of `deaths`, side by side, which is killed after so
        many seconds; None lets it live. What became of each: killed, done, or its last words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([options, deaths]), file=self._process.stdin, flush=True)
        ends: list[str] = json.loads(self._process.stdout.readline())
        return ends


def _main(log: Path) -> None:
    from adq.quant.errors import InputError
    from adq.quant.files import write_json
    from adq.search import jobs, run
    from adq.search.config import make_config
    from adq.search.folder import StudyFolder
    from adq.search.task import load_task

    task = load_task(TASK)
    writing = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    train = jobs.train_job

    def say(*words: object) -> None:
        os.write(writing, (" ".join(map(str, words)) + "\n").encode())

    def logged(bench: Any, job: Any, parts: int, on_epoch: Any) -> Any:
        say("start", job.name)
        return train(bench, job, parts, lambda epoch, loss: say("epoch", job.name, epoch))

    jobs.train_job = logged
    # pictures take seconds to draw, and are no matter here
    run.write_report = lambda folder, front: write_json(folder.file("front.json"), front.to_json())

    def work(options: dict[str, Any]) -> None:
        config = make_config(options, {"task": TASK})
        folder = StudyFolder(Path(config.out) / str(config.study))
        if not folder.path.exists():
            try:
                run.start(config, task)
                return
            except InputError as error:  # the other one was sooner
                if "exists already" not in str(error) and "already: choose" not in str(error):
                    raise
        while not folder.path.exists():
            time.sleep(0.01)
        run.resume(folder, task)

    for line in sys.stdin:
        options, deaths = json.loads(line)
        children = {}
        for death in deaths:
            reading, telling = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    work(options)
                    os.write(telling, b"done " + " ".join(sys.modules).encode())
                except BaseException as error:  # noqa: BLE001 (the test shows it)
                    os.write(telling, f"{type(error).__name__}: {error}".encode()[:2000])
                os._exit(0)
            os.close(telling)
            children[pid] = reading, death
        began = time.monotonic()
        for pid, (_, death) in sorted(children.items(), key=lambda item: item[1][1] or 1e9):
            if death is not None:
                time.sleep(max(0.0, began + death - time.monotonic()))
                os.kill(pid, signal.SIGKILL)
        ends = []
        for pid, (reading, _) in children.items():
            with os.fdopen(reading) as heard:  # to its end, before the child can end
                words = heard.read()
            _, status = os.waitpid(pid, 0)
            if words.startswith("done "):
                for name in words.split()[1:]:  # so that the next ones need not load them
                    with suppress(Exception):
                        importlib.import_module(name)
                words = "done"
            ends.append("killed" if os.WIFSIGNALED(status) and not words else words)
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main(Path(sys.argv[1]))
