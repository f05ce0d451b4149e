"""A measurement in parts: spread over devices, kept as soon as they are there, taken up again.

A part is what one device computes on its own: a block of probes, a batch of data. It gives an
array of plain numbers that depends on the part's number alone, so that results do not depend on
how many devices there are, nor on where a measurement was interrupted.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[np.float64]
Part = Callable[[nn.Module, int], Array]
"""(model on the device that is to compute, number of the part) -> its result."""


class Work:
    """Runs parts of one measurement.

    `kept` is a file of one JSON line a part; parts found there are not computed again. Without it
    nothing is kept. Several devices compute side by side, each on a copy of the model.
    """

    def __init__(self, kept: Path | None = None, devices: Sequence[torch.device] = ()) -> None:
        self.kept, self.devices = kept, tuple(devices)
        self._known = {} if kept is None else _read(kept)
        self._lock = Lock()

    def parts(self, model: nn.Module, count: int, compute: Part, first: int = 0) -> Iterator[Array]:
        """The results of `count` parts, in order; their numbers start at `first`.

        Whoever stops iterating early stops the work: on several devices a few parts more may have
        been computed by then.
        """
        numbers = range(first, first + count)
        if len(self.devices) < 2:
            for device in self.devices:
                model = copy.deepcopy(model).to(device)
            for part in numbers:
                yield (
                    self._known[part]
                    if part in self._known
                    else self._keep(part, compute(model, part))
                )
            return
        replicas: SimpleQueue[nn.Module] = SimpleQueue()
        for device in self.devices:
            replicas.put(copy.deepcopy(model).to(device))

        def run(part: int) -> None:
            replica = replicas.get()
            try:
                self._keep(part, compute(replica, part))
            finally:
                replicas.put(replica)

        pool = ThreadPoolExecutor(len(self.devices))
        try:
            futures: dict[int, Future[None]] = {}
            for part in numbers:
                for other in range(part, min(numbers.stop, part + len(self.devices))):
                    if other not in self._known and other not in futures:
                        futures[other] = pool.submit(run, other)
                if part in futures:
                    futures.pop(part).result()
                yield self._known[part]
        finally:
            pool.shutdown(cancel_futures=True)

    def _keep(self, part: int, result: Array) -> Array:
        with self._lock:
            self._known[part] = result
            if self.kept is not None:
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                with self.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"part": part, "result": result.tolist()}) + "\n")
        return result


def _read(path: Path) -> dict[int, Array]:
    """The parts in a file; a last line that a killed process left unfinished is cut off."""
    if not path.exists():
        return {}
    found = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                found[entry["part"]] = np.array(entry["result"], dtype=np.float64)
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
    with path.open("r+b") as file:
        file.truncate(whole)
    return found
