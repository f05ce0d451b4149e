"""Products and convolutions with packed codebook weights in plain PyTorch: the meaning of the
kernels, and the CPU's way.

A weight is a matrix of N rows of K weights of b bits. Row n is

    w[n, k] = scale[n, k div (K/G)] · codebook[code[n, k]]       codebook (2^b,), scale (N, G)

with G scales a row, one for each K/G weights; a convolution has one for each of its output
channels, and a row of it holds the weights in the order (kh, kw, channel), as channels-last does.

Words. Codes of 2, 3, 4 and 8 bits lie in 32-bit words, others in the next wider code. A cell of C
codes (16, 32, 8 and 4) takes one word, or three at 3 bits, and four rows take turns, so that a
thread which loads 16 bytes has one cell of four rows:

    words (ceil(N/4), planes · width, 4) int32        width = ceil(K/C), planes = 3 at 3 bits, or 1

                              n mod 4 = 0      1          2          3
    words[n div 4, 0]       = [codes 0..C−1]  [codes 0..C−1]  ...            plane 0, cell 0
    words[n div 4, 1]       = [codes C..2C−1] ...                            plane 0, cell 1
    ...
    words[n div 4, width]   = ...                                            plane 1, cell 0

    bits of a word of cell u      31                                      0
    2, 4, 8 bits                  | code uC+C−1 | ... | code uC+1 | code uC |
    3 bits, plane p of 0, 1, 2    | 2 bits | code 32u+10p+9 | ... | code 32u+10p |

At 3 bits the two upper bits of planes 0, 1 and 2 are, from the lowest to the highest, code 32u+30
and then code 32u+31. Rows and codes that are missing at the end count as the code 2^(b−1). Words
take N·K·b/8 bytes, and what rounding K up to C and N up to 4 adds.

Sums are in float32 on a GPU, where weights meet x in the dtype of x in products of several rows:
a weight is then rounded once or twice to that dtype. Here x and w are multiplied in the dtype of x.

The integer path serves codebooks with uniform levels, codebook[k] = offset + step·k, and inputs
with uniform levels, x = x_scale·(q − z), q a uint8 and z a whole number in 0..255. With the middle
code m = 2^(b−1), and the whole numbers

    A[r, n] = Σ_k (code[n, k] − m)·(q[r, k] − z)        B[r] = Σ_k (q[r, k] − z)

which int32 holds up to K = 65,793 (255·128·K < 2^31), it gives

    y[r, n] = scale[n]·x_scale · (step·A + (offset + step·m)·B) + bias[n]

in float32. Outside of an image lies q = z, which is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Ints = Sequence[int]

WIDTHS = (2, 3, 4, 8)
"""Bits of a code that the kernels know."""
CELL = {2: 16, 3: 32, 4: 8, 8: 4}
"""Codes of a cell."""
ROWS = 4
"""Rows that take turns."""
UPPER = 10
"""Codes of 3 bits in one word, below its two upper bits."""


def kernel_width(bits: int) -> int:
    """The next of WIDTHS that holds codes of `bits` bits."""
    return next(width for width in WIDTHS if width >= bits)


def planes(width: int) -> int:
    """Words of a cell."""
    return 3 if width == 3 else 1


def arrange(codes: Tensor, bits: int) -> Tensor:
    """The words of codes (N, K) in 0..2^bits−1."""
    width = kernel_width(bits)
    n, k = codes.shape
    cell = CELL[width]
    padding = (0, -k % cell, 0, -n % ROWS)
    padded = F.pad(codes.to(torch.int64), padding, value=2 ** (bits - 1))
    cells = padded.view(-1, ROWS, padded.shape[1] // cell, cell)  # (N/4, row, cell, code)
    words = _words_of_3(cells) if width == 3 else _sum_of_shifted(cells, width)[:, :, None]
    # (N/4, row, plane, cell) -> (N/4, plane, cell, row)
    words = words.permute(0, 2, 3, 1).reshape(words.shape[0], -1, ROWS)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _sum_of_shifted(parts: Tensor, bits: int) -> Tensor:
    """Σ_i parts[..., i]·2^(bits·i)."""
    shifts = bits * torch.arange(parts.shape[-1], device=parts.device)
    return (parts << shifts).sum(-1)


def _words_of_3(cells: Tensor) -> Tensor:
    """Cells of 32 codes (N/4, row, cell, 32) -> their three words (N/4, row, plane, cell)."""
    upper = cells[..., 30] | cells[..., 31] << 3
    words = [
        _sum_of_shifted(cells[..., UPPER * p : UPPER * (p + 1)], 3) | (upper >> 2 * p & 3) << 30
        for p in range(3)
    ]
    return torch.stack(words, dim=2)


def restore(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The codes (n, k) uint8 that `arrange` was given."""
    width = kernel_width(bits)
    blocks, count = words.shape[0], planes(width)
    # (N/4, plane, cell, row) -> (N/4, row, cell, plane)
    words = words.view(blocks, count, -1, ROWS).permute(0, 3, 2, 1).to(torch.int64) & (2**32 - 1)
    per_word = UPPER if width == 3 else CELL[width]
    shifts = width * torch.arange(per_word, device=words.device)
    codes = (words[..., None] >> shifts & 2**width - 1).flatten(3)
    if width == 3:
        upper = _sum_of_shifted(words >> 30, 2)
        codes = torch.cat([codes, torch.stack([upper & 7, upper >> 3], dim=-1)], dim=-1)
    return codes.reshape(blocks * ROWS, -1)[:n, :k].to(torch.uint8)


def code_sums(codes: Tensor, bits: int) -> Tensor:
    """Σ_k (code[n, k] − m), m = 2^(bits−1), (N,) int32: what the integer path takes."""
    return (codes.to(torch.int32) - 2 ** (bits - 1)).sum(1, dtype=torch.int32)


def uniform_levels(codebook: Tensor) -> tuple[float, float] | None:
    """(step, offset) where every codebook[k] is offset + step·k, or None.

    What rounding to the codebook's dtype does is allowed: one unit in the last place of the largest
    level.
    """
    levels = codebook.double()
    offset = float(levels[0])
    step = (float(levels[-1]) - offset) / (levels.numel() - 1)
    even = offset + step * torch.arange(levels.numel(), dtype=torch.float64, device=levels.device)
    rounding = torch.finfo(codebook.dtype).eps * float(levels.abs().max())
    return (step, offset) if bool(((even - levels).abs() <= rounding).all()) else None


def dequantize(
    words: Tensor, codebook: Tensor, scale: Tensor, bits: int, k: int, dtype: torch.dtype
) -> Tensor:
    """The weight (N, k), computed in float32 at least and then rounded to `dtype`."""
    n, groups = scale.shape
    work = torch.promote_types(codebook.dtype, torch.float32)
    values = codebook.to(work)[restore(words, bits, n, k).int()]
    return (values.view(n, groups, -1) * scale.to(work)[:, :, None]).view(n, k).to(dtype)


def linear(
    x: Tensor, words: Tensor, codebook: Tensor, scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """x (..., K) -> (..., N) in the dtype of x."""
    weight = dequantize(words, codebook, scale, bits, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def conv2d(
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
    """x (B, C, H, W) -> (B, O, H', W') in the dtype of x, channels last."""
    own = x.shape[1] // groups
    k = kernel_size[0] * kernel_size[1] * own
    weight = dequantize(words, codebook, scale, bits, k, x.dtype)
    weight = weight.view(-1, *kernel_size, own).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.to(x.dtype)
    rest = list(stride), list(padding), list(dilation), groups
    return _channels_last(F.conv2d(x, weight, bias, *rest))


def _channels_last(x: Tensor) -> Tensor:
    """x with the strides that `torch.empty` gives a channels-last tensor, sizes of 1 as well."""
    _, channels, height, width = x.shape
    strides = (height * width * channels, 1, width * channels, channels)
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def out_size(
    size: Ints, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[int, int]:
    """Height and width of what a convolution makes of an image of this height and width."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )
    return height, width


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
    dtype: torch.dtype,
) -> Tensor:
    """q (..., K) uint8 -> (..., N) in `dtype`; `sums` are the `code_sums`."""
    middle = 2 ** (bits - 1)
    # float64 holds every sum exactly
    codes = restore(words, bits, scale.shape[0], q.shape[-1]).double() - middle
    inputs = q.double() - zero_point.double()
    products, totals = F.linear(inputs, codes), inputs.sum(-1, keepdim=True)
    return _real(products, totals, step, offset + step * middle, scale, bias, x_scale).to(dtype)


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
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """q (B, C, H, W) uint8 -> (B, O, H', W') in `dtype`, channels last."""
    middle = 2 ** (bits - 1)
    n, own = scale.shape[0], q.shape[1] // groups
    codes = restore(words, bits, n, kernel_size[0] * kernel_size[1] * own).double() - middle
    weight = codes.view(n, *kernel_size, own).permute(0, 3, 1, 2)
    inputs = q.double() - zero_point.double()
    rest = list(stride), list(padding), list(dilation), groups
    products = F.conv2d(inputs, weight, None, *rest)
    totals = F.conv2d(inputs, torch.ones_like(weight), None, *rest)
    products, totals = (t.permute(0, 2, 3, 1) for t in (products, totals))
    y = _real(products, totals, step, offset + step * middle, scale, bias, x_scale)
    return _channels_last(y.to(dtype).permute(0, 3, 1, 2))


def _real(
    products: Tensor,
    totals: Tensor,
    step: float,
    centre: float,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor,
) -> Tensor:
    """y (..., N) of A and B, in float32."""
    y = (products.float() * step + totals.float() * centre) * (scale.flatten() * x_scale).float()
    return y if bias is None else y + bias.float()


def conv_supported(channels: int, out_channels: int, groups: int) -> bool:
    """Whether the convolution kernel pays for such a layer.

    It works for one group at a time with 16 or more of its channels on either side; of a grouped
    layer with fewer, as a depthwise one, it would compute zeros mostly.
    """
    return groups == 1 or (channels // groups >= 16 and out_channels // groups >= 16)


def integer_supported(zero_point: float, k: int) -> bool:
    """Whether the integer path serves inputs with this zero point and rows of k weights."""
    return zero_point == round(zero_point) and 0 <= zero_point <= 255 and 255 * 128 * k < 2**31
