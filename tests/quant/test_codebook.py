"""The weight codebook against slow loops, closed forms, and Max's table of optimal quantizers."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples
from torch import Tensor, nn

from adq.quant.apply import quantize
from adq.quant.codebook import (
    INITIALISATIONS,
    Codebook,
    Initialisation,
    assign,
    best_uniform,
    channel_scale,
    cube_root_quantiles,
    ema_step,
    fake_quantize,
    initial_levels,
    lloyd,
    new_codebook,
    statistics,
)
from adq.quant.flat import update_codebooks
from adq.quant.kernels.weights_reference import DEAD_COUNT

BITS = range(2, 9)

# exact in binary, and so are their differences and midpoints: no test hangs on a rounding
eighths = st.integers(-80, 80).map(lambda i: i / 8)
value_lists = st.lists(eighths, min_size=1, max_size=40)
level_lists = st.integers(2, 4).flatmap(
    lambda bits: st.lists(eighths, min_size=2**bits, max_size=2**bits, unique=True).map(sorted)
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def squared_error(x: Tensor, levels: Tensor) -> Tensor:
    return (levels[assign(x, levels)] - x).double().square()


@few_examples
@given(value_lists, level_lists)
def test_each_value_gets_its_nearest_level_and_a_tie_the_upper_one(
    values: list[float], levels: list[float]
) -> None:
    codes = assign(torch.tensor(values), torch.tensor(levels))
    assert codes.dtype == torch.int64
    assert codes.tolist() == [oracles.nearest_level(v, levels) for v in values]


def test_a_tie_by_name() -> None:
    assert assign(torch.tensor([0.5, 1.5, 0.4999]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [
        1,
        2,
        0,
    ]


@few_examples
@given(value_lists, st.lists(eighths, min_size=4, max_size=4).map(sorted))
def test_with_repeated_levels_the_distance_is_still_the_least(
    values: list[float], levels: list[float]
) -> None:
    found = torch.tensor(levels)[assign(torch.tensor(values), torch.tensor(levels))]
    for value, level in zip(values, found.tolist(), strict=True):
        assert abs(level - value) == min(abs(c - value) for c in levels)


def test_the_memory_layout_does_not_matter() -> None:
    weight = randn(6, 5, 3, 3)
    scale = channel_scale(weight)
    levels = initial_levels(weight / scale, 3)
    channels_last = weight.to(memory_format=torch.channels_last)
    transposed = weight.transpose(0, 1).contiguous().transpose(0, 1)
    quantized = fake_quantize(weight, scale, levels)
    for layout in (channels_last, transposed):
        assert not layout.is_contiguous()
        assert torch.equal(channel_scale(layout), scale)
        assert torch.equal(assign(layout, levels), assign(weight, levels))
        assert torch.equal(fake_quantize(layout, scale, levels), quantized)
        for name in ("counts", "squared_errors"):
            here, there = (getattr(statistics(w, levels), name) for w in (layout, weight))
            torch.testing.assert_close(here, there)
        torch.testing.assert_close(initial_levels(layout / scale, 3), levels)


def test_the_scale_is_each_channels_root_mean_square() -> None:
    weight = randn(4, 3, 2, 2)
    scale = channel_scale(weight)
    assert scale.shape == (4, 1, 1, 1)
    expected = np.sqrt((weight.double().numpy() ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(scale.flatten().numpy(), expected, rtol=1e-6)  # float32 sums of 12


@pytest.mark.parametrize("factor", [0.0, 1e-8, 1e-3])
def test_a_channel_near_zero_is_scaled_by_a_hundredth_of_its_layer(factor: float) -> None:
    weight = randn(3, 4)
    weight[1] *= factor
    scale = channel_scale(weight)
    assert scale[1].item() == pytest.approx(0.01 * weight.square().mean().sqrt().item())
    assert scale[0].item() == pytest.approx(weight[0].square().mean().sqrt().item())
    assert torch.isfinite(weight / scale).all()
    assert torch.equal(channel_scale(torch.zeros(2, 3)), torch.ones(2, 1))


def test_a_nearly_zero_channel_stays_small_while_its_layer_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 2))
    with torch.no_grad():
        model[0].weight[3] *= 1e-8  # type: ignore[index, operator]
    x = torch.randn(32, 8, 6, 6)
    quantized = quantize(model, {"0": 4, "2": 4})
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        quantized(x).square().mean().backward()
        optimizer.step()
        update_codebooks(quantized, 0.99, 0)
    levels = quantized[0].parametrizations["weight"][0].levels  # type: ignore[index, union-attr]
    assert levels.abs().max() < 10  # in units of a channel's own root mean square


@few_examples
@given(value_lists, st.integers(2, 4))
def test_the_quantile_start_is_zero_and_the_quantiles_of_each_sign(
    values: list[float], bits: int
) -> None:
    levels = initial_levels(torch.tensor(values), bits, "quantile")
    assert levels.tolist() == oracles.signed_quantile_levels(values, bits)
    assert 0.0 in levels.tolist()


def test_the_quantile_start_agrees_with_numpys_quantiles() -> None:
    # (i + 1/2)/k of an odd number of values is never a whole rank, so every definition by
    # nearest rank gives the same value
    negative, positive = -randn(701).abs(), randn(1001, seed=1).abs()
    levels = initial_levels(torch.cat([positive, negative]), 4, "quantile")
    for values, found in ((negative, levels[:7]), (positive, levels[8:])):
        q = (np.arange(len(found)) + 0.5) / len(found)
        expected = np.quantile(values.numpy(), q, method="inverted_cdf")
        np.testing.assert_array_equal(found.numpy(), expected)


@few_examples
@given(value_lists, st.integers(2, 4))
def test_the_midpoint_start_is_the_quantile_midpoints_of_all_values(
    values: list[float], bits: int
) -> None:
    levels = initial_levels(torch.tensor(values), bits, "midpoint")
    assert levels.tolist() == oracles.quantile_midpoints(values, 2**bits)


def test_the_cube_root_quantiles_are_those_of_a_slow_histogram() -> None:
    for bits, x in ((2, randn(301)), (3, randn(5000, seed=1).exp()), (4, randn(257, seed=2) ** 3)):
        bins = min(1024, max(8, x.numel() // 16))
        expected = oracles.cube_root_quantiles(x.tolist(), 2**bits, bins)
        found = cube_root_quantiles(x.sort().values, bits)
        # bin edges are rounded to single precision, which may move one value to the next bin
        spread = (x.max() - x.min()).item()
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-3 * spread)


@pytest.mark.parametrize(
    ("bits", "optimum"), [(2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)]
)
def test_the_lloyd_start_is_within_two_percent_of_the_gaussian_optimum(
    bits: int, optimum: float
) -> None:
    x = randn(400_000)  # Max (1960), table I; sampling noise is below half a percent
    levels = initial_levels(x, bits)
    error = (x - levels[assign(x, levels)]).square().mean().item()
    assert error == pytest.approx(optimum, rel=0.02)


def test_the_lloyd_start_at_eight_bits_is_near_the_high_resolution_optimum() -> None:
    x = randn(400_000)
    levels = initial_levels(x, 8)
    error = (x - levels[assign(x, levels)]).square().mean().item()
    # Panter and Dite: sqrt(3)·π/2 / K² for a Gaussian; 1563 values a level overfit by some percent
    assert error == pytest.approx(3**0.5 * np.pi / 2 / 256**2, rel=0.05)


def test_the_lloyd_start_is_twenty_naive_steps_from_the_cube_root_quantiles() -> None:
    for bits, x in ((2, randn(301)), (3, randn(500, seed=1).exp()), (4, randn(257, seed=2) ** 3)):
        start = cube_root_quantiles(x.sort().values, bits)
        expected = oracles.lloyd(x.tolist(), start.tolist(), 20)
        # levels and thresholds are rounded to single precision at each step
        np.testing.assert_allclose(initial_levels(x, bits).numpy(), expected, rtol=1e-5)


@few_examples
@given(value_lists, level_lists)
def test_one_lloyd_step_moves_each_level_to_its_cells_mean(
    values: list[float], levels: list[float]
) -> None:
    found = lloyd(torch.tensor(sorted(values)), torch.tensor(levels), 1)
    np.testing.assert_allclose(found.numpy(), oracles.lloyd(values, levels, 1), rtol=1e-6)


@few_examples
@given(value_lists, level_lists)
def test_lloyd_steps_never_increase_the_error_and_keep_the_order(
    values: list[float], levels: list[float]
) -> None:
    ordered, current = torch.tensor(sorted(values)), torch.tensor(levels)
    for _ in range(5):
        moved = lloyd(ordered, current, 1)
        assert torch.equal(moved, moved.sort().values)
        before, after = squared_error(ordered, current).sum(), squared_error(ordered, moved).sum()
        assert after <= before + 1e-4  # values up to 10 in single precision
        current = moved


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_uniform_start_is_the_best_of_its_grids_by_brute_force(bits: int) -> None:
    x = torch.cat([randn(150), torch.tensor([4.5, -3.0])])
    found = initial_levels(x, bits, "uniform")
    expected = oracles.uniform_levels(x.tolist(), bits)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(np.diff(found.numpy()), found[1] - found[0], rtol=1e-5)
    np.testing.assert_allclose(found.numpy(), -found.numpy()[::-1], rtol=1e-5)


def test_the_uniform_start_of_a_large_layer_is_found_on_a_part_of_it() -> None:
    x = randn(300_000)
    ordered = x.sort().values
    error = squared_error(x, best_uniform(ordered, 3)).mean()
    others = [(k - 3.5) * step for step in np.linspace(0.3, 1.2, 200) for k in [torch.arange(8)]]
    assert error <= 1.01 * min(squared_error(x, grid.float()).mean() for grid in others)


# J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), tables I and II.
MAX_OPTIMAL = {2: 0.1175, 3: 0.03454, 4: 0.009497}
MAX_UNIFORM = {2: 0.1188, 3: 0.03744, 4: 0.01154}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_weights_come_near_maxs_optimum(bits: int) -> None:
    x = randn(100_000)
    start = initial_levels(x, bits)
    converged = lloyd(x.sort().values, start, 1500)
    errors = squared_error(x, converged)
    # four standard errors of the sample, and the digits that the table gives
    sampling = 4 * errors.std().item() / math.sqrt(len(x)) + 1e-4 * MAX_OPTIMAL[bits]
    assert errors.mean().item() == pytest.approx(MAX_OPTIMAL[bits], abs=sampling)
    # twenty steps are not the limit: within 2 % of it at 2 and 3 bits, below uniform at 4
    bound = MAX_UNIFORM[4] if bits == 4 else 1.02 * MAX_OPTIMAL[bits]
    assert MAX_OPTIMAL[bits] - sampling < squared_error(x, start).mean().item() < bound + sampling


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_weights_on_a_uniform_grid_come_near_maxs_uniform_optimum(bits: int) -> None:
    x = randn(100_000)
    errors = squared_error(x, initial_levels(x, bits, "uniform"))
    sampling = 4 * errors.std().item() / math.sqrt(len(x))
    # 64 candidate steps lie 1/64 of the range apart, which costs up to 2 % at the flat minimum
    assert MAX_UNIFORM[bits] - sampling < errors.mean().item() < 1.02 * MAX_UNIFORM[bits] + sampling


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of \('quantile', .*got 'kmeans'"):
        initial_levels(randn(9), 2, "kmeans")  # type: ignore[arg-type]


ODD_WEIGHTS = {
    "all zero": torch.zeros(3, 4),
    "constant": torch.full((3, 4), 0.3),
    "constant, of both signs": torch.tensor([[0.3, -0.3], [0.3, 0.3]]),
    "one element": torch.tensor([[-0.7]]),
    "fewer values than levels": randn(2, 3),
    "a zero channel": torch.cat([randn(2, 5), torch.zeros(1, 5)]),
    "one sign": randn(3, 7).abs(),
    "one sign, the other": -randn(3, 7).abs(),
    "a single outlier": torch.cat([randn(1, 9), torch.tensor([[1e6] + 8 * [1e-6]])]),
    "tiny": 1e-30 * randn(3, 5),
    "huge": 1e18 * randn(3, 5),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_odd_weights_give_finite_sorted_levels_and_finite_gradients(
    name: str, init: Initialisation, bits: int
) -> None:
    weight = ODD_WEIGHTS[name].clone().requires_grad_()
    scale = channel_scale(weight.detach()).requires_grad_()
    x = (weight / scale).detach()
    state = new_codebook(x, bits, init)
    for _ in range(3):
        assert state.levels.shape == (2**bits,)
        assert torch.isfinite(torch.stack([state.levels, state.counts, state.sums])).all()
        assert (state.levels.diff() >= 0).all()
        quantized = fake_quantize(weight, scale, state.levels)
        gradients = torch.autograd.grad(quantized.sum(), (weight, scale))
        assert all(torch.isfinite(t).all() for t in (quantized, *gradients))
        state = ema_step(state, x, 0.9)


@pytest.mark.parametrize("bits", BITS)
def test_few_values_are_met_exactly(bits: int) -> None:
    # each of at most 2^bits values can have a level of its own; Lloyd's start finds it when the
    # values are spread evenly, because the quantile midpoints are then the values
    x = torch.linspace(-1, 1, 2**bits).repeat(3)
    assert torch.equal(initial_levels(x, bits), torch.linspace(-1, 1, 2**bits))
    assert initial_levels(torch.zeros(5), bits).tolist() == [0.0] * 2**bits
    assert set(initial_levels(torch.full((5,), 0.5), bits).tolist()) == {0.5}


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_a_channel_holds_only_its_scale_times_the_levels(bits: int, init: Initialisation) -> None:
    weight = randn(5, 400)
    scale = channel_scale(weight)
    levels = initial_levels(weight / scale, bits, init)
    quantized = fake_quantize(weight, scale, levels)
    assert torch.equal(quantized, scale * levels[assign(weight / scale, levels)])
    assert all(len(channel.unique()) <= 2**bits for channel in quantized)


def test_the_quantized_weight_is_the_nearest_by_a_slow_loop() -> None:
    weight, levels = randn(3, 2, 2), [-1.5, -0.25, 0.5, 1.0]
    scale = channel_scale(weight)
    quantized = fake_quantize(weight, scale, torch.tensor(levels))
    for c in range(3):
        s, found = scale[c].item(), quantized[c].flatten().tolist()
        nearest = [oracles.nearest_level(w / s, levels) for w in weight[c].flatten().tolist()]
        assert found == pytest.approx([s * levels[k] for k in nearest], rel=1e-6)


def test_gradients_are_straight_through_for_weights_and_lsqs_for_scales() -> None:
    weight = randn(4, 3, 2, dtype=torch.float64).requires_grad_()
    scale = (0.5 + randn(4, 1, 1, seed=1, dtype=torch.float64).abs()).requires_grad_()
    levels = torch.tensor([-2.0, -0.5, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    upstream = randn(4, 3, 2, seed=2, dtype=torch.float64)
    quantized = fake_quantize(weight, scale, levels)
    of_weight, of_scale, of_levels = torch.autograd.grad(
        quantized, (weight, scale, levels), upstream, allow_unused=True
    )
    assert torch.equal(of_weight, upstream)
    assert of_levels is None
    for c in range(4):
        s, expected = scale[c].item(), 0.0
        for w, g in zip(weight[c].flatten().tolist(), upstream[c].flatten().tolist(), strict=True):
            level = levels[oracles.nearest_level(w / s, levels.tolist())].item()
            expected += g * (level - w / s)
        assert of_scale[c].item() == pytest.approx(expected, rel=1e-12)


def test_gradients_agree_with_autograd_on_the_written_out_formula() -> None:
    weight = randn(4, 6, dtype=torch.float64).requires_grad_()
    scale = channel_scale(weight.detach()).requires_grad_()
    levels = initial_levels((weight / scale).detach(), 3)
    upstream = randn(4, 6, seed=2, dtype=torch.float64)
    x = weight / scale
    # ŵ = s·x̂ with x̂ = x + stop_grad(c[k(x)] − x): METHOD's and LSQ's form
    written_out = scale * (x + (levels[assign(x.detach(), levels)] - x).detach())
    expected = torch.autograd.grad(written_out, (weight, scale), upstream)
    found = torch.autograd.grad(fake_quantize(weight, scale, levels), (weight, scale), upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@few_examples
@given(value_lists, level_lists)
def test_statistics_are_those_of_the_cells(values: list[float], levels: list[float]) -> None:
    found = statistics(torch.tensor(values), torch.tensor(levels))
    served = oracles.cells(values, levels)
    for k, level in enumerate(levels):
        members = served.get(k, [])
        assert found.counts[k] == len(members)
        assert found.sums[k] == sum(members)
        assert found.squared_errors[k] == sum((v - level) ** 2 for v in members)


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_a_new_codebook_counts_its_values_and_its_average_is_its_levels(
    init: Initialisation,
) -> None:
    x = randn(333)
    state = new_codebook(x, 3, init)
    assert torch.equal(state.levels, initial_levels(x, 3, init))
    assert state.counts.tolist() == statistics(x, state.levels).counts.tolist()
    assert state.counts.sum() == 333
    torch.testing.assert_close(state.sums, state.counts * state.levels)


def book(state: list[oracles.Level]) -> Codebook:
    levels, counts, sums = torch.tensor(state, dtype=torch.float64).T
    return Codebook(levels, counts, sums)


@st.composite
def codebooks(draw: st.DrawFn) -> list[oracles.Level]:
    levels = draw(level_lists)
    counts = [draw(st.sampled_from([0.0, 0.25, 1.0, 7.5])) for _ in levels]
    return [(c, n, n * (c + draw(eighths) / 100)) for c, n in zip(levels, counts, strict=True)]


@few_examples
@given(
    codebooks(),
    value_lists,
    st.sampled_from([0.0, 0.5, 0.99]),
    st.sampled_from([0.0, 1e-5, 2.0]),
)
def test_a_step_is_that_of_the_slow_loop(
    state: list[oracles.Level], values: list[float], decay: float, epsilon: float
) -> None:
    found = ema_step(book(state), torch.tensor(values, dtype=torch.float64), decay, epsilon)
    expected = oracles.ema_step(state, values, decay, epsilon)
    # levels may tie up to rounding, so that only the sorted levels can be compared one by one
    np.testing.assert_allclose(found.levels, [c for c, _, _ in expected], rtol=1e-9, atol=1e-9)
    order = sorted(zip(found.counts.tolist(), found.sums.tolist(), strict=True))
    np.testing.assert_allclose(order, sorted(e[1:] for e in expected), rtol=1e-9, atol=1e-9)


def test_a_step_in_numbers() -> None:
    state = book([(-1.0, 2.0, -2.0), (0.0, 1.0, 0.0), (1.0, 3.0, 3.0), (2.0, 2.0, 4.0)])
    x = torch.tensor([-2.0, 0.25, 1.0, 1.25, 3.0, 2.0], dtype=torch.float64)
    moved = ema_step(state, x, decay=0.75, epsilon=0.5)
    # n = 1, 1, 2, 2 and m = −2, .25, 2.25, 5; ΣN = .75·8 + .25·6 = 7.5 and ΣN + 4ε = 9.5
    counts = [1.75, 1.0, 2.75, 2.0]
    sums = [-2.0, 0.0625, 2.8125, 4.25]
    assert moved.counts.tolist() == counts
    assert moved.sums.tolist() == sums
    levels = [m / ((n + 0.5) / 9.5 * 7.5) for n, m in zip(counts, sums, strict=True)]
    np.testing.assert_allclose(moved.levels, levels, rtol=1e-12)


def test_without_memory_a_step_is_lloyds() -> None:
    x = randn(500, dtype=torch.float64)
    state = new_codebook(x, 3, "uniform")
    moved = ema_step(state, x, decay=0.0, epsilon=0.0)
    expected = oracles.lloyd(x.tolist(), state.levels.tolist(), 1)
    np.testing.assert_allclose(moved.levels, expected, rtol=1e-12)


def test_many_damped_steps_end_where_lloyd_ends() -> None:
    x = randn(400, dtype=torch.float64)
    state = new_codebook(x, 2, "uniform")
    for _ in range(400):
        state = ema_step(state, x, decay=0.9)
    limit = oracles.lloyd(x.tolist(), state.levels.tolist(), 30)
    # 400 steps with a lag of 10; ε = 1e-5 against cells of 50 values and more
    np.testing.assert_allclose(state.levels, limit, rtol=1e-5)


def test_a_codebook_at_its_cells_means_stays_there() -> None:
    x = randn(400, dtype=torch.float64)
    levels = torch.tensor(oracles.lloyd(x.tolist(), [-2.0, -0.5, 0.5, 2.0], 100))
    now = statistics(x, levels)
    state = Codebook(levels, now.counts, now.counts * levels)
    torch.testing.assert_close(ema_step(state, x, 0.99, 0.0).levels, levels, rtol=1e-12, atol=0)


def test_a_reseeded_level_survives_the_next_steps() -> None:
    # fifty values at 1, fifty at 2 and a hundred at −1; two levels serve nobody
    x = torch.tensor(100 * [-1.0] + 50 * [1.0] + 50 * [2.0], dtype=torch.float64)
    state = book([(-1.0, 100.0, -100.0), (1.5, 100.0, 150.0), (50.0, 0.0, 0.0), (60.0, 0.0, 0.0)])
    first = ema_step(state, x, 0.99, 0.0)
    # the cell at 1.5 is the only one with error, σ = 1/2; the other dead level keeps its place
    assert first.levels.tolist() == [-1.0, 1.0, 2.0, 60.0]
    assert first.counts.tolist() == [100.0, 50.0, 50.0, 0.0]
    assert first.sums.tolist() == [-100.0, 50.0, 100.0, 0.0]
    second = ema_step(first, x, 0.99, 0.0)
    np.testing.assert_allclose(second.levels, [-1.0, 1.0, 2.0, 60.0], rtol=1e-12)
    np.testing.assert_allclose(second.counts, [100.0, 50.0, 50.0, 0.0], rtol=1e-12)


def test_reseeding_lowers_the_error_and_leaves_no_level_dead() -> None:
    x = randn(2000)
    levels = torch.cat([torch.tensor([-1.0, 1.0]), torch.arange(100.0, 106.0)])
    now = statistics(x, levels)
    state = Codebook(levels, now.counts.float(), (now.counts * levels).float())
    before = squared_error(x, levels).mean()
    for _ in range(300):
        state = ema_step(state, x, 0.9)
    assert (state.counts >= DEAD_COUNT).all()
    # from two levels (.36) to near eight levels' optimum; how near hangs on the local minimum
    assert before > 0.3
    assert squared_error(x, state.levels).mean() < 1.2 * MAX_OPTIMAL[3]


def test_the_worst_cell_is_split_first() -> None:
    x = torch.tensor([0.0, 0.1, 5.0, 7.0], dtype=torch.float64)
    state = book([(0.05, 2.0, 0.1), (6.0, 2.0, 12.0), (20.0, 0.0, 0.0), (30.0, 0.49, 14.7)])
    moved = ema_step(state, x, 0.999, 0.0)
    # 20 takes the half of the cell at 6 (σ = 1), 30 that of the cell at .05 (σ = .05)
    np.testing.assert_allclose(moved.levels, [0.0, 0.1, 5.0, 7.0], atol=1e-12)


@few_examples
@given(codebooks(), value_lists, st.sampled_from([0.0, 0.9]))
def test_levels_stay_sorted_and_counts_are_conserved(
    state: list[oracles.Level], values: list[float], decay: float
) -> None:
    before = book(state)
    moved = ema_step(before, torch.tensor(values, dtype=torch.float64), decay)
    assert (moved.levels.diff() >= 0).all()
    total = decay * before.counts.sum().item() + (1 - decay) * len(values)
    lost = total - moved.counts.sum().item()
    # a dead level that takes over half a cell gives up what it had, less than half a weight
    assert -1e-9 <= lost < DEAD_COUNT * len(state)
    alive = (
        decay * before.counts
        + (1 - decay) * statistics(torch.tensor(values, dtype=torch.float64), before.levels).counts
    )
    if (alive >= DEAD_COUNT).all():
        assert lost == pytest.approx(0, abs=1e-9)


def test_a_step_leaves_the_old_codebook_untouched() -> None:
    x = randn(50)
    state = new_codebook(x, 3)
    copy = [t.clone() for t in (state.levels, state.counts, state.sums)]
    ema_step(state, 2 * x, 0.5)
    for tensor, before in zip((state.levels, state.counts, state.sums), copy, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_weights_type_is_kept(dtype: torch.dtype) -> None:
    x = randn(3, 50).to(dtype)
    assert channel_scale(x).dtype == dtype
    for init in INITIALISATIONS:
        state = ema_step(new_codebook(x, 2, init), x, 0.9)
        assert state.levels.dtype == dtype
        assert state.counts.dtype == state.sums.dtype == torch.promote_types(dtype, torch.float32)
        assert fake_quantize(x, channel_scale(x), state.levels).dtype == dtype
