"""What the doctor looks at on this machine: versions, CPUs, GPUs."""

import importlib.metadata
import os
import platform
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from adq.search.finding import OK, PROBLEM, WARNING, Finding, Values, error_text, size_text

SHARED_MEMORY = 2**30  # bytes; below, Ray's object store goes to the disk


def check_versions(values: Values) -> list[Finding]:
    """Python and the packages that a search uses."""
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


def check_processors(values: Values) -> list[Finding]:
    """CPUs, how idle threads wait for work, and memory that processes share."""
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
                    f"/dev/shm has {size_text(shared)}: Ray keeps its objects on the disk, which "
                    "is slow",
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


def check_gpus(values: Values) -> list[Finding]:
    """Whether PyTorch sees the GPUs that there are, and our kernels run on each."""
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
            f"{built}: a Triton kernel does not run: {error_text(error)}",
            "install the triton that PyTorch asks for, and a C compiler (Debian: apt-get install "
            "gcc)",
        )
    text = f"{name}, {size_text(free)} of {size_text(total)} free, {built}, Triton's kernels run"
    if not torch.allclose(got, wanted, atol=1e-5):
        return Finding(
            check, PROBLEM, f"{name} computes other numbers than the CPU", "test the hardware"
        )
    if free < total / 2:
        return Finding(check, WARNING, text, "see with nvidia-smi who else uses it")
    return Finding(check, OK, text)
