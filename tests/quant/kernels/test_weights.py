"""The Triton kernels of the weight quantizer against the reference: on a GPU, or on a CPU by
Triton's interpreter (see test_n2uq.py)."""

import math
import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from adq.quant.kernels import weights_ops as ops
from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.weights_reference import PART, RULES

weights = pytest.importorskip("adq.quant.kernels.weights", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no CUDA device (test_interpreter.py runs this file with Triton's interpreter)",
    ),
    # NumPy, which interprets, warns of NaN and infinity where a processor does not
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# rtol of ŵ and ∂L/∂w: equality is exact, but for the interpreter's bfloat16 (see test_n2uq.py)
TOLERANCES = dict.fromkeys(DTYPES, 0.0) | {torch.bfloat16: 2**-7 if INTERPRETED else 0.0}

Layer = tuple[int, int, int]
"""(rows, weights of a row, bits)"""

SMALL: list[Layer] = [(1, 7, 2), (9, 1, 8), (7, 9, 5), (1, 1, 3), (40, 9, 6), (2, 17, 7), (1, 2, 4)]
ROWS: list[Layer] = [(3, 341, 4), (1025, 1, 3), (70, 32, 2), (5, 100, 5), (3, 300, 4), (1, 1024, 6)]
# rows that end inside a part, just after one begins, and at its end
LONG: list[Layer] = [(2, PART + 8, 4), (3, 10_007, 3), (1, 1, 2), (2, PART, 2), (1, PART + 1, 5)]
MODELS = {"small": SMALL, "rows": ROWS, "long": LONG, "mixed": [*SMALL, LONG[0], *ROWS]}

Inputs = tuple[Tensor, Tensor, Tensor, list[int], list[int], list[int]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every new tensor is full of NaN (integers: of their largest value) until written to."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def example(model: Sequence[Layer], dtype: torch.dtype, bad: bool = True) -> Inputs:
    """Weights on both sides of all levels, repeated levels, and with `bad` NaN and infinities."""
    generator = torch.Generator().manual_seed(len(model))
    rows, sizes, bits = (list(column) for column in zip(*model, strict=True))
    work = torch.promote_types(dtype, torch.float32)
    levels = [1.5 * torch.randn(2**b, generator=generator, dtype=work) for b in bits]
    for c in levels:
        c[-1] = c[0]
    scale = 0.5 + torch.rand(sum(rows), generator=generator, dtype=work)
    count = sum(n * size for n, size, _ in model)
    w = 1.5 * torch.randn(count, generator=generator, dtype=work)
    if bad and count > 3:
        at = torch.randperm(count, generator=generator)[: max(3, count // 1000)]
        w[at] = torch.tensor([math.nan, math.inf, -math.inf], dtype=work).repeat(at.numel())[
            : at.numel()
        ]
    return w.to(dtype), scale, torch.cat([c.sort().values for c in levels]), rows, sizes, bits


def upstream(w: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(w.numel())
    return torch.randn(w.shape, generator=generator).to(w.dtype)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def assert_forward(inputs: Inputs, gather: bool = True) -> Tensor:
    """ŵ, codes and statistics of the kernel are the reference's; returns the codes."""
    w, scale, levels, *layout = inputs
    expected = reference.forward(*inputs, gather)
    arguments = (*on_device(w, scale, levels), *layout, 0, gather)
    found = [t.cpu() for t in ops._forward_on_gpu(*arguments)]
    rtol = TOLERANCES[w.dtype]
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=rtol, equal_nan=True)
    torch.testing.assert_close(found[1], expected[1], atol=0, rtol=0)
    assert found[2].shape == expected[2].shape
    if gather:
        assert_statistics(found[2], expected[2], inputs, expected[1])
    return expected[1]


def assert_statistics(found: Tensor, expected: Tensor, inputs: Inputs, codes: Tensor) -> None:
    """n is exact; m and e are, part by part, within the rounding of their additions."""
    w, scale, _, *layout = inputs
    assert torch.equal(found[0], expected[0])
    dtype = reference.work_dtype(w)
    # a lane adds up to PART/LANES numbers and a tree the lanes; x − c, its square and the
    # reference's own float64 sum round as well
    lane = PART // weights.LANES + math.log2(weights.LANES) + 4
    bound = lane * torch.finfo(dtype).eps / 2 + PART * 2**-53
    for layer in reference.layers(*layout):
        x = w[layer.weights].view(layer.rows, layer.size) / scale[layer.scales, None].to(dtype)
        x, k = x.flatten(), layer.levels.stop - layer.levels.start
        kept = x.isfinite()
        cell = (torch.arange(x.numel()) // PART * k + codes[layer.weights].long())[kept]
        length = layer.partials.stop - layer.partials.start
        unsigned = torch.zeros(length, dtype=torch.float64)
        unsigned.index_add_(0, cell, x[kept].double().abs())
        at = layer.partials
        assert ((found[1, at] - expected[1, at]).abs() <= bound * unsigned).all()
        assert ((found[2, at] - expected[2, at]).abs() <= bound * expected[2, at]).all()


def assert_backward(inputs: Inputs, codes: Tensor, grad: Tensor, rule: int) -> None:
    """The kernel's gradients are the reference's, up to the rounding of a row's additions."""
    w, scale, levels, rows, sizes, bits = inputs
    expected = reference.backward(grad, w, codes, scale, levels, rows, sizes, bits, rule)
    tensors = on_device(grad, w, codes, scale, levels)
    found = [t.cpu() for t in ops._backward_on_gpu(*tensors, rows, sizes, bits, rule)]
    rtol = TOLERANCES[w.dtype]
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=rtol, equal_nan=True)
    # the terms of a row's sum are the sums of rows of one weight
    counts = torch.tensor(sizes).repeat_interleave(torch.tensor(rows))
    numels = [n * size for n, size in zip(rows, sizes, strict=True)]
    own_scale = scale.repeat_interleave(counts)
    layout = (numels, [1] * len(numels), bits)
    terms = reference.backward(grad, w, codes, own_scale, levels, *layout, rule)[1].double().abs()
    owner = torch.arange(scale.numel()).repeat_interleave(counts)
    unsigned = torch.zeros(scale.numel(), dtype=torch.float64).index_add_(0, owner, terms)
    # a lane's additions, those of the lanes, a term's two roundings, and the reference's
    adds = counts // weights.TILE + math.log2(weights.TILE) + 3 + 16
    bound = adds * torch.finfo(reference.work_dtype(w)).eps / 2
    if torch.finfo(scale.dtype).bits < 32:
        bound = bound + torch.finfo(scale.dtype).eps
    assert found[1].dtype == scale.dtype
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    finite = expected[1].isfinite()
    error = (found[1].double() - expected[1].double()).abs()
    assert (error <= bound * unsigned)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_the_forward_kernel_agrees_with_the_reference(model: str, dtype: torch.dtype) -> None:
    assert_forward(example(MODELS[model], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_statistics_the_rest_stays_the_same(dtype: torch.dtype) -> None:
    assert_forward(example(MODELS["mixed"], dtype), gather=False)


@pytest.mark.parametrize("rule", range(len(RULES)))
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["mixed", "long"])
def test_the_backward_kernel_agrees_with_the_reference(
    model: str, dtype: torch.dtype, bad: bool, rule: int
) -> None:
    inputs = example(MODELS[model], dtype, bad)
    codes = reference.forward(*inputs, False)[1]
    assert_backward(inputs, codes, upstream(inputs[0]), rule)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025])
def test_a_single_layer_of_any_size_will_do(size: int, bits: int) -> None:
    shape = (size, 1) if bits % 2 else (1, size)
    inputs = example([(*shape, bits)], DTYPES[bits % 4])
    codes = assert_forward(inputs)
    assert_backward(inputs, codes, upstream(inputs[0]), bits % 3)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (5, torch.bfloat16)])
def test_a_large_layer_of_one_row_agrees_with_the_reference(bits: int, dtype: torch.dtype) -> None:
    inputs = example([(1, 100_003, bits), (3, 5, 2)], dtype)
    codes = assert_forward(inputs)
    assert_backward(inputs, codes, upstream(inputs[0]), 0)


OTHERS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("dtype", "other"), OTHERS)
def test_scales_and_levels_may_have_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    w, scale, levels, *layout = example(SMALL, dtype, bad=False)
    inputs = (w, scale.to(other), levels.to(other), *layout)
    codes = assert_forward(inputs)
    for rule in range(len(RULES)):
        assert_backward(inputs, codes, upstream(w), rule)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_at_a_threshold_goes_up_and_one_just_below_does_not(bits: int) -> None:
    _, _, levels, *_ = example([(1, 1, bits)], torch.float32)
    levels[1] = levels[2]  # both thresholds beside a level that repeats lie apart from it
    limits = (levels[1:] + levels[:-1]) / 2
    w = torch.cat([limits, torch.nextafter(limits, torch.tensor(-math.inf)), limits.new_zeros(2)])
    codes = assert_forward((w, torch.ones(1), levels, [1], [w.numel()], [bits]))
    expected = [sum(t <= x for t in limits.tolist()) for x in w.tolist()]
    assert codes.tolist() == expected


def test_a_scale_of_zero_makes_infinities_and_no_harm_to_its_neighbours() -> None:
    w, scale, levels, *layout = example(ROWS, torch.float32, bad=False)
    size = layout[1][0]
    scale[0] = scale[1] = 0.0
    w[0] = 0.0  # 0/0
    w[size : 2 * size].abs_()
    inputs = (w, scale, levels, *layout)
    codes, grad = assert_forward(inputs), upstream(w).abs()
    sums = reference.backward(grad, w, codes, scale, levels, *layout, 0)[1]
    assert sums[0].isnan()
    assert sums[1] == -math.inf
    for rule in range(len(RULES)):
        assert_backward(inputs, codes, grad, rule)


def test_a_weight_at_an_outermost_level_is_not_inside() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    inputs = (torch.tensor([-1.0, 2.0, 0.25]), torch.ones(3), levels, [3], [1], [2])
    codes = assert_forward(inputs)
    for rule in range(len(RULES)):
        assert_backward(inputs, codes, torch.ones(3), rule)


@pytest.mark.parametrize("last", [(5, 9, 2), (5, 40, 3), (1, 200, 2), (1, 600, 5)])
def test_nothing_is_written_beyond_the_layers(last: Layer) -> None:
    w, scale, levels, *layout = example([(2, 3, 4), last], torch.float32, bad=False)
    # as if other layers came after these
    longer = [torch.cat([t, t.new_ones(1000)]) for t in (w, scale, levels)]
    out, codes, _ = weights.forward(*on_device(*longer), *layout, True)
    tensors = on_device(*longer[:1] * 2, codes.cpu().clamp(max=3), *longer[1:])
    grad_w, grad_scale = weights.backward(*tensors, *layout, 0)
    assert out[w.numel() :].isnan().all()
    assert (codes[w.numel() :] == 255).all()
    for t, of in ((grad_w, w), (grad_scale, scale)):
        assert t[of.numel() :].isnan().all()
        assert t[: of.numel()].isfinite().all()


@pytest.mark.parametrize("model", [[], [(0, 5, 3)], [(2, 3, 2), (0, 5, 3), (3, 0, 4), (1, 4, 2)]])
def test_layers_without_weights_are_passed_over(model: list[Layer]) -> None:
    inputs = example(model, torch.float32) if model else (*torch.empty(3, 0), [], [], [])
    if any(n * size for n, size, _ in model):
        codes = assert_forward(inputs)
        assert_backward(inputs, codes, upstream(inputs[0]), 1)
    w, scale, levels, *layout = inputs
    found = weights.forward(*on_device(w, scale, levels), *layout, False)
    assert found[2].shape == (3, 0)
    assert (
        weights.backward(*found[:1], *found[:2], scale, levels, *layout, 0)[1].shape == scale.shape
    )


def test_two_runs_are_equal_to_the_last_bit() -> None:
    w, scale, levels, *layout = example([*SMALL, LONG[0]], torch.float32)
    codes = reference.forward(w, scale, levels, *layout, False)[1]
    forward = (*on_device(w, scale, levels), *layout, 0, True)
    backward = (*on_device(upstream(w), w, codes, scale, levels), *layout, 0)
    for call, arguments in ((ops._forward_on_gpu, forward), (ops._backward_on_gpu, backward)):
        for one, other in zip(call(*arguments), call(*arguments), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher sends CPU tensors to the reference")
def test_the_dispatcher_sends_cuda_tensors_to_the_kernels() -> None:
    w, scale, levels, *layout = example(SMALL, torch.float32, bad=False)
    w, scale, levels = on_device(w, scale, levels)
    inputs = (w.requires_grad_(), scale.requires_grad_(), levels, *layout)
    torch.library.opcheck(torch.ops.adq.weights_forward.default, (*inputs, 0, True))
    out = ops.quantize_weights(*inputs)[0]
    torch.autograd.grad(out.sum(), (w, scale))
