"""The Triton kernel of the codebook step; `weights_reference` says what it computes.

One launch for all layers and one program for a layer, with a thread for each of up to 256 levels.
All is done in float64. A program sums the parts of its statistics in a fixed order: it walks over
them 2,048 numbers at a time, as they lie in memory, so that a thread always meets the same level.
Sorting is counting: a number's place is how many come before it. No atomics; two runs on one kind
of card are equal to the last bit.

A program takes L2 latencies and not bandwidth: some microseconds, and 1 more for each 128 parts of
a layer of 4 bits (a million weights).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels.weights_reference import DEAD_COUNT, Ints

WIDTH = 256  # levels at most
WARPS = 8


@triton.jit
def _fold(sums, index, levels, WIDTH: tl.constexpr):
    """For each number the sum over all whose index differs by a multiple of `levels`."""
    distance = WIDTH // 2
    while distance >= levels:
        sums += tl.gather(sums, (index + distance) % WIDTH, axis=0)
        distance = distance // 2
    return sums


@triton.jit
def _places(keys_ptr, keys, index, count, WIDTH: tl.constexpr):
    """How many of the `count` keys come before each; equal ones keep their order.

    Threads see each other's keys by way of the memory at `keys_ptr`.
    """
    tl.store(keys_ptr + index, keys, mask=index < count)
    tl.debug_barrier()
    place = tl.zeros([WIDTH], tl.int32)
    for base in range(0, count, 16):
        other = base + tl.arange(0, 16)
        key = tl.load(keys_ptr + other, mask=other < count, other=float("inf"))[None, :]
        earlier = other[None, :] < index[:, None]
        before = (key < keys[:, None]) | ((key == keys[:, None]) & earlier)
        place += tl.sum(before.to(tl.int32), axis=1)
    return place


@triton.jit(do_not_specialize=["stride", "scratch_stride"])
def step_kernel(
    partials_ptr,
    stride,
    levels_ptr,
    counts_ptr,
    sums_ptr,
    new_levels_ptr,
    new_counts_ptr,
    new_sums_ptr,
    dead_ptr,
    scratch_ptr,
    scratch_stride,
    layers_ptr,
    decay: tl.float64,
    epsilon: tl.float64,
    split,
    zero,
    DEAD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One layer's step. Of scratch memory it takes four lines, each of a number for each level."""
    layer = tl.program_id(0)
    first_level = tl.load(layers_ptr + layer * 4)
    levels = tl.load(layers_ptr + layer * 4 + 1).to(tl.int32)
    partials_ptr += tl.load(layers_ptr + layer * 4 + 2)
    statistics = tl.load(layers_ptr + layer * 4 + 3)

    index = tl.arange(0, WIDTH)
    tile = tl.arange(0, 8)[:, None] * WIDTH + index[None, :]
    n_tile = tl.zeros([8, WIDTH], tl.float64)
    m_tile = tl.zeros([8, WIDTH], tl.float64)
    e_tile = tl.zeros([8, WIDTH], tl.float64)
    for base in range(0, statistics, 8 * WIDTH):
        i = base + tile
        inside = i < statistics
        n_tile += tl.load(partials_ptr + i, mask=inside, other=0.0)
        m_tile += tl.load(partials_ptr + stride + i, mask=inside, other=0.0)
        e_tile += tl.load(partials_ptr + stride + stride + i, mask=inside, other=0.0)
    fresh_n = _fold(tl.sum(n_tile, axis=0), index, levels, WIDTH)
    fresh_m = _fold(tl.sum(m_tile, axis=0), index, levels, WIDTH)
    error = _fold(tl.sum(e_tile, axis=0), index, levels, WIDTH)

    there = index < levels
    at = first_level + index
    c = tl.load(levels_ptr + at, mask=there, other=0.0).to(tl.float64)
    n = tl.load(counts_ptr + at, mask=there, other=0.0).to(tl.float64)
    m = tl.load(sums_ptr + at, mask=there, other=0.0).to(tl.float64)
    n = tl.where(there, decay * n + (1 - decay) * fresh_n, 0.0)
    m = decay * m + (1 - decay) * fresh_m
    total = tl.sum(n)
    smoothed = (n + epsilon) / (total + levels.to(tl.float64) * epsilon) * total
    dead = there & (n < DEAD)
    c = tl.where(dead, c, m / smoothed)
    deaths = tl.sum(dead.to(tl.int32))
    tl.store(dead_ptr + layer, deaths)

    scratch_ptr += first_level
    # a cell can be split when it is alive and holds at least two values that differ
    splittable = there & (dead == 0) & (fresh_n >= 2) & (error > 0)
    pairs = tl.minimum(deaths, tl.sum(splittable.to(tl.int32)))
    if split & (pairs > 0):
        keys = tl.where(splittable, -error, 0.0)
        rank = _places(scratch_ptr, keys, index, levels, WIDTH)
        giver = splittable & (rank < pairs)
        spread = tl.sqrt(tl.where(giver, error / fresh_n, 0.0))
        upper_ptr, half_ptr = scratch_ptr + scratch_stride, scratch_ptr + 2 * scratch_stride
        tl.store(upper_ptr + rank, c + spread, mask=giver)
        tl.store(half_ptr + rank, n / 2, mask=giver)
        tl.debug_barrier()
        order = tl.cumsum(dead.to(tl.int32)) - 1
        taker = dead & (order < pairs)
        c = tl.where(giver, c - spread, tl.load(upper_ptr + order, mask=taker, other=c))
        n = tl.where(giver, n / 2, tl.load(half_ptr + order, mask=taker, other=n))
        m = tl.where(giver | taker, n * c, m)
    nearest = tl.argmin(tl.where(there, tl.abs(c), float("inf")), axis=0)
    c = tl.where(zero & (index == nearest), 0.0, c)

    at = first_level + _places(scratch_ptr + 3 * scratch_stride, c, index, levels, WIDTH)
    tl.store(new_levels_ptr + at, c.to(new_levels_ptr.dtype.element_ty), mask=there)
    tl.store(new_counts_ptr + at, n.to(new_counts_ptr.dtype.element_ty), mask=there)
    tl.store(new_sums_ptr + at, m.to(new_sums_ptr.dtype.element_ty), mask=there)


@lru_cache(maxsize=256)
def _layers(bits: tuple[int, ...], parts: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 4) int64: first level, levels, first partial statistic, partial statistics."""
    lines, level, statistic = [], 0, 0
    for b, p in zip(bits, parts, strict=True):
        lines.append((level, 2**b, statistic, p * 2**b))
        level, statistic = level + 2**b, statistic + p * 2**b
    return torch.tensor(lines, dtype=torch.int64, device=device)


def codebook_step(
    partials: Tensor,
    levels: Tensor,
    counts: Tensor,
    sums: Tensor,
    bits: Ints,
    parts: Ints,
    decay: float,
    epsilon: float,
    split: bool,
    zero: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.codebook_step`; every tensor is contiguous."""
    new = torch.empty_like(levels), torch.empty_like(counts), torch.empty_like(sums)
    dead = levels.new_empty(len(bits), dtype=torch.int32)
    scratch = partials.new_empty(4, levels.numel())
    if len(bits):
        with torch.cuda.device_of(levels):
            step_kernel[(len(bits),)](
                *(partials, partials.shape[1], levels, counts, sums, *new, dead),
                *(scratch, levels.numel(), _layers(tuple(bits), tuple(parts), levels.device)),
                *(decay, epsilon, split, zero),
                DEAD=DEAD_COUNT,
                WIDTH=WIDTH,
                num_warps=WARPS,
                enable_fp_fusion=False,  # rounds where PyTorch does
            )
    return (*new, dead)
