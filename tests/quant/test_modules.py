import math

import oracles
import pytest
import torch
from torch import Tensor, nn

from adq.quant import codebook
from adq.quant.modules import MIN_WIDTH, AdaptiveWeight, N2UQActivation
from adq.quant.rows import Rows


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adaptive(weight: Tensor, bits: int, *init: codebook.Initialisation) -> AdaptiveWeight:
    return AdaptiveWeight(weight, Rows(tuple(weight.shape), weight[0].numel()), bits, *init)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("init", codebook.INITIALISATIONS)
def test_a_weight_quantizer_starts_at_the_channels_scales_and_their_codebook(
    init: codebook.Initialisation,
) -> None:
    weight = randn(4, 3, 5)
    quantizer = adaptive(weight, 3, init)
    scale = codebook.channel_scale(weight)
    torch.testing.assert_close(quantizer.log_scale.exp(), scale.flatten())
    expected = codebook.initial_levels(weight / scale, 3, init)
    assert torch.equal(quantizer.levels, expected)
    assert quantizer.counts.sum() == weight.numel()
    scale = quantizer.log_scale.exp()
    assert torch.equal(quantizer(weight), codebook.fake_quantize(weight, scale, expected))


def test_forward_changes_no_state() -> None:
    weight = nn.Parameter(randn(4, 6))
    quantizer = adaptive(weight, 2).train()
    before = snapshot(quantizer)
    for _ in range(3):
        quantizer(2 * weight).sum().backward()
    assert same(before, snapshot(quantizer))


def test_the_logarithmic_scale_learns_by_lsqs_gradient_times_the_scale() -> None:
    weight = randn(3, 20)
    quantizer = adaptive(weight, 2)
    upstream = randn(3, 20, seed=1)
    quantizer(weight).backward(upstream)
    levels = quantizer.levels.tolist()
    for c in range(3):
        s, expected = quantizer.log_scale[c].exp().item(), 0.0
        for w, g in zip(weight[c].tolist(), upstream[c].tolist(), strict=True):
            level = levels[oracles.nearest_level(w / s, levels)]
            expected += g * (level - w / s) * s
        # sums of 20 single-precision terms of order one
        assert quantizer.log_scale.grad[c].item() == pytest.approx(expected, abs=1e-5)


def test_state_and_not_more_is_saved() -> None:
    quantizer = adaptive(randn(4, 6), 2)
    assert set(quantizer.state_dict()) == {"log_scale", "levels", "counts", "sums"}
    assert [name for name, _ in quantizer.named_parameters()] == ["log_scale"]
    act = N2UQActivation(2, 0.5, 0)
    assert set(act.state_dict()) == {
        "log_input_scale",
        "log_output_scale",
        "start",
        "widths",
        "zero_point",
    }
    assert "zero_point" not in dict(act.named_parameters())


def test_the_bits_show_in_print() -> None:
    assert repr(adaptive(randn(4, 6), 3)) == "AdaptiveWeight(bits=3)"
    assert repr(N2UQActivation(4, 0.5, 0)) == "N2UQActivation(bits=4)"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_an_activation_quantizer_starts_as_the_uniform_affine_grid(bits: int, signed: bool) -> None:
    step, zero_point = 0.25, 2 ** (bits - 1) if signed else 0
    # every sixteenth of a step, ties and both ends included; a power of two keeps it all exact
    x = torch.arange(-(2**bits) * 16, 2**bits * 32) * (step / 16)
    found = N2UQActivation(bits, step, zero_point)(x)
    expected = [oracles.affine_grid(v, step, zero_point, bits) for v in x.tolist()]
    assert found.tolist() == expected


def test_a_step_that_is_no_power_of_two_gives_the_grid_away_from_the_thresholds() -> None:
    step, zero_point, bits = 0.137, 5, 4
    x = 1.5 * randn(500)
    place = x / step - 0.5
    x = x[(place - place.round()).abs() > 1e-3]  # rounding decides what lies on a threshold
    found = N2UQActivation(bits, step, zero_point)(x)
    expected = [oracles.affine_grid(v, step, zero_point, bits) for v in x.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_zero_stays_zero_at_the_start() -> None:
    for zero_point in range(8):
        assert N2UQActivation(3, 0.137, zero_point)(torch.zeros(1)).item() == 0


def trained(bits: int = 3) -> N2UQActivation:
    """A quantizer whose every parameter has moved away from its start."""
    quantizer = N2UQActivation(bits, 0.3, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    return quantizer


def test_its_thresholds_are_where_its_output_changes() -> None:
    quantizer = trained()
    x = randn(400)
    limits = quantizer.thresholds.tolist()
    codes = quantizer(x) / quantizer.output_scale + quantizer.zero_point
    assert codes.round().int().tolist() == [oracles.code(v, limits) for v in x.tolist()]


def test_gradients_reach_every_parameter_through_the_written_out_curve() -> None:
    quantizer = trained().double()
    x = randn(300).double()
    upstream = randn(300, seed=1).double()
    quantizer(x).backward(upstream)
    found = {name: p.grad.clone() for name, p in quantizer.named_parameters()}

    quantizer.zero_grad()
    scale = quantizer.log_input_scale.exp()
    curve = oracles.curve(x, quantizer.start * scale, quantizer.widths * scale)
    (quantizer.log_output_scale.exp().detach() * curve).backward(upstream)
    for name in ("log_input_scale", "start", "widths"):
        torch.testing.assert_close(found[name], quantizer.get_parameter(name).grad)
    step = quantizer(x).detach()  # ∂x̂/∂log σ = x̂
    assert found["log_output_scale"].item() == pytest.approx((upstream * step).sum().item())


def test_widths_that_training_drove_below_zero_keep_the_thresholds_in_order() -> None:
    quantizer = N2UQActivation(2, 0.5, 0)
    with torch.no_grad():
        quantizer.widths.copy_(torch.tensor([1.0, -3.0, 0.0]))
    # knots at 0, .5, and then twice the least width
    least = 0.5 * MIN_WIDTH
    expected = [0.25, 0.5 + least / 2, 0.5 + 1.5 * least]
    assert quantizer.thresholds.tolist() == pytest.approx(expected, rel=1e-6)
    x = torch.linspace(-1, 2, 50, requires_grad=True)
    quantizer(x).sum().backward()
    assert all(math.isfinite(g) for g in x.grad.tolist())


def test_forward_of_an_activation_quantizer_changes_no_state() -> None:
    quantizer = trained().train()
    before = snapshot(quantizer)
    quantizer(randn(50)).sum().backward()
    assert same(before, snapshot(quantizer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_reach_the_counts(dtype: torch.dtype) -> None:
    # a float16 count ends at 65504: four levels of a million weights have more
    quantizer = adaptive(randn(1000, 1000), 2).to(dtype)
    assert quantizer.levels.dtype == quantizer.log_scale.dtype == dtype
    assert quantizer.counts.dtype == quantizer.sums.dtype == torch.float32
    assert quantizer.counts.sum() == 10**6
    assert adaptive(randn(4, 6), 2).double().counts.dtype == torch.float64
