"""Measuring a latency table: what a packed model runs, and nothing else.

A fake-quantized layer takes FP32 time and more, at any bits: to time it would be a lie. Measured is
the layer that a packed file becomes on this device, its input's quantization included (see
`adq.quant.serving`): packed kernels on GPUs; on CPUs integers by oneDNN where they are exact, else
floats. So on CPUs most widths take FP32 time, because they do.

    32/float   the layer in FP32
    16/float   the layer in FP16, on GPUs
    w/a        the packed layer; a float input where a is None

Times do not depend on the numbers in a weight, but on whether its levels have a common step. So
codes are random ones, and levels and thresholds are those that the scheme's quantizers start from.
"""

import copy
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adq.proxies.latency import Entry, LatencyTable, Shape, shape_of
from adq.quant.apply import INPUT_QUANTIZER
from adq.quant.baselines import activation_quantizer_for, weight_quantizer_for
from adq.quant.batches import evaluating, first_tensor, forward, to_device
from adq.quant.errors import InputError
from adq.quant.fold import fold_batchnorm_
from adq.quant.layers import LayerInfo
from adq.quant.packed import PackedInput, PackedWeight
from adq.quant.packing import pack
from adq.quant.rows import rows_of
from adq.quant.scheme import Scheme
from adq.quant.serving import serve
from adq.quant.spec import FP32_BITS

Width = tuple[int, int | None]
"""(weight bits, input bits); None for an input that keeps its precision."""

Runner = Callable[[nn.Module, list[Tensor], int, int | None], Callable[[], object]]
"""(layer, the inputs of each of its calls, weight bits, input bits) -> what to time: all the calls
of one forward pass."""

WARM_UP = 3
MIN_REPEATS = 5
FP16_BITS = 16


def measure(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    inputs: Any,
    bits: Sequence[int],
    act_bits: Sequence[int | None],
    device: torch.device,
    repeats: int = 30,
    *,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
    runner: Runner | None = None,
    clock: Callable[[], float] = time.perf_counter,
    calls: int | None = None,
) -> LatencyTable:
    """Times of each distinct layer shape of an FP32 model, at every pair of widths.

    `layers` are the model's, as traced; `inputs` one batch, whose size the table is for. FP32 (and
    FP16 on GPUs) is measured beside the pairs, and so is the whole FP32 model with its BatchNorms
    folded: what it takes beyond its layers is the table's `rest_seconds`. An entry is the median
    of `repeats` readings, each of `calls` passes in a row (1 on CPUs; 10 on GPUs, where launches
    overlap with work, as they do in a network) over calls · batch; see `median_stderr` for its
    error. All layers and widths take turns, in a new random order each round, so that drift and
    caches favour none. The clock's frequency before and after goes into the notes.

    The model is moved to `device`. Raises InputError for one that is quantized already, or fewer
    than 5 repeats.
    """
    if repeats < MIN_REPEATS:
        raise InputError(f"repeats: expected at least {MIN_REPEATS}, got {repeats}")
    gpu = device.type == "cuda"
    per_reading = calls or (10 if gpu else 1)
    inputs = to_device(inputs, device)
    batch = first_tensor(inputs).shape[0]
    model = model.to(device)
    shapes = _input_shapes(model, layers, inputs)
    widths: list[Width] = [(FP32_BITS, None), *([(FP16_BITS, None)] if gpu else [])]
    widths += [(w, a) for w in bits for a in act_bits]
    whole = copy.deepcopy(model).eval()
    fold_batchnorm_(whole)
    cases: dict[tuple[Shape, Width] | None, Callable[[], object]] = {
        None: partial(forward, whole, inputs)
    }
    generator = torch.Generator().manual_seed(0)
    before = clock_mhz(device)
    with evaluating(model), torch.no_grad():
        for layer in {shape_of(layer): layer for layer in reversed(layers)}.values():
            made = [torch.randn(s, generator=generator).to(device) for s in shapes[layer.name]]
            module = model.get_submodule(layer.name)
            for width in dict.fromkeys(widths):
                run = (runner or partial(served, scheme=scheme))(module, made, *width)
                cases[shape_of(layer), width] = run
        readings = _take_turns(cases, repeats, per_reading, clock, device)
    after = clock_mhz(device)
    share = per_reading * batch
    seconds = {case: statistics.median(found) / share for case, found in readings.items()}
    in_layers = math.fsum(seconds[shape_of(layer), (FP32_BITS, None)] for layer in layers)
    entries = tuple(
        Entry(*case[0], *case[1], seconds[case], median_stderr(found) / share)
        for case, found in readings.items()
        if case is not None
    )
    notes = _alike(model, layers)
    if before is not None and after is not None:
        notes.append(f"the clock ran at {before:.0f} MHz before and {after:.0f} MHz after")
    return LatencyTable(
        device=device_name(device),
        versions=_versions(gpu),
        threads=torch.get_num_threads(),
        batch=batch,
        repeats=repeats,
        entries=entries,
        notes=tuple(notes),
        rest_seconds=max(0.0, seconds[None] - in_layers),
    )


def _take_turns(
    cases: dict[tuple[Shape, Width] | None, Callable[[], object]],
    repeats: int,
    calls: int,
    clock: Callable[[], float],
    device: torch.device,
) -> dict[tuple[Shape, Width] | None, list[float]]:
    """`repeats` readings of each case, in seconds of `calls` passes, after a warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for run in cases.values():
        for _ in range(WARM_UP):
            run()
    readings: dict[tuple[Shape, Width] | None, list[float]] = {case: [] for case in cases}
    order, rng = list(cases), random.Random(0)
    for _ in range(repeats):
        rng.shuffle(order)
        for case in order:
            run = cases[case]
            wait()
            started = clock()
            for _ in range(calls):
                run()
            wait()
            readings[case].append(clock() - started)
    return readings


def median_stderr(values: Sequence[float]) -> float:
    """The standard error of the median, of any distribution: half the distance between the order
    statistics (n ± √n)/2, which hold the true median between them about two times in three (David
    and Nagaraja, Order Statistics, 7.1)."""
    ordered, n = sorted(values), len(values)
    low = math.floor((n - math.sqrt(n)) / 2)
    return (ordered[n - 1 - low] - ordered[low]) / 2


def served(
    layer: nn.Module,
    inputs: list[Tensor],
    weight_bits: int,
    act_bits: int | None,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
) -> Callable[[], object]:
    """What a packed model runs in this layer's place, see the head of this file."""
    if (weight_bits, act_bits) == (FP32_BITS, None):
        return lambda: [layer(x) for x in inputs]
    if (weight_bits, act_bits) == (FP16_BITS, None):
        half = copy.deepcopy(layer).half()
        halves = [x.half() for x in inputs]
        return lambda: [half(x) for x in halves]
    rows = rows_of(layer, scheme.group_size)
    numel = rows.count * rows.size
    codes = torch.randint(2**weight_bits, (numel,), generator=torch.Generator().manual_seed(0))
    weight = PackedWeight(
        pack(codes, weight_bits),
        weight_bits,
        _levels(weight_bits, scheme),
        torch.full((rows.count,), numel**-0.5),
    )
    quantizer = None
    if act_bits is not None:
        low, high = min(float(inputs[0].min()), 0.0), max(float(inputs[0].max()), 0.0)
        step = max(high - low, 1e-6) / (2**act_bits - 1)
        start = activation_quantizer_for(act_bits, step, round(-low / step), scheme)
        parts = (start.thresholds, start.output_scale, start.zero_point)
        quantizer = PackedInput(*(part.detach().contiguous() for part in parts))
    run = serve(layer, weight, quantizer, inputs[0].device)
    return lambda: [run(x) for x in inputs]


@lru_cache
def _levels(bits: int, scheme: Scheme) -> Tensor:
    """The levels that a weight of normal numbers starts from."""
    sample = nn.Linear(1024, 4)
    nn.init.normal_(sample.weight, generator=torch.Generator().manual_seed(0))
    return weight_quantizer_for(sample.weight, rows_of(sample), bits, scheme).levels.float()


def _input_shapes(
    model: nn.Module, layers: Sequence[LayerInfo], inputs: Any
) -> dict[str, list[torch.Size]]:
    """The shape of a layer's input at each of its calls in one forward pass."""
    found: dict[str, list[torch.Size]] = {layer.name: [] for layer in layers}
    hooks = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        if parametrize.is_parametrized(module) or hasattr(module, INPUT_QUANTIZER):
            raise InputError(
                f"layer {layer.name!r} is quantized: give the FP32 model, since a fake-quantized "
                "layer's time is not a low-bit kernel's"
            )
        calls = found[layer.name]
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, calls=calls: calls.append(args[0].shape)
            )
        )
    try:
        with evaluating(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if missed := [name for name, calls in found.items() if not calls]:
        raise InputError(f"layer {missed[0]!r} does not run in a forward pass of this model")
    return found


def _alike(model: nn.Module, layers: Sequence[LayerInfo]) -> list[str]:
    """A note for each layer whose shape an earlier one has, with another stride or dilation."""
    first: dict[Shape, tuple[str, list[Any]]] = {}
    notes = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        own = [getattr(module, k, None) for k in ("stride", "padding", "dilation", "groups")]
        name, settings = first.setdefault(shape_of(layer), (layer.name, own))
        if settings != own:
            notes.append(
                f"layer {layer.name!r} has the time of {name!r}: same shape and MACs, other "
                "stride, padding or dilation"
            )
    return notes


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clock_mhz(device: torch.device) -> float | None:
    """The clock's frequency now, over all cores of a processor; None where nothing tells it."""
    if device.type == "cuda":
        try:
            return float(torch.cuda.clock_rate(device))
        except (ImportError, RuntimeError):  # the package that asks the driver is not there
            return None
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [float(x.partition(":")[2]) for x in lines if x.startswith("cpu MHz")]
    return statistics.median(found) if found else None


def _versions(gpu: bool) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    if gpu:
        found["cuda"] = str(torch.version.cuda)
    else:
        found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return found
