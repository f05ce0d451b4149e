"""Triton kernels of matrix products and convolutions with packed weights: implicit GEMM.

A convolution is the product of the weight (N, K) with a matrix (K, M) that nobody stores: column m
is the patch of x that pixel m of the output sees, row k = (tap, channel). A linear layer is a
convolution of one tap over an image of one line. x lies channels-last, so that where STEP divides
the channels a block of K is one tap's next STEP channels, 16 bytes a thread; elsewhere each element
is found by itself. Outside of the image, and beyond K, x counts as 0.

A program makes ROWS rows by PIXELS pixels: it unpacks STEP codes of its rows at a time, looks them
up in a table of the dtype of x (see `packed_words`) and leaves the product to the tensor cores,
which add in float32. The integer kernel needs no table: code − m is an int8 and so is q − 128, and

    Σ (code − m)(q − z) = Σ (code − m)(q − 128) + (128 − z)·Σ_k (code − m)

where z is read outside of the image, which makes the left factor's share vanish. Where blocks of
the output alone do not fill the card, K is cut in parts that a second kernel adds in order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq.quant.kernels.packed_reference import Ints, kernel_width, out_size, planes
from adq.quant.kernels.packed_vector import group_mode
from adq.quant.kernels.packed_words import (
    _joined,
    codes_of,
    finish,
    load_words,
    look_up,
    table_of,
)

STEP = 64
"""Weights of a row that a program unpacks at a time."""
ROWS = 64
FEW_PIXELS, SOME_PIXELS, MANY_PIXELS = 16, 64, 128
"""Pixels of a program: of a small output, and of a larger one. Where patches are found element by
element, or scales serve a part of a row, a thread lacks the registers for many."""
WARPS = 4
PROGRAMS = 512
"""Programs that fill a card: four for each of some 130 cores."""
FINISH_BLOCK = 512
GEOMETRY = (
    *("height", "image_width", "out_height", "out_width", "taps_wide"),
    *("stride_y", "stride_x", "pad_y", "pad_x", "dilation_y", "dilation_x"),
)


@triton.jit
def _codes(words_ptr, first_row, rows, first, width, BITS: tl.constexpr, N: tl.constexpr):
    """The codes of N rows and STEP weights, (N/4, cells, 4, 2, ..., 2): natural order after
    `_as_matrix`."""
    CELL: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    CELLS: tl.constexpr = 64 // CELL
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    block = first_row // 4 + tl.arange(0, N // 4)[:, None, None]
    cell = first + tl.arange(0, CELLS)[None, :, None]
    at = block.to(tl.int64) * (width * (PLANES * 4)) + (cell * 4 + tl.arange(0, 4)[None, None, :])
    inside = (block * 4 < rows) & (cell < width)
    words = load_words(words_ptr, at, width * 4, inside, BITS)
    return _joined(codes_of(words, BITS))


@triton.jit
def _as_matrix(values, BITS: tl.constexpr, N: tl.constexpr):
    """(N/4, cells, 4, 2, ..., 2) -> (N, STEP)."""
    CELL: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    cells = tl.reshape(values, [N // 4, 64 // CELL, 4, CELL])
    return tl.reshape(tl.permute(cells, [0, 2, 1, 3]), [N, 64])


@triton.jit
def _patches(
    x_ptr,
    outside,
    beyond,
    pixel,
    pixels,
    k,
    size,
    channels,
    own,
    height,
    image_width,
    out_height,
    out_width,
    taps_wide,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows k to k + STEP of the matrix of patches: `outside` of the image, and `beyond` K."""
    line = pixel // out_width
    image = line // out_height
    top = (line - image * out_height) * stride_y - pad_y
    left = (pixel - line * out_width) * stride_x - pad_x
    step = tl.arange(0, STEP)
    if ALIGNED:  # one tap
        tap = k // own
        channel = (k - tap * own) + step[:, None]
        tap_y = tap // taps_wide
        y = (top + tap_y * dilation_y)[None, :]
        x = (left + (tap - tap_y * taps_wide) * dilation_x)[None, :]
    else:
        tap = (k + step) // own
        channel = (k + step - tap * own)[:, None]
        tap_y = tap // taps_wide
        y = top[None, :] + (tap_y * dilation_y)[:, None]
        x = left[None, :] + ((tap - tap_y * taps_wide) * dilation_x)[:, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < image_width) & (pixel < pixels)[None, :]
    place = (image.to(tl.int64)[None, :] * height + y) * image_width + x
    at = x_ptr + (place * channels + channel)
    if ALIGNED:
        return tl.load(at, mask=inside, other=outside)
    known = (k + step < size)[:, None]
    return tl.where(known, tl.load(at, mask=inside & known, other=outside), beyond)


@triton.jit(do_not_specialize=GEOMETRY)
def matrix_kernel(
    x_ptr,
    words_ptr,
    codebook_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    rows,
    size,
    width,
    levels,
    steps,
    groups,
    has_bias,
    channels,
    own,
    own_rows,
    height,
    image_width,
    out_height,
    out_width,
    taps_wide,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One block of the output, or of a part of it: program (block, group of channels, part).

    size is K, width the cells of a row, steps those of a part in K, groups the scales of a row;
    `own` and `own_rows` are the input and output channels of a group of channels.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CELLS: tl.constexpr = STEP * (3 if BITS == 3 else BITS) // (96 if BITS == 3 else 32)
    group, part = tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(own_rows + 3, ROWS)
    column = tl.program_id(0) // blocks
    first_row = group * own_rows // 4 * 4 + (tl.program_id(0) - column * blocks) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = (row >= group * own_rows) & (row < (group + 1) * own_rows)
    pixel = column * PIXELS + tl.arange(0, PIXELS)
    x_ptr += group * own
    scale_ptr += row.to(tl.int64) * groups
    group_size = size // groups
    table = table_of(codebook_ptr, levels, BITS).to(dtype)
    sums = tl.zeros([ROWS, PIXELS], tl.float32)
    last = tl.minimum(part * steps + steps, tl.cdiv(size, STEP))
    for i in range(part * steps, last):
        codes = _codes(words_ptr, first_row, rows, i * CELLS, width, BITS, ROWS)
        w = _as_matrix(look_up(table, codes), BITS, ROWS)
        x = _patches(
            *(x_ptr, 0.0, 0.0, pixel, pixels, i * STEP, size, channels, own),
            *(height, image_width, out_height, out_width, taps_wide),
            *(stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x),
            ALIGNED,
            STEP,
        ).to(dtype)
        if GROUPS == 0:
            sums = tl.dot(w, x, sums)
        elif GROUPS == 1:  # a scale serves whole steps
            scale = tl.load(scale_ptr + i * STEP // group_size, mask=there, other=0.0)
            sums += tl.dot(w, x) * scale.to(tl.float32)[:, None]
        else:
            k = i * STEP + tl.arange(0, STEP)
            at = scale_ptr[:, None] + (k // group_size)[None, :]
            scale = tl.load(at, mask=there[:, None] & (k < size)[None, :], other=0.0)
            sums = tl.dot((w.to(tl.float32) * scale.to(tl.float32)).to(dtype), x, sums)
    if GROUPS == 0:
        sums *= tl.load(scale_ptr, mask=there, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(bias_ptr + row, mask=there & (has_bias != 0), other=0.0).to(tl.float32)
    y = tl.trans(sums + bias[:, None]).to(out_ptr.dtype.element_ty)
    at = (part * pixels.to(tl.int64) + pixel[:, None]) * rows + row[None, :]
    tl.store(out_ptr + at, y, mask=(pixel < pixels)[:, None] & there[None, :])


@triton.jit
def _real(products, totals, sums, scale, bias, lift, step, centre, size):
    """y of Σ (code − m)(q − 128) and Σ (q − 128) over all K; lift is 128 − z."""
    a = (products + lift * sums).to(tl.float32)
    b = (totals + lift * size).to(tl.float32)
    return (a * step + b * centre) * scale + bias


@triton.jit(do_not_specialize=(*GEOMETRY, "middle"))
def integer_kernel(
    q_ptr,
    words_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    x_scale_ptr,
    zero_point_ptr,
    out_ptr,
    totals_ptr,
    pixels,
    rows,
    size,
    width,
    steps,
    has_bias,
    channels,
    own,
    own_rows,
    middle,
    step: tl.float32,
    centre: tl.float32,
    height,
    image_width,
    out_height,
    out_width,
    taps_wide,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dilation_y,
    dilation_x,
    BITS: tl.constexpr,
    PARTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """As `matrix_kernel`, in int8 and int32; PARTED writes the sums of a part to `out` (parts,
    pixels, rows) and `totals` (parts, groups of channels, pixels), both int32."""
    CELLS: tl.constexpr = STEP * (3 if BITS == 3 else BITS) // (96 if BITS == 3 else 32)
    group, part = tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(own_rows + 3, ROWS)
    column = tl.program_id(0) // blocks
    first_row = group * own_rows // 4 * 4 + (tl.program_id(0) - column * blocks) * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = (row >= group * own_rows) & (row < (group + 1) * own_rows)
    pixel = column * PIXELS + tl.arange(0, PIXELS)
    q_ptr += group * own
    zero_point = tl.load(zero_point_ptr).to(tl.int32)
    products = tl.zeros([ROWS, PIXELS], tl.int32)
    totals = tl.zeros([PIXELS], tl.int32)
    last = tl.minimum(part * steps + steps, tl.cdiv(size, STEP))
    for i in range(part * steps, last):
        codes = _codes(words_ptr, first_row, rows, i * CELLS, width, BITS, ROWS)
        w = _as_matrix((codes - middle).to(tl.int8), BITS, ROWS)
        q = _patches(
            *(q_ptr, zero_point.to(tl.uint8), 128, pixel, pixels, i * STEP, size, channels, own),
            *(height, image_width, out_height, out_width, taps_wide),
            *(stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x),
            ALIGNED,
            STEP,
        )
        q = (q.to(tl.uint8) ^ 128).to(tl.int8, bitcast=True)  # q − 128
        products = tl.dot(w, q, products, out_dtype=tl.int32)
        totals += tl.sum(q.to(tl.int32), axis=0)
    known = pixel < pixels
    at = (part * pixels.to(tl.int64) + pixel[:, None]) * rows + row[None, :]
    if PARTED:
        tl.store(out_ptr + at, tl.trans(products), mask=known[:, None] & there[None, :])
        line = (part * tl.num_programs(1) + group) * pixels.to(tl.int64)
        tl.store(totals_ptr + line + pixel, totals, mask=known)  # the same from each block of rows
    else:
        scale = tl.load(scale_ptr + row, mask=there, other=0.0) * tl.load(x_scale_ptr)
        bias = tl.load(bias_ptr + row, mask=there & (has_bias != 0), other=0.0).to(tl.float32)
        sums = tl.load(sums_ptr + row, mask=there, other=0)
        y = _real(
            *(products, totals[None, :], sums[:, None], scale[:, None], bias[:, None]),
            *(128 - zero_point, step, centre, size),
        )
        y = tl.trans(y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=known[:, None] & there[None, :])


@triton.jit(do_not_specialize=("parts",))
def integer_finish_kernel(
    parts_ptr,
    totals_ptr,
    scale_ptr,
    sums_ptr,
    bias_ptr,
    x_scale_ptr,
    zero_point_ptr,
    out_ptr,
    pixels,
    rows,
    own_rows,
    size,
    parts,
    has_bias,
    step: tl.float32,
    centre: tl.float32,
    BLOCK: tl.constexpr,
):
    """y of the parts of `integer_kernel`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = pixels.to(tl.int64) * rows
    inside = i < numel
    pixel = i // rows
    row = (i - pixel * rows).to(tl.int32)
    group = row // own_rows
    groups = rows // own_rows
    products = tl.zeros([BLOCK], tl.int32)
    totals = tl.zeros([BLOCK], tl.int32)
    for part in range(parts):
        products += tl.load(parts_ptr + part * numel + i, mask=inside, other=0)
        line = (part * groups + group) * pixels.to(tl.int64)
        totals += tl.load(totals_ptr + line + pixel, mask=inside, other=0)
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0) * tl.load(x_scale_ptr)
    bias = tl.load(bias_ptr + row, mask=inside & (has_bias != 0), other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + row, mask=inside, other=0)
    lift = 128 - tl.load(zero_point_ptr).to(tl.int32)
    y = _real(products, totals, sums, scale, bias, lift, step, centre, size)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Image:
    """A convolution's geometry; `shape` is that of x (images, channels, height, width)."""

    shape: tuple[int, ...]
    kernel_size: Ints = (1, 1)
    stride: Ints = (1, 1)
    padding: Ints = (0, 0)
    dilation: Ints = (1, 1)
    groups: int = 1

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return out_size(self.shape[2:], *geometry)

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.out[0] * self.out[1]

    @property
    def own(self) -> int:
        """Input channels of a group."""
        return self.shape[1] // self.groups

    @property
    def aligned(self) -> bool:
        """Whether STEP weights of a row are always of one tap."""
        return self.own % STEP == 0

    def arguments(self) -> tuple[int, ...]:
        """What GEOMETRY names."""
        return (
            *(*self.shape[2:], *self.out, self.kernel_size[1]),
            *(*self.stride, *self.padding, *self.dilation),
        )


def line_of(x: Tensor) -> Image:
    """A matrix (M, K) as an image of one line of M pixels."""
    return Image((1, x.shape[1], 1, x.shape[0]))


@dataclass(frozen=True)
class Launch:
    """How the output is cut: pixels of a block, steps of a part, the grid."""

    pixels: int
    steps: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, image: Image, rows: int, size: int, groups: int) -> "Launch":
        many = MANY_PIXELS if image.aligned and groups == 1 else SOME_PIXELS
        pixels = FEW_PIXELS if image.pixels <= 2 * FEW_PIXELS else many
        blocks = triton.cdiv(rows // image.groups + 3, ROWS) * triton.cdiv(image.pixels, pixels)
        steps = triton.cdiv(size, STEP)
        # a part of fewer than four steps would not pay for its second kernel
        parts = max(1, min(steps // 4, PROGRAMS // (2 * blocks * image.groups)))
        steps_of_part = triton.cdiv(steps, parts)
        parts = triton.cdiv(steps, steps_of_part)
        return cls(pixels, steps_of_part, (blocks, image.groups, parts))

    @property
    def parts(self) -> int:
        return self.grid[2]

    def constants(self, bits: int, image: Image) -> dict[str, Any]:
        return {
            "BITS": bits,
            "ALIGNED": image.aligned,
            "PIXELS": self.pixels,
            "ROWS": ROWS,
            "STEP": STEP,
            "num_warps": WARPS,
        }


def product(
    x: Tensor,
    image: Image,
    words: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """The output (pixels, N) of x, which lies channels-last; all else is contiguous."""
    bits = kernel_width(bits)
    (rows, groups), width = scale.shape, words.shape[1] // planes(bits)
    size = image.kernel_size[0] * image.kernel_size[1] * image.own
    launch = Launch.of(image, rows, size, groups)
    out = x.new_empty(image.pixels, rows)
    parted = launch.parts > 1
    sums = out.new_empty(launch.parts, *out.shape, dtype=torch.float32) if parted else out
    has_bias = bias is not None and not parted
    with torch.cuda.device_of(x):
        matrix_kernel[launch.grid](
            *(x, words, codebook, scale, bias if has_bias else scale, sums),
            *(image.pixels, rows, size, width, codebook.numel(), launch.steps, groups),
            *(int(has_bias), image.shape[1], image.own, rows // image.groups),
            *image.arguments(),
            GROUPS=group_mode(size, groups, STEP),
            **launch.constants(bits, image),
        )
        if parted:
            finish(sums, bias, out)
    return out


def integer_product(
    q: Tensor,
    image: Image,
    words: Tensor,
    step: float,
    offset: float,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The output (pixels, N) of uint8 codes, which lie channels-last; all else is contiguous."""
    middle, bits = 2 ** (bits - 1), kernel_width(bits)
    rows, width = scale.shape[0], words.shape[1] // planes(bits)
    size, own_rows = image.kernel_size[0] * image.kernel_size[1] * image.own, rows // image.groups
    launch = Launch.of(image, rows, size, 1)
    out = q.new_empty(image.pixels, rows, dtype=dtype)
    parted = launch.parts > 1
    parts, totals = out, sums
    if parted:
        parts = q.new_empty((launch.parts, *out.shape), dtype=torch.int32)
        totals = q.new_empty((launch.parts, image.groups, image.pixels), dtype=torch.int32)
    real = (scale, sums, scale if bias is None else bias, x_scale, zero_point)
    has_bias, centre = int(bias is not None), offset + step * middle
    with torch.cuda.device_of(q):
        integer_kernel[launch.grid](
            *(q, words, *real, parts, totals, image.pixels, rows, size, width, launch.steps),
            *(has_bias, image.shape[1], image.own, own_rows, middle, step, centre),
            *image.arguments(),
            PARTED=parted,
            **launch.constants(bits, image),
        )
        if parted:
            integer_finish_kernel[(triton.cdiv(out.numel(), FINISH_BLOCK),)](
                *(parts, totals, *real, out, image.pixels, rows, own_rows, size),
                *(launch.parts, has_bias, step, centre),
                BLOCK=FINISH_BLOCK,
            )
    return out
