"""A real process, stopped at many moments: nothing finished is lost, nothing is done twice."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1] / "support"
COMMAND = Path(sys.executable).with_name("adq-search")
OPTIONS = [
    "--task", "tiny_task:make_task", "--budget-bits", "3.5", "--bits", "2,3,4", "--trials", "12",
    "--epochs", "2", "--final-epochs", "3", "--device", "cpu", "--study", "s",
]  # fmt: skip
PATIENCE_S = 600


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def stop_when(
    folder: Path,
    arguments: list[str],
    *steps: tuple[Callable[[Path], bool], signal.Signals],
) -> tuple[int, str]:
    """Start the command, send it each signal once its moment has come; its exit code and stderr."""
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores Ctrl-C, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE_S
    try:
        for moment, how in steps:
            while not moment(folder / "runs/s"):
                assert process.poll() is None, "it ended before the moment came"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.send_signal(how)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, stderr


def results(study: Path) -> dict[str, Any]:
    """All that a study found, without what differs between two runs: seconds."""
    found = {}
    for path in sorted([*study.glob("trials/*.json"), *study.glob("final/*.json")]):
        record = json.loads(path.read_text())
        record.pop("seconds")
        for rung in record["rungs"]:
            rung.pop("seconds")
        found[str(path.relative_to(study))] = record
    found["front"] = json.loads((study / "front.json").read_text())
    return found


def finished_work(study: Path) -> dict[Path, int]:
    """Every finished record and weight file with its time of writing."""
    files = [p for kind in ("trials", "final", "models") for p in study.glob(f"{kind}/[!.]*")]
    return {p: p.stat().st_mtime_ns for p in [*files, *study.glob("fp32.*")]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(TESTS / "tiny_task.py", tmp_path)
    return tmp_path


def trial(number: int) -> Callable[[Path], bool]:
    return lambda study: (study / f"trials/{number:04d}.json").exists()


def count(pattern: str, number: int) -> Callable[[Path], bool]:
    return lambda study: len(list(study.glob(pattern))) >= number


# In order of a study's life. Files appear in the middle of the work between them, so that the
# signal meets FP32 training, a proxy, a trial (its training, or the moment between its record and
# its tell), final training and the report. tests/search/run/test_resume.py stops at every stage.
MOMENTS: list[Callable[[Path], bool]] = [
    lambda study: study.exists(),
    count("fp32.json", 1),
    trial(5),
    count("final/t*.json", 1),
    count("front.json", 1),
]


def test_a_study_killed_at_every_stage_ends_like_an_undisturbed_one(folder: Path) -> None:
    whole = folder / "whole"
    whole.mkdir()
    shutil.copy(TESTS / "tiny_task.py", whole)
    assert run(whole, *OPTIONS).returncode == 0

    arguments = OPTIONS
    kept: dict[Path, int] = {}
    for moment in MOMENTS:
        code, _ = stop_when(folder, arguments, (moment, signal.SIGKILL))
        assert code == -signal.SIGKILL
        kept |= finished_work(folder / "runs/s")
        arguments = ["resume", "s"]
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr

    assert results(folder / "runs/s") == results(whole / "runs/s")
    now = finished_work(folder / "runs/s")
    assert kept.items() <= now.items()  # nothing finished was done again
    assert not list((folder / "runs/s").rglob(".*.tmp"))  # what a kill left half-written is gone


RUNGS = ["--rungs", "0,1", "--reduction", "2", "--warm-start", "on"]


def test_a_stopped_study_leaves_its_front_so_far_and_ends_like_an_undisturbed_one(
    folder: Path,
) -> None:
    whole = folder / "whole"
    whole.mkdir()
    shutil.copy(TESTS / "tiny_task.py", whole)
    assert run(whole, *OPTIONS, *RUNGS).returncode == 0

    study = folder / "runs/s"
    fully = count("start/*.safetensors", 2)
    code, stderr = stop_when(folder, [*OPTIONS, *RUNGS], (fully, signal.SIGINT))
    assert code == 130
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("interrupted: 'adq-search resume s' goes on, and nothing finished")
    assert last.endswith("the front so far, by validation, is in runs/s/front.json")
    front = json.loads((study / "front.json").read_text())
    assert front["split"] == "validation"
    assert {p["weights"] for p in front["points"]} == {None}
    assert {p["id"] for p in front["points"]} <= {p.stem for p in study.glob("trials/*.json")}
    for name in ("front.csv", "front.png"):
        assert (study / name).stat().st_size > 100
    assert "searching, " in run(folder, "list").stdout
    assert json.loads(run(folder, "pareto", "s").stdout) == front

    done = run(folder, "resume", "s")
    assert done.returncode == 0, done.stderr
    assert results(study) == results(whole / "runs/s")


def test_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    """The second one comes when the first one's front.json is there and its picture is drawn."""
    written = count("front.json", 1)
    steps = ((trial(2), signal.SIGINT), (written, signal.SIGINT))
    code, _ = stop_when(folder, OPTIONS, *steps)
    assert code == -signal.SIGINT
    assert not (folder / "runs/s/front.png").exists()


def test_sigterm_says_how_to_go_on_and_a_second_process_works_along(folder: Path) -> None:
    """Two at once from where the first one was stopped: what both do is what one would have done,
    nothing is done twice, and each has its share."""
    code, stderr = stop_when(folder, [*OPTIONS, "--window", "2"], (trial(1), signal.SIGTERM))
    assert code == 130
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("interrupted: 'adq-search resume s' goes on")

    alone = folder / "alone"
    alone.mkdir()
    shutil.copy(TESTS / "tiny_task.py", alone)
    shutil.copytree(folder / "runs", alone / "runs")
    assert run(alone, "resume", "s").returncode == 0

    two = [
        subprocess.Popen([COMMAND, "resume", "s"], cwd=folder, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        heard = [process.communicate(timeout=PATIENCE_S)[1] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [0, 0], heard
    assert results(folder / "runs/s") == results(alone / "runs/s")
    trained = [re.findall(r"\] search \d+/12 (\d{4}): ", text) for text in heard]
    assert all(trained)
    assert len(trained[0]) + len(trained[1]) == len({*trained[0], *trained[1]}) <= 11
