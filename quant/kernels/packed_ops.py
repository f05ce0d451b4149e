"""The operators over packed weights: `adq::packed_linear`, `adq::packed_conv2d`, and their integer
ways `adq::packed_linear_int` and `adq::packed_conv2d_int`. Their arguments are those of
`packed_reference`, and words come from its `arrange`.

A CUDA (or ROCm) tensor of 16 bits, or of codes, goes to the Triton kernels of `packed_vector` and
`packed_matrix`, and so does a float32 vector; float32 matrices and images, for which tensor cores
have no exact product, go to the reference there, as all else does. These are operators of
inference: they have no derivatives. Triton is imported at the first call on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from adq.quant.kernels import packed_reference as reference
from adq.quant.kernels.library import register
from adq.quant.kernels.packed_reference import CELL, ROWS, Ints, kernel_width, planes

HALVES = (torch.float16, torch.bfloat16)


def linear(
    x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """x (..., K) -> (..., N) in the dtype of x."""
    return _LINEAR(x, words, codebook, scale, bias, bits)


def conv2d(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: Ints,
    stride: Ints = (1, 1),
    padding: Ints = (0, 0),
    dilation: Ints = (1, 1),
    groups: int = 1,
) -> Tensor:
    """x (B, C, H, W) -> (B, O, H', W') in the dtype of x, channels last."""
    geometry = (kernel_size, stride, padding, dilation, groups)
    return _CONV2D(x, words, codebook, scale, bias, bits, *geometry)


def linear_int(
    q: Tensor,
    words: Tensor,
    step: float,
    offset: float,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes q (..., K) -> (..., N) in `dtype`, by integers."""
    real = (step, offset, scale, sums, bias, x_scale, zero_point)
    return _LINEAR_INT(q, words, *real, bits, dtype)


def conv2d_int(
    q: Tensor,
    words: Tensor,
    step: float,
    offset: float,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    kernel_size: Ints,
    stride: Ints = (1, 1),
    padding: Ints = (0, 0),
    dilation: Ints = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes q (B, C, H, W) -> (B, O, H', W') in `dtype`, channels last, by integers."""
    real = (step, offset, scale, sums, bias, x_scale, zero_point)
    geometry = (kernel_size, stride, padding, dilation, groups)
    return _CONV2D_INT(q, words, *real, bits, *geometry, dtype)


def _check(words: Tensor, scale: Tensor, bits: int, k: int) -> None:
    """Raise ValueError unless the words are those of rows of k weights, one for each of scale."""
    width = kernel_width(bits)
    shape = (-(-scale.shape[0] // ROWS), -(-k // CELL[width]) * planes(width), ROWS)
    if words.shape != shape or k % scale.shape[1]:
        raise ValueError(
            f"expected words of shape {shape} for scales of shape {tuple(scale.shape)} and rows of "
            f"{k} weights of {bits} bits, got {tuple(words.shape)}"
        )


def _check_conv(
    x: Tensor, words: Tensor, scale: Tensor, bits: int, kernel_size: Ints, groups: int
) -> None:
    _check(words, scale, bits, kernel_size[0] * kernel_size[1] * (x.shape[1] // groups))


def _linear(x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    _check(words, scale, rest[-1], x.shape[-1])
    return reference.linear(x, words, codebook, scale, *rest)


def _linear_on_gpu(
    x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    from adq.quant.kernels import packed_matrix, packed_vector

    matrix = x.reshape(-1, x.shape[-1]).contiguous()
    few = 0 < matrix.shape[0] <= packed_vector.MAX_VECTORS
    half = x.dtype in HALVES
    if not matrix.numel() or not (half or (few and x.dtype == torch.float32)):
        return _linear(x, words, codebook, scale, bias, bits)
    _check(words, scale, bits, x.shape[-1])
    if few:
        out = packed_vector.linear(matrix, words, codebook, scale, bias, bits)
    else:
        image = packed_matrix.line_of(matrix)
        out = packed_matrix.product(matrix, image, words, codebook, scale, bias, bits)
    return out.view(*x.shape[:-1], -1)


def _conv2d(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    _check_conv(x, words, scale, bits, kernel_size, groups)
    geometry = (kernel_size, stride, padding, dilation, groups)
    return reference.conv2d(x, words, codebook, scale, bias, bits, *geometry)


def _conv2d_on_gpu(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    from adq.quant.kernels import packed_matrix

    geometry = (kernel_size, stride, padding, dilation, groups)
    if x.dtype not in HALVES or not x.numel():
        return _conv2d(x, words, codebook, scale, bias, bits, *geometry)
    _check_conv(x, words, scale, bits, kernel_size, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    image = packed_matrix.Image(tuple(x.shape), *geometry)
    out = packed_matrix.product(x, image, words, codebook, scale, bias, bits)
    return out.view(x.shape[0], *image.out, -1).permute(0, 3, 1, 2)


def _linear_int(q: Tensor, words: Tensor, *rest: Any) -> Tensor:
    _check(words, rest[2], rest[7], q.shape[-1])
    return reference.linear_int(q, words, *rest)


def _linear_int_on_gpu(q: Tensor, words: Tensor, *rest: Any) -> Tensor:
    from adq.quant.kernels import packed_matrix

    if not q.numel():
        return _linear_int(q, words, *rest)
    _check(words, rest[2], rest[7], q.shape[-1])
    matrix = q.reshape(-1, q.shape[-1]).contiguous()
    image = packed_matrix.line_of(matrix)
    return packed_matrix.integer_product(matrix, image, words, *rest).view(*q.shape[:-1], -1)


def _conv2d_int(q: Tensor, words: Tensor, *rest: Any) -> Tensor:
    _check_conv(q, words, rest[2], rest[7], rest[8], rest[12])
    return reference.conv2d_int(q, words, *rest)


def _conv2d_int_on_gpu(q: Tensor, words: Tensor, *rest: Any) -> Tensor:
    from adq.quant.kernels import packed_matrix

    if not q.numel():
        return _conv2d_int(q, words, *rest)
    real, geometry, dtype = rest[:8], rest[8:13], rest[13]
    _check_conv(q, words, rest[2], rest[7], rest[8], rest[12])
    q = q.contiguous(memory_format=torch.channels_last)
    image = packed_matrix.Image(tuple(q.shape), *geometry)
    out = packed_matrix.integer_product(q, image, words, *(*real, dtype))
    return out.view(q.shape[0], *image.out, -1).permute(0, 3, 1, 2)


def _fake_linear(x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _fake_linear_int(
    q: Tensor, words: Tensor, step: float, offset: float, scale: Tensor, *rest: Any
) -> Tensor:
    return q.new_empty(*q.shape[:-1], scale.shape[0], dtype=rest[-1])


def _fake_conv2d(
    x: Tensor,
    words: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    *geometry: Any,
) -> Tensor:
    return _fake_image(x, scale, geometry, x.dtype)


def _fake_conv2d_int(
    q: Tensor, words: Tensor, step: float, offset: float, scale: Tensor, *rest: Any
) -> Tensor:
    return _fake_image(q, scale, rest[5:10], rest[10])


def _fake_image(x: Tensor, scale: Tensor, geometry: Any, dtype: torch.dtype) -> Tensor:
    sizes = reference.out_size(x.shape[2:], *geometry[:4])
    return torch.empty(
        (x.shape[0], scale.shape[0], *sizes),
        dtype=dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


_GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_REAL = (
    "float step, float offset, Tensor scale, Tensor sums, Tensor? bias, Tensor x_scale,"
    " Tensor zero_point, int bits"
)
_LINEAR = register(
    "packed_linear(Tensor x, Tensor words, Tensor codebook, Tensor scale, Tensor? bias, int bits)"
    " -> Tensor",
    cpu=_linear,
    gpu=_linear_on_gpu,
    fake=_fake_linear,
)
_CONV2D = register(
    "packed_conv2d(Tensor x, Tensor words, Tensor codebook, Tensor scale, Tensor? bias, int bits,"
    f" {_GEOMETRY}) -> Tensor",
    cpu=_conv2d,
    gpu=_conv2d_on_gpu,
    fake=_fake_conv2d,
)
_LINEAR_INT = register(
    f"packed_linear_int(Tensor q, Tensor words, {_REAL}, ScalarType dtype) -> Tensor",
    cpu=_linear_int,
    gpu=_linear_int_on_gpu,
    fake=_fake_linear_int,
)
_CONV2D_INT = register(
    f"packed_conv2d_int(Tensor q, Tensor words, {_REAL}, {_GEOMETRY}, ScalarType dtype) -> Tensor",
    cpu=_conv2d_int,
    gpu=_conv2d_int_on_gpu,
    fake=_fake_conv2d_int,
)
