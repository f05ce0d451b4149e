"""What a study sends to its workers: once into Ray's object store, opened once per process."""

import copy
import os
import socket
import sys
from dataclasses import dataclass, replace

import ray
import torch
from ray import cloudpickle

from adq.quant.errors import InputError
from adq.search.executors.served import serve
from adq.search.files import Files
from adq.search.jobs import Bench
from adq.search.problem import pick_device
from adq.search.task import one_line


@dataclass(frozen=True)
class Parcel:
    """A bench on its way.

    content      the pickled bench without its files, in the object store
    size_bytes   of the content
    files, checkpoints   how a worker reaches them
    folder, path         the driver's working folder and where it looks for modules
    ranks        processes that train a candidate together
    cpus, gpus   of each of them
    """

    content: "ray.ObjectRef[bytes]"
    size_bytes: int
    files: Files
    checkpoints: Files
    folder: str
    path: tuple[str, ...]
    ranks: int
    cpus: int
    gpus: float


def pack(bench: Bench, ranks: int, cpus: int, gpus: float) -> Parcel:
    """Put the bench into the object store, its models on the CPU: not all workers have a GPU.

    Raises InputError for a task that cannot be pickled.
    """
    problem = replace(
        bench.problem,
        device=torch.device("cpu"),
        initial_model=copy.deepcopy(bench.problem.initial_model).cpu(),
    )
    # in plain pickled bytes: Ray would give workers arrays that cannot be written to
    try:
        content = cloudpickle.dumps((problem, copy.deepcopy(bench.fp32).cpu(), bench.ranges))
    except Exception as error:  # noqa: BLE001 (whatever a user's objects raise)
        raise InputError(
            f"task {problem.config.task!r} cannot be sent to workers ({one_line(error)}): open "
            "files, locks and connections where they are used, not when the task is made"
        ) from None
    files, checkpoints = serve(bench.files, bench.checkpoints)
    return Parcel(
        content=ray.put(content),
        size_bytes=len(content),
        files=files,
        checkpoints=checkpoints,
        folder=os.getcwd(),
        path=tuple(sys.path),
        ranks=ranks,
        cpus=cpus,
        gpus=gpus,
    )


_opened: tuple[str, Bench] | None = None


def unpack(parcel: Parcel) -> Bench:
    """The bench, on this worker's device; kept for the next training in this process.

    Raises InputError for a task that this worker cannot load.
    """
    global _opened
    key = parcel.content.hex()
    if _opened is not None and _opened[0] == key:
        return _opened[1]
    _opened = None  # two of them may not fit
    if os.path.isdir(parcel.folder):
        os.chdir(parcel.folder)  # a task may name its data relative to where it was started
    for place in parcel.path:  # modules that lie beside the driver's
        if place not in sys.path and os.path.exists(place):
            sys.path.append(place)
    content = ray.get(parcel.content)
    try:
        problem, fp32, ranges = cloudpickle.loads(content)
    except Exception as error:  # noqa: BLE001 (whatever a user's module raises)
        raise InputError(
            f"a worker on {socket.gethostname()} cannot load the task ({one_line(error)}): send it "
            "along with 'adq-search submit', or install its module on every node"
        ) from None
    device = _device(problem.config.device, parcel.gpus)
    problem = replace(problem, device=device, initial_model=problem.initial_model.to(device))
    bench = Bench(problem, fp32.to(device), ranges, parcel.files, parcel.checkpoints)
    _opened = key, bench
    return bench


def _device(name: str, gpus: float) -> torch.device:
    """The worker's: Ray shows it no other GPUs than its own, and they count from 0."""
    if gpus == 0:
        return torch.device("cpu")
    return pick_device("cuda" if name.startswith("cuda") else name)
