"""Measuring a latency table: what really runs, and nothing else.

A fake-quantized layer takes FP32 time and more, at any bits: to time it would be a lie. Measured
is what a runner has a kernel for; the rest is left out and said in the table's notes, so that a
lookup there raises. `torch_runner` knows what torch itself runs:

    32/float   the layer in FP32
    16/float   the layer in FP16, on GPUs
    8/8        signed weights and unsigned inputs on uniform integers. CPU: oneDNN's kernels for
               Linear and convolutions in one and two dimensions. GPU: Linear, as an integer
               matrix product and the scaling of its result. The input comes quantized, as the
               layer before would leave it; the output is FP32.

Levels of a codebook are not uniform integers: for them the 8/8 time stands for a kernel that
rounds the levels to 8 bits.
"""

import copy
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adq.proxies.latency import Entry, LatencyTable, Shape, shape_of
from adq.quant.batches import evaluating, first_tensor, forward, to_device
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.spec import FP32_BITS

Width = tuple[int, int | None]
"""(weight bits, input bits); None for an input that keeps its precision."""

Runner = Callable[[nn.Module, list[Tensor], int, int | None], Callable[[], object]]
"""(layer, the inputs of each of its calls, weight bits, input bits) -> what to time: all the calls
of one forward pass. Raises NoKernelError where it has nothing that really runs at these bits."""

WARM_UP = 3
MIN_REPEATS = 5
FP16_BITS = 16
X86 = ("x86_64", "AMD64")


class NoKernelError(Exception):
    """Nothing runs a layer at these bits; the message says why."""


def measure(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    inputs: Any,
    bits: Sequence[int],
    act_bits: Sequence[int | None],
    device: torch.device,
    repeats: int = 30,
    *,
    runner: Runner | None = None,
    clock: Callable[[], float] = time.perf_counter,
    calls: int | None = None,
) -> LatencyTable:
    """Times of each distinct layer shape of an FP32 model, at every pair of widths with a kernel.

    `layers` are the model's, as traced; `inputs` one batch, whose size the table is for. FP32 (and
    FP16 on GPUs) is measured beside the pairs. An entry is the median of `repeats` readings, each
    of `calls` passes in a row (1 on CPUs; 10 on GPUs, where launches overlap with work, as they do
    in a network) over calls · batch; see `median_stderr` for its error. All layers and widths take
    turns, in a new random order each round, so that drift and caches favour none.

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
    cases: dict[tuple[Shape, Width], Callable[[], object]] = {}
    notes = _alike(model, layers)
    missing: dict[tuple[Width, str], list[str]] = {}  # (width, reason) -> kinds of layers
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), torch.no_grad():
        for layer in {shape_of(layer): layer for layer in reversed(layers)}.values():
            made = [torch.randn(s, generator=generator).to(device) for s in shapes[layer.name]]
            module = model.get_submodule(layer.name)
            for width in dict.fromkeys(widths):
                try:
                    cases[shape_of(layer), width] = (runner or torch_runner)(module, made, *width)
                except NoKernelError as error:
                    kinds = missing.setdefault((width, str(error)), [])
                    kinds += [layer.kind] if layer.kind not in kinds else []
        readings = _take_turns(cases, repeats, per_reading, clock, device)
    left_out: dict[tuple[str, str], list[str]] = {}  # (kinds, reason) -> widths
    for ((w, a), why), kinds in missing.items():
        names = left_out.setdefault((", ".join(kinds), why), [])
        names.append(f"{w}/{'float' if a is None else a}")
    for (of_kinds, why), names in left_out.items():
        notes.append(f"{', '.join(names)} bits, {of_kinds}: not measured, {why}")
    share = per_reading * batch
    entries = tuple(
        Entry(*shape, *width, statistics.median(found) / share, median_stderr(found) / share)
        for (shape, width), found in readings.items()
    )
    return LatencyTable(
        device=device_name(device),
        versions=_versions(gpu),
        threads=torch.get_num_threads(),
        batch=batch,
        repeats=repeats,
        entries=entries,
        notes=tuple(notes),
    )


def _take_turns(
    cases: dict[tuple[Shape, Width], Callable[[], object]],
    repeats: int,
    calls: int,
    clock: Callable[[], float],
    device: torch.device,
) -> dict[tuple[Shape, Width], list[float]]:
    """`repeats` readings of each case, in seconds of `calls` passes, after a warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for run in cases.values():
        for _ in range(WARM_UP):
            run()
    readings: dict[tuple[Shape, Width], list[float]] = {case: [] for case in cases}
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


def torch_runner(
    layer: nn.Module, inputs: list[Tensor], weight_bits: int, act_bits: int | None
) -> Callable[[], object]:
    """What torch itself runs, see the head of this file."""
    gpu = inputs[0].device.type == "cuda"
    if (weight_bits, act_bits) == (FP32_BITS, None):
        return lambda: [layer(x) for x in inputs]
    if (weight_bits, act_bits) == (FP16_BITS, None) and gpu:
        half = copy.deepcopy(layer).half()
        halves = [x.half() for x in inputs]
        return lambda: [half(x) for x in halves]
    if (weight_bits, act_bits) != (8, 8):
        raise NoKernelError("torch runs 8-bit weights on 8-bit inputs, or floats, and no others")
    if gpu:
        return _checked(_int8_matmul, layer, inputs)
    if platform.machine() not in X86 or not hasattr(torch.ops.onednn, "qconv_pointwise"):
        raise NoKernelError("this torch has no oneDNN kernels for 8-bit integers")
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise NoKernelError(f"torch has no 8-bit {type(layer).__name__} for CPUs")
    return _checked(_onednn, layer, inputs)


Made = tuple[Callable[[], Tensor], Tensor, Tensor]
"""What to time, and the input and the weight that its integers stand for."""


def _checked(
    make: Callable[[Any, Tensor], Made], layer: nn.Module, inputs: list[Tensor]
) -> Callable[[], object]:
    """Every call of a layer on integer kernels, each compared with the layer in FP32 first.

    Both sum the same products, and differ by rounding alone. (Without VNNI, oneDNN's kernels add
    products in saturating 16 bits.)
    """
    runs = []
    with torch.no_grad():
        for x in inputs:
            run, x_hat, weight_hat = make(layer, x)
            reference = copy.deepcopy(layer)
            reference.get_parameter("weight").copy_(weight_hat)
            wanted = reference(x_hat)
            if not (run() - wanted).abs().max() <= 1e-3 * wanted.abs().max():
                raise NoKernelError("torch's 8-bit kernel gives wrong results on this device")
            runs.append(run)
    return lambda: [run() for run in runs]


def _onednn(layer: nn.Linear | nn.Conv1d | nn.Conv2d, x: Tensor) -> Made:
    """The layer on oneDNN's integer kernels: u8 input, s8 weight with a scale a channel."""
    ops = torch.ops.onednn
    codes, weight_scale = _integers(layer.weight)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / 255, 1e-12)
    zero = round(-low / scale)
    x8 = (x / scale + zero).round().clamp(0, 255).to(torch.uint8)
    hats = (x8.float() - zero) * scale, _by_channel(codes, weight_scale)
    zeros = torch.zeros(len(codes), dtype=torch.long)
    quantized = (weight_scale, zeros, layer.bias)
    # an output in FP32, without a scale of its own, and nothing fused behind
    tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    if isinstance(layer, nn.Linear):
        packed = ops.qlinear_prepack(codes, list(x8.shape))
        return lambda: ops.qlinear_pointwise(x8, scale, zero, packed, *quantized, *tail), *hats
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise NoKernelError("torch's 8-bit convolutions pad with zeros, in numbers")
    geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    packed = ops.qconv_prepack(codes, weight_scale, scale, zero, *geometry, list(x8.shape))
    if isinstance(layer, nn.Conv2d):  # the layout that these kernels are written for
        x8 = x8.to(memory_format=torch.channels_last)
    return (
        lambda: ops.qconv_pointwise(x8, scale, zero, packed, *quantized, *geometry, *tail),
        *hats,
    )


def _int8_matmul(layer: nn.Module, x: Tensor) -> Made:
    """A Linear layer on a GPU's integer tensor cores: product in int32, then scale and bias."""
    if not isinstance(layer, nn.Linear):
        raise NoKernelError(f"torch has no 8-bit {type(layer).__name__} for GPUs")
    if x[..., 0].numel() <= 16 or layer.in_features % 8 or layer.out_features % 8:
        raise NoKernelError(
            "torch's 8-bit product on GPUs wants more than 16 rows and multiples of 8"
        )
    codes, weight_scale = _integers(layer.weight)
    scale = x.abs().amax().clamp(min=1e-12) / 127
    x8 = (x / scale).round().to(torch.int8).flatten(0, -2)
    transposed, both, bias = codes.t(), weight_scale * scale, layer.bias
    shape = (*x.shape[:-1], layer.out_features)

    def run() -> Tensor:
        out = torch._int_mm(x8, transposed) * both
        return (out if bias is None else out + bias).view(shape)

    return run, (x8 * scale).view(x.shape), _by_channel(codes, weight_scale)


def _integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as signed 8-bit integers, and the scale of each output channel."""
    scale = (weight.detach().flatten(1).abs().amax(1) / 127).clamp(min=1e-12)
    return _by_channel(weight, 1 / scale).round().to(torch.int8), scale


def _by_channel(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))


def _input_shapes(
    model: nn.Module, layers: Sequence[LayerInfo], inputs: Any
) -> dict[str, list[torch.Size]]:
    """The shape of a layer's input at each of its calls in one forward pass."""
    found: dict[str, list[torch.Size]] = {layer.name: [] for layer in layers}
    hooks = []
    for layer in layers:
        module = model.get_submodule(layer.name)
        if parametrize.is_parametrized(module) or hasattr(module, "input_quantizer"):
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
