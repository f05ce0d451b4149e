"""Hutchinson's estimate against dense Hessians and against its own standard error."""

import math

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies.base import quantization_errors
from adq.proxies.trace import TraceEstimate, hutchinson_trace, trace_sensitivity
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.hidden(x)))


NAMES = ("conv", "hidden", "head")


@pytest.fixture
def net() -> Net:
    """Double precision, in training mode, with BatchNorm statistics unlike the data's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double().train()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def batches() -> Batches:
    """12 samples and 2 that are quite unlike them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, 1, 4, 4, generator=generator).double()
    x[12:] *= 4
    y = torch.randint(0, 3, (14,), generator=generator)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [model.get_parameter(f"{name}.weight") for name in NAMES]


def dense(model: nn.Module, batches: Batches) -> np.ndarray:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    names = [f"{name}.weight" for name in NAMES]
    model.eval()
    traces = oracles.dense_traces(model, names, x, y, F.cross_entropy)
    model.train()
    return np.array(traces)


def test_the_estimate_is_the_dense_hessians_trace_within_its_error(
    net: Net, batches: Batches
) -> None:
    truth = dense(net, batches)
    found = hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, probes=600, seed=0)
    assert found.probes == 600
    assert (abs(found.trace - truth) < 4 * found.stderr).all()
    # the test can tell: equal weights for both batches would be far outside
    apart = np.array([dense(net, [batch]) for batch in batches])
    assert (abs(apart.mean(axis=0) - truth) > 8 * found.stderr).any()
    assert (found.stderr < 0.2 * abs(truth)).all()


class Elementwise(nn.Module):
    """outputs = x ⊙ w: with a squared loss its Hessian is diagonal, E[x²]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1, 1, n).double())
        self.second = nn.Parameter(torch.linspace(2, 3, n).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * self.first, 3 * x * self.second], dim=1)


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def test_a_diagonal_hessian_is_met_exactly_with_no_error_and_batches_weighted() -> None:
    model = Elementwise(6)
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).double()
    x[8:] += 5
    targets = torch.ones(11, 12).double()
    batches = [(x[:8], targets[:8]), (x[8:], targets[8:])]
    found = hutchinson_trace(model, [model.first, model.second], batches, half_squares, 3, seed=0)
    expected = x.square().mean(dim=0).sum().item()
    assert found.trace == pytest.approx([expected, 9 * expected], rel=1e-12)
    assert found.stderr == pytest.approx([0, 0], abs=1e-9)


def test_the_batching_does_not_matter(net: Net, batches: Batches) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    estimates = []
    for size in (14, 5, 1):
        parts = [(x[i : i + size], y[i : i + size]) for i in range(0, 14, size)]
        estimates.append(hutchinson_trace(net, weights_of(net), parts, F.cross_entropy, 4, 0))
    for other in estimates[1:]:
        np.testing.assert_allclose(other.trace, estimates[0].trace, rtol=1e-10)
        np.testing.assert_allclose(other.stderr, estimates[0].stderr, rtol=1e-10)


def test_the_standard_error_shrinks_with_the_root_of_the_probes(net: Net, batches: Batches) -> None:
    few, many = (
        hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, probes, seed=0).stderr
        for probes in (60, 960)
    )
    # a standard deviation of 60 draws is itself known to about 1/sqrt(2·60) = 9 %: allow 3 times
    np.testing.assert_allclose(few / many, 4, rtol=0.3)


def test_the_standard_error_is_calibrated(net: Net, batches: Batches) -> None:
    truth = dense(net, batches[:1])
    repetitions, probes = 100, 20
    z = []
    for seed in range(repetitions):
        found = hutchinson_trace(
            net, weights_of(net), batches[:1], F.cross_entropy, probes, seed=seed
        )
        z.append((found.trace - truth) / found.stderr)
    # Student's t of 19 degrees of freedom has the spread sqrt(19/17) = 1.06. The spread of 100
    # draws is known to about 1/sqrt(200) = 7 %, their mean to 1/sqrt(100): four times that.
    spread = np.std(z, axis=0, ddof=1)
    assert (abs(spread - 1.06) < 0.28).all(), spread
    assert (abs(np.mean(z, axis=0)) < 0.4).all()


def test_the_standard_error_is_that_of_the_mean_over_probes() -> None:
    # one 2x2 block: H = [[a, b], [b, c]], so each probe gives a + c ± 2b
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.2]).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.w[None].expand(len(x), -1)

    def quadratic(w: Tensor, _: Tensor) -> Tensor:
        return (1.5 * w[:, 0] ** 2 + 2.5 * w[:, 0] * w[:, 1] + 2 * w[:, 1] ** 2).mean()

    model, batch = Pair(), (torch.zeros(3, 1), torch.zeros(3))
    found = hutchinson_trace(model, [model.w], [batch], quadratic, probes=64, seed=1)
    plus = round((found.trace[0] - (7 - 5)) / 10 * 64)  # how many probes gave 7 + 5
    draws = np.array([12.0] * plus + [2.0] * (64 - plus))
    assert 0 < plus < 64
    assert found.trace[0] == pytest.approx(draws.mean(), rel=1e-12)
    assert found.stderr[0] == pytest.approx(draws.std(ddof=1) / 8, rel=1e-12)


def test_one_seed_gives_one_estimate_whatever_the_random_state(net: Net, batches: Batches) -> None:
    estimates = []
    for outside, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(outside)
        estimates.append(
            hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, 4, seed).trace.tolist()
        )
    assert estimates[0] == estimates[1] != estimates[2]


def test_the_model_is_left_as_it_was(net: Net, batches: Batches) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(0)
    outside = torch.get_rng_state()
    hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, 2, 0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert torch.equal(torch.get_rng_state(), outside)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.curved, self.unused = (nn.Linear(3, 2).double() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), self.curved(x), self.unused(x)


def test_linear_and_unused_layers_have_no_curvature() -> None:
    def loss(outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        return outputs[0].sum() + outputs[1].square().sum(dim=1).mean()

    model = Heads()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    weights = [model.linear.weight, model.curved.weight, model.unused.weight]
    found = hutchinson_trace(model, weights, [(x, x)], loss, 200, 0)
    # the Hessian of Σ_o (w_o·x)² is 2·E[x xᵀ] for each of two outputs
    expected = 4 * x.square().sum(dim=1).mean().item()
    assert found.trace[[0, 2]].tolist() == found.stderr[[0, 2]].tolist() == [0, 0]
    assert abs(found.trace[1] - expected) < 4 * found.stderr[1]


@pytest.mark.parametrize("probes", [0, 1])
def test_fewer_than_two_probes_are_refused(net: Net, batches: Batches, probes: int) -> None:
    with pytest.raises(InputError, match=f"at least 2 probes, .*; got {probes}"):
        hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, probes, 0)


def test_empty_batches_are_refused(net: Net) -> None:
    with pytest.raises(InputError, match="batches for the Hessian trace are empty"):
        hutchinson_trace(net, weights_of(net), [], F.cross_entropy, 4, 0)


def test_scores_are_half_the_mean_curvature_times_the_squared_error(
    net: Net, batches: Batches
) -> None:
    layers = trace_layers(net, batches[0][0])
    assert tuple(layer.name for layer in layers) == NAMES
    found = trace_sensitivity(net, layers, (4, 2), batches, F.cross_entropy, probes=8, seed=5)
    estimate = hutchinson_trace(net, weights_of(net), batches, F.cross_entropy, 8, 5)
    assert (found.proxy, found.act, found.samples) == ("hessian-trace", None, 8)
    assert (found.weight.layers, found.weight.bits) == (NAMES, (4, 2))
    assert found.seconds > 0
    for i, weight in enumerate(weights_of(net)):
        for j, error in enumerate(quantization_errors(weight, (4, 2))):
            factor = sum(e * e for e in error.flatten().tolist()) / (2 * weight.numel())
            assert found.weight.score[i, j] == pytest.approx(max(0, estimate.trace[i]) * factor)
            assert found.weight.stderr[i, j] == pytest.approx(estimate.stderr[i] * factor)


def test_a_score_foretells_the_loss_of_quantizing_a_quadratic_bowl() -> None:
    # loss ½‖w − w₀‖² around its minimum: the Hessian is the identity, so that HAWQ's mean
    # curvature loses nothing and the score is the true increase
    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.weight[None].expand(len(x), -1, -1)

    model = Bowl()
    minimum = model.layer.weight.detach().clone()

    def loss(weight: Tensor, _: Tensor) -> Tensor:
        return 0.5 * (weight - minimum).square().sum(dim=(1, 2)).mean()

    info = LayerInfo("layer", "Linear", (6, 20), (20,), 120, 6)
    batch = (torch.zeros(4, 1), torch.zeros(4))
    found = trace_sensitivity(model, [info], (2, 3), [batch], loss, probes=2).weight.score[0]
    for j, error in enumerate(quantization_errors(minimum, (2, 3))):
        with torch.no_grad():
            model.layer.weight.copy_(minimum + error)
        assert found[j] == pytest.approx(loss(model(batch[0]), batch[1]).item(), rel=1e-9)


def test_a_negative_trace_scores_zero_and_keeps_its_error(monkeypatch, net, batches) -> None:
    estimate = TraceEstimate(np.array([-1.0, 2.0, 0.0]), np.array([0.5, 0.5, 0.5]), 4)
    monkeypatch.setattr("adq.proxies.trace.hutchinson_trace", lambda *_: estimate)
    layers = trace_layers(net, batches[0][0])
    table = trace_sensitivity(net, layers, (2,), batches, F.cross_entropy, 4).weight
    assert (table.score[0], table.score[2]) == (0, 0)
    assert table.score[1, 0] > 0
    assert (table.stderr > 0).all()
    assert math.isfinite(table.score.sum())
