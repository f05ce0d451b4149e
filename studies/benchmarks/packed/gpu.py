"""The kernels over packed weights on a GPU: verified, then measured beside what others offer.

`verify` compares every kernel with a product in float64, at sizes that it is given. `measure`
times, in rounds that take turns, a linear layer of 4096x4096 at 1 and 16 rows and a convolution of
ResNet-18: ours at 2, 3, 4 and 8 bits, PyTorch's fp16, and torchao's int4 where it is installed. A
time is the median over rounds of medians of `triton.testing.do_bench`, which empties the
second-level cache before each run; a bandwidth share is the bytes of codes (or fp16 weights) over
the time of their kernel, over what a copy from device to device moves in a second.

    python gpu.py        prints the dict as JSON; without a card, one line
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.kernels import packed_ops as ops
from adq.quant.kernels import packed_reference as reference

WIDTHS = reference.WIDTHS
SIZE = 4096
BATCHES = (1, 16)
CONVOLUTION = (1, 256, 256, 3, 14)
"""Images, channels, filters, kernel and side: the third stage of ResNet-18 at 224x224."""
ROUNDS = 5
COPY_BYTES = 2**28

Call = Callable[[], Any]


def layer(n: int, k: int, bits: int, device: str, groups: int = 1) -> list[Any]:
    """(codes, words, codebook, scale) of a random layer."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    levels = torch.randn(2**bits, generator=generator).sort().values
    scale = (0.5 + torch.rand(n, groups, generator=generator)) / k**0.5
    return [t.to(device) for t in (codes, reference.arrange(codes, bits), levels, scale)]


def verify(
    device: str = "cuda",
    size: int = SIZE,
    side: int = CONVOLUTION[4],
    channels: int = CONVOLUTION[1],
    dtypes: Sequence[torch.dtype] = ops.HALVES,
) -> dict[str, float]:
    """Largest error of each kernel over what rounding allows; raises AssertionError above 1.

    The bound of y = Σ_k w·x in a dtype of this eps is (2·eps/2 + (K + 4)·2^-23)·Σ|w·x| + eps·|y|: a
    weight is rounded once or twice, additions are in float32, and the result is rounded. Integer
    products must be equal to those in float64.
    """
    found: dict[str, float] = {}
    for bits in WIDTHS:
        for dtype in dtypes:
            for rows in BATCHES:
                for groups in (1, size // 64):
                    name = f"linear {bits} bits {str(dtype)[6:]} {rows} rows {groups} scales"
                    found[name] = _linear_error(device, size, bits, dtype, rows, groups)
            name = f"conv2d {bits} bits {str(dtype)[6:]}"
            found[name] = _conv_error(device, channels, side, bits, dtype)
        found[f"integers {bits} bits"] = _integer_error(device, channels, side, bits)
    wrong = {name: error for name, error in found.items() if not error <= 1}
    if wrong:
        raise AssertionError(f"kernels beyond their rounding: {wrong}")
    return found


def _worst(found: Tensor, expected: Tensor, unsigned: Tensor, terms: int) -> float:
    eps = torch.finfo(found.dtype).eps
    bound = (eps + (terms + 4) * 2.0**-23) * unsigned + eps * expected.abs()
    return float(((found.double() - expected).abs() / bound).max())


def _linear_error(
    device: str, size: int, bits: int, dtype: torch.dtype, rows: int, groups: int
) -> float:
    codes, words, levels, scale = layer(size, size, bits, device, groups)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    y = ops._linear_on_gpu(x, words, levels, scale, None, bits)
    w = levels.double()[codes.int()] * scale.double().repeat_interleave(size // groups, 1)
    return _worst(y, x.double() @ w.T, x.double().abs() @ w.abs().T, size)


def _conv_error(device: str, channels: int, side: int, bits: int, dtype: torch.dtype) -> float:
    codes, words, levels, scale = layer(channels, 9 * channels, bits, device)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), 1
    y = ops._conv2d_on_gpu(x, words, levels, scale, None, bits, *geometry)
    w = (levels.double()[codes.int()] * scale.double()).view(channels, 3, 3, -1)
    w, x = w.permute(0, 3, 1, 2), x.double()
    conv = partial(nn.functional.conv2d, padding=1)
    return _worst(y, conv(x, w), conv(x.abs(), w.abs()), codes.shape[1])


def _integer_error(device: str, channels: int, side: int, bits: int) -> float:
    """0 where the integer convolution and product are exact, else infinity."""
    codes, words, _, _ = layer(channels, 9 * channels, bits, device)
    one, zero = torch.ones(channels, 1, device=device), torch.full((1,), 3.0, device=device)
    sums = reference.code_sums(codes, bits)
    middle = 2 ** (bits - 1)
    real = (1.0, -float(middle), one, sums, None, one[0], zero, bits)
    generator = torch.Generator().manual_seed(0)
    # of 4 bits, so that float32 holds the sums
    q = torch.randint(0, 16, (2, channels, side, side), generator=generator).to(device, torch.uint8)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1), 1
    y = ops._conv2d_int_on_gpu(q, words, *real, *geometry, torch.float32)
    w = (codes.double() - middle).view(channels, 3, 3, -1).permute(0, 3, 1, 2)
    same = torch.equal(y.double(), nn.functional.conv2d(q.double() - 3, w, padding=1))
    count = min(16, q.numel() // codes.shape[1])
    rows = q.flatten()[: count * codes.shape[1]].view(count, -1)
    y = ops._linear_int_on_gpu(rows, words, *real, torch.float32)
    same &= torch.equal(y.double(), (rows.double() - 3) @ (codes.double() - middle).T)
    return 0.0 if same else float("inf")


def calls() -> dict[str, dict[str, tuple[Call, int]]]:
    """Case -> (what is called, bytes of its weight) by name."""
    found: dict[str, dict[str, tuple[Call, int]]] = {}
    layers = {bits: layer(SIZE, SIZE, bits, "cuda")[1:] for bits in WIDTHS}
    dense = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.float16)
    int4 = _torchao_int4()
    for rows in BATCHES:
        x = torch.randn(rows, SIZE, device="cuda", dtype=torch.float16)
        case: dict[str, tuple[Call, int]] = {
            "torch fp16": (partial(nn.functional.linear, x, dense), dense.nbytes)
        }
        for bits, (words, levels, scale) in layers.items():
            call = partial(ops.linear, x, words, levels, scale, None, bits)
            case[f"adq {bits} bits"] = (call, words.nbytes)
        if int4 is not None:
            case["torchao int4"] = (partial(int4, x.bfloat16()), dense.nbytes // 4)
        found[f"linear {SIZE}x{SIZE}, {rows} rows"] = case
    images, channels, filters, kernel, side = CONVOLUTION
    x = torch.randn(images, channels, side, side, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    dense = torch.randn(filters, channels, kernel, kernel, device="cuda", dtype=torch.float16)
    dense = dense.contiguous(memory_format=torch.channels_last)
    case = {"torch fp16": (partial(nn.functional.conv2d, x, dense, padding=1), dense.nbytes)}
    for bits in WIDTHS:
        words, levels, scale = layer(filters, kernel**2 * channels, bits, "cuda")[1:]
        rest = (kernel, kernel), (1, 1), (1, 1), (1, 1), 1
        call = partial(ops.conv2d, x, words, levels, scale, None, bits, *rest)
        case[f"adq {bits} bits"] = (call, words.nbytes)
    found[f"conv2d {channels}x{side}x{side}, 3x3"] = case
    return found


def _torchao_int4() -> nn.Module | None:
    """A linear layer with torchao's int4 weights, or None where it does not install or run."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, device="cuda").bfloat16())
        quantize_(model, Int4WeightOnlyConfig(group_size=128))
        model(torch.randn(1, SIZE, device="cuda", dtype=torch.bfloat16))
    except Exception as error:  # noqa: BLE001 (whatever another library lacks)
        print(f"torchao int4 is left out: {error}", file=sys.stderr)
        return None
    return model


def measure() -> dict[str, Any]:
    """Verifies, then measures; microseconds, bandwidth shares, and times as fast as fp16."""
    from triton.testing import do_bench

    errors = verify()
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = do_bench(partial(target.copy_, source), return_mode="median")
    bytes_per_s = 2 * COPY_BYTES / copy_ms * 1e3
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for case, own in calls().items():
        times: dict[str, list[float]] = {name: [] for name in own}
        for _ in range(ROUNDS):
            for name, (call, _) in own.items():
                times[name].append(1e3 * float(do_bench(call, return_mode="median")))
        medians = {name: statistics.median(us) for name, us in times.items()}
        cases[case] = {
            name: {
                "us": us,
                "bandwidth_share": own[name][1] / (us * 1e-6) / bytes_per_s,
                "times_as_fast_as_fp16": medians["torch fp16"] / us,
            }
            for name, us in medians.items()
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "torch": torch.__version__,
        "copy_bytes_per_s": bytes_per_s,
        "largest_error_over_bound": max(errors.values()),
        "cases": cases,
    }


def main() -> None:
    if torch.cuda.is_available():
        print(json.dumps(measure(), indent=2))
    else:
        print("no CUDA device: the packed kernels are verified by the tests' interpreter only")


if __name__ == "__main__":
    main()
