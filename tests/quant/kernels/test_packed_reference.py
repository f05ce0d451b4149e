"""The packed weights' reference against loops over plain numbers, written from the formulas.

Numbers are short binary fractions where equality is asked for.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adq.quant.kernels import packed_reference as reference
from adq.quant.kernels.packed_reference import CELL, WIDTHS

BITS = range(2, 9)
SHAPES = [(1, 1), (4, 32), (5, 37), (7, 129)]

CONVOLUTIONS = [
    # channels, out, kernel, stride, padding, dilation, groups
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, (3, 2), (2, 1), (0, 2), (1, 2), 2),
    (5, 5, (3, 3), (1, 2), (1, 1), (1, 1), 5),
    (6, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def codes_of(n: int, k: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + k)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)


def quarters(shape: tuple[int, ...], most: int, seed: int) -> Tensor:
    """Multiples of 1/4, at most `most` in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4 * most, 4 * most + 1, shape, generator=generator) / 4


def test_codes_have_the_next_width_that_the_kernels_know() -> None:
    assert [reference.kernel_width(bits) for bits in BITS] == [2, 3, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_words_are_what_the_drawing_says(bits: int, shape: tuple[int, int]) -> None:
    n, k = shape
    codes = codes_of(n, k, bits)
    words = reference.arrange(codes, bits)
    width = reference.kernel_width(bits)
    cells = -(-k // CELL[width])
    planes = 3 if width == 3 else 1
    assert words.dtype == torch.int32
    assert words.shape == (-(-n // 4), planes * cells, 4)
    table = codes.tolist()
    for row, cell in itertools.product(range(4 * words.shape[0]), range(cells)):
        own = [
            table[row][i] if row < n and i < k else 2 ** (bits - 1)
            for i in range(CELL[width] * cell, CELL[width] * (cell + 1))
        ]
        if width == 3:
            upper = own[30] + 8 * own[31]
            expected = [
                sum(c << 3 * i for i, c in enumerate(own[10 * p : 10 * p + 10]))
                + ((upper >> 2 * p) % 4 << 30)
                for p in range(3)
            ]
        else:
            expected = [sum(c << width * i for i, c in enumerate(own))]
        found = [int(words[row // 4, p * cells + cell, row % 4]) % 2**32 for p in range(planes)]
        assert found == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits: int, shape: tuple[int, int]) -> None:
    codes = codes_of(*shape, bits)
    assert torch.equal(reference.restore(reference.arrange(codes, bits), bits, *shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_take_no_more_bytes_than_the_codes_where_sizes_are_even(bits: int) -> None:
    words = reference.arrange(codes_of(8, 96, bits), bits)
    assert words.nbytes == 8 * 96 * bits // 8


@pytest.mark.parametrize("groups", [1, 3, 9])
@pytest.mark.parametrize("bits", BITS)
def test_a_product_is_that_of_a_slow_loop(bits: int, groups: int) -> None:
    n, k = 5, 9
    codes, levels = codes_of(n, k, bits), quarters((2**bits,), 4, 0)
    scale, bias, x = quarters((n, groups), 2, 1), quarters((n,), 2, 2), quarters((2, 3, k), 3, 3)
    words = reference.arrange(codes, bits)
    found = reference.linear(x, words, levels, scale, bias, bits)
    assert found.shape == (2, 3, n)
    for i, j, row in itertools.product(range(2), range(3), range(n)):
        expected = float(bias[row])
        for c in range(k):
            weight = float(scale[row, c * groups // k]) * float(levels[int(codes[row, c])])
            expected += weight * float(x[i, j, c])
        assert found[i, j, row] == expected
    without = reference.linear(x, words, levels, scale, None, bits)
    assert torch.equal(without + bias, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_product_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    codes, levels = codes_of(4, 8, 4), torch.arange(16.0)
    arguments = reference.arrange(codes, 4), levels, torch.ones(4, 1), torch.ones(4), 4
    found = reference.linear(torch.ones(2, 8, dtype=dtype), *arguments)
    assert found.dtype == dtype
    assert torch.equal(found[0].float(), codes.float().sum(1) + 1)


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_a_convolution_is_the_sum_over_its_taps(
    layer: tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int],
) -> None:
    channels, out, kernel, stride, padding, dilation, groups = layer
    own = channels // groups
    codes, levels = codes_of(out, kernel[0] * kernel[1] * own, 3), quarters((8,), 2, 0)
    scale, bias = quarters((out, 1), 2, 1), quarters((out,), 2, 2)
    x = quarters((2, channels, 6, 5), 3, 3)
    words = reference.arrange(codes, 3)
    found = reference.conv2d(
        x, words, levels, scale, bias, 3, kernel, stride, padding, dilation, groups
    )
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    taps = codes.view(out, *kernel, own)
    height, width = reference.out_size(x.shape[2:], kernel, stride, padding, dilation)
    assert found.shape == (2, out, height, width)
    assert found.stride() == (out * height * width, 1, out * width, out)
    expected = bias[None, :, None, None].expand(found.shape).clone()
    for o, u, v, c in itertools.product(range(out), *map(range, kernel), range(own)):
        weight = scale[o, 0] * levels[int(taps[o, u, v, c])]
        top, left = u * dilation[0], v * dilation[1]
        seen = padded[
            :,
            o // (out // groups) * own + c,
            top : top + (height - 1) * stride[0] + 1 : stride[0],
            left : left + (width - 1) * stride[1] + 1 : stride[1],
        ]
        expected[:, o] += weight * seen
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", BITS)
def test_uniform_levels_are_told_from_others(bits: int) -> None:
    k = torch.arange(2**bits)
    for step, offset in ((1.0, -(2.0 ** (bits - 1))), (0.1, 0.7), (1 / 3, -5.0), (0.25, 0.0)):
        levels = (offset + step * k.double()).float()
        found = reference.uniform_levels(levels)
        assert found is not None
        assert found == pytest.approx((step, offset), rel=1e-6)
        for at in (1, 2**bits - 2):
            other = levels.clone()
            other[at] += step * 2**-8
            assert reference.uniform_levels(other) is None
    assert reference.uniform_levels(torch.full((4,), torch.nan)) is None


@pytest.mark.parametrize("zero_point", [0.0, 5.0, 255.0])
@pytest.mark.parametrize("bits", BITS)
def test_the_integer_product_is_the_real_one(bits: int, zero_point: float) -> None:
    codes, q = codes_of(5, 37, bits), codes_of(3, 37, 8)
    step, offset, x_scale = 0.25, -1.5, torch.tensor([0.5])
    scale, bias = quarters((5, 1), 2, 1), quarters((5,), 2, 2)
    zero = torch.tensor([zero_point])
    words, sums = reference.arrange(codes, bits), reference.code_sums(codes, bits)
    assert sums.tolist() == [sum(c - 2 ** (bits - 1) for c in row) for row in codes.tolist()]
    real = (step, offset, scale, sums, bias, x_scale, zero)
    found = reference.linear_int(q, words, *real, bits, torch.float32)
    levels = offset + step * torch.arange(2**bits)
    x = x_scale * (q.float() - zero)
    expected = reference.linear(x, words, levels, scale, bias, bits)
    assert torch.equal(found, expected)  # sums of short binary fractions


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_the_integer_convolution_is_the_real_one(
    layer: tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int],
) -> None:
    channels, out, kernel, *rest, groups = layer
    codes = codes_of(out, kernel[0] * kernel[1] * channels // groups, 4)
    q = codes_of(2 * channels, 30, 8).view(2, channels, 6, 5)
    scale, x_scale, zero = quarters((out, 1), 2, 1), torch.tensor([0.25]), torch.tensor([9.0])
    words, sums = reference.arrange(codes, 4), reference.code_sums(codes, 4)
    real = (0.5, -2.0, scale, sums, None, x_scale, zero)
    found = reference.conv2d_int(q, words, *real, 4, kernel, *rest, groups, torch.float32)
    levels = -2.0 + 0.5 * torch.arange(16)
    x = x_scale * (q.float() - zero)
    expected = reference.conv2d(x, words, levels, scale, None, 4, kernel, *rest, groups)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_what_the_kernels_serve() -> None:
    assert reference.conv_supported(3, 64, 1)
    assert reference.conv_supported(64, 128, 4)
    assert not reference.conv_supported(32, 32, 32)
    assert reference.integer_supported(0.0, 4608)
    assert reference.integer_supported(255.0, 65_793)
    assert not reference.integer_supported(255.0, 65_794)
    assert not reference.integer_supported(256.0, 9)
    assert not reference.integer_supported(-1.0, 9)
    assert not reference.integer_supported(0.5, 9)
