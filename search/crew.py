"""Who works on a study: one process or several, on one machine or on many.

The folder is what they share:

  lock           held while a process decides what is next or writes down a result; it names the
                 process that held it last
  drivers/ID     one file a process, locked while it lives, with a number that goes up every
                 BEAT seconds
  running/JOB    the ID of the process that has taken a training

A process is gone when nobody holds the lock of its file: the kernel frees it, however the process
ends. Locks of another machine may not be seen here: there, it is gone when its number has stood
still for GRACE seconds by this machine's own clock, so that clocks are never compared.
"""

import fcntl
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from adq.quant.errors import InputError

BEAT, GRACE = 10.0, 90.0
DRIVERS, RUNNING = "drivers", "running"


def _machine() -> str:
    """What tells this boot of this machine from every other."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return os.uname().nodename.replace("-", "_")
    return text.strip().replace("-", "")


_handles: "weakref.WeakSet[FileIO]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process, such as a loader of data, keeps a lock for as long as it has the file."""
    for handle in [*_handles]:
        handle.close()


os.register_at_fork(after_in_child=_close_in_child)


class Crew:
    """This process's part in the work on a study. Use it as a context manager.

    Raises InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path, beat: float = BEAT, grace: float = GRACE) -> None:
        self.folder, self._beat, self._grace = folder, beat, grace
        self.id = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._mine: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        self._inside = False

    def __enter__(self) -> "Crew":
        try:
            for name in (DRIVERS, RUNNING):
                (self.folder / name).mkdir(exist_ok=True)
            while True:
                path = self.folder / DRIVERS / self.id
                self._handle = open(path, "w+b", buffering=0)
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._handle.fileno()), path.stat()):
                        break
                self._handle.close()  # another process took it for a dead one's, before the lock
        except OSError as error:
            raise InputError(f"cannot write in {self.folder}: {error.strerror}") from None
        _handles.add(self._handle)
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        with suppress(OSError):
            (self.folder / DRIVERS / self.id).unlink()
        self._handle.close()

    def _keep_beating(self) -> None:
        count = 0
        while True:
            with suppress(OSError):  # a full disk, a server that is away: the next one may do
                self._handle.seek(0)
                self._handle.write(b"%d\n" % count)
            count += 1
            if self._stopped.wait(self._beat):
                return

    @contextmanager
    def exclusive(self, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Keep the others from deciding and writing; gives whether one of them did since.

        `waiting` is called when another process holds the lock.
        """
        if self._inside:
            raise RuntimeError("the study's lock is held already")
        try:
            handle = open(self.folder / "lock", "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write in {self.folder}: {error.strerror}") from None
        with handle:
            _handles.add(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            changed = handle.read() != self.id.encode()
            if changed:
                try:
                    handle.truncate(0)
                    handle.write(self.id.encode())
                except OSError as error:
                    raise InputError(f"cannot write in {self.folder}: {error.strerror}") from None
            self._inside = True
            try:
                yield changed
            except BaseException:
                # what was left half done is read anew by whoever comes next
                with suppress(OSError):
                    handle.truncate(0)
                raise
            finally:
                self._inside = False
                fcntl.flock(handle, fcntl.LOCK_UN)

    def others(self) -> list[str]:
        """The other processes that are alive."""
        ids = [path.name for path in (self.folder / DRIVERS).iterdir()]
        return sorted(id for id in ids if id != self.id and self.alive(id))

    def alive(self, id: str) -> bool:
        if id == self.id:
            return True
        path = self.folder / DRIVERS / id
        try:
            if id.partition("-")[0] == _machine():
                with open(path, "rb") as handle:
                    try:
                        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except OSError:
                        return True
                path.unlink(missing_ok=True)
                return False
            content, now = path.read_bytes(), time.monotonic()
        except FileNotFoundError:
            return False
        except OSError:  # a server that is away says nothing of who is gone
            return True
        before, since = self._seen.get(id, (b"", now))
        if id not in self._seen or content != before:
            self._seen[id] = content, now
            return True
        if now - since <= self._grace:
            return True
        path.unlink(missing_ok=True)
        return False

    def is_free(self, job: str) -> bool:
        """Whether no living process has taken a job, this one neither."""
        if job in self._mine:
            return False
        try:
            owner = (self.folder / RUNNING / job).read_text()
        except FileNotFoundError:
            return True
        return not owner or not self.alive(owner)

    def take(self, job: str) -> None:
        """Make a job this process's, with the lock held.

        Whoever dies in between, or with the machine, leaves what names no living process.
        """
        try:
            (self.folder / RUNNING / job).write_text(self.id)
        except OSError as error:
            raise InputError(f"cannot write in {self.folder}: {error.strerror}") from None
        self._mine.add(job)

    def drop(self, job: str) -> None:
        """The job is done."""
        self._mine.discard(job)
        (self.folder / RUNNING / job).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left half written; with the lock held, and nobody else."""
        if not self.others():
            for leftover in self.folder.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
