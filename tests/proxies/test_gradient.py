"""Gradient scores against dense Gauss-Newton matrices, slow loops and written-out derivatives.

A score at the model's labels is the mean of something over random signs. Where the signs are
replaced by each of their patterns in turn, that mean is exact.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies import gradient
from adq.proxies.base import Sensitivity, Subject, quantization_errors
from adq.proxies.gradient import MAX_OUTPUTS, SCORES, Gradients
from adq.proxies.work import Work
from adq.quant.batches import batch_size
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.layers import trace_layers
from adq.quant.rows import rows_of
from adq.quant.scheme import Scheme

Batches = list[tuple[Tensor, Tensor]]
CPU = torch.device("cpu")
AT_MODEL = ("gauss-newton", "fisher", "gauss-newton-trace")
AT_GIVEN = ("empirical-fisher", "output-gradient")
SCHEME = Scheme(weight="minmax")


def subject_of(
    model: nn.Module,
    batches: Sequence[tuple[Any, Any]],
    loss: Any = F.cross_entropy,
    bits: tuple[int, ...] = (2, 3),
    act_bits: tuple[int, ...] = (),
    **settings: Any,
) -> Subject:
    layers = trace_layers(copy.deepcopy(model), batches[0][0])
    wanted = {layer.name: act_bits for layer in layers} if act_bits else {}
    ranges = input_ranges(model, wanted, batches)
    return Subject(model, layers, bits, batches, loss, act_bits, SCHEME, ranges, **settings)


def measured(subject: Subject, *scores: str, pairs: int = 0) -> list[Sensitivity]:
    return Gradients(scores, pairs).measure(subject, Work())


def over_all_signs(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, *scores: str, pairs: int = 0
) -> list[dict[str, np.ndarray]]:
    """What each score is on average over every pattern of signs, of all samples of a batch.

    All batches have the same size and get the same pattern: each is averaged over all of them.
    """
    n = batch_size(subject.batches[0])
    with torch.no_grad():
        count = copy.deepcopy(subject.model).eval()(subject.batches[0][0])[0].numel()
    pattern: list[tuple[int, ...]] = []

    def given(shape: tuple[int, ...], _: torch.Generator, like: Tensor) -> Tensor:
        assert math.prod(shape) == n * count
        return torch.tensor(pattern[0]).reshape(shape).to(like)

    monkeypatch.setattr(gradient, "_signs", given)
    totals: list[dict[str, Any]] = [{"weight": 0, "act": 0, "pairs": 0} for _ in scores]
    for signs in itertools.product((-1, 1), repeat=n * count):
        pattern[:] = [signs]
        found = measured(subject, *scores, pairs=pairs)
        for total, score in zip(totals, found, strict=True):
            total["weight"] += score.weight.score / 2 ** (n * count)
            if score.act is not None:
                total["act"] += score.act.score / 2 ** (n * count)
            if score.pairs is not None:
                total["pairs"] += score.pairs.value / 2 ** (n * count)
    return totals


class Dense:
    """The Gauss-Newton matrix of a subject, and what the scores are by their formulas."""

    def __init__(
        self,
        subject: Subject,
        curvature: Callable[[Tensor], Tensor] = oracles.softmax_curvature,
    ) -> None:
        names = [f"{name}.weight" for name in subject.names]
        model = copy.deepcopy(subject.model).eval()
        inputs = torch.cat([x for x, _ in subject.batches])
        matrix = oracles.dense_gauss_newton(model, names, inputs, curvature)
        sizes = [model.get_parameter(name).numel() for name in names]
        self.blocks = [part.split(sizes, dim=1) for part in matrix.split(sizes)]
        self.errors = [
            quantization_errors(layer.weight, subject.bits, subject.scheme, rows_of(layer)).flatten(
                1
            )
            for layer in map(model.get_submodule, subject.names)
        ]

    def of(self, score: str) -> np.ndarray:
        table = []
        for i, errors in enumerate(self.errors):
            g = self.blocks[i][i]
            row = []
            for delta in errors:
                if score == "gauss-newton":
                    row.append(0.5 * (delta @ g @ delta).item())
                elif score == "fisher":
                    row.append(
                        0.5 * sum(g[k, k].item() * d**2 for k, d in enumerate(delta.tolist()))
                    )
                else:
                    mean = sum(d**2 for d in delta.tolist()) / len(delta)
                    row.append(0.5 * g.trace().item() * mean)
            table.append(row)
        return np.array(table)

    def pair(self, i: int, a: int, j: int, b: int) -> float:
        return (self.errors[i][a] @ self.blocks[i][j] @ self.errors[j][b]).item()


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


def pairs_of(inputs: Tensor, size: int = 2, classes: int = 3) -> Batches:
    """Batches of so many samples, with labels in turn."""
    y = torch.arange(len(inputs)) % classes
    return list(zip(inputs.split(size), y.split(size), strict=True))


def random_inputs(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def samples_of(batches: Batches) -> Batches:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


def test_every_pattern_of_signs_gives_the_dense_gauss_newton_matrix_together(
    net: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(net, pairs_of(random_inputs(4, 4)))
    dense = Dense(subject)
    found = over_all_signs(monkeypatch, subject, *AT_MODEL, pairs=3)
    for name, mean in zip(AT_MODEL, found, strict=True):
        np.testing.assert_allclose(mean["weight"], dense.of(name), rtol=1e-8)
    pairs = found[0]["pairs"]
    np.testing.assert_array_equal(pairs, pairs.transpose(2, 3, 0, 1))
    for i, a, j, b in itertools.product(range(3), range(2), range(3), range(2)):
        expected = 0 if i == j else dense.pair(i, a, j, b)
        assert pairs[i, a, j, b] == pytest.approx(expected, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_interactions_are_those_of_the_layers_that_cost_most_at_the_fewest_bits(
    net: Residual, seed: int
) -> None:
    subject = subject_of(net, pairs_of(random_inputs(9, 4), 3), bits=(4, 2), seed=seed)
    [of_all], [of_two], [of_none] = (
        measured(subject, "gauss-newton", pairs=count) for count in (5, 2, 1)
    )
    most = sorted(np.argsort(of_all.weight.score[:, 1])[1:])
    assert of_all.pairs.layers == subject.names
    assert of_two.pairs.layers == tuple(subject.names[i] for i in most)
    assert of_two.pairs.bits == (4, 2)
    inner = np.ix_(most, range(2), most, range(2))
    np.testing.assert_array_equal(of_two.pairs.value, of_all.pairs.value[inner])
    np.testing.assert_array_equal(of_two.pairs.stderr, of_all.pairs.stderr[inner])
    assert not of_two.pairs.value[[0, 1], :, [0, 1]].any()
    assert not of_two.pairs.stderr[[0, 1], :, [0, 1]].any()
    assert (of_two.pairs.stderr[0, :, 1] > 0).all()
    assert of_none.pairs is None


def test_random_signs_are_unbiased(net: Residual) -> None:
    batches = pairs_of(random_inputs(12, 4), 4)
    truth = Dense(subject_of(net, batches))
    runs = [
        measured(subject_of(net, batches, seed=seed), *AT_MODEL, pairs=3) for seed in range(100)
    ]
    for k, name in enumerate(AT_MODEL):
        scores = np.stack([run[k].weight.score for run in runs])
        error = scores.std(axis=0, ddof=1) / len(runs) ** 0.5
        assert (abs(scores.mean(axis=0) - truth.of(name)) < 4 * error).all()
        assert (error < 0.2 * truth.of(name)).all()
    values = np.stack([run[0].pairs.value for run in runs])
    error = values.std(axis=0, ddof=1) / len(runs) ** 0.5
    for i, a, j, b in itertools.product(range(3), range(2), range(3), range(2)):
        if i != j:
            off = values.mean(axis=0)[i, a, j, b] - truth.pair(i, a, j, b)
            assert abs(off) < 4 * error[i, a, j, b]


def test_the_standard_error_foretells_the_spread_over_data_and_signs(net: Residual) -> None:
    runs = []
    for seed in range(50):
        x = random_inputs(96, 4, seed=seed)
        runs.append(measured(subject_of(net, pairs_of(x, 8), bits=(3,), seed=seed), *AT_MODEL))
    for k in range(len(AT_MODEL)):
        spread = np.std([run[k].weight.score for run in runs], axis=0, ddof=1)
        told = np.sqrt(np.mean([run[k].weight.stderr ** 2 for run in runs], axis=0))
        # 50 draws know their spread to 10 %, 50 errors from 12 batches each to a few
        assert (abs(told / spread - 1) < 0.4).all(), told / spread


def test_a_squared_loss_and_its_directions_of_negative_curvature(
    net: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = torch.linalg.qr(random_inputs(3, 3)).Q
    a = turn @ torch.diag(torch.tensor([2.0, 0.5, -3.0]).double()) @ turn.T
    clipped = turn @ torch.diag(torch.tensor([2.0, 0.5, 0]).double()) @ turn.T

    def loss(z: Tensor, y: Tensor) -> Tensor:
        off = z - y[:, None]
        return 0.5 * ((off @ a) * off).sum(dim=1).mean()

    subject = subject_of(net, pairs_of(random_inputs(4, 4)), loss)
    found = over_all_signs(monkeypatch, subject, *AT_MODEL)
    dense = Dense(subject, lambda z: clipped)
    for name, mean in zip(AT_MODEL, found, strict=True):
        np.testing.assert_allclose(mean["weight"], dense.of(name), rtol=1e-8)


def test_no_curvature_at_all_scores_zero(net: Residual, batches: Batches) -> None:
    for loss in (
        lambda z, _: z.sum(dim=1).mean(),
        lambda z, _: -z.square().sum(dim=1).mean(),
    ):
        for found in measured(subject_of(net, batches, loss), *AT_MODEL):
            assert not found.weight.score.any()


def test_outputs_of_several_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Conv1d(2, 2, 1), nn.Tanh(), nn.Conv1d(2, 2, 2)
    ).double()
    x = random_inputs(4, 2, 4)
    batches = [(x[i : i + 2], torch.tensor([[0, 1], [1, 1]])) for i in (0, 2)]

    def curvature(z: Tensor) -> Tensor:
        """(classes, positions) flat: a softmax at each of the two positions, averaged."""
        out = torch.zeros(4, 4).double()
        for position in range(2):
            places = torch.tensor([position, 2 + position])
            out[places[:, None], places] = oracles.softmax_curvature(z[places]) / 2
        return out

    subject = subject_of(model, batches, bits=(2,))
    found = over_all_signs(monkeypatch, subject, *AT_MODEL)
    dense = Dense(subject, curvature)
    for name, mean in zip(AT_MODEL, found, strict=True):
        np.testing.assert_allclose(mean["weight"], dense.of(name), rtol=1e-8)


def test_empirical_fisher_is_that_of_a_slow_double_loop(net: Residual, batches: Batches) -> None:
    subject = subject_of(net, samples_of(batches))
    [found] = measured(subject, "empirical-fisher")
    assert (found.proxy, found.act, found.pairs) == ("empirical-fisher", None, None)
    assert (found.samples, found.passes) == (7, 3)
    assert found.weight.layers == ("stem", "branch", "head")
    assert found.weight.bits == (2, 3)
    twin = copy.deepcopy(net).eval()
    for i, name in enumerate(subject.names):
        weight = twin.get_parameter(f"{name}.weight")
        for j, delta in enumerate(quantization_errors(weight, (2, 3), SCHEME)):
            per_sample = []
            for x, y in samples_of(batches):
                twin.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                pairs = zip(weight.grad.flatten().tolist(), delta.flatten().tolist(), strict=True)
                per_sample.append(0.5 * sum(g**2 * d**2 for g, d in pairs))
            mean, stderr = mean_and_stderr(per_sample)
            assert found.weight.score[i, j] == pytest.approx(mean, rel=1e-9)
            assert found.weight.stderr[i, j] == pytest.approx(stderr, rel=1e-9)


def test_batches_of_several_samples_give_the_empirical_fisher_on_average(
    net: Residual, batches: Batches
) -> None:
    [exact] = measured(subject_of(net, samples_of(batches)), "empirical-fisher")
    runs = np.stack(
        [
            measured(subject_of(net, batches, seed=seed), "empirical-fisher")[0].weight.score
            for seed in range(120)
        ]
    )
    error = runs.std(axis=0, ddof=1) / 120**0.5
    assert (abs(runs.mean(axis=0) - exact.weight.score) < 4 * error).all()


def test_output_gradient_is_that_of_a_slow_loop_over_outputs(
    net: Residual, batches: Batches
) -> None:
    subject = subject_of(net, batches)
    found, both = measured(subject, "output-gradient", "empirical-fisher")
    assert found.passes == both.passes == 3 + 2
    twin = copy.deepcopy(net).eval()
    for i, name in enumerate(subject.names):
        layer = twin.get_submodule(name)
        kept: list[tuple[Tensor, Tensor]] = []
        layer.register_forward_hook(lambda _, args, y, kept=kept: kept.append((args[0], y)))
        for j, delta in enumerate(quantization_errors(layer.weight, (2, 3), SCHEME)):
            means = []
            for batch in batches:
                per_sample = []
                for x, label in samples_of([batch]):
                    del kept[:]
                    value = F.cross_entropy(twin(x), label)
                    entered, y = kept[0]
                    [slope] = torch.autograd.grad(value, y)
                    with torch.no_grad():
                        quantized = F.linear(entered, layer.weight + delta, layer.bias)
                    changes = (quantized - y)[0].tolist()
                    per_sample.append(
                        sum((g * c) ** 2 for g, c in zip(slope[0].tolist(), changes, strict=True))
                    )
                means.append(0.5 * np.mean(per_sample))
            assert found.weight.score[i, j] == pytest.approx(
                (5 * means[0] + 2 * means[1]) / 7, rel=1e-9
            )


def grid_error(value: float, bits: int, subject: Subject, name: str) -> float:
    step, zero_point = subject.ranges[name, bits]
    return oracles.affine_grid(value, step, zero_point, bits) - value


@pytest.mark.parametrize("score", AT_GIVEN)
def test_input_scores_count_the_layers_own_use_and_not_the_skip_beside_it(
    net: Residual, batches: Batches, score: str
) -> None:
    subject = subject_of(net, samples_of(batches), act_bits=(3, 2))
    found = measured(subject, score)[0].act
    assert (found.layers, found.bits) == (("stem", "branch", "head"), (3, 2))
    net.eval()

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
            for name, value, slope in (
                ("stem", x, at_stem),
                ("branch", h, at_branch),
                ("head", u, at_head),
            ):
                for j, bits in enumerate((3, 2)):
                    score = 0.0
                    for v, g in zip(value[0].tolist(), slope[0].tolist(), strict=True):
                        score += 0.5 * (g * grid_error(v, bits, subject, name)) ** 2
                    rows[name][j].append(score)
    for i, name in enumerate(found.layers):
        for j in range(2):
            mean, stderr = mean_and_stderr(rows[name][j])
            assert found.score[i, j] == pytest.approx(mean, rel=1e-6)
            assert found.stderr[i, j] == pytest.approx(stderr, rel=1e-6)


def test_input_scores_at_the_models_labels(net: Residual, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against ∂z/∂(a shift of the layer's own input), sample by sample."""
    subject = subject_of(net, pairs_of(random_inputs(4, 4)), act_bits=(2,))
    found = over_all_signs(monkeypatch, subject, *AT_MODEL)
    net.eval()
    for i, name in enumerate(subject.names):
        projected, squared = [], []
        for x, _ in samples_of(list(subject.batches)):
            kept: list[Tensor] = []

            def outputs(shift: Tensor, name: str = name, x: Tensor = x, kept: Any = kept) -> Tensor:
                def moved(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                    kept.append(args[0])
                    return (args[0] + shift,)

                hook = net.get_submodule(name).register_forward_pre_hook(moved)
                try:
                    return net(x)[0]
                finally:
                    hook.remove()

            width = net.get_submodule(name).in_features
            with torch.no_grad():
                z = outputs(torch.zeros(width).double())
            values = kept[0][0].tolist()
            j = torch.autograd.functional.jacobian(outputs, torch.zeros(width).double())
            g = j.T @ oracles.softmax_curvature(z) @ j
            delta = torch.tensor([grid_error(v, 2, subject, name) for v in values]).double()
            projected.append(0.5 * (delta @ g @ delta).item())
            squared.append(0.5 * (g.diagonal() * delta**2).sum().item())
        assert found[0]["act"][i, 0] == pytest.approx(np.mean(projected), rel=1e-6)
        assert found[1]["act"][i, 0] == pytest.approx(np.mean(squared), rel=1e-6)
        assert found[2]["act"][i, 0] == pytest.approx(np.mean(squared), rel=1e-6)


class Twice(nn.Module):
    """Calls `shared` twice, on unlike inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(torch.tanh(self.shared(self.stem(x)))))


def seeded_double(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def test_a_layer_called_twice_sums_its_gradients_and_its_input_scores(batches: Batches) -> None:
    net = seeded_double(Twice)
    subject = subject_of(net, samples_of(batches), bits=(3,), act_bits=(3,))
    fisher, by_output = measured(subject, *AT_GIVEN)
    [delta] = quantization_errors(net.shared.weight, (3,), SCHEME)
    weight_scores, output_scores, input_scores = [], [], []
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
            changes = torch.cat([at_out * (second @ delta.T), at_middle * (first @ delta.T)])
            output_scores.append(0.5 * changes.square().sum().item())
            input_scores.append(
                sum(
                    0.5 * (g * grid_error(v, 3, subject, "shared")) ** 2
                    for value, slope in ((first, at_first), (second, at_second))
                    for v, g in zip(value[0].tolist(), slope[0].tolist(), strict=True)
                )
            )
    assert fisher.weight.score[1, 0] == pytest.approx(np.mean(weight_scores), rel=1e-9)
    assert by_output.weight.score[1, 0] == pytest.approx(np.mean(output_scores), rel=1e-9)
    for found in (fisher, by_output):
        assert found.act.score[1, 0] == pytest.approx(np.mean(input_scores), rel=1e-6)


class Mixed(nn.Module):
    """A transposed convolution and another, both of two groups; (2, 3) -> three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 4, 2, stride=2, groups=2)
        self.down = nn.Conv1d(4, 2, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))).flatten(1))


class Transposed(nn.Module):
    """Its first layer sees (length, batch, features), or (length·batch, features)."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.each, self.mix, self.head = nn.Linear(2, 2), nn.Linear(6, 3), nn.Linear(3, 3)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = x.unflatten(1, (3, 2)).transpose(0, 1)
        x = self.each(x.flatten(0, 1)).unflatten(0, (3, n)) if self.flat else self.each(x)
        x = torch.tanh(x).transpose(0, 1).flatten(1)
        return self.head(torch.tanh(self.mix(x)))


class Windows(nn.Module):
    """Its first layer sees (batch·windows, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.mix, self.head = nn.Linear(2, 2), nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.each(x.reshape(-1, 2))).reshape(len(x), 6)
        return self.head(torch.tanh(self.mix(x)))


class OneByOne(Windows):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([Windows.forward(self, x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize(
    ("make", "shape", "apart"),
    [
        (Twice, (4,), True),
        (Mixed, (2, 3), True),
        (Windows, (6,), True),
        (OneByOne, (6,), False),
        (lambda: Transposed(flat=False), (6,), False),
        (lambda: Transposed(flat=True), (6,), False),
    ],
    ids=["twice", "convolutions", "windows", "one by one", "length first", "length first, flat"],
)
def test_layers_of_any_shape_and_order_are_unbiased(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = seeded_double(make)
    subject = subject_of(net, pairs_of(random_inputs(4, *shape)), bits=(2,))
    # a layer's first dimension tells the samples apart, or only their sum is known
    assert gradient._first_is_sample(subject) is apart
    dense = Dense(subject)
    found = over_all_signs(monkeypatch, subject, *AT_MODEL, pairs=3)
    for name, mean in zip(AT_MODEL, found, strict=True):
        np.testing.assert_allclose(mean["weight"], dense.of(name), rtol=1e-8)
    for i, j in itertools.combinations(range(3), 2):
        expected = dense.pair(i, 0, j, 0)
        assert found[0]["pairs"][i, 0, j, 0] == pytest.approx(expected, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("flat", [False, True])
def test_samples_that_cannot_be_told_apart_still_sum_up_at_given_labels(flat: bool) -> None:
    batches = pairs_of(random_inputs(6, 6), 3)
    together, alone = (
        measured(subject_of(net, batches, act_bits=(2,)), "output-gradient")[0]
        for net in (seeded_double(lambda: Transposed(flat)), seeded_double(Windows))
    )
    np.testing.assert_allclose(together.weight.score, alone.weight.score, rtol=1e-9)
    np.testing.assert_allclose(together.act.score, alone.act.score, rtol=1e-6)


class InPlace(nn.Module):
    """Rectifies in place what a layer has just read, and what one has just written."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        branch = F.relu(self.b(h), self.inplace)
        return self.c(branch + F.relu(h, self.inplace))


@pytest.mark.parametrize("scores", [AT_MODEL, AT_GIVEN])
def test_operations_in_place_do_not_reach_what_is_kept(
    batches: Batches, scores: tuple[str, ...]
) -> None:
    found = []
    for inplace in (False, True):
        net = seeded_double(lambda inplace=inplace: InPlace(inplace))

        def loss(z: Tensor, y: Tensor, inplace: bool = inplace) -> Tensor:
            return F.cross_entropy(z.mul_(2) if inplace else z * 2, y)

        for score in measured(subject_of(net, batches, loss, act_bits=(2,)), *scores):
            found.append((score.weight.score.tolist(), score.act.score.tolist()))
    assert found[: len(scores)] == found[len(scores) :]


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


@pytest.mark.parametrize("scores", [AT_MODEL, AT_GIVEN])
def test_convolutions_batchnorm_and_inplace_rectifiers_are_no_obstacle(
    scores: tuple[str, ...],
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 5, 5, generator=generator), torch.arange(12) % 3
    batches = list(zip(x.split(4), y.split(4), strict=True))
    subject = subject_of(convolutional(), batches, bits=(2, 8), act_bits=(2, 8))
    for found in measured(subject, *scores):
        for table in (found.weight, found.act):
            assert np.isfinite(table.score).all()
            assert (table.score[:, 0] > table.score[:, 1]).all()
            assert (table.score > 0).all()
            assert (table.stderr > 0).all()


def test_scores_measured_together_are_those_measured_alone(net: Residual, batches: Batches) -> None:
    for labels in (AT_MODEL, AT_GIVEN):
        subject = subject_of(net, batches, act_bits=(2,))
        for found in measured(subject, *labels):
            [alone] = measured(subject, found.proxy)
            assert alone.weight.score.tolist() == found.weight.score.tolist()
            assert alone.act.score.tolist() == found.act.score.tolist()
            assert alone.weight.stderr.tolist() == found.weight.stderr.tolist()


def test_output_gradient_does_not_depend_on_the_batching(net: Residual, batches: Batches) -> None:
    one, other = (
        measured(subject_of(net, parts), "output-gradient")[0].weight.score
        for parts in (batches, samples_of(batches))
    )
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_inputs_and_targets_may_be_nested(net: Residual, batches: Batches) -> None:
    def named(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["label"])

    dressed = [((x,), {"label": y}) for x, y in batches]
    for score in SCORES:
        [plain] = measured(subject_of(net, batches), score)
        [found] = measured(subject_of(net, dressed, named), score)
        assert found.weight.score.tolist() == plain.weight.score.tolist()


@pytest.mark.parametrize("scores", [AT_MODEL, AT_GIVEN])
def test_the_model_is_left_as_it_was(
    net: Residual, batches: Batches, scores: tuple[str, ...]
) -> None:
    net.stem.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    subject = subject_of(net, batches, act_bits=(3,))
    outside = torch.get_rng_state()
    measured(subject, *scores)
    assert torch.equal(torch.get_rng_state(), outside)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert not any(x.requires_grad for x, _ in batches)


def test_hooks_are_taken_off_when_the_loss_raises(net: Residual, batches: Batches) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        measured(subject_of(net, batches, broken), "fisher")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert all(m.training for m in net.modules())


class Unused(Residual):
    def forward(self, x: Tensor) -> Tensor:
        self.branch(x.new_zeros(len(x), 5))
        return self.head(torch.tanh(self.stem(x)))


@pytest.mark.parametrize("scores", [AT_MODEL, AT_GIVEN])
def test_layers_that_the_outputs_never_meet_score_zero(
    batches: Batches, scores: tuple[str, ...]
) -> None:
    for found in measured(subject_of(seeded_double(Unused), batches, act_bits=(2,)), *scores):
        assert found.weight.layers == ("branch", "stem", "head")
        assert not found.weight.score[0].any()
        assert not found.act.score[0].any()
        assert (found.weight.score[1:] > 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_one_batch_is_split_and_one_sample_is_refused(
    net: Residual, batches: Batches, score: str
) -> None:
    layers = trace_layers(net, batches[0][0])
    (x, y), *_ = batches
    subject = Subject(net, layers, (3,), [(x[:4], y[:4])], F.cross_entropy)
    (one,) = Gradients((score,)).measure(subject, Work())
    halves = replace(subject, batches=[(x[:2], y[:2]), (x[2:4], y[2:4])])
    (two,) = Gradients((score,)).measure(halves, Work())
    assert np.array_equal(one.weight.score, two.weight.score)
    assert np.array_equal(one.weight.stderr, two.weight.stderr)
    with pytest.raises(InputError, match=r"at least 2 samples, .*; got 1"):
        Gradients((score,)).measure(replace(subject, batches=[(x[:1], y[:1])]), Work())


def contrastive(z: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def normalised(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((z - z.mean(dim=0)) / z.std(dim=0), y)


def confident_but_diverse(z: Tensor, _: Tensor) -> Tensor:
    """The entropy of each prediction less that of their mean (mutual information)."""
    p = z.softmax(dim=1)
    mean = p.mean(dim=0)
    return (mean * mean.log()).sum() - (p * p.log()).sum(dim=1).mean()


@pytest.mark.parametrize("loss", [contrastive, normalised, confident_but_diverse])
def test_a_loss_that_ties_samples_together_is_refused(
    net: Residual, batches: Batches, loss: Any
) -> None:
    for score in AT_MODEL:
        with pytest.raises(InputError, match=r"a mean over samples: .* changes another's gradient"):
            measured(subject_of(net, batches, loss), score)
    for score in AT_GIVEN:
        assert np.isfinite(measured(subject_of(net, batches, loss), score)[0].weight.score).all()


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_a_loss_that_is_all_but_certain_is_no_tie(
    net: Residual, batches: Batches, scale: float
) -> None:
    net.float()
    with torch.no_grad():
        net.head.weight *= scale
    single = [(x.float(), y) for x, y in batches]
    for found in measured(subject_of(net, single), *AT_MODEL):
        assert np.isfinite(found.weight.score).all()
        assert (found.weight.score >= 0).all()


class Dressed(nn.Module):
    def __init__(self, dress: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.dress = Residual().double(), dress

    def forward(self, x: Tensor) -> Any:
        return self.dress(self.net(x))


@pytest.mark.parametrize(
    ("dress", "told"),
    [
        (lambda z: (z, z), "a tuple"),
        (lambda z: {"logits": z}, "a dict"),
        (lambda z: z[None], r"a Tensor of shape \(1, 5, 3\)"),
        (lambda z: z.sum(), r"a Tensor of shape \(\)"),
    ],
)
def test_outputs_without_a_row_a_sample_are_refused(
    batches: Batches, dress: Callable[[Tensor], Any], told: str
) -> None:
    for score in SCORES:
        with pytest.raises(InputError, match=f"a row for each of the 5 samples; .* gave {told}"):
            measured(subject_of(Dressed(dress), batches), score)


def test_too_many_outputs_are_refused_at_the_models_labels(batches: Batches) -> None:
    def wide(count: int) -> Subject:
        model = seeded_double(Residual)
        model.head = nn.Linear(5, count).double()
        return subject_of(model, batches)

    with pytest.raises(InputError, match="at most 2048 outputs a sample, the model has 2049"):
        measured(wide(MAX_OUTPUTS + 1), "gauss-newton")
    assert (measured(wide(MAX_OUTPUTS + 1), "output-gradient")[0].weight.score > 0).all()


def starved(most: int, seen: list[int]) -> Any:
    """Cross-entropy on a device where no more than `most` samples fit."""

    def limited(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        if len(outputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.cross_entropy(outputs, targets)

    return limited


@pytest.mark.parametrize("scores", [("gauss-newton",), ("output-gradient",)])
def test_running_out_of_memory_halves_the_batches_and_changes_nothing(
    net: Residual, batches: Batches, scores: tuple[str, ...]
) -> None:
    # these two keep the samples apart, and signs are drawn after the loss: the same for each
    # (the square root of a zero eigenvalue is only zero to half the digits)
    whole = measured(subject_of(net, batches, act_bits=(2,)), *scores)
    said, seen = [], []
    subject = subject_of(net, batches, starved(2, seen), act_bits=(2,), say=said.append)
    for found, expected in zip(measured(subject, *scores), whole, strict=True):
        np.testing.assert_allclose(found.weight.score, expected.weight.score, rtol=1e-6)
        np.testing.assert_allclose(found.weight.stderr, expected.weight.stderr, rtol=1e-6)
        np.testing.assert_allclose(found.act.score, expected.act.score, rtol=1e-6)
    assert seen == [5, 3, 2, 1, 2, 2]
    assert said == [
        "out of memory with 5 samples at once: going on with 3",
        "out of memory with 3 samples at once: going on with 2",
    ]
    starving = replace(subject, loss=starved(0, []))
    with pytest.raises(InputError, match="single sample"):
        measured(starving, *scores)


@pytest.mark.parametrize("scores", [AT_MODEL, AT_GIVEN])
def test_two_devices_give_the_numbers_of_one(net: Residual, scores: tuple[str, ...]) -> None:
    subject = subject_of(net, pairs_of(random_inputs(12, 4)), act_bits=(2,))
    pairs = 3 if scores == AT_MODEL else 0
    one = Gradients(scores, pairs).measure(subject, Work())
    two = Gradients(scores, pairs).measure(subject, Work(devices=(CPU, CPU)))
    for a, b in zip(one, two, strict=True):
        left, right = a.to_json(), b.to_json()
        assert left | {"seconds": 0} == right | {"seconds": 0}


def test_an_interrupted_measurement_goes_on_where_it_was(
    net: Residual, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "folder" / "fisher.jsonl"
    subject = subject_of(net, pairs_of(random_inputs(10, 4)), act_bits=(2,))
    whole = Gradients(AT_MODEL, 2).measure(subject, Work(kept))
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    kept.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    computed = []
    compute = gradient._Pass.compute

    def counting(self: Any, model: nn.Module, part: int) -> np.ndarray:
        computed.append(part)
        return compute(self, model, part)

    monkeypatch.setattr(gradient._Pass, "compute", counting)
    found = Gradients(AT_MODEL, 2).measure(subject, Work(kept))
    assert computed == [3, 4]
    for a, b in zip(whole, found, strict=True):
        assert a.to_json() | {"seconds": 0} == b.to_json() | {"seconds": 0}
    assert kept.read_bytes() == b"".join(lines)


def test_one_seed_gives_one_score_whatever_the_random_state(
    net: Residual, batches: Batches
) -> None:
    scores = []
    for outside, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(outside)
        scores.append(measured(subject_of(net, batches, seed=seed), "fisher")[0].weight.score)
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[1], scores[2])
