"""The Triton kernels on a GPU: each beside its reference, the compiled reference, and a copy.

A time is the median of `triton.testing.do_bench`, which empties the second-level cache before each
run. The copy is one from device to device that moves as many bytes as the kernel must (half of
them read, half written): what it takes is what the memory allows.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from cpu import bit_vector, interleaved, step_of, synthetic_batches
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adq.quant.apply import quantize_
from adq.quant.calibrate import input_ranges
from adq.quant.kernels import n2uq_reference, weights_reference
from adq.quant.qat import TrainingConfig
from adq.quant.rows import rows_of

SIZES = (2**20, 2**22, 2**24, 2**26)
BITS = (2, 4, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW = 2**12  # weights of a row
RESNET50_BATCH, RESNET50_ROUNDS, RESNET50_WARMUP = 256, 20, 5

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one size: what it calls, what that means, and the bytes that it must move."""

    kernel: str
    bits: int
    dtype: str
    elements: int
    moved_bytes: int
    call: Call
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds; `compiled_us` is None where torch.compile fails or is left out."""

    kernel: str
    bits: int
    dtype: str
    elements: int
    moved_bytes: int
    kernel_us: float
    reference_us: float
    compiled_us: float | None
    copy_us: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.moved_bytes / self.kernel_us / 1e3

    @property
    def fraction_of_copy(self) -> float:
        """The kernel's speed over the copy's."""
        return self.copy_us / self.kernel_us


def device() -> dict[str, Any]:
    """The card and what drives it."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.split()[0]


def cases(elements: int, bits: int, dtype: str) -> Iterator[Case]:
    """All kernels at one size, made of random weights and values."""
    generator = torch.Generator("cuda").manual_seed(0)
    kind = DTYPES[dtype]
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    width, place_width, k = kind.itemsize, 1 if bits < 8 else 2, 2**bits
    ops, same = torch.ops.adq, (bits, dtype, elements)

    w = torch.randn(elements, **options).to(kind)
    grad = torch.randn(elements, **options).to(kind)
    rows, sizes = [elements // ROW], [ROW]
    scale = 0.5 + torch.rand(rows[0], **options)
    levels = torch.randn(k, **options).sort().values
    layout = (rows, sizes, [bits])
    parts = weights_reference.parts(elements)
    for name, gather in (("weights forward", False), ("weights forward + statistics", True)):
        yield Case(
            name,
            *same,
            elements * (2 * width + 1) + gather * 24 * parts * k,
            partial(ops.weights_forward, w, scale, levels, *layout, 0, gather),
            weights_reference.forward,
            (w, scale, levels, *layout, gather),
        )
    _, codes, partials = ops.weights_forward(w, scale, levels, *layout, 0, True)
    arguments: tuple[Any, ...] = (grad, w, codes, scale, levels, *layout, 0)
    yield Case(
        "weights backward",
        *same,
        elements * (3 * width + 1),
        partial(ops.weights_backward, *arguments),
        weights_reference.backward,
        arguments,
    )
    if dtype == "fp32":  # codebooks are float32 whatever the weights are
        counts = partials[0].view(parts, k).sum(0).float()
        state = (levels, counts, counts * levels)
        arguments = (partials, *state, [bits], [parts], 0.95, 1e-5, True, False)
        yield Case(
            "codebook step",
            *same,
            24 * parts * k + 6 * 4 * k,
            partial(ops.codebook_step, *arguments),
            weights_reference.codebook_step,
            arguments,
        )

    x = torch.randn(elements, **options).to(kind)
    widths = 0.75 + 0.5 * torch.rand(k - 1, **options)
    widths *= 4 / widths.sum()  # from two standard deviations below to two above
    start, sigma = x.new_full((1,), -2.0).float(), x.new_full((1,), 4 / (k - 1)).float()
    parameters = (widths, sigma, x.new_full((1,), k / 2).float())
    yield Case(
        "n2uq forward",
        *same,
        elements * (2 * width + place_width),
        partial(ops.n2uq_forward, x, start, *parameters),
        n2uq_reference.forward,
        (x, start, *parameters),
    )
    saved = ops.n2uq_forward(x, start, *parameters)[1:]
    arguments = (grad, x, *saved, *parameters)
    yield Case(
        "n2uq backward",
        *same,
        elements * (3 * width + place_width),
        partial(ops.n2uq_backward, *arguments),
        n2uq_reference.backward,
        arguments,
    )


def timings(compiled: bool) -> Iterator[Timing]:
    """Every kernel at every size, bit-width and dtype."""
    for dtype in DTYPES:
        for bits in BITS:
            for elements in SIZES:
                for case in cases(elements, bits, dtype):
                    yield timing(case, compiled)


def timing(case: Case, compiled: bool) -> Timing:
    source = torch.empty(case.moved_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    fields = {name: getattr(case, name) for name in ("kernel", "bits", "dtype", "elements")}
    return Timing(
        **fields,
        moved_bytes=case.moved_bytes,
        kernel_us=_median_us(case.call),
        reference_us=_median_us(partial(case.reference, *case.arguments)),
        compiled_us=_compiled_us(case) if compiled else None,
        copy_us=_median_us(partial(target.copy_, source)),
    )


def _median_us(call: Call) -> float:
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, return_mode="median"))


def _compiled_us(case: Case) -> float | None:
    torch._dynamo.reset()  # shapes differ from case to case: each is compiled for its own
    compiled = torch.compile(case.reference, dynamic=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of graph breaks: the reference was not written for it
            compiled(*case.arguments)
            return _median_us(partial(compiled, *case.arguments))
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"torch.compile of {case.kernel} failed: {str(error).splitlines()[0]}", flush=True)
        return None


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50()


def launches() -> dict[str, dict[str, int]]:
    """GPU kernels by name for one pass over a ResNet-50's weights (forward with statistics,
    backward, codebook step), with our kernels and with the reference."""
    layers = [m for m in resnet50().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    rows = [rows_of(layer) for layer in layers]
    pairs = zip(layers, rows, strict=True)
    w = torch.cat([r.split(layer.weight.detach()).reshape(-1) for layer, r in pairs]).cuda()
    layout = ([r.count for r in rows], [r.size for r in rows], [4] * len(rows))
    scale = torch.full((sum(layout[0]),), 0.02, device="cuda")
    levels = torch.linspace(-2, 2, 16, device="cuda").repeat(len(rows))
    counts = torch.ones_like(levels)
    parts = [weights_reference.parts(r.count * r.size) for r in rows]
    ops = torch.ops.adq

    def ours() -> None:
        out, codes, partials = ops.weights_forward(w, scale, levels, *layout, 0, True)
        ops.weights_backward(out, w, codes, scale, levels, *layout, 0)
        ops.codebook_step(
            partials, levels, counts, levels, layout[2], parts, 0.95, 1e-5, True, False
        )

    def reference() -> None:
        out, codes, partials = weights_reference.forward(w, scale, levels, *layout, True)
        weights_reference.backward(out, w, codes, scale, levels, *layout, 0)
        weights_reference.codebook_step(
            partials, levels, counts, levels, layout[2], parts, 0.95, 1e-5, True, False
        )

    return {"kernels": _kernels_of(ours), "reference": _kernels_of(reference)}


def _kernels_of(call: Call) -> dict[str, int]:
    call()  # compiles, and fills the tables
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    names = (event.name for event in found.events() if event.device_type == DeviceType.CUDA)
    # copies and fills are launches as well, but of no kernel of a program's own
    return dict(Counter(name for name in names if not name.startswith(("Memcpy", "Memset"))))


def resnet50_steps() -> dict[str, list[float]] | None:
    """Seconds of training steps of torchvision's ResNet-50 with bf16 autocast, images 224x224 and
    channels last; None where the card's memory is too small. Weights and inputs at 4 bits, the
    first and the last layer at 8."""
    torch.backends.cudnn.benchmark = True
    config = TrainingConfig(epochs=1, lr=1e-3, warmup=0.0, amp="bf16")
    try:
        batches = [
            (images.cuda().contiguous(memory_format=torch.channels_last), labels.cuda())
            for images, labels in synthetic_batches(RESNET50_BATCH, 224, 1000, 2)
        ]
        model = resnet50().cuda().to(memory_format=torch.channels_last)
        few: list[tuple[Tensor, Tensor]] = [(batches[0][0][:32], batches[0][1][:32])]
        bits = bit_vector(model, few[0][0][:2], 4, 8)
        ranges = input_ranges(model, {name: (b,) for name, b in bits.act.items()}, few)
        steps = {
            "plain": step_of(copy.deepcopy(model), batches, config),
            "adq": step_of(quantize_(model, bits, ranges), batches, config),
        }
        return interleaved(steps, RESNET50_ROUNDS, RESNET50_WARMUP)
    except torch.cuda.OutOfMemoryError:
        return None


def measure(compiled: bool) -> dict[str, Any]:
    """Everything that needs a GPU, raw."""
    found = []
    for one in timings(compiled):
        found.append(asdict(one))
        print(
            f"{one.kernel:29} {one.bits} bits {one.dtype} 2^{one.elements.bit_length() - 1}: "
            f"{one.kernel_us:.1f} µs, {one.gigabytes_per_second:.0f} GB/s, "
            f"{one.fraction_of_copy:.2f} of a copy's speed",
            flush=True,
        )
    return {
        "device": device(),
        "timings": found,
        "launches": launches(),
        "resnet50_seconds": resnet50_steps(),
    }
