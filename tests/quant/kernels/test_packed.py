"""The Triton kernels over packed weights against products in float64: on a GPU, or on a CPU by
Triton's interpreter (see test_n2uq.py)."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adq.quant.kernels import packed_ops as ops
from adq.quant.kernels import packed_reference as reference

matrix = pytest.importorskip("adq.quant.kernels.packed_matrix", reason="triton is not installed")
vector = pytest.importorskip("adq.quant.kernels.packed_vector", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device (test_interpreter.py runs this file with Triton's interpreter)",
)

BITS = (2, 3, 4, 5, 8)
HALVES = [torch.float16, torch.bfloat16]

# rows, weights of a row, scales of a row: sizes that nothing divides, parts of K with a rest,
# scales of whole cells (vector) or steps (matrix), and of a few weights
PRODUCTS = [(5, 37, 1), (6, 580, 1), (7, 128, 2), (3, 45, 9), (66, 64, 1)]
LONG = 2112  # weights of a row that the vector kernel takes in parts at every width

Pair = tuple[int, int]
Layer = tuple[int, int, Pair, Pair, Pair, Pair, int]
"""(channels, out, kernel, stride, padding, dilation, groups)"""

CONVOLUTIONS: list[Layer] = [
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (64, 9, (3, 2), (2, 1), (1, 2), (1, 2), 1),
    (12, 10, (1, 3), (1, 1), (1, 0), (1, 1), 2),
    (5, 5, (3, 3), (1, 2), (1, 1), (1, 1), 5),
    (128, 6, (1, 1), (2, 2), (0, 0), (1, 1), 2),
]
CASES = [(bits, layer) for layer in CONVOLUTIONS[:2] for bits in BITS]
CASES += [(4, layer) for layer in CONVOLUTIONS[2:]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is full of NaN (integers: of their largest value) until written to."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds a bfloat16 as its 16 bits, and would multiply those."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(value: TensorHandle) -> TensorHandle:
        if value.dtype.scalar != tl.bfloat16:
            return value
        floats = (value.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(floats, tl.float32)

    monkeypatch.setattr(
        *(InterpreterBuilder, "create_dot"),
        lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
    )


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(n: int, k: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)


def on_device(*values: object) -> list[object]:
    return [v.to(DEVICE) if isinstance(v, Tensor) else v for v in values]


def assert_near(
    found: Tensor, expected: Tensor, unsigned: Tensor, bias: Tensor | None, terms: int, steps: int
) -> None:
    """Within what `terms` additions in float32 and `steps` roundings to x's dtype can do.

    `unsigned` is the sum of the products' sizes. A tensor core cuts off where it does not round.
    """
    eps = torch.finfo(found.dtype).eps
    bound = unsigned * (steps * eps / 2 + (terms + 4) * 2.0**-23) + expected.abs() * eps
    if bias is not None:
        bound = bound + 2.0**-23 * bias.abs()
    assert found.isfinite().all()
    error = (found.cpu().double() - expected).abs()
    assert (error <= bound).all(), float((error / bound).max())


def assert_product(
    x: Tensor, n: int, groups: int, bits: int, biased: bool = True, steps: int = 0
) -> None:
    k = x.shape[-1]
    codes, levels = codes_of(n, k, bits), random(1, 2**bits)
    scale = 0.5 + random(2, n, groups).abs()
    bias = random(3, n) if biased else None
    words = reference.arrange(codes, bits)
    found = ops._linear_on_gpu(*on_device(x, words, levels, scale, bias, bits))
    weight = levels.double()[codes.int()] * scale.double().repeat_interleave(k // groups, dim=1)
    expected, unsigned = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected = expected + bias.double()
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    assert_near(found, expected, unsigned, bias, k, steps)


@pytest.mark.parametrize("size", PRODUCTS)
@pytest.mark.parametrize("bits", BITS)
def test_products_with_vectors(bits: int, size: tuple[int, int, int]) -> None:
    n, k, groups = size
    dtype = [*HALVES, torch.float32][(bits + groups) % 3]
    assert_product(random(4, 1, k).to(dtype), n, groups, bits)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_products_with_two_vectors_of_every_dtype(dtype: torch.dtype) -> None:
    assert_product(random(4, 2, 40).to(dtype), 5, 1, 4)


@pytest.mark.parametrize("bits", BITS)
def test_products_with_long_vectors(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(4, 1, LONG)
    assert_product(x, 5, 1, bits)  # in parts
    monkeypatch.setattr(vector, "PROGRAMS", 0)
    assert_product(x.half(), 5, 33, bits, biased=False)  # in one loop


@pytest.mark.parametrize("size", PRODUCTS)
@pytest.mark.parametrize("bits", BITS)
def test_products_with_matrices(bits: int, size: tuple[int, int, int]) -> None:
    n, k, groups = size
    dtype = HALVES[(bits + groups) % 2]
    # a level is rounded once, and once more where it meets the scale before the product
    assert_product(random(4, 5, k).to(dtype), n, groups, bits, steps=2)


@pytest.mark.parametrize("shape", [(40, 128), (130, 65), (2, 3, 64)])
def test_products_with_inputs_of_many_rows_and_of_more_axes(shape: tuple[int, ...]) -> None:
    assert_product(random(4, *shape).half(), 5, 1, 4, biased=False, steps=1)


def test_an_input_that_is_not_contiguous_will_do() -> None:
    assert_product(random(4, 64, 3).half().T, 5, 1, 4, steps=1)
    assert_product(random(4, 2, 64)[:, ::2].half(), 5, 1, 4)


def test_a_float32_matrix_and_no_rows_go_to_the_reference() -> None:
    assert_product(random(4, 3, 37), 5, 1, 4)
    assert_product(random(4, 0, 37).half(), 5, 1, 4)


def image_of(layer: Layer, dtype: torch.dtype) -> Tensor:
    x = random(5, 2, layer[0], 5, 4).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("bits", "layer"), CASES)
def test_convolutions(bits: int, layer: Layer) -> None:
    channels, out, kernel, *rest, groups = layer
    dtype = HALVES[bits % 2]
    x, own = image_of(layer, dtype), channels // groups
    codes, levels = codes_of(out, kernel[0] * kernel[1] * own, bits), random(1, 2**bits)
    scale, bias = 0.5 + random(2, out, 1).abs(), random(3, out) if bits < 5 else None
    words = reference.arrange(codes, bits)
    arguments = on_device(x, words, levels, scale, bias, bits, kernel, *rest, groups)
    found = ops._conv2d_on_gpu(*arguments)
    weight = (levels.double()[codes.int()] * scale.double()).view(out, *kernel, own)
    weight = weight.permute(0, 3, 1, 2)
    conv = torch.nn.functional.conv2d
    expected = conv(x.double(), weight, None, *rest, groups)
    unsigned = conv(x.double().abs(), weight.abs(), None, *rest, groups)
    if bias is not None:
        bias = bias[:, None, None]
        expected = expected + bias.double()
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_near(found, expected, unsigned, bias, codes.shape[1], 1)


def test_an_image_of_another_memory_format_or_of_float32_will_do() -> None:
    layer = CONVOLUTIONS[0]
    codes = codes_of(5, 27, 4)
    rest = on_device(reference.arrange(codes, 4), random(1, 16), torch.ones(5, 1), None, 4)
    for dtype in (torch.float16, torch.float32):
        x = image_of(layer, dtype)
        expected = ops._conv2d_on_gpu(*on_device(x), *rest, *layer[2:])
        found = ops._conv2d_on_gpu(*on_device(x.contiguous()), *rest, *layer[2:])
        assert torch.equal(found, expected)


def real_of(n: int, codes: Tensor, bits: int, biased: bool, zero: float) -> list[object]:
    """Short binary fractions: all sums are exact, in whichever order."""
    scale = 2.0 ** torch.randint(-2, 3, (n, 1), generator=torch.Generator().manual_seed(1))
    bias = torch.arange(n) / 4 if biased else None
    sums = reference.code_sums(codes, bits)
    middle = -(2.0 ** (bits - 1))
    offset = middle / 4 + (0.5 if biased else 0.0)
    return [0.25, offset, scale, sums, bias, torch.tensor([0.5]), torch.tensor([zero])]


@pytest.mark.parametrize("zero", [0.0, 100.0, 255.0])
@pytest.mark.parametrize("bits", BITS)
def test_integer_products_are_exact(bits: int, zero: float) -> None:
    for rows, n, k in ((3, 5, 37), (40, 66, 64), (1, 7, 580)):
        codes, q = codes_of(n, k, bits), codes_of(rows, k, 8, seed=2)
        words = reference.arrange(codes, bits)
        real = real_of(n, codes, bits, rows != 40, zero)
        expected = reference.linear_int(q, words, *real, bits, torch.float32)
        assert expected.abs().max() < 2**20  # in steps of 2^-4 at least: float32 holds them
        found = ops._linear_int_on_gpu(*on_device(q, words, *real), bits, torch.float32)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("bits", "layer"), CASES)
def test_integer_convolutions_are_exact_and_pad_with_zero(bits: int, layer: Layer) -> None:
    channels, out, kernel, *rest, groups = layer
    codes = codes_of(out, kernel[0] * kernel[1] * channels // groups, bits)
    q = codes_of(2 * channels, 20, 8, seed=2).view(2, channels, 5, 4)
    words = reference.arrange(codes, bits)
    for zero in (0.0, 131.0):
        real = real_of(out, codes, bits, zero > 0, zero)
        geometry = (bits, kernel, *rest, groups, torch.float32)
        expected = reference.conv2d_int(q, words, *real, *geometry)
        found = ops._conv2d_int_on_gpu(*on_device(q, words, *real), *geometry)
        assert torch.equal(found.cpu(), expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
def test_the_largest_sums_do_not_overflow() -> None:
    k = 2**31 // (255 * 128)
    assert reference.integer_supported(0.0, k)
    codes, q = torch.zeros(1, k, dtype=torch.uint8), torch.full((1, k), 255, dtype=torch.uint8)
    words, sums = reference.arrange(codes, 8), reference.code_sums(codes, 8)
    real = on_device(torch.ones(1, 1), sums, None, torch.ones(1), torch.zeros(1))
    found = ops._linear_int_on_gpu(*on_device(q, words), 1.0, -128.0, *real, 8, torch.float64)
    assert found.item() == float(torch.tensor(-128.0 * 255 * k))  # rounded to float32


def test_two_runs_are_equal_to_the_last_bit() -> None:
    codes = codes_of(6, 580, 4)
    rest = on_device(reference.arrange(codes, 4), random(1, 16), torch.ones(6, 1), None, 4)
    for x in (random(4, 1, 580).half(), random(4, 5, 580).half()):
        one, other = (ops._linear_on_gpu(*on_device(x), *rest) for _ in range(2))
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher sends CPU tensors to the reference")
def test_the_dispatcher_sends_cuda_tensors_to_the_kernels() -> None:
    codes = codes_of(6, 64, 4)
    rest = on_device(reference.arrange(codes, 4), random(1, 16), torch.ones(6, 1), None, 4)
    for rows in (1, 5):
        x = random(4, rows, 64).half().cuda()
        torch.library.opcheck(torch.ops.adq.packed_linear.default, (x, *rest))
