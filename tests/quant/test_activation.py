"""Learned thresholds against slow loops, and their gradients against the written-out curve."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples
from torch import Tensor

from adq.quant.activation import fake_quantize, fit_range, thresholds

# exact in binary, and so are the knots and thresholds made of them
eighths = st.integers(-80, 80).map(lambda i: i / 8)
width_lists = st.sampled_from([3, 7, 15]).flatmap(
    lambda n: st.lists(st.integers(1, 16).map(lambda i: i / 8), min_size=n, max_size=n)
)


def codes_of(x: Tensor, start: Tensor, widths: Tensor) -> Tensor:
    one, zero = widths.new_ones(1), widths.new_zeros(1)
    return fake_quantize(x, start, widths, one, zero)


def example(
    bits: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values on both sides of the knots, a start and unequal widths."""
    generator = torch.Generator().manual_seed(seed)
    widths = 0.1 + torch.rand(2**bits - 1, generator=generator, dtype=dtype)
    start = torch.tensor([-0.4 * widths.sum().item()], dtype=dtype)
    x = 0.5 * widths.sum() * torch.randn(6, 50, generator=generator, dtype=dtype)
    return x, start, widths


@few_examples
@given(eighths, width_lists)
def test_thresholds_follow_the_recursion(start: float, widths: list[float]) -> None:
    found = thresholds(torch.tensor([start]), torch.tensor(widths))
    assert found.tolist() == oracles.thresholds(start, widths)


@few_examples
@given(st.lists(eighths, min_size=1, max_size=30), eighths, width_lists)
def test_codes_are_those_of_the_slow_loop_at_and_between_thresholds(
    values: list[float], start: float, widths: list[float]
) -> None:
    limits = oracles.thresholds(start, widths)
    values = values + limits
    found = codes_of(torch.tensor(values), torch.tensor([start]), torch.tensor(widths))
    assert found.tolist() == [oracles.code(v, limits) for v in values]


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_value_at_a_threshold_gets_the_upper_code_and_one_just_below_the_lower(
    bits: int,
) -> None:
    _, start, widths = example(bits, torch.float32)
    limits = thresholds(start, widths)
    below = torch.nextafter(limits, limits.new_tensor(-math.inf))
    n = 2**bits - 1
    assert codes_of(limits, start, widths).tolist() == list(range(1, n + 1))
    assert codes_of(below, start, widths).tolist() == list(range(n))


def test_the_output_is_the_scaled_distance_from_the_zero_point() -> None:
    x, start, widths = example(3)
    scale, zero_point = torch.tensor([0.25]).double(), torch.tensor([3.0]).double()
    found = fake_quantize(x, start, widths, scale, zero_point)
    limits = oracles.thresholds(start.item(), widths.tolist())
    expected = [0.25 * (oracles.code(v, limits) - 3) for v in x.flatten().tolist()]
    assert found.flatten().tolist() == expected


def test_far_values_get_the_first_and_the_last_code() -> None:
    _, start, widths = example(4)
    x = torch.tensor([-math.inf, -1e30, 1e30, math.inf], dtype=torch.float64)
    assert codes_of(x, start, widths).tolist() == [0, 0, 15, 15]


@pytest.mark.parametrize("bits", range(2, 9))
def test_gradients_are_those_of_the_piecewise_linear_curve(bits: int) -> None:
    x, start, widths = (t.requires_grad_() for t in example(bits))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    scale = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([2.0], dtype=torch.float64)
    found = torch.autograd.grad(
        fake_quantize(x, start, widths, scale, zero_point), (x, start, widths, scale), upstream
    )
    smooth = 0.3 * (oracles.curve(x, start, widths) - zero_point)
    expected = torch.autograd.grad(smooth, (x, start, widths), upstream)
    for one, other in zip(found[:3], expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # the output scale multiplies the step itself, not the curve
    limits = oracles.thresholds(start.item(), widths.tolist())
    codes = [oracles.code(v, limits) for v in x.flatten().tolist()]
    slope = sum(g * (q - 2) for g, q in zip(upstream.flatten().tolist(), codes, strict=True))
    assert found[3].item() == pytest.approx(slope, rel=1e-12)


def test_gradients_agree_with_finite_differences_of_the_curve() -> None:
    x, start, widths = example(2)
    x = x[0, :20]
    upstream = torch.linspace(-1, 2, 20, dtype=torch.float64)
    parameters = [t.clone().requires_grad_() for t in (x, start, widths)]
    found = torch.autograd.grad(codes_of(*parameters), parameters, upstream)
    step = 1e-6  # the curve is linear between its kinks, so only rounding (1e-16/1e-6) is left
    for which, gradient in enumerate(found):
        for i in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in parameters]
                moved[which][i] += sign * step
                values.append((upstream * oracles.curve(*moved)).sum().item())
            difference = (values[0] - values[1]) / (2 * step)
            assert gradient[i].item() == pytest.approx(difference, abs=1e-8)


def test_gradients_in_numbers() -> None:
    # knots at 0, 1, 3, 4; x = 2 lies halfway in the second segment, of slope 1/2
    x = torch.tensor([2.0], requires_grad=True)
    start = torch.tensor([0.0], requires_grad=True)
    widths = torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    code = codes_of(x, start, widths)
    assert code.tolist() == [2.0]  # T_2 = 2
    code.backward()
    assert x.grad.tolist() == [0.5]
    assert start.grad.tolist() == [-0.5]
    # ∂/∂a_1 = −1/a_2, ∂/∂a_2 = −(x − b_1)/a_2², nothing for the segment above
    assert widths.grad.tolist() == [-0.5, -0.25, 0.0]


def test_outside_the_knots_every_gradient_is_zero() -> None:
    _, start, widths = (t.requires_grad_() for t in example(3))
    low, high = start.item(), (start + widths.sum()).item()
    x = torch.tensor([low - 1e-9, low - 5, high + 1e-9, high + 5], dtype=torch.float64)
    x.requires_grad_()
    for gradient in torch.autograd.grad(codes_of(x, start, widths).sum(), (x, start, widths)):
        assert not gradient.any()


def test_the_memory_layout_does_not_matter() -> None:
    _, start, widths = (t.requires_grad_() for t in example(3))
    base = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    upstream = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for layout in (base, base.to(memory_format=torch.channels_last), base.mT.contiguous().mT):
        x = layout.clone(memory_format=torch.preserve_format).requires_grad_()
        out = codes_of(x, start, widths)
        for g in (upstream, upstream.mT.contiguous().mT):
            results.append((out, *torch.autograd.grad(out, (x, start, widths), g, True)))
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(one, other)


def test_single_precision_gradients_are_close_to_double() -> None:
    x, start, widths = example(4)
    grads = []
    for dtype in (torch.float64, torch.float32):
        parameters = [t.to(dtype).requires_grad_() for t in (x, start, widths)]
        grads.append(torch.autograd.grad(codes_of(*parameters).sum(), parameters))
    for one, other in zip(*grads, strict=True):
        # sums of 300 terms, each with a relative rounding of 6e-8 and a divisor down to 0.1
        torch.testing.assert_close(one, other.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "negative", "lopsided", "outlier"])
def test_the_range_is_the_best_of_fifty_by_brute_force(kind: str, bits: int) -> None:
    x = torch.randn(150, generator=torch.Generator().manual_seed(bits))
    values = {
        "signed": x,
        "unsigned": x.relu(),
        "negative": -x.abs() - 0.1,
        "lopsided": x.exp() - 0.5,
        "outlier": torch.cat([x, torch.tensor([25.0])]),
    }[kind]
    step, zero_point = fit_range(values, bits)
    expected_step, expected_zero_point, error = oracles.range_of_least_error(values.tolist(), bits)
    assert zero_point == expected_zero_point
    assert step == pytest.approx(expected_step, rel=1e-6)
    assert type(zero_point) is int
    assert 0 <= zero_point <= 2**bits - 1
    found = [oracles.affine_grid(v, step, zero_point, bits) - v for v in values.tolist()]
    assert np.square(found).mean() == pytest.approx(error, rel=1e-5)


def test_values_that_are_never_negative_get_an_unsigned_grid() -> None:
    for values in (torch.rand(50) + 3, torch.tensor([0.0, 1.0]), torch.tensor([5.0])):
        assert fit_range(values, 4)[1] == 0


def test_values_on_a_grid_get_that_grid() -> None:
    values = 0.5 * (torch.arange(16) - 5)
    assert fit_range(values, 4) == (0.5, 5)


def test_clipping_an_outlier_beats_keeping_it() -> None:
    # 20,000 values even in 0..1 and one at 50. Squared errors in all, on four levels: kept, 1/3
    # each (all round to 0); clipped to 0..1, (1/3)²/12 each and 49²; to 0..2, four times as much
    # each and 48². The smallest of the fifty ranges is the best.
    x = torch.cat([torch.linspace(0, 1, 20_000), torch.tensor([50.0])])
    step, _ = fit_range(x, 2)
    assert step == pytest.approx(1 / 3)


def test_values_that_are_all_zero_get_a_harmless_grid() -> None:
    assert fit_range(torch.zeros(7), 4) == (1.0, 0)
