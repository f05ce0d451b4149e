"""Interactions against their definition and against a loss whose Hessian is known."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies.base import Sensitivity, Subject, quantization_errors
from adq.proxies.direct import Direct
from adq.proxies.pairwise import Pairwise
from adq.proxies.work import Work
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.d = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return self.d(torch.tanh(self.c(x)))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double().train()


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, generator=generator).double()
    y = torch.randint(0, 3, (9,), generator=generator)
    return [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:], y[7:])]


def subject_of(net: nn.Module, batches: Batches, **changes: Any) -> Subject:
    layers = changes.pop("layers", None) or trace_layers(net, batches[0][0])
    fields = {"layers": layers, "bits": (3, 2), "loss": F.cross_entropy, "say": lambda line: None}
    return Subject(net, batches=batches, **(fields | changes))


def pairwise(subject: Subject, layers: int = 8, work: Work | None = None) -> Sensitivity:
    [found] = Pairwise(layers).measure(subject, work or Work())
    return found


def loss_with(subject: Subject, bits: dict[str, int], x: Tensor, y: Tensor) -> float:
    twin = copy.deepcopy(subject.model).eval()
    with torch.no_grad():
        for name, b in bits.items():
            weight = twin.get_parameter(f"{name}.weight")
            weight += quantization_errors(weight, [b])[0]
        return subject.loss(twin(x), y).item()


def slow(subject: Subject, names: tuple[str, ...], x: Tensor, y: Tensor) -> np.ndarray:
    n, k = len(names), len(subject.bits)
    table = np.zeros((n, k, n, k))
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            for a, first in enumerate(subject.bits):
                for b, second in enumerate(subject.bits):
                    if i != j:
                        table[i, a, j, b] = (
                            loss_with(subject, {one: first, other: second}, x, y)
                            - loss_with(subject, {one: first}, x, y)
                            - loss_with(subject, {other: second}, x, y)
                            + loss_with(subject, {}, x, y)
                        )
    return table


def test_interactions_are_those_of_their_definition(net: Net, batches: Batches) -> None:
    subject = subject_of(net, batches)
    found = pairwise(subject)
    assert (found.proxy, found.samples) == ("pairwise", 9)
    pairs = found.pairs
    assert (pairs.layers, pairs.bits) == (("a", "b", "c", "d"), (3, 2))
    values = [slow(subject, pairs.layers, x, y) for x, y in batches]
    shares = [len(x) / 9 for x, _ in batches]
    mean = sum(w * v for w, v in zip(shares, values, strict=True))
    squares = sum(w**2 * (v - mean) ** 2 for w, v in zip(shares, values, strict=True))
    np.testing.assert_allclose(pairs.value, mean, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(pairs.stderr, np.sqrt(squares * 3 / 2), rtol=1e-9, atol=1e-13)
    assert np.abs(mean[0, :, 1:]).min() > 1e-6  # there is something to find


def test_interactions_are_symmetric_and_no_layer_has_one_with_itself(
    net: Net, batches: Batches
) -> None:
    pairs = pairwise(subject_of(net, batches)).pairs
    assert np.array_equal(pairs.value, pairs.value.transpose(2, 3, 0, 1))
    assert np.array_equal(pairs.stderr, pairs.stderr.transpose(2, 3, 0, 1))
    for i in range(4):
        assert not pairs.value[i, :, i].any()


def test_scores_of_single_layers_are_the_direct_ones(net: Net, batches: Batches) -> None:
    ranges = {(name, 4): (0.25, 8) for name in "abcd"}
    subject = subject_of(net, batches, act_bits=(4,), ranges=ranges)
    found, [expected] = pairwise(subject), Direct().measure(subject, Work())
    for table, other in ((found.weight, expected.weight), (found.act, expected.act)):
        assert table.to_json() == other.to_json()
    assert found.passes > expected.passes + 4


@pytest.mark.parametrize("count", [2, 3])
def test_only_the_most_sensitive_layers_are_paired(net: Net, batches: Batches, count: int) -> None:
    subject = subject_of(net, batches)
    whole, found = pairwise(subject), pairwise(subject, count)
    worst = sorted("abcd", key=lambda name: -whole.weight.score["abcd".index(name), 1])[:count]
    assert found.pairs.layers == tuple(sorted(worst))
    kept = ["abcd".index(name) for name in found.pairs.layers]
    np.testing.assert_array_equal(found.pairs.value, whole.pairs.value[kept][:, :, kept])


class Sums(nn.Module):
    """outputs = A w_a + B w_b + C w_c, of layers (1, 12) that meet the columns of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(12, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x[:, 0]), self.b(x[:, 1]), self.c(x[:, 2])], dim=1)


def squared_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs.sum(dim=1) - targets).square().mean()


def sums() -> tuple[Sums, Batches]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = Sums().double(), torch.randn(8, 3, 12).double(), torch.randn(8).double()
    return net, [(x[:5], y[:5]), (x[5:], y[5:])]


def layer_of(name: str) -> LayerInfo:
    return LayerInfo(name, "Linear", (1, 12), (12,), 12, 1)


def test_of_a_quadratic_loss_they_are_the_hessians_blocks() -> None:
    net, batches = sums()
    layers = tuple(layer_of(name) for name in "abc")
    subject = subject_of(net, batches, layers=layers, bits=(2,), loss=squared_sum)
    pairs = pairwise(subject).pairs
    x = torch.cat([x for x, _ in batches])
    errors = [quantization_errors(net.get_parameter(f"{n}.weight"), [2])[0, 0] for n in "abc"]
    for i in range(3):
        for j in range(3):
            hessian = x[:, i].T @ x[:, j] / len(x)  # ∂²/∂w_i ∂w_j of ½ (Σ_k x_k·w_k − y)²
            expected = (errors[i] @ hessian @ errors[j]).item() if i != j else 0
            assert pairs.value[i, 0, j, 0] == pytest.approx(expected, rel=1e-9)
            assert i == j or abs(expected) > 1e-6


def test_layers_that_do_not_meet_in_the_loss_have_none() -> None:
    def apart(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets[:, None]).square().sum(dim=1).mean()

    net, batches = sums()
    layers = tuple(layer_of(name) for name in "abc")
    found = pairwise(subject_of(net, batches, layers=layers, loss=apart))
    assert np.abs(found.pairs.value).max() < 1e-14
    assert np.abs(found.weight.score).min() > 1e-6


def test_the_model_is_left_as_it_was(net: Net, batches: Batches) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    pairwise(subject_of(net, batches))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training and "forward" not in vars(m) for m in net.modules())


def test_work_is_taken_up_where_it_was_left_and_devices_do_not_matter(
    net: Net, batches: Batches, tmp_path: Path
) -> None:
    calls, limit = 0, 0

    def counting(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyError("killed")
        return F.cross_entropy(outputs, targets)

    subject = subject_of(net, batches, loss=counting)
    whole = pairwise(subject)
    singles, pairs = 1 + 4 * 2, 3 * 2 + 6 * 4  # of a batch: one run for each of a, b, c at 2 widths
    assert calls == 3 * (singles + pairs)
    path = tmp_path / "parts.jsonl"
    calls, limit = 0, 3 * singles + pairs + 2
    with pytest.raises(KeyError, match="killed"):
        pairwise(subject, work=Work(path))
    calls, limit = 0, 0
    resumed = pairwise(subject, work=Work(path))
    assert calls == 2 * pairs
    cpu = torch.device("cpu")
    spread = pairwise(dataclasses.replace(subject), work=Work(devices=(cpu, cpu)))
    for found in (resumed, spread):
        assert {**found.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}


def test_a_pair_needs_two_layers() -> None:
    with pytest.raises(InputError, match="at least 2 layers, to make a pair; got 1"):
        Pairwise(1)
