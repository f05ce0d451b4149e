"""Triton kernel of the product of packed weights with one or two vectors.

A program takes ROWS rows and walks over K, W cells at a time; a thread has some cells of all its
rows, loads 16 bytes of words at once, and multiplies and adds in float32. At 2 bits it looks up two
weights at once, as a pair of floats. Where rows alone do not fill the card K is cut in parts, each
a row of partial sums that `finish_kernel` adds in order, so that two runs are equal to the last
bit.

Bytes moved: N·K·b/8 of words; all else is small. Instructions of a weight, counted in the loop that
is compiled for sm_90 (shift, mask, lookup, product, and the share of x): 3.1 at 2 bits, 4.8 at 3,
4.7 at 4 and 5.0 at 8, and with K = 4096 about 0.8 more before and after the loop. An H100 can issue
these in 2.2, 3.2, 3.1 and 3.3 µs for 4096x4096 weights, and reads the words in 1.4, 2.1, 2.8 and
5.6 µs; at 8 bits lookups that meet in a bank take some 8 µs. These are counts, not measurements.
"""

# see `packed_words`:
# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels.packed_reference import CELL, ROWS, kernel_width, planes
from adq.quant.kernels.packed_words import (
    _joined,
    _parted,
    codes_of,
    finish,
    load_words,
    look_up,
    table_of,
)

MAX_VECTORS = 2
"""Rows of x up to which this kernel serves them."""
BLOCK_CELLS = {2: 128, 3: 64, 4: 256, 8: 256}
"""Cells that a program of 64 threads holds at a time: enough bytes in flight, few registers."""
WARPS = 1 if torch.version.hip else 2
PROGRAMS = 1024
"""Programs that fill a card: eight for each of 132 cores."""


@triton.jit
def _pairs_of(codebook_ptr, levels):
    """At 2 bits: the 16 pairs of levels, each the bits of two floats, the first one lower."""
    pair = tl.arange(0, 16)
    low = tl.load(codebook_ptr + (pair & 3), mask=(pair & 3) < levels, other=0.0)
    high = tl.load(codebook_ptr + (pair >> 2), mask=(pair >> 2) < levels, other=0.0)
    low = low.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.float32).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def _values(words, table, BITS: tl.constexpr):
    """The levels of some cells' codes, a tensor for each place in a cell."""
    if BITS == 2:
        pairs = codes_of(words, 4)
        found = _parted((look_up(table, _joined(pairs)),), 8)
        values = ()
        for i in tl.static_range(8):
            low = found[i].to(tl.uint32).to(tl.float32, bitcast=True)
            high = (found[i] >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
            values = values + (low, high)
        return values
    else:
        codes = codes_of(words, BITS)
        return _parted((look_up(table, _joined(codes)),), len(codes))


@triton.jit
def _inputs(x_ptr, first, size, W: tl.constexpr, CELL: tl.constexpr):
    """The W cells of x from `first` on, a tensor for each place in a cell."""
    CHUNK: tl.constexpr = min(CELL, 8)  # 16 bytes of a 16-bit x
    AXES: tl.constexpr = [W, 2, 2] if CHUNK == 4 else [W, 2, 2, 2]
    chunks = ()
    for c in tl.static_range(CELL // CHUNK):
        k = (first + tl.arange(0, W)[:, None]) * CELL + (c * CHUNK + tl.arange(0, CHUNK)[None, :])
        x = tl.load(x_ptr + k, mask=k < size, other=0.0).to(tl.float32)
        chunks = chunks + _parted((tl.reshape(x, AXES),), CHUNK)
    return chunks


@triton.jit
def vector_kernel(
    x_ptr,
    words_ptr,
    codebook_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    size,
    width,
    levels,
    cells,
    groups,
    has_bias,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
):
    """Four elements of one row of the output, or of a part of it: program (rows, row of x, part).

    size is K, width the cells of a row, and cells those of a part. GROUPS is 0 for one scale a row,
    1 where a scale serves whole cells, and 2 for any other.
    """
    CELL: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    block, vector, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tl.arange(0, 4)
    row = block * 4 + r
    there = row < rows
    x_ptr += vector.to(tl.int64) * size
    words_ptr += block.to(tl.int64) * (width * (12 if BITS == 3 else 4))
    out_ptr += (part.to(tl.int64) * tl.num_programs(1) + vector) * rows
    scale_ptr += row.to(tl.int64) * groups
    group_size = size // groups
    table = _pairs_of(codebook_ptr, levels) if BITS == 2 else table_of(codebook_ptr, levels, BITS)
    sums = tl.zeros([W, 4], tl.float32)
    last = tl.minimum(part * cells + cells, width)
    for first in range(part * cells, last, W):
        cell = first + tl.arange(0, W)[:, None]
        inside = cell < last
        words = load_words(words_ptr, cell * 4 + r[None, :], width * 4, inside, BITS)
        x = _inputs(x_ptr, first, tl.minimum(size, last * CELL), W, CELL)
        values = _values(words, table, BITS)
        if GROUPS == 0:
            for s in tl.static_range(CELL):
                sums += values[s] * x[s][:, None]
        elif GROUPS == 1:
            own = values[0] * x[0][:, None]
            for s in tl.static_range(1, CELL):
                own += values[s] * x[s][:, None]
            at = scale_ptr[None, :] + cell * CELL // group_size
            sums += own * tl.load(at, mask=inside & there[None, :], other=0.0).to(tl.float32)
        else:
            for s in tl.static_range(CELL):
                k = cell * CELL + s
                at = scale_ptr[None, :] + k // group_size
                scale = tl.load(at, mask=(k < size) & there[None, :], other=0.0).to(tl.float32)
                sums += values[s] * x[s][:, None] * scale
    y = tl.sum(sums, axis=0)
    if GROUPS == 0:
        y *= tl.load(scale_ptr, mask=there, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + row, mask=there & (has_bias != 0), other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=there)


def group_mode(size: int, groups: int, unit: int) -> int:
    """GROUPS: 0 for one scale a row, 1 where a scale serves whole units of weights, else 2."""
    if groups == 1:
        return 0
    return 1 if size // groups % unit == 0 else 2


def linear(
    x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """`reference.linear` for a few rows: x (M, K) and all else contiguous."""
    bits = kernel_width(bits)
    (vectors, size), (rows, groups) = x.shape, scale.shape
    width = words.shape[1] // planes(bits)
    out = x.new_empty(vectors, rows)
    block, blocks = BLOCK_CELLS[bits], triton.cdiv(rows, ROWS)
    steps = triton.cdiv(width, block)
    parts = min(steps, max(1, PROGRAMS // (2 * blocks * vectors)))
    cells = triton.cdiv(steps, parts) * block
    parts = triton.cdiv(width, cells)
    sums = out if parts == 1 else out.new_empty(parts, vectors, rows, dtype=torch.float32)
    has_bias = bias is not None and parts == 1
    with torch.cuda.device_of(x):
        vector_kernel[(blocks, vectors, parts)](
            *(x, words, codebook, scale, bias if has_bias else scale, sums),
            *(rows, size, width, codebook.numel(), cells, groups, int(has_bias)),
            BITS=bits,
            GROUPS=group_mode(size, groups, CELL[bits]),
            W=block,
            num_warps=WARPS,
        )
        if parts > 1:
            finish(sums, bias, out)
    return out
