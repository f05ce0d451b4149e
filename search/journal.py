"""Optuna's journal file, for processes that die at any moment and disks that run full."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from adq.quant.errors import InputError
from adq.search.patience import reason

JOB = "job"  # a user attribute, unlike for every trial: whether a creation came through
RECORD = b'{"op_code":'  # how each begins in a journal
LOCK_SUFFIX = ".lock"
LOCK_WAIT_S = 60.0  # it is held for milliseconds


class Journal(JournalStorage):
    """Optuna's journal, which makes a trial of one `job` once."""

    def __init__(self, path: str) -> None:
        self._unsure: set[str] = set()
        super().__init__(_JournalFile(path))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        job = "" if template_trial is None else template_trial.user_attrs.get(JOB, "")
        if job in self._unsure:
            for trial in self.get_all_trials(study_id, deepcopy=False):
                if trial.user_attrs.get(JOB) == job:
                    return trial._trial_id
        if job:
            self._unsure.add(job)
        made = super().create_new_trial(study_id, template_trial)
        self._unsure.discard(job)
        return made


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, in which what a process or a full disk cut short does no harm.

    A line counts once it ends: the start of one that its writer did not finish is taken away by
    the next writer. Optuna's would write behind it, and make the file unreadable.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        with open(path, "rb") as file:
            if not RECORD.startswith(file.read(len(RECORD))):
                raise self._no_journal()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with (
            _locked(self._file_path + LOCK_SUFFIX),
            open(self._file_path, "r+b", buffering=0) as file,
        ):
            end = self._end(file)
            file.truncate(end)
            file.seek(end)
            try:
                left = memoryview(content)
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
            os.fsync(file.fileno())

    def _end(self, file: FileIO) -> int:
        """The size of the file without a record that its writer did not finish."""
        end, tail, block = file.seek(0, os.SEEK_END), b"", 4096
        while end > 0 and b"\n" not in tail:
            start = max(0, end - block)
            file.seek(start)
            tail = file.read(end - start) + tail
            end = start
        unfinished = tail[tail.rfind(b"\n") + 1 :]
        if not (unfinished.startswith(RECORD) or RECORD.startswith(unfinished)):
            raise self._no_journal()
        return file.seek(0, os.SEEK_END) - len(unfinished)

    def _no_journal(self) -> InputError:
        return InputError(
            f"storage journal:{self._file_path} cannot be used: it is no journal of Optuna; give "
            "another --storage"
        )

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:  # not JSON, not UTF-8
            raise InputError(
                f"storage journal:{self._file_path} cannot be used: it is damaged "
                f"({reason(error)}); restore it, or give another --storage"
            ) from None


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock that ends with the process, on local file systems and NFS version 4.

    Optuna's own are files that exist while they are held: where a process died, the others wait 30
    seconds, and two that have waited may both go on.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until, pause = time.monotonic() + LOCK_WAIT_S, 0.001
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(errno.ETIMEDOUT, f"{path} is held for long") from None
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have it open too
    finally:
        os.close(descriptor)
