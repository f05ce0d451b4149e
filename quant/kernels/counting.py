"""How many of some ascending thresholds a value has reached: what every quantizer asks on a CPU.

`torch.bucketize` takes 10 to 90 ns for a value: a processor mispredicts the branches of a search.
`counting.c`, compiled when this package is installed, takes 0.5 to 3 ns; it is loaded with ctypes
and so depends on no version of Python or PyTorch. Where there was no compiler, or the operands are
not of its kind, three ways in plain PyTorch take 2 to 25 ns when there are many values: compare
them with each threshold if those are few, look them up in a table (`Bins`) if no two thresholds lie
too close together, or else halve the thresholds for all values in step.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MANY = 2**13  # values; below, a search costs less than to prepare anything better
FEW = 3  # thresholds that are compared one after the other; measured on an x86 core, as is MANY
PART = 2**17  # values for each thread
BINS = 2**12

IN_C = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the names of x's dtypes there
MOST_IN_C = 511
VALUES_A_THREAD = 2**15  # as many as PyTorch gives one for an elementwise operation


def count_dtype(thresholds: int) -> torch.dtype:
    """The smallest dtype that holds 0..thresholds."""
    return torch.uint8 if thresholds <= 255 else torch.int16


def count(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many of the ascending thresholds are <= x, for each value; NaN counts as +∞.

    Shapes: x any, thresholds (m,). They are compared in the dtype of the thresholds, which holds
    every value of x's. Of thresholds that do not ascend the result means nothing.
    """
    dtype = count_dtype(thresholds.numel())
    if _is_for_c(x, thresholds):
        counts = torch.empty(x.shape, dtype=dtype)
        if _in_c(x, thresholds, counts=counts):
            return counts
    x = x.to(thresholds.dtype).contiguous()
    if not x.is_cpu or x.numel() < MANY:
        return torch.bucketize(x, thresholds, right=True, out_int32=True).to(dtype)
    counts = torch.empty(x.shape, dtype=dtype)
    find = _way(thresholds)
    for part, out in zip(parts(x.reshape(-1)), parts(counts.view(-1)), strict=True):
        find(part, out)
    return counts


def quantize(x: Tensor, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """scale·(c − zero_point) with the count c; arguments as in `quantize_and_count`."""
    if _is_for_c(x, thresholds, scale, zero_point):
        values = torch.empty_like(x)
        if _in_c(x, thresholds, values, None, (scale, zero_point)):
            return values
    return _values(x, count(x, thresholds), scale.to(thresholds.dtype), zero_point)


def quantize_and_count(
    x: Tensor, thresholds: Tensor, scale: Tensor, zero_point: Tensor, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """(scale·((c >> shift) − zero_point), c) with the count c.

    Shapes: x any, contiguous, thresholds (m,), scale and zero point (1,). Values have the dtype of
    x; in between all is in the dtype of the thresholds.
    """
    if _is_for_c(x, thresholds, scale, zero_point):
        values = torch.empty_like(x)
        counts = torch.empty(x.shape, dtype=count_dtype(thresholds.numel()))
        if _in_c(x, thresholds, values, counts, (scale, zero_point), shift):
            return values, counts
    counts = count(x, thresholds)
    return _values(x, counts, scale.to(thresholds.dtype), zero_point, shift), counts


def _values(x: Tensor, counts: Tensor, scale: Tensor, zero_point: Tensor, shift: int = 0) -> Tensor:
    out = torch.empty_like(x)
    for codes, part in zip(parts(counts.view(-1)), parts(out.view(-1)), strict=True):
        # cast before the subtraction: operations on two dtypes are many times slower on a CPU
        shifted = (codes >> shift if shift else codes).to(scale.dtype)
        part.copy_(shifted.sub_(zero_point).mul_(scale))
    return out


@cache
def _function() -> Any:
    """`adq_count` of counting.c; None where it was not compiled."""
    spec = find_spec("adq.quant.kernels._counting")
    if spec is None or spec.origin is None:
        return None
    try:
        function = ctypes.CDLL(spec.origin).adq_count
    except (OSError, AttributeError):  # compiled for another system, or from another version
        return None
    pointer, i32, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
    function.argtypes = [pointer, i32, ctypes.c_int64, pointer, i32, i32, f32, f32]
    function.argtypes += [pointer, pointer, pointer, pointer, i32]
    return function


@cache
def _parallel() -> int | None:
    """The address of OpenMP's GOMP_parallel in the library that PyTorch has its threads from."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def _is_for_c(x: Tensor, *float32: Tensor) -> bool:
    """Whether C takes them: x, the thresholds, and scale and zero point if there are any."""
    if _function() is None or x.dtype not in IN_C or float32[0].numel() > MOST_IN_C:
        return False
    for t in float32:
        if t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous():
            return False
    return x.is_cpu and x.is_contiguous() and not x.is_neg()


def _in_c(
    x: Tensor,
    thresholds: Tensor,
    values: Tensor | None = None,
    counts: Tensor | None = None,
    parameters: tuple[Tensor, Tensor] | None = None,
    shift: int = 0,
) -> bool:
    """Whether `values` and `counts` have been written: not where the thresholds do not ascend.

    `parameters` are scale and zero point, which `values` need.
    """
    size, m, table = x.numel(), thresholds.numel(), None
    if parameters is not None and x.dtype != torch.float32:
        scale, zero_point = parameters
        codes = torch.arange((m >> shift) + 1, dtype=torch.float32)
        table = codes.sub_(zero_point).mul_(scale).to(x.dtype)
    done = _function()(
        *(x.data_ptr(), IN_C[x.dtype], size, thresholds.data_ptr(), m, shift),
        *((0.0, 0.0) if parameters is None else (t.item() for t in parameters)),
        *(None if t is None else t.data_ptr() for t in (table, values, counts)),
        _parallel(),
        max(1, min(torch.get_num_threads(), size // VALUES_A_THREAD)),
    )
    return bool(done)


def parts(x: Tensor) -> tuple[Tensor, ...]:
    """Pieces of a flat tensor that stay in a processor's cache from one operation to the next.

    A tensor of no values is one piece; and so is one on another device, for which every piece
    would be a launch.
    """
    return x.split(PART * torch.get_num_threads()) if x.is_cpu else (x,)


def _way(thresholds: Tensor) -> Callable[[Tensor, Tensor], None]:
    if thresholds.numel() <= FEW:
        return partial(_compare, thresholds=thresholds)
    bins = Bins.of(thresholds)
    return partial(_halve, thresholds=thresholds) if bins is None else bins.count


@dataclass(frozen=True)
class Bins:
    """Equal bins between the first and the last threshold, each with at most one in it.

    x lies in bin f(x) = ⌊(x − T_1)·(BINS − 1)/(T_m − T_1)⌋, clipped to 0..BINS − 1. Rounded or not,
    f never falls: a threshold of a lower bin is <= x and one of a higher bin is not, so that the
    one in x's own bin alone has to be compared. That is exact, for f is computed for thresholds as
    for values.
    """

    origin: Tensor
    rate: Tensor
    upto: Tensor  # (BINS,) thresholds in the bin and in lower ones
    threshold: Tensor  # (BINS,) the one in the bin, NaN where there is none

    @staticmethod
    def of(thresholds: Tensor) -> "Bins | None":
        """None where two thresholds share a bin, or do not ascend."""
        origin = thresholds[0]
        rate = (BINS - 1) / (thresholds[-1] - origin)
        index = _bins_of(thresholds, origin, rate).long()
        if not ((thresholds.diff() > 0) & (index.diff() > 0)).all():
            return None
        own = torch.full((BINS,), torch.nan, dtype=thresholds.dtype)
        own.index_copy_(0, index, thresholds)
        counts = torch.zeros(BINS, dtype=torch.int32).index_fill_(0, index, 1)
        upto = counts.cumsum(0, dtype=torch.int32).to(count_dtype(thresholds.numel()))
        return Bins(origin, rate, upto, own)

    def count(self, x: Tensor, out: Tensor) -> None:
        index = _bins_of(x, self.origin, self.rate)
        above = self.threshold.index_select(0, index) > x  # false for NaN, whose bin is the last
        torch.index_select(self.upto, 0, index, out=out)
        out.sub_(above.view(torch.uint8))


def _bins_of(x: Tensor, origin: Tensor, rate: Tensor) -> Tensor:
    """f(x) of `Bins`, int32; BINS − 1 where x is NaN."""
    scaled = torch.sub(x, origin).mul_(rate).clamp_(0, BINS - 1)
    return scaled.nan_to_num_(nan=BINS - 1).int()


def _compare(x: Tensor, out: Tensor, thresholds: Tensor) -> None:
    """The counts by one comparison for each threshold; NaN is below none of them."""
    out.fill_(thresholds.numel())
    below = torch.empty_like(x, dtype=torch.bool)
    for threshold in thresholds:
        out.sub_(torch.lt(x, threshold, out=below).view(torch.uint8))


def _halve(x: Tensor, out: Tensor, thresholds: Tensor) -> None:
    """The counts by ⌈log2(m + 1)⌉ comparisons of each value."""
    # counts the thresholds above x: NaN compares as false, and so has none above it
    total = thresholds.numel()
    size = 1 << total.bit_length()
    padded = torch.cat([thresholds.flip(0), thresholds.new_full((size - 1 - total,), -torch.inf)])
    above, step = (padded[size // 2 - 1] > x).int().mul_(size // 2), size // 2
    while step := step // 2:
        probe = padded[step - 1 :].index_select(0, above)
        above.add_((probe > x).int(), alpha=step)
    torch.sub(total, above, out=above)
    out.copy_(above)
