"""The Triton kernels against the reference: on a GPU, or on a CPU by Triton's interpreter.

A plain run on a machine without a GPU skips them here; test_interpreter.py then runs this file with
TRITON_INTERPRET=1, which Triton wants set before it is imported.
"""

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adq.quant.kernels import n2uq_ops as ops
from adq.quant.kernels import n2uq_reference as reference

n2uq = pytest.importorskip("adq.quant.kernels.n2uq", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no CUDA device (test_interpreter.py runs this file with Triton's interpreter)",
    ),
    # NumPy, which interprets, warns of NaN and infinity where a processor does not
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

BITS = range(2, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 1023, 1024, 1025]
LONG = 100_003

# (atol, rtol) of x̂ and ∂L/∂x. Kernel and reference do the same operations on one element in the
# same order, so that equality is exact; but the interpreter cuts the digits that bfloat16 (8 of
# them) has no room for, where PyTorch and processors round to nearest.
TOLERANCES = {
    torch.float32: (0, 0),
    torch.float16: (0, 0),
    torch.float64: (0, 0),
    torch.bfloat16: (0, 2**-7 if INTERPRETED else 0),
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is full of NaN (integers: of their largest value) until written to."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def example(bits: int, shape: tuple[int, ...] | int, dtype: torch.dtype) -> Inputs:
    """Values on both sides of the knots, NaN and infinities among them, and unequal widths."""
    generator = torch.Generator().manual_seed(bits)
    work = torch.promote_types(dtype, torch.float32)
    widths = 0.1 + torch.rand(2**bits - 1, generator=generator, dtype=work)
    start = -0.4 * widths.sum().reshape(1)
    x = 0.5 * widths.sum() * torch.randn(shape, generator=generator, dtype=work)
    if x.numel() > 3:
        x.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    return x.to(dtype), start, widths, torch.tensor([0.3]).to(work), torch.tensor([2.0]).to(work)


def upstream(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(x.numel())
    return torch.randn(x.shape, generator=generator).to(x.dtype)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def assert_forward(inputs: Inputs) -> list[Tensor]:
    """x̂, place and edges of the kernel are the reference's; returns place and edges."""
    x = inputs[0]
    expected = torch.ops.adq.n2uq_forward(*inputs)
    found = [t.cpu() for t in ops._forward_on_gpu(*on_device(*inputs))]
    atol, rtol = TOLERANCES[x.dtype]
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=rtol)
    assert found[0].stride() == expected[0].stride()
    torch.testing.assert_close(found[1], expected[1], atol=0, rtol=0)
    # a GPU sums the float64 edges in another order, which float32 does not see
    slack = 1e-14 if x.dtype == torch.float64 else 0
    torch.testing.assert_close(found[2], expected[2], atol=slack, rtol=0)
    return list(expected[1:])


def assert_backward(inputs: Inputs, grad: Tensor, adds: int = 32) -> None:
    """The kernel's gradients are the reference's, up to the rounding of `adds` additions."""
    x, _, *parameters = inputs
    saved = torch.ops.adq.n2uq_forward(*inputs)[1:]
    arguments = (x, *saved, *parameters)
    expected = torch.ops.adq.n2uq_backward(grad, *arguments)
    found = [t.cpu() for t in ops._backward_on_gpu(*on_device(grad, *arguments))]
    atol, rtol = TOLERANCES[x.dtype]
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=rtol)
    assert found[0].stride() == expected[0].stride()
    # a sum is rounded in proportion to that of its terms without their signs
    unsigned = torch.ops.adq.n2uq_backward(grad.abs(), *arguments[:-1], 0 * arguments[-1])
    epsilon = torch.finfo(saved[1].dtype).eps / 2
    for one, other, size in zip(found[1:], expected[1:], unsigned[1:], strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert ((one - other).abs() <= adds * epsilon * size.abs()).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_kernels_agree_with_the_reference(bits: int, dtype: torch.dtype, size: int) -> None:
    inputs = example(bits, size, dtype)
    assert_forward(inputs)
    assert_backward(inputs, upstream(inputs[0]))


@pytest.mark.parametrize("bits", BITS)
def test_kernels_agree_with_the_reference_on_a_long_tensor(bits: int) -> None:
    inputs = example(bits, LONG, DTYPES[bits % 3])
    assert_forward(inputs)
    assert_backward(inputs, upstream(inputs[0]))


@pytest.mark.parametrize("bits", [2, 5])
def test_a_program_that_comes_round_again_adds_to_its_sums(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes, warps = n2uq.backward_shape(bits)
    monkeypatch.setattr(n2uq, "WARPS_IN_FLIGHT", 3 * warps)
    inputs = example(bits, 20_003, torch.float32)
    assert_backward(inputs, upstream(inputs[0]), adds=32 + 20_003 // (3 * lanes))


@pytest.mark.parametrize("bits", [3, 8])
def test_double_precision_stays_double(bits: int) -> None:
    inputs = example(bits, 1025, torch.float64)
    assert_forward(inputs)
    # here the reference is the less exact one: its difference Σ g·x − b·G loses the digits of b/a,
    # a number up to 2^bits·(mean of the widths)/(least of them), about 2^bits·6
    assert_backward(inputs, upstream(inputs[0]), adds=32 * 6 * 2**bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_value_at_an_edge_lies_above_it_and_one_just_below_does_not(bits: int) -> None:
    _, start, widths, scale, zero_point = example(bits, 1, torch.float32)
    edges = reference.edges_of(start, widths, torch.float32)
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(-math.inf))])
    place, _ = assert_forward((x, start, widths, scale, zero_point))
    count = edges.numel()
    assert place.tolist() == [*range(1, count + 1), *range(count)]


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT,
    "every second row": lambda t: torch.cat([t, t], dim=2)[:, :, ::2],
    "one value everywhere": lambda t: t[..., :1].expand(t.shape),
    "a later part": lambda t: torch.cat([t, t])[2:],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_will_do(layout: str, dtype: torch.dtype) -> None:
    x, *parameters = example(4, (2, 3, 14, 14), dtype)
    grad = upstream(x)
    for one, other in ((LAYOUTS[layout](x), grad), (x, LAYOUTS[layout](grad))):
        assert_forward((one, *parameters))
        assert_backward((one, *parameters), other)


def test_a_gradient_that_is_not_finite_makes_the_parameters_gradients_so() -> None:
    inputs = example(3, 1025, torch.float32)
    _, place, edges = torch.ops.adq.n2uq_forward(*inputs)
    for bad in (math.nan, math.inf):
        grad = upstream(inputs[0])
        grad[(place == 4).nonzero()[0]] = bad
        arguments = on_device(grad, inputs[0], place, edges, *inputs[2:])
        for gradient in ops._backward_on_gpu(*arguments):
            assert not gradient.isfinite().all()


def test_an_empty_tensor_gives_zero_gradients() -> None:
    inputs = example(3, (0, 5), torch.float32)
    assert_forward(inputs)
    assert_backward(inputs, upstream(inputs[0]))


@pytest.mark.parametrize("bits", [2, 8])
def test_two_runs_are_equal_to_the_last_bit(bits: int) -> None:
    inputs = example(bits, 20_003, torch.float32)
    grad, saved = upstream(inputs[0]), assert_forward(inputs)
    arguments = on_device(grad, inputs[0], *saved, *inputs[2:])
    first, second = (ops._backward_on_gpu(*arguments) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher sends CPU tensors to the reference")
def test_the_dispatcher_sends_cuda_tensors_to_the_kernels() -> None:
    x, *parameters = (t.to(DEVICE).requires_grad_() for t in example(4, (3, 50), torch.float32))
    torch.library.opcheck(torch.ops.adq.n2uq_forward.default, (x, *parameters))
    out = ops.fake_quantize(x, *parameters)
    assert out.grad_fn is not None
    torch.autograd.grad(out.nan_to_num().sum(), (x, *parameters[:3]))
