"""Per-layer Hessian traces on one batch: PyHessian beside the package's estimators.

A contender has a fixed cost (graphs, a sketch), a cost a probe, and for each layer the standard
deviation σ of one probe. Its standard error after m probes is σ/√m, so that to bring a layer's
error to a given share of its trace it needs m = (σ / (share · trace))² probes.

Seconds are the processor's (time.process_time), on one thread: they are those of the clock on an
idle machine, and hardly change with the load.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyhessian import hessian
from torch import nn
from torch.nn import functional as F

from adq.proxies.base import Subject, layer_errors
from adq.proxies.gradient import Gradients
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Part, Work
from adq.quant.batches import Batch
from adq.quant.layers import trace_layers

Array = npt.NDArray[np.float64]

TARGET = 0.1
FEWEST = 4
"""Probes, at the least: of fewer the spread is not known (a block of HessianTrace has 4)."""
RANKS = (0, 8, 16, 32)
DEFAULT = f"rank_{HessianTrace().rank}"
PYHESSIAN, GAUSS_NEWTON = "pyhessian", "gauss_newton"
TITLES = {
    PYHESSIAN: "PyHessian, a run a layer",
    **{f"rank_{rank}": f"HessianTrace, rank {rank}" for rank in RANKS},
    GAUSS_NEWTON: "gauss-newton-trace",
}
TITLES["rank_0"] += " (Hutchinson)"
TITLES[DEFAULT] += " (default)"


@dataclass(frozen=True)
class Sample:
    """What one round of a contender found. `fixed` and `each` are seconds, one number for all
    layers together or one a layer; `variance` is that of a single probe."""

    fixed: list[float]
    each: list[float]
    trace: list[float]
    variance: list[float]
    probes: int


Contender = Callable[[int, int], Sample]
"""(seed, probes) -> what it found."""


def subject_of(model: nn.Module, batch: Batch, bits: tuple[int, ...] = (4,)) -> Subject:
    return Subject(model, trace_layers(model, batch[0][:2]), bits, [batch], F.cross_entropy)


def contenders(subject: Subject) -> dict[str, Contender]:
    found: dict[str, Contender] = {PYHESSIAN: lambda seed, m: by_pyhessian(subject, seed, m)}
    for rank in RANKS:
        found[f"rank_{rank}"] = lambda seed, m, rank=rank: by_hessian_trace(subject, rank, seed, m)
    found[GAUSS_NEWTON] = lambda seed, m: by_gauss_newton(subject, seed, m)
    return found


def measure(subject: Subject, rounds: int, probes: int) -> dict[str, list[Sample]]:
    """One sample of each contender a round, in an order that moves on from round to round."""
    runs = contenders(subject)
    names = list(runs)
    found: dict[str, list[Sample]] = {name: [] for name in names}
    by_gauss_newton(subject, 0, 2)  # warm up
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            found[name].append(runs[name](number, probes))
            print(f"round {number}: {name}, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def by_pyhessian(subject: Subject, seed: int, probes: int) -> Sample:
    """`hessian(...).trace` for each layer, with its weight alone requiring a gradient."""
    model, data = subject.model, subject.batches[0]
    required = [p.requires_grad for p in model.parameters()]
    sample = Sample([], [], [], [], probes)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference cycle, which is broken below
        torch.manual_seed(seed)
        model.requires_grad_(False)
        for name in subject.names:
            weight = model.get_parameter(f"{name}.weight").requires_grad_()
            began = time.process_time()
            run = hessian(model, subject.loss, data=data, cuda=False)
            built = time.process_time()
            values = run.trace(maxIter=probes, tol=0)
            ended = time.process_time()
            assert len(values) == probes
            weight.requires_grad_(False).grad = None
            del run
            gc.collect()
            sample.fixed.append(built - began)
            sample.each.append((ended - built) / probes)
            sample.trace.append(float(np.mean(values)))
            sample.variance.append(float(np.var(values, ddof=1)))
    for parameter, before in zip(model.parameters(), required, strict=True):
        parameter.requires_grad_(before)
    return sample


class TimedWork(Work):
    """Keeps the seconds of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def parts(self, model: nn.Module, count: int, compute: Part, first: int = 0) -> Iterator[Array]:
        def timed(model: nn.Module, part: int) -> Array:
            began = time.process_time()
            result = compute(model, part)
            self.seconds.append(time.process_time() - began)
            return result

        return super().parts(model, count, timed, first)


def by_hessian_trace(subject: Subject, rank: int, seed: int, probes: int) -> Sample:
    """The first block of probes makes the sketch as well: what it takes longer is the sketch's."""
    proxy = HessianTrace(rank=rank, probes=probes, target=0)
    work = TimedWork()
    found = proxy.trace(_seeded(subject, seed), work)
    block = fmean(work.seconds[1:] if rank else work.seconds)
    fixed = work.seconds[0] - block if rank else 0.0
    variance = found.stderr**2 * found.probes
    return Sample(
        [fixed], [block / proxy.block], found.trace.tolist(), variance.tolist(), found.probes
    )


def by_gauss_newton(subject: Subject, seed: int, probes: int) -> Sample:
    """The batch several times over, each time with signs of its own: the spread is theirs alone."""
    again = Subject(
        subject.model,
        subject.layers,
        subject.bits[:1],
        list(subject.batches) * probes,
        subject.loss,
        seed=seed,
    )
    began = time.process_time()
    (found,) = Gradients(("gauss-newton-trace",)).measure(again, Work())
    seconds = time.process_time() - began
    errors = layer_errors(subject.model, subject.names, subject.bits[:1], subject.scheme)
    powers = np.array([error.double().square().mean().item() for error in errors])
    trace, stderr = (2 * part[:, 0] / powers for part in (found.weight.score, found.weight.stderr))
    variance = stderr**2 * probes
    return Sample([0.0], [seconds / probes], trace.tolist(), variance.tolist(), probes)


def _seeded(subject: Subject, seed: int) -> Subject:
    return Subject(
        subject.model, subject.layers, subject.bits, subject.batches, subject.loss, seed=seed
    )


def evaluate(samples: dict[str, list[Sample]]) -> dict[str, dict[str, Any]]:
    """For each contender what it costs, how far its probes spread, and seconds to TARGET.

    The traces that errors are measured by are the same for all: the mean of what the contenders
    for the Hessian found, weighted by their variances. `seconds` brings every layer to TARGET;
    PyHessian may stop each layer's run by itself there (`seconds`), or take one number of probes
    for all layers, as with its `maxIter` (`seconds_same_probes`). `by_layer[l]` brings layer l to
    TARGET, with that layer's number of probes for all.
    """
    means = {name: _mean(found) for name, found in samples.items()}
    exact = [one for name, one in means.items() if name != GAUSS_NEWTON]
    weights = np.stack([1 / one["stderr"] ** 2 for one in exact])
    truth = (weights * np.stack([one["trace"] for one in exact])).sum(axis=0) / weights.sum(axis=0)
    for one in means.values():
        needed = np.maximum(one["variance"] / (TARGET * truth) ** 2, FEWEST)
        fixed, each = one["fixed"].sum(), one["each"].sum()
        one |= {"needed": needed, "most": needed.max(), "worst": int(needed.argmax())}
        one["by_layer"] = fixed + needed * each
        one["seconds_same_probes"] = fixed + needed.max() * each
        one["seconds"] = fixed + (needed * one["each"]).sum()
        if len(one["each"]) == 1:
            one["seconds"] = one["seconds_same_probes"]
    return means


def _mean(found: list[Sample]) -> dict[str, Any]:
    fields = ("fixed", "each", "trace", "variance")
    one: dict[str, Any] = {f: np.mean([getattr(s, f) for s in found], axis=0) for f in fields}
    one["probes"] = sum(s.probes for s in found)
    one["stderr"] = np.sqrt(one["variance"] / one["probes"])
    return one


def largest_z(one: dict[str, Any], other: dict[str, Any]) -> float:
    errors = np.hypot(one["stderr"], other["stderr"])
    return float((abs(one["trace"] - other["trace"]) / errors).max())


def geometric_mean(values: Array) -> float:
    return float(np.exp(np.log(values).mean()))
