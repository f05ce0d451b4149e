"""Several processes in one folder: who has what, who is gone, and one at a time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adq.quant.errors import InputError
from adq.search import crew as module
from adq.search.crew import Crew

OTHER = """
import sys, time
from pathlib import Path
from adq.search.crew import Crew
with Crew(Path(sys.argv[1])) as crew:
    with crew.exclusive():
        crew.take("0000-0")
        if sys.argv[2] == "hold":
            print(crew.id, flush=True)
            time.sleep(60)
    print(crew.id, flush=True)
    sys.stdin.read()
"""


class Other:
    """Another process that has taken the training 0000-0, and holds the lock if it is to."""

    def __init__(self, folder: Path, mode: str = "free") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(folder), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.id = self.process.stdout.readline().strip()

    def end(self, how: signal.Signals | None = None) -> None:
        if how is None:
            self.process.communicate("")
        else:
            self.process.send_signal(how)
            self.process.communicate()


def test_what_a_living_process_has_taken_is_not_free(tmp_path: Path) -> None:
    other = Other(tmp_path)
    try:
        with Crew(tmp_path) as crew:
            assert crew.others() == [other.id]
            assert not crew.is_free("0000-0")
            assert crew.is_free("0001-0")
            with crew.exclusive():
                crew.take("0001-0")
            assert not crew.is_free("0001-0")
            crew.drop("0001-0")
            assert crew.is_free("0001-0")
    finally:
        other.end()


@pytest.mark.parametrize("how", [None, signal.SIGKILL], ids=["at its end", "killed"])
def test_what_a_process_had_taken_is_free_once_it_is_gone(
    tmp_path: Path, how: signal.Signals | None
) -> None:
    other = Other(tmp_path)
    with Crew(tmp_path) as crew:
        other.end(how)
        assert crew.is_free("0000-0")
        assert crew.others() == []


def test_the_lock_waits_for_its_holder_and_outlives_none(tmp_path: Path) -> None:
    other = Other(tmp_path, "hold")
    waited: list[float] = []

    def kill() -> None:
        waited.append(time.monotonic())
        other.end(signal.SIGKILL)

    with Crew(tmp_path) as crew, crew.exclusive(kill) as changed:
        assert changed
        assert len(waited) == 1


def test_a_process_hears_whether_another_one_had_the_lock(tmp_path: Path) -> None:
    with Crew(tmp_path) as one, Crew(tmp_path) as two:
        for crew, expected in [(one, True), (one, False), (two, True), (one, True), (one, False)]:
            with crew.exclusive() as changed:
                assert changed == expected


def test_work_that_broke_off_under_the_lock_is_read_anew(tmp_path: Path) -> None:
    with Crew(tmp_path) as crew:
        with crew.exclusive():
            pass
        with pytest.raises(OSError, match="full"), crew.exclusive():
            raise OSError("full")
        with crew.exclusive() as changed:
            assert changed


def test_a_process_on_another_machine_is_gone_when_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock cannot be seen, its clock is never read: only that its number moves, or not."""
    with Crew(tmp_path, beat=0.02, grace=0.5) as far, monkeypatch.context() as here:
        here.setattr(module, "_machine", lambda: "elsewhere")
        near = Crew(tmp_path, grace=0.3)
        clock = [1000.0]
        here.setattr(module.time, "monotonic", lambda: clock[0])
        for _ in range(5):
            assert near.alive(far.id)
            clock[0] += 0.29
            time.sleep(0.1)
        far._stopped.set()
        far._thread.join()
        assert near.alive(far.id)
        clock[0] += 0.29
        assert near.alive(far.id)
        clock[0] += 0.02
        assert not near.alive(far.id)


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Other(tmp_path)
    try:
        with Crew(tmp_path) as crew:
            monkeypatch.setattr(time, "time", lambda: 0.0)
            assert not crew.is_free("0000-0")
            monkeypatch.setattr(time, "time", lambda: 1e11)
            assert not crew.is_free("0000-0")
    finally:
        other.end()


def test_a_process_forked_with_the_lock_held_does_not_keep_it(tmp_path: Path) -> None:
    """As loaders of data that stay alive are; nor does it keep its parent alive for the others."""
    with Crew(tmp_path) as crew:
        with crew.exclusive():
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        try:
            with crew.exclusive(lambda: pytest.fail("the lock is still held")):
                pass
            other = Crew(tmp_path)
            assert other.alive(crew.id)
            time.sleep(0.2)
            crew._handle.close()  # as when it is killed; the child lives on
            assert not other.alive(crew.id)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_half_written_files_are_swept_when_nobody_else_is_there(tmp_path: Path) -> None:
    leftover = tmp_path / "trials" / ".0001.json.17.tmp"
    leftover.parent.mkdir()
    leftover.touch()
    other = Other(tmp_path)
    with Crew(tmp_path) as crew:
        with crew.exclusive():
            crew.sweep()
        assert leftover.exists()
        other.end(signal.SIGKILL)
        with crew.exclusive():
            crew.sweep()
        assert not leftover.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "drivers").touch()
    with pytest.raises(InputError, match="cannot write in"), Crew(tmp_path):
        pass


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with (
        Crew(tmp_path) as crew,
        pytest.raises(InputError, match=r"cannot write in .*: Is a directory"),
        crew.exclusive(),
    ):
        pass
