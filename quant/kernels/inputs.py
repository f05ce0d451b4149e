"""Triton kernels that quantize a layer's input; `inputs_reference` says what they compute.

The code of x is found by halving the thresholds: STEPS = ⌈log2(n + 1)⌉ loads from a table that fits
the first cache. Where n is not 2^STEPS − 1 the thresholds that are missing are +∞ and the count is
cut at n. Tensors are dense and of one memory order, offsets int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels.inputs_reference import work_dtype

BLOCK = 1024


@triton.jit
def _codes_of(x, thresholds_ptr, count, STEPS: tl.constexpr):
    """int32; `count` in 1..2^STEPS − 1."""
    code = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - k)
        at = code + (step - 1)
        threshold = tl.load(thresholds_ptr + at, mask=at < count, other=float("inf"))
        code += tl.where(threshold > x, 0, step)  # false for NaN, which goes up as +∞ does
    return tl.minimum(code, count)


@triton.jit
def quantize_kernel(
    x_ptr,
    thresholds_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    numel,
    count,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x̂."""
    work = thresholds_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(work)
    code = _codes_of(x, thresholds_ptr, count, STEPS).to(work)
    out = (code - tl.load(zero_point_ptr).to(work)) * tl.load(scale_ptr).to(work)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def codes_kernel(
    x_ptr, thresholds_ptr, codes_ptr, numel, count, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """q, uint8."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(thresholds_ptr.dtype.element_ty)
    code = _codes_of(x, thresholds_ptr, count, STEPS)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=inside)


def quantize(x: Tensor, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`inputs_reference.quantize` for a dense x of any shape."""
    out = torch.empty_like(x)
    thresholds = thresholds.to(work_dtype(x, thresholds)).contiguous()
    count = thresholds.numel()
    if x.numel():
        with torch.cuda.device_of(x):
            quantize_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(x, thresholds, scale, zero_point, out, x.numel(), count),
                STEPS=count.bit_length(),
                BLOCK=BLOCK,
            )
    return out


def codes(x: Tensor, thresholds: Tensor) -> Tensor:
    """`inputs_reference.codes` for a dense x of any shape."""
    out = torch.empty_like(x, dtype=torch.uint8)
    thresholds = thresholds.to(work_dtype(x, thresholds)).contiguous()
    count = thresholds.numel()
    if x.numel():
        with torch.cuda.device_of(x):
            codes_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                *(x, thresholds, out, x.numel(), count),
                STEPS=count.bit_length(),
                BLOCK=BLOCK,
            )
    return out
