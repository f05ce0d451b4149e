"""Training steps of ResNet-20 on a CPU, side by side.

Every contender is a `_Run` of `adq.quant.qat`, the object behind `train_`, and a step is its
`_train_on`: what is timed is what users run. A round is one step of each contender, in an order
that moves on by one from round to round, so that a neighbour's load meets all of them alike;
ratios are taken inside a round.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from grounds.resnet20 import ResNet20
from plain_lsq import quantize_plainly_
from torch import nn
from torch.nn import functional as F

from adq.quant.apply import quantize_
from adq.quant.batches import Batch, device_of, threads, to_device
from adq.quant.calibrate import input_ranges
from adq.quant.layers import trace_layers
from adq.quant.qat import TrainingConfig, _Run
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

BATCH, SIDE, BITS, ENDS_BITS = 128, 32, 4, 8
ROUNDS, WARMUP = 15, 3
BATCHES = 4
CONFIG = TrainingConfig(epochs=1, lr=1e-3, warmup=0.0)

CONTENDERS = {
    "fp32": "FP32",
    "adq": "ADQ",
    "adq_distilled": "ADQ with distillation",
    "plain_lsq": "LSQ written plainly",
    "our_lsq": "LSQ of this package",
}
RATIOS = {
    "cpu_qat_over_fp32_step": ("adq", "fp32"),
    "cpu_qat_distilled_over_fp32_step": ("adq_distilled", "fp32"),
    "cpu_plain_lsq_over_fp32_step": ("plain_lsq", "fp32"),
    "cpu_our_lsq_over_fp32_step": ("our_lsq", "fp32"),
    "cpu_adq_over_plain_lsq_step": ("adq", "plain_lsq"),
}

Step = Callable[[], None]


def synthetic_batches(batch: int, side: int, classes: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, 3, side, side, generator=generator),
            torch.randint(classes, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def bit_vector(model: nn.Module, example: torch.Tensor, bits: int, ends: int) -> BitVector:
    """`bits` everywhere but `ends` in the first and the last layer; the images stay as they are."""
    names = [layer.name for layer in trace_layers(model, example)]
    weight = {name: ends if name in (names[0], names[-1]) else bits for name in names}
    return BitVector(weight, {name: weight[name] for name in names[1:]})


def step_of(
    model: nn.Module,
    batches: list[Batch],
    config: TrainingConfig,
    teacher: nn.Module | None = None,
) -> Step:
    """One training step after another, as `train_` makes them while codebooks adapt."""
    run = _Run(model.train(), batches, F.cross_entropy, config, 0, teacher, None)
    run.total = 1_000_000  # far from the end, where codebooks would stay still

    def step() -> None:
        run._train_on(to_device(batches[run.step % len(batches)], device_of(model)))

    return step


def contenders() -> dict[str, Step]:
    torch.manual_seed(0)
    batches = synthetic_batches(BATCH, SIDE, 10, BATCHES)
    model = ResNet20()
    images = batches[0][0]
    bits = bit_vector(model, images[:2], BITS, ENDS_BITS)
    ranges = input_ranges(model, {name: (b,) for name, b in bits.act.items()}, batches)

    def quantized(scheme: Scheme) -> nn.Module:
        return quantize_(copy.deepcopy(model), bits, ranges, scheme)

    plain = quantize_plainly_(copy.deepcopy(model), bits.weight, bits.act, images)
    return {
        "fp32": step_of(copy.deepcopy(model), batches, CONFIG),
        "adq": step_of(quantized(Scheme()), batches, CONFIG),
        "adq_distilled": step_of(quantized(Scheme()), batches, CONFIG, copy.deepcopy(model)),
        "plain_lsq": step_of(plain, batches, CONFIG),
        "our_lsq": step_of(quantized(Scheme("lsq", "lsq")), batches, CONFIG),
    }


def interleaved(steps: dict[str, Step], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each contender's step, one number a round after `warmup` rounds."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Raw seconds by number of threads: all that torch takes by itself, and one."""
    found: dict[str, Any] = {}
    for count in sorted({torch.get_num_threads(), 1}, reverse=True):
        with threads(count):
            found[str(count)] = interleaved(contenders(), rounds, WARMUP)
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> tuple[float, float, float]:
    """Quartiles of the ratio of two contenders' steps in one round."""
    pairs = zip(seconds[above], seconds[below], strict=True)
    return quartiles([a / b for a, b in pairs])
