"""What a search needs of its surroundings: each thing looked at, and what to do where it is amiss.

Every check runs in a process of its own that is ended when its time is over, so that a driver or a
network file system that hangs, and an address where nobody answers, hold up nothing else.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adq.quant.errors import InputError

OK, WARNING, PROBLEM = "ok", "warning", "problem"
NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph",
    "glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs",
)  # fmt: skip
LITTLE_SPACE, TOO_LITTLE_SPACE = 2 * 2**30, 100 * 2**20  # bytes
SHARED_MEMORY = 2**30  # bytes; below, Ray's object store goes to the disk
SLOW_STORAGE_S = 1.0
CHECK_S, CLUSTER_S = 60.0, 120.0
PROBE = b"adq-search doctor\n"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """`state` is ok, warning or problem; `remedy` says what to do unless all is well."""

    check: str
    state: str
    text: str
    remedy: str = ""


def examine(
    out: str,
    storage: str | None = None,
    checkpoints: str | None = None,
    address: str | None = None,
    seconds: float | None = None,
) -> list[Finding]:
    """All findings on this machine, the named places and the cluster, in the order of CHECKS.

    `seconds` is the most that a check may take; CHECK_S, and CLUSTER_S of the cluster, if not
    given. Never raises for what it finds.
    """
    values = {
        "out": str(Path(out).absolute()),
        "storage": storage,
        "checkpoints": checkpoints,
        "address": address,
    }
    here = [name for name in CHECKS if name != "cluster"]
    with ThreadPoolExecutor(len(here)) as pool:
        found = [*pool.map(lambda name: _apart(name, values, seconds or CHECK_S), here)]
    found.append(_apart("cluster", values, seconds or CLUSTER_S))
    return [finding for each in found for finding in each]


def _apart(name: str, values: Values, seconds: float) -> list[Finding]:
    """The findings of one check, made in another process."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "adq.search.doctor", name, json.dumps(values)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead server stays
            process.communicate(timeout=1)
        return [Finding(name, PROBLEM, f"no answer within {seconds:.0f} s", _HANGS[name])]
    try:
        return [Finding(**found) for found in json.loads(printed.splitlines()[-1])]
    except (IndexError, TypeError, ValueError):
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1] if lines else f"it ended with exit code {process.returncode}"
        return [
            Finding(
                name,
                PROBLEM,
                f"the check could not be made: {last[:200]}",
                "install adq-search and its packages again if this is about an import",
            )
        ]


def _versions(values: Values) -> list[Finding]:
    found = [Finding("python", OK, platform.python_version())]
    missing = []
    for name in ("torch", "optuna", "ray", "sqlalchemy", "triton"):
        try:
            found.append(Finding(name, OK, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            if name != "triton":
                missing.append(name)
            elif platform.system() == "Linux":
                found.append(
                    Finding(
                        "triton",
                        WARNING,
                        "not installed",
                        "needed on GPUs only; PyTorch's CUDA builds bring it",
                    )
                )
    found += [
        Finding(name, PROBLEM, "not installed", f"pip install {name}, or adq-search again")
        for name in missing
    ]
    return found


def _processors(values: Values) -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    found = [Finding("CPUs", OK, f"{usable} for this process")]
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        found[0] = Finding(
            "CPUs",
            WARNING,
            f"{usable} seen, and a container's limit of {quota:g}",
            f"set --cpus-per-trial so that workers do not have more than {max(1, int(quota))}",
        )
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "PASSIVE":
        found.append(Finding("OpenMP", OK, "idle threads sleep (OMP_WAIT_POLICY=PASSIVE)"))
    else:
        found.append(
            Finding(
                "OpenMP",
                WARNING,
                f"OMP_WAIT_POLICY={policy or '(not set)'}: idle threads spin, which makes several "
                "workers on one machine up to ten times slower",
                "set OMP_WAIT_POLICY=PASSIVE before Python starts",
            )
        )
    with suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").total
        if shared < SHARED_MEMORY:
            found.append(
                Finding(
                    "shared memory",
                    WARNING,
                    f"/dev/shm has {_size(shared)}: Ray keeps its objects on the disk, which is "
                    "slow",
                    "start the container with more (docker run --shm-size=4g)",
                )
            )
    return found


def _cpu_quota() -> float | None:
    """CPUs that the control group grants, None where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _gpus(values: Values) -> list[Finding]:
    import torch

    built = f"PyTorch {torch.__version__}"
    built += f" for CUDA {torch.version.cuda}" if torch.version.cuda else " without CUDA"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
            return [Finding("GPUs", OK, f"none; {built} computes on the CPUs")]
        why = " ".join(str(said[0].message).split())[:200] if said else "no device is seen"
        remedy = "check 'nvidia-smi' and CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None:
            remedy = "install PyTorch with CUDA, see pytorch.org"
        elif "driver" in why:
            remedy = "update the NVIDIA driver, or install PyTorch for an older CUDA"
        return [Finding("GPUs", PROBLEM, f"{built} cannot use this machine's GPU: {why}", remedy)]
    return [_gpu(index, built) for index in range(torch.cuda.device_count())]


def _gpu(index: int, built: str) -> Finding:
    """One GPU, by a kernel of ours that is compiled and compared with the CPU."""
    import torch

    from adq.quant.kernels.n2uq_ops import fake_quantize

    check = f"GPU {index}"
    try:
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        x = torch.linspace(-1, 2, 1001)
        parameters = torch.zeros(1), torch.full((3,), 0.3), torch.ones(1), torch.zeros(1)
        wanted = fake_quantize(x, *parameters)
        device = torch.device("cuda", index)
        with torch.cuda.device(index):
            got = fake_quantize(x.to(device), *(p.to(device) for p in parameters)).cpu()
    except Exception as error:  # noqa: BLE001 (Triton, its C compiler and CUDA each have their own)
        return Finding(
            check,
            PROBLEM,
            f"{built}: a Triton kernel does not run: {_line(error)}",
            "install the triton that PyTorch asks for, and a C compiler (Debian: apt-get install "
            "gcc)",
        )
    text = f"{name}, {_size(free)} of {_size(total)} free, {built}, Triton's kernels run"
    if not torch.allclose(got, wanted, atol=1e-5):
        return Finding(
            check, PROBLEM, f"{name} computes other numbers than the CPU", "test the hardware"
        )
    if free < total / 2:
        return Finding(check, WARNING, text, "see with nvidia-smi who else uses it")
    return Finding(check, OK, text)


def _folder(values: Values) -> list[Finding]:
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
    found = [Finding(check, OK, f"{path} can be written, {_size(free)} free ({kind})")]
    if free < LITTLE_SPACE:
        state = PROBLEM if free < TOO_LITTLE_SPACE else WARNING
        found[0] = Finding(check, state, f"{path}: {_size(free)} free", "make room on this disk")
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


def _storage(values: Values) -> list[Finding]:
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


def _checkpoints(values: Values) -> list[Finding]:
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


def _cluster(values: Values) -> list[Finding]:
    if values["address"] is None:
        return []
    from adq.search.executors.cluster import examine_cluster

    return [
        Finding("Ray", *found)
        for found in examine_cluster(values["address"], values["out"], values["checkpoints"])
    ]


def _size(size_bytes: float) -> str:
    return (
        f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


CHECKS: dict[str, Callable[[Values], list[Finding]]] = {
    "versions": _versions,
    "processors": _processors,
    "GPUs": _gpus,
    "out folder": _folder,
    "storage": _storage,
    "checkpoints": _checkpoints,
    "cluster": _cluster,
}
_HANGS = {
    "versions": "see what the machine is busy with",
    "processors": "see what the machine is busy with",
    "GPUs": "'nvidia-smi' may hang too: restart the driver or the machine",
    "out folder": "its file server may be gone: see with 'df', or choose another --out",
    "storage": "the server, or the network to it, may be gone; see that the port is let through",
    "checkpoints": "the server, or the network to it, may be gone",
    "cluster": "its head may be gone or overloaded: see 'ray status' there",
}


def main(name: str, values: str) -> None:
    """One check, its findings as the last line of stdout."""
    try:
        found = CHECKS[name](json.loads(values))
    except Exception as error:  # noqa: BLE001 (a check that fails is a finding)
        found = [
            Finding(
                name,
                PROBLEM,
                f"the check could not be made: {_line(error)}",
                "install adq-search and its packages again if this is about an import",
            )
        ]
    print(f"\n{json.dumps([asdict(each) for each in found])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
