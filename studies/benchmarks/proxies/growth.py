"""How the time of a measurement grows with layers, bit-widths and batch size.

The networks are plain stacks of 3x3 convolutions of equal width with BatchNorm and ReLU. Where one
thing changes, the others are those of `BASE`.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from adq.proxies.base import Proxy, Subject
from adq.proxies.direct import Direct
from adq.proxies.gradient import Gradients
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.layers import trace_layers

WIDTH, SIDE, CLASSES = 16, 12, 10


@dataclass(frozen=True)
class Case:
    """`bits` counts bit-widths."""

    layers: int = 10
    bits: int = 2
    batch: int = 64

    @property
    def key(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


BASE = Case()
GROWTH = {"layers": (5, 10, 20, 40), "bits": (1, 2, 5), "batch": (16, 64, 256)}
WIDTHS = (4, 2, 3, 6, 8)
PROXIES: dict[str, Callable[[], Proxy]] = {
    "hessian": lambda: HessianTrace(probes=8, target=0),
    "gradients": lambda: Gradients(("gauss-newton", "fisher")),
    "direct": lambda: Direct("loss"),
}
TITLES = {
    "hessian": "HessianTrace, 8 probes",
    "gradients": "Gradients, gauss-newton and fisher",
    "direct": "Direct, loss",
}


def cases() -> list[Case]:
    found = [_varied(name, value) for name, values in GROWTH.items() for value in values]
    return list(dict.fromkeys(found))


def network(layers: int) -> nn.Sequential:
    """`layers` convolutions, the last one giving the classes."""
    modules: list[nn.Module] = []
    for number in range(layers):
        last = number + 1 == layers
        conv = nn.Conv2d(WIDTH if number else 3, CLASSES if last else WIDTH, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # values keep their size
        modules += [conv] if last else [conv, nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def subject_of(case: Case) -> Subject:
    """Two batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network(case.layers)
        batches = [
            (torch.randn(case.batch, 3, SIDE, SIDE), torch.randint(CLASSES, (case.batch,)))
            for _ in range(2)
        ]
    layers = trace_layers(model, batches[0][0][:2])
    bits = tuple(sorted(WIDTHS[: case.bits]))
    return Subject(model, layers, bits, batches, F.cross_entropy)


def measure(rounds: int, which: list[Case]) -> dict[str, dict[str, list[float]]]:
    """Seconds of the processor by proxy and case, one number a round."""
    found: dict[str, dict[str, list[float]]] = {
        name: {case.key: [] for case in which} for name in PROXIES
    }
    for make in PROXIES.values():
        make().measure(subject_of(Case(layers=3, batch=4)), Work())  # warm up
    for number in range(rounds):
        for case in which[number % len(which) :] + which[: number % len(which)]:
            subject = subject_of(case)
            for name, make in PROXIES.items():
                began = time.process_time()
                make().measure(subject, Work())
                found[name][case.key].append(time.process_time() - began)
        print(f"growth, round {number}", flush=True)
    return found


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """The median over rounds of each case's seconds over those of the smallest, `name` varying."""
    rows = [seconds[_varied(name, value).key] for value in GROWTH[name]]
    return [statistics.median(a / b for a, b in zip(row, rows[0], strict=True)) for row in rows]


def smallest(seconds: dict[str, list[float]], name: str) -> float:
    """The median over rounds of the smallest case's seconds."""
    return statistics.median(seconds[_varied(name, GROWTH[name][0]).key])


def _varied(name: str, value: int) -> Case:
    return replace(BASE, **{name: value})
