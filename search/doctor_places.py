"""What the doctor looks at where results are kept: the folder, the storage, checkpoints."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from adq.quant.errors import InputError
from adq.search.finding import OK, PROBLEM, WARNING, Finding, Values, size_text

NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph",
    "glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs",
)  # fmt: skip
LITTLE_SPACE, TOO_LITTLE_SPACE = 2 * 2**30, 100 * 2**20  # bytes
SLOW_STORAGE_S = 1.0
PROBE = b"adq-search doctor\n"


def check_folder(values: Values) -> list[Finding]:
    """The folder of studies: rights, space, locks, kind of file system."""
    path, check = Path(values["out"]), "out folder"
    remedy = "choose another folder with --out, or give yourself the right to write there"
    made = [p for p in (path, *path.parents) if not p.exists()]
    probe = path / f".doctor-{uuid.uuid4().hex}"
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with open(probe, "wb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(file.fileno())
            renamed = probe.with_suffix(".moved")
            os.replace(probe, renamed)
            os.replace(renamed, probe)
            if probe.read_bytes() != PROBE:
                return [Finding(check, PROBLEM, f"{path} loses what is written", remedy)]
            locked = _locks(probe)
            free = shutil.disk_usage(path).free
        except OSError as error:
            text = f"cannot write in {path}: {error.strerror or error}"
            return [Finding(check, PROBLEM, text, remedy)]
        kind = file_system(path)
    finally:
        with suppress(OSError):
            probe.unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    found = [Finding(check, OK, f"{path} can be written, {size_text(free)} free ({kind})")]
    if free < LITTLE_SPACE:
        state = PROBLEM if free < TOO_LITTLE_SPACE else WARNING
        found[0] = Finding(
            check, state, f"{path}: {size_text(free)} free", "make room on this disk"
        )
    if not locked:
        found.append(
            Finding(
                "file locks",
                PROBLEM,
                f"file locks do not keep two processes apart in {path} ({kind})",
                "mount it with locks (NFS version 4, no 'nolock'), or choose another --out",
            )
        )
    if kind in NETWORK_FILE_SYSTEMS and values["storage"] is None:
        found.append(
            Finding(
                "storage",
                WARNING,
                f"a study's SQLite file would lie on {kind}, where SQLite may be damaged",
                f"give --storage journal:{path}/NAME.log, or a PostgreSQL URL",
            )
        )
    return found


def _locks(path: Path) -> bool:
    """Whether a lock held here is seen by another process."""
    import fcntl

    code = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('held')"
    )
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        other = subprocess.run(
            [sys.executable, "-I", "-c", code, str(path)], capture_output=True, check=False
        )
    return other.stdout.strip() == b"held"


def file_system(path: Path) -> str:
    """The kind of file system that holds the path, '?' where the kernel does not say."""
    kind, longest = "?", -1
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            point = Path(left.split()[4].replace("\\040", " "))
            if path.resolve().is_relative_to(point) and len(point.parts) >= longest:
                longest, kind = len(point.parts), right.split()[0]
    return kind


def check_storage(values: Values) -> list[Finding]:
    """The storage, by a study that is made in it and deleted."""
    url, check = values["storage"], "storage"
    if url is None:
        return []
    from optuna.study import StudyDirection
    from optuna.trial import TrialState, create_trial

    from adq.search.storage import StudyStorage, create_study_in
    from adq.search.storage_url import file_of, has_password, shown

    found = []
    path = file_of(url)
    new = path is not None and not path.exists()
    name, started = f"doctor-{uuid.uuid4().hex}", time.monotonic()
    try:
        directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
        create_study_in(url, name, ["metric", "cost"], directions, patience_s=0)
        study = StudyStorage(url, name, patience_s=0)
        try:
            _, id = study.create(create_trial(state=TrialState.RUNNING))
            study.finish(id, TrialState.COMPLETE, [0.5, 1.0])
            good = [trial.values for trial in study.trials()] == [[0.5, 1.0]]
        finally:
            study.delete_study()
            study.close()
    except InputError as error:
        text, _, rest = str(error).partition("; ")
        remedy = "see that the server is up, that this machine may connect, and that name and "
        remedy += "password are right" if path is None else "see that the file may be written"
        return [Finding(check, PROBLEM, text, remedy + (f" ({rest})" if "pip" in rest else ""))]
    finally:
        if path is not None and new:
            for left in (path, Path(f"{path}.lock")):
                with suppress(OSError):
                    left.unlink()
    seconds = time.monotonic() - started
    if not good:
        return [Finding(check, PROBLEM, f"{shown(url)} loses what is written", "use another one")]
    found.append(
        Finding(check, OK, f"{shown(url)}: a study was made, read and deleted in {seconds:.1f} s")
    )
    if seconds / 4 > SLOW_STORAGE_S:
        found[0] = Finding(check, WARNING, found[0].text, "a storage nearer by saves time")
    if path is not None and url.startswith("sqlite"):
        kind = file_system(path)
        if kind in NETWORK_FILE_SYSTEMS:
            found.append(
                Finding(
                    check,
                    WARNING,
                    f"SQLite on {kind} may be damaged when several machines write",
                    f"give --storage journal:{path.with_suffix('.log')}, or a PostgreSQL URL",
                )
            )
    if has_password(url):
        found.append(
            Finding(
                check,
                WARNING,
                "its password would be kept in the study's folder, in study.toml",
                "leave it out of the URL: PostgreSQL takes it from ~/.pgpass or PGPASSWORD",
            )
        )
    return found


def check_checkpoints(values: Values) -> list[Finding]:
    """The place of checkpoints, by a file that is written, read and removed."""
    where, check = values["checkpoints"], "checkpoints"
    if where is None:
        return []
    from adq.search.files import UrlFiles, open_files

    name = f"doctor-{uuid.uuid4().hex}"
    folder = Path(where) if "://" not in where else None
    new = folder is not None and not folder.exists()
    remedy = "name a folder or URL that may be written, and check its keys and network"
    try:
        files = open_files(where)
        if isinstance(files, UrlFiles):
            files.patience_s = 10
        files.write(name, PROBE)
        try:
            good = files.read(name) == PROBE
        finally:
            files.remove(name)
        good = good and files.read(name) is None
    except InputError as error:
        return [Finding(check, PROBLEM, str(error), remedy)]
    finally:
        if folder is not None and new:
            with suppress(OSError):
                folder.rmdir()
    if not good:
        return [Finding(check, PROBLEM, f"{where} loses what is written", remedy)]
    return [Finding(check, OK, f"{where} can be written, read and cleared")]
