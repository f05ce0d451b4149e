"""The gradient score against a slow double loop and written-out derivatives."""

import copy
import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies.base import quantization_errors
from adq.proxies.gradient import gradient_sensitivity
from adq.quant.activation import fit_range
from adq.quant.calibrate import input_samples
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers

Batches = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """Three layers; the input of `branch` also goes past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.branch = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(1.7)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.stem(x)))
        return self.head(h + self.branch(h))


@pytest.fixture
def net() -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Residual().double().train()


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, generator=generator).double()
    y = torch.randint(0, 3, (7,), generator=generator)
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def samples_of(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


def test_weight_scores_are_those_of_a_slow_double_loop(net: Residual, batches: Batches) -> None:
    layers = trace_layers(net, batches[0][0])
    found = gradient_sensitivity(net, layers, (4, 2), (), batches, F.cross_entropy)
    assert (found.proxy, found.act, found.samples) == ("fisher", None, 7)
    assert found.weight.layers == ("stem", "branch", "head")
    assert found.weight.bits == (4, 2)

    twin = copy.deepcopy(net).eval()
    for i, layer in enumerate(layers):
        weight = twin.get_parameter(f"{layer.name}.weight")
        for j, delta in enumerate(quantization_errors(weight, (4, 2))):
            per_sample = []
            for x, y in samples_of(batches):
                twin.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                pairs = zip(weight.grad.flatten().tolist(), delta.flatten().tolist(), strict=True)
                per_sample.append(0.5 * sum(g**2 * d**2 for g, d in pairs))
            mean, stderr = mean_and_stderr(per_sample)
            assert found.weight.score[i, j] == pytest.approx(mean, rel=1e-9)
            assert found.weight.stderr[i, j] == pytest.approx(stderr, rel=1e-9)


def grid_error(value: float, bits: int, step: float, zero_point: int) -> float:
    return oracles.affine_grid(value, step, zero_point, bits) - value


def test_input_scores_count_the_layers_own_use_and_not_the_skip_beside_it(
    net: Residual, batches: Batches
) -> None:
    layers = trace_layers(net, batches[0][0])
    found = gradient_sensitivity(net, layers, (2,), (3, 2), batches, F.cross_entropy).act
    assert (found.layers, found.bits) == (("stem", "branch", "head"), (3, 2))
    net.eval()
    samples = input_samples(net, found.layers, batches)

    # by hand: with p the softmax, ∂ℓ/∂logits = p − onehot
    rows: dict[str, list[list[float]]] = {name: [[], []] for name in found.layers}
    with torch.no_grad():
        for x, y in samples_of(batches):
            h = torch.tanh(net.norm(net.stem(x)))
            u = h + net.branch(h)
            at_logits = net.head(u).softmax(dim=1) - F.one_hot(y, 3)
            at_head = at_logits @ net.head.weight
            at_branch = at_head @ net.branch.weight  # the skip would add at_head itself
            at_norm = (at_head + at_branch) * (1 - h**2)
            scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
            at_stem = (at_norm * scale) @ net.stem.weight
            for name, value, gradient in (
                ("stem", x, at_stem),
                ("branch", h, at_branch),
                ("head", u, at_head),
            ):
                for j, bits in enumerate((3, 2)):
                    step, zero_point = fit_range(samples[name], bits)
                    score = 0.0
                    for v, g in zip(value[0].tolist(), gradient[0].tolist(), strict=True):
                        score += 0.5 * (g * grid_error(v, bits, step, zero_point)) ** 2
                    rows[name][j].append(score)
    for i, name in enumerate(found.layers):
        for j in range(2):
            mean, stderr = mean_and_stderr(rows[name][j])
            assert found.score[i, j] == pytest.approx(mean, rel=1e-6)
            assert found.stderr[i, j] == pytest.approx(stderr, rel=1e-6)


class Twice(nn.Module):
    """Calls `shared` twice, on unlike inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(torch.tanh(self.shared(self.stem(x)))))


def test_a_layer_called_twice_sums_its_gradients_and_its_input_scores(batches: Batches) -> None:
    torch.manual_seed(0)
    net = Twice().double().eval()
    layers = trace_layers(net, batches[0][0])
    found = gradient_sensitivity(net, layers, (3,), (3,), batches, F.cross_entropy)
    [delta] = quantization_errors(net.shared.weight, (3,))
    step, zero_point = fit_range(input_samples(net, ["shared"], batches)["shared"], 3)
    weight_scores, input_scores = [], []
    with torch.no_grad():
        for x, y in samples_of(batches):
            first = net.stem(x)
            second = torch.tanh(net.shared(first))
            out = net.shared(second)
            at_out = (net.head(out).softmax(dim=1) - F.one_hot(y, 3)) @ net.head.weight
            at_second = at_out @ net.shared.weight
            at_middle = at_second * (1 - second**2)
            at_first = at_middle @ net.shared.weight
            of_weight = at_out.T @ second + at_middle.T @ first
            weight_scores.append(0.5 * (of_weight * delta).square().sum().item())
            input_scores.append(
                sum(
                    0.5 * (g * grid_error(v, 3, step, zero_point)) ** 2
                    for value, gradient in ((first, at_first), (second, at_second))
                    for v, g in zip(value[0].tolist(), gradient[0].tolist(), strict=True)
                )
            )
    assert found.weight.score[1, 0] == pytest.approx(np.mean(weight_scores), rel=1e-9)
    assert found.act.score[1, 0] == pytest.approx(np.mean(input_scores), rel=1e-6)


class InPlace(nn.Module):
    """Rectifies in place what a layer has just read."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        branch = self.b(h)
        return self.c(branch + F.relu(h, self.inplace))


def test_operations_in_place_do_not_reach_the_kept_inputs(batches: Batches) -> None:
    scores = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = InPlace(inplace).double()
        with torch.no_grad():
            layers = trace_layers(InPlace(False).double(), batches[0][0])
        found = gradient_sensitivity(net, layers, (2,), (2,), batches, F.cross_entropy)
        scores.append((found.weight.score.tolist(), found.act.score.tolist()))
    assert scores[0] == scores[1]


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(16, 3),
        )


def test_convolutions_batchnorm_and_inplace_rectifiers_are_no_obstacle() -> None:
    net = convolutional()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 1, 5, 5, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    layers = trace_layers(net, x)
    found = gradient_sensitivity(net, layers, (2, 8), (2, 8), [(x, y)], F.cross_entropy)
    for table in (found.weight, found.act):
        assert np.isfinite(table.score).all()
        assert (table.score[:, 0] > table.score[:, 1]).all()
        assert (table.score > 0).all()
    # plain per-sample autograd on the first layer
    net.eval()
    [delta] = quantization_errors(net[0].weight, (2,))
    per_sample = []
    for i in range(6):
        [g] = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net[0].weight)
        per_sample.append(0.5 * (g * delta).square().sum().item())
    assert found.weight.score[0, 0] == pytest.approx(np.mean(per_sample), rel=1e-5)


def test_the_batching_does_not_matter(net: Residual, batches: Batches) -> None:
    layers = trace_layers(net, batches[0][0])
    one, other = (
        gradient_sensitivity(net, layers, (3,), (), parts, F.cross_entropy).weight
        for parts in (batches, samples_of(batches))
    )
    np.testing.assert_allclose(one.score, other.score, rtol=1e-12)
    np.testing.assert_allclose(one.stderr, other.stderr, rtol=1e-12)


def test_targets_may_be_dictionaries(net: Residual, batches: Batches) -> None:
    def named(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["label"])

    layers = trace_layers(net, batches[0][0])
    plain = gradient_sensitivity(net, layers, (3,), (), batches, F.cross_entropy).weight
    dressed = [(x, {"label": y}) for x, y in batches]
    found = gradient_sensitivity(net, layers, (3,), (), dressed, named).weight
    assert np.array_equal(found.score, plain.score)


def test_the_model_is_left_as_it_was(net: Residual, batches: Batches) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    layers = trace_layers(net, batches[0][0])
    gradient_sensitivity(net, layers, (3,), (3,), batches, F.cross_entropy)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert not any(x.requires_grad for x, _ in batches)


def test_hooks_are_taken_off_when_the_loss_raises(net: Residual, batches: Batches) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("stop")

    layers = trace_layers(net, batches[0][0])
    with pytest.raises(KeyError, match="stop"):
        gradient_sensitivity(net, layers, (3,), (), batches, broken)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(m.training for m in net.modules())


def head_alone(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return net.head.weight.square().sum() + 0 * targets.sum()

    return loss


def test_layers_that_the_loss_never_meets_score_zero(net: Residual, batches: Batches) -> None:
    layers = trace_layers(net, batches[0][0])
    found = gradient_sensitivity(net, layers, (2,), (2,), batches, head_alone(net))
    assert found.weight.score[:2].tolist() == [[0], [0]]
    assert found.weight.score[2] > 0
    assert not found.act.score.any()


@pytest.mark.parametrize("samples", [0, 1])
def test_fewer_than_two_samples_are_refused(net: Residual, batches: Batches, samples: int) -> None:
    layers: tuple[LayerInfo, ...] = trace_layers(net, batches[0][0])
    few = samples_of(batches)[:samples]
    with pytest.raises(InputError, match=f"at least 2 samples, .*; got {samples}"):
        gradient_sensitivity(net, layers, (2,), (), few, F.cross_entropy)
