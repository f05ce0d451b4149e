"""Each baseline against its paper's formula or its authors' public code, written out literally."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant import codebook
from adq.quant.apply import quantize, quantized_layers
from adq.quant.baselines import (
    APoTWeight,
    LSQActivation,
    LSQWeight,
    MinMaxActivation,
    MinMaxWeight,
    N2UQWeight,
    PACTActivation,
    activation_quantizer_for,
    power_levels,
    weight_quantizer_for,
)
from adq.quant.export.loading import load_packed_
from adq.quant.export.packed import save_packed
from adq.quant.modules import AdaptiveWeight, N2UQActivation, WeightQuantizer
from adq.quant.qat import TrainingConfig, train_
from adq.quant.rows import Rows
from adq.quant.scheme import ACT_METHODS, WEIGHT_METHODS, Scheme
from adq.quant.spec import BitVector

SCHEMES = [Scheme(w, "n2uq") for w in WEIGHT_METHODS] + [Scheme("lsq", a) for a in ACT_METHODS]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.weight}-{s.act}")
every_width = pytest.mark.parametrize("bits", range(2, 9))
every_weight_method = pytest.mark.parametrize("method", WEIGHT_METHODS)
every_act_method = pytest.mark.parametrize("method", ACT_METHODS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(weight: Tensor) -> Rows:
    return Rows(tuple(weight.shape), weight[0].numel())


def quantizer(weight: Tensor, bits: int, method: Any) -> WeightQuantizer:
    return weight_quantizer_for(weight, whole(weight), bits, Scheme(method))


def results(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of the input); those of the parameters stay on them."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(upstream)
    return out.detach(), x.grad


def test_each_word_gives_its_class() -> None:
    weight = randn(3, 4)
    kinds = [type(quantizer(weight, 3, method)) for method in WEIGHT_METHODS]
    assert kinds == [AdaptiveWeight, LSQWeight, N2UQWeight, APoTWeight, MinMaxWeight]
    kinds = [type(activation_quantizer_for(3, 0.1, 0, Scheme(act=m))) for m in ACT_METHODS]
    assert kinds == [N2UQActivation, LSQActivation, PACTActivation, MinMaxActivation]


# --- LSQ, arXiv 1902.08153 ---


def lsq(v: float, step: float, low: int, high: int) -> tuple[float, float, float]:
    """(v̂, ∂v̂/∂v, ∂v̂/∂s): equations 1, 2, 5 and 3."""
    if v / step <= low:
        return low * step, 0.0, low
    if v / step >= high:
        return high * step, 0.0, high
    rounded = math.floor(v / step + 0.5)
    return rounded * step, 1.0, -v / step + rounded


@every_width
def test_lsqs_weights_and_gradients_are_those_of_its_equations(bits: int) -> None:
    weight, upstream = randn(3, 40), randn(3, 40, seed=1)
    weight[0] *= 4
    module = quantizer(weight, bits, "lsq")
    with torch.no_grad():
        module.log_scale -= 0.8  # away from its start: some weights are clipped
    out, grad = results(module, weight, upstream)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    clipped = 0
    for row in range(3):
        step, of_step = module.log_scale[row].exp().item(), 0.0
        for column in range(40):
            v, g = weight[row, column].item(), upstream[row, column].item()
            value, by_v, by_step = lsq(v, step, low, high)
            assert out[row, column].item() == pytest.approx(value, rel=1e-6)
            assert grad[row, column].item() == g * by_v
            of_step += g * by_step
            clipped += by_v == 0
        # section 2.2: g = 1/√(N·Q_P); and ∂s/∂log s = s
        expected = of_step / math.sqrt(40 * high) * step
        # 40 single-precision terms of up to Q_N
        assert module.log_scale.grad[row].item() == pytest.approx(
            expected, rel=1e-4, abs=1e-6 * 2**bits
        )
    assert clipped or bits > 5


@every_width
def test_lsqs_step_starts_at_the_papers_value_in_each_row(bits: int) -> None:
    weight = randn(4, 30) * torch.tensor([1.0, 2, 0.5, 3])[:, None]
    module = quantizer(weight, bits, "lsq")
    for row, step in zip(weight.tolist(), module.log_scale.exp().tolist(), strict=True):
        mean = math.fsum(abs(w) for w in row) / 30
        assert step == pytest.approx(2 * mean / math.sqrt(2 ** (bits - 1) - 1), rel=1e-5)
    assert module.levels.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_lsqs_factor_counts_the_weights_that_share_a_step() -> None:
    layer = nn.Linear(8, 2)
    for group_size, shared in ((None, 8), (4, 4), (2, 2)):
        rows = Rows((2, 8), group_size or 8)
        module = weight_quantizer_for(layer.weight, rows, 3, Scheme("lsq"))
        assert module.factor == pytest.approx((shared * 3) ** -0.5)


# --- APoT, arXiv 1909.13144 ---

H = [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / 512, 1 / 1024]
TERMS = {
    # bits of magnitude -> the sets whose sums are the magnitudes, as the public code lists them
    1: [[0, H[0]]],
    2: [[0, H[0], H[1], H[2]]],
    3: [[0, H[1], H[2], H[4]], [0, H[3]]],
    4: [[0, H[1], H[3], H[5]], [0, H[2], H[4], H[6]]],
    5: [[0, H[1], H[3], H[6]], [0, H[2], H[4], H[7]], [0, H[5]]],
    6: [[0, H[1], H[4], H[7]], [0, H[2], H[5], H[8]], [0, H[3], H[6], H[9]]],
    # not in the code: one term more than 6 bits, by the rule that leads from 2 to 3 and 4 to 5
    7: [[0, H[1], H[4], H[8]], [0, H[2], H[5], H[9]], [0, H[3], H[6], H[10]], [0, H[7]]],
}


@every_width
def test_apots_levels_are_those_of_a_literal_enumeration(bits: int) -> None:
    sums = {sum(terms) for terms in itertools.product(*TERMS[bits - 1])}
    assert len(sums) == 2 ** (bits - 1)  # no two sums agree
    expected = {sign * s / max(sums) for s in sums for sign in (-1, 1)}
    levels = power_levels(bits)
    assert len(levels) == 2**bits
    assert levels.tolist() == sorted(levels.tolist())
    assert sorted(set(levels.tolist())) == pytest.approx(sorted(expected), rel=1e-15)
    assert len(set(levels.tolist())) == 2**bits - 1
    assert levels[-1] == levels[-2] == 1


@every_width
def test_apots_start_is_the_best_of_its_64_clipping_values(bits: int) -> None:
    weight = randn(4, 25)
    module = quantizer(weight, bits, "apot")
    scale = codebook.channel_scale(weight)
    x = (weight / scale).flatten().tolist()
    clip = (module.log_scale.exp() / scale.flatten()).tolist()
    assert clip == pytest.approx([clip[0]] * 4, rel=1e-5)  # one clip, in units of each channel
    levels, largest = power_levels(bits).tolist(), max(abs(v) for v in x)
    errors = [
        oracles.mean_squared_error(x, [i / 64 * largest * c for c in levels]) for i in range(1, 65)
    ]
    found = oracles.mean_squared_error(x, [clip[0] * c for c in levels])
    assert found == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_apots_clipping_value_learns_by_equation_7(bits: int) -> None:
    # ∂ŵ/∂α = sign(w) outside the clip, Π(w̃) − w̃ with w̃ = w/α inside (straight through inside)
    weight, upstream = randn(2, 30), randn(2, 30, seed=1)
    module = quantizer(weight, bits, "apot")
    with torch.no_grad():
        module.log_scale -= 0.5
    out, grad = results(module, weight, upstream)
    levels = power_levels(bits).tolist()
    for row in range(2):
        alpha, expected = module.log_scale[row].exp().item(), 0.0
        for w, g, v, gw in zip(
            *(t[row].tolist() for t in (weight, upstream, out, grad)), strict=True
        ):
            scaled = w / alpha
            level = levels[oracles.nearest_level(scaled, levels)]
            assert v == pytest.approx(alpha * level, rel=1e-6)
            if abs(scaled) >= 1:
                expected += g * math.copysign(1, w) * alpha
                assert gw == 0
            else:
                expected += g * (level - scaled) * alpha
                assert gw == g
        assert module.log_scale.grad[row].item() == pytest.approx(expected, abs=1e-5)


# --- N2UQ's weights, arXiv 2111.14826 ---


def n2uq_weights(weight: Tensor, clip: Tensor, bits: int) -> Tensor:
    """The public code of HardQuantizeConv for a two-dimensional weight, line by line, but for the
    scale, which the gradient of the clipped weight is multiplied by."""
    gamma = (2**bits - 1) / (2 ** (bits - 1))
    scaling_factor = (gamma * weight.abs().mean(dim=1, keepdim=True)).detach()
    scaled = weight / scaling_factor
    clipped = torch.where(scaled < clip / 2, scaled, clip / 2)
    clipped = torch.where(clipped > -clip / 2, clipped, -clip / 2)
    n = float(2**bits - 1) / clip
    no_grad = scaling_factor * (((clipped + clip / 2) * n).round() / n - clip / 2)
    return no_grad.detach() + scaling_factor * (clipped - clipped.detach())


@every_width
@pytest.mark.parametrize("clip", [2.0, 1.3])
def test_n2uqs_weights_and_gradients_are_those_of_its_public_code(bits: int, clip: float) -> None:
    weight, upstream = randn(3, 50).double(), randn(3, 50, seed=1).double()
    module = quantizer(weight, bits, "n2uq")
    assert module.log_clip.exp().item() == pytest.approx(2)  # where the code starts
    with torch.no_grad():
        module.log_clip.fill_(math.log(clip))
    out, grad = results(module, weight, upstream)

    plain, alpha = weight.clone().requires_grad_(), torch.tensor([clip]).double().requires_grad_()
    expected = n2uq_weights(plain, alpha, bits)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad, plain.grad)
    assert alpha.grad.item() != 0
    assert module.log_clip.grad.item() == pytest.approx(alpha.grad.item() * clip)


def test_n2uqs_scale_is_that_of_the_present_weight() -> None:
    weight = randn(3, 20)
    module = quantizer(weight, 3, "n2uq")
    first = module.scale_of(weight)
    torch.testing.assert_close(module.scale_of(4 * weight), 4 * first)
    # 7/4·mean|w|·clip/7 between two of the eight levels, which span ±clip/2
    expected = weight.abs().mean(dim=1) * 7 / 4 * 2 / 7
    torch.testing.assert_close(first, expected)


# --- min-max ---


@every_width
def test_minmax_puts_the_largest_weight_on_the_largest_level_and_learns_nothing(bits: int) -> None:
    weight = randn(4, 30)
    weight[1] *= 5
    module = quantizer(weight, bits, "minmax")
    assert list(module.parameters()) == []
    assert set(module.state_dict()) == {"levels", "scale"}
    high = 2 ** (bits - 1) - 1
    for row, found in zip(weight.tolist(), module(weight).tolist(), strict=True):
        step = max(abs(w) for w in row) / high
        assert max(abs(v) for v in found) == pytest.approx(high * step, rel=1e-6)
        for w, v in zip(row, found, strict=True):
            assert abs(w - v) <= step / 2 * (1 + 1e-5)
            assert v / step == pytest.approx(round(v / step), abs=1e-4)


def test_minmax_keeps_its_scale_when_the_weights_move() -> None:
    weight = randn(4, 30)
    module = quantizer(weight, 3, "minmax")
    before = module.scale.clone()
    module(10 * weight)
    assert torch.equal(module.scale_of(10 * weight), before)


# --- activations ---


def grid_parameters(bits: int, signed: bool) -> tuple[float, int]:
    return 0.13, 2 ** (bits - 1) - 1 if signed else 0


def inputs(bits: int, step: float, zero_point: int) -> Tensor:
    """Values in and out of the range, none within a thousandth of a step of a threshold."""
    x = (torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.3) * 2**bits
    x = (x - zero_point) * step
    place = x / step - 0.5
    return torch.where((place - place.round()).abs() < 1e-3, x + 0.1 * step, x)


@every_act_method
@every_width
@pytest.mark.parametrize("signed", [False, True])
def test_every_activation_quantizer_starts_as_the_uniform_grid(
    method: Any, bits: int, signed: bool
) -> None:
    step, zero_point = grid_parameters(bits, signed)
    module = activation_quantizer_for(bits, step, zero_point, Scheme(act=method))
    x = inputs(bits, step, zero_point)
    found = module(x)
    expected = [oracles.affine_grid(v, step, zero_point, bits) for v in x.flatten().tolist()]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(found.unique()) <= 2**bits
    assert len(module.thresholds) == 2**bits - 1


def round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def grad_scale(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


@every_width
@pytest.mark.parametrize("signed", [False, True])
def test_lsqs_activation_is_that_of_its_papers_pseudocode(bits: int, signed: bool) -> None:
    step, zero_point = grid_parameters(bits, signed)
    low, high = -zero_point, 2**bits - 1 - zero_point
    module = activation_quantizer_for(bits, step, zero_point, Scheme(act="lsq"))
    x, upstream = inputs(bits, step, zero_point), randn(6, 50, seed=1)
    out, grad = results(module, x, upstream)

    plain, s = x.clone().requires_grad_(), torch.tensor([step], requires_grad=True)
    scaled = grad_scale(s, 1 / math.sqrt(50 * high))  # 50 features a sample
    expected = round_pass((plain / scaled).clamp(low, high)) * scaled
    expected.backward(upstream)
    # the two curves differ where a value is within half a step of either end of the range, where
    # LSQ clips and N2UQ's outermost segments end
    assert high > 0
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad, plain.grad)
    assert module.log_step.grad.item() == pytest.approx(s.grad.item() * step, rel=1e-4, abs=1e-5)


@every_width
@pytest.mark.parametrize("signed", [False, True])
def test_pacts_gradient_is_the_sum_over_clipped_values(bits: int, signed: bool) -> None:
    step, zero_point = grid_parameters(bits, signed)
    low, high = -zero_point * step, (2**bits - 1 - zero_point) * step
    module = activation_quantizer_for(bits, step, zero_point, Scheme(act="pact"))
    x, upstream = inputs(bits, step, zero_point), randn(6, 50, seed=1)
    out, grad = results(module, x, upstream)
    expected, clipped = 0.0, 0
    for v, g, gx in zip(*(t.flatten().tolist() for t in (x, upstream, grad)), strict=True):
        if v > high:
            expected, clipped = expected + g * high, clipped + 1  # ∂high/∂log σ = high
            assert gx == 0
        elif v < low:
            expected, clipped = expected + g * low, clipped + 1
            assert gx == 0
        else:
            assert gx == g
    assert 0 < clipped < x.numel()
    assert module.log_step.grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if not signed:
        # the paper's own case: α's gradient is Σ g over x >= α
        alpha = high
        of_alpha = module.log_step.grad.item() / alpha
        assert of_alpha == pytest.approx(upstream[x >= alpha].sum().item(), rel=1e-4, abs=1e-5)
    grid = [oracles.affine_grid(v, step, zero_point, bits) for v in x.flatten().tolist()]
    assert out.flatten().tolist() == pytest.approx(grid, rel=1e-5, abs=1e-6)


def test_minmaxs_activation_learns_nothing_and_passes_gradients_in_its_range() -> None:
    module = activation_quantizer_for(3, 0.25, 2, Scheme(act="minmax"))
    assert not any(p.requires_grad for p in module.parameters())
    x = torch.tensor([-9.0, -0.3, 0.0, 0.4, 1.2, 9.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@every_act_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_activation_quantizer_keeps_the_dtype_of_its_input(
    method: Any, dtype: torch.dtype
) -> None:
    module = activation_quantizer_for(4, 0.25, 3, Scheme(act=method))
    x = randn(4, 8).to(dtype).requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


# --- what holds for all of them ---

AWKWARD = {
    "zero": torch.zeros(3, 8),
    "constant": torch.full((3, 8), 0.7),
    "one-zero-row": torch.cat([torch.zeros(1, 8), randn(2, 8)]),
    "one-constant-row": torch.cat([torch.full((1, 8), -2.0), randn(2, 8)]),
    "one-weight": torch.tensor([[0.3]]),
    "tiny": randn(3, 8) * 1e-30,
    "huge": randn(3, 8) * 1e15,
}


@every_weight_method
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_awkward_channels_stay_finite(method: Any, kind: str, bits: int) -> None:
    weight = AWKWARD[kind]
    module = quantizer(weight, bits, method)
    out, grad = results(module, weight, torch.ones_like(weight))
    assert out.isfinite().all()
    assert grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert (module.scale_of(weight) > 0).all()
    # no weight is thrown far out of what the layer holds; N2UQ has no level at zero, and where
    # there is nothing else its least scale shows
    slack = 0.01 if method == "n2uq" else 0.0
    assert (out.abs() <= 4 * weight.abs().max() + slack).all()


@every_weight_method
@every_width
def test_every_weight_quantizer_honours_its_bits(method: Any, bits: int) -> None:
    weight = randn(2, 700)
    module = quantizer(weight, bits, method)
    assert module.levels.numel() == 2**bits
    assert (module.levels.diff() >= 0).all()
    codes = module.codes(weight).view(2, -1)
    assert codes.dtype == torch.uint8
    assert codes.max() <= 2**bits - 1
    for row, used in zip(module(weight), codes, strict=True):
        assert len(row.unique()) <= 2**bits
        if method != "lsq":  # whose start spans 2·√Q_P·mean|w|: far more than there is at 8 bits
            assert len(row.unique()) > 2**bits / 2
        assert len(used.unique()) >= len(row.unique())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.unsqueeze(1))).relu()
        return self.head(self.up(x).relu().mean(dim=2))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def data() -> list[tuple[Tensor, Tensor]]:
    x = randn(32, 8)
    y = (x[:, :3].sum(dim=1) > 0).long() + (x[:, 4] > 0.5).long()
    return [(x[:16], y[:16]), (x[16:], y[16:])]


BITS = BitVector({"first": 4, "up": 3, "head": 5}, {"up": 4, "head": 3})


@every_scheme
@pytest.mark.parametrize("group_size", [None, 2])
def test_every_scheme_trains_to_a_lower_loss_and_packs_to_the_same_outputs(
    scheme: Scheme, group_size: int | None, tmp_path: Path
) -> None:
    scheme = Scheme(scheme.weight, scheme.act, group_size=group_size)
    model = quantize(net(), BITS, data(), scheme)
    start = copy.deepcopy(model.state_dict())
    config = TrainingConfig(25, lr=2e-2, distillation=0)
    epochs = train_(model, data(), F.cross_entropy, config, 0)
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert not model.training

    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        if name in learned and not name.endswith("log_clip"):  # which learns from clipped weights
            assert not torch.equal(value, start[name]), name
    for name, _ in quantized_layers(model):
        if scheme.weight != "adq":  # baselines' levels stay where they are
            key = f"{name}.parametrizations.weight.0.levels"
            assert torch.equal(model.state_dict()[key], start[key])

    save_packed(model, tmp_path / "m", {})
    loaded = load_packed_(net(seed=4), tmp_path / "m", kernels="torch")
    for x, _ in data():
        assert torch.equal(loaded(x), model(x))


@every_scheme
def test_every_schemes_state_fits_a_fresh_model(scheme: Scheme) -> None:
    model = quantize(net(), BITS, data(), scheme)
    train_(model, data(), F.cross_entropy, TrainingConfig(3, lr=2e-2), 0)
    fresh = quantize(net(seed=7), BITS, [(3 * x, y) for x, y in data()], scheme)
    x = data()[0][0]
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
