"""Direct scores against a slow loop over deep copies and full passes."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies import direct
from adq.proxies.base import Sensitivity, Subject, quantization_errors
from adq.proxies.direct import Direct
from adq.proxies.work import Work
from adq.quant.baselines import activation_quantizer_for
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.layers import trace_layers
from adq.quant.rows import rows_of
from adq.quant.scheme import Scheme

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A convolution, BatchNorm, a skip that is added in place, a rectifier in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        out = self.branch(x)
        out += x
        return self.head(self.relu(out).mean(dim=(2, 3)))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().double().train()
        model.norm.running_mean.normal_()
        return model


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, 1, 4, 4, generator=generator).double()
    y = torch.randint(0, 3, (11,), generator=generator)
    return [(x[:5], y[:5]), (x[5:9], y[5:9]), (x[9:], y[9:])]


def subject_of(net: nn.Module, batches: Batches, **changes: Any) -> Subject:
    layers = trace_layers(net, batches[0][0])
    act_bits = changes.pop("act_bits", (4, 2))
    ranges = input_ranges(net, {layer.name: act_bits for layer in layers}, batches)
    quiet: dict[str, Any] = {"say": lambda line: None}
    fields = {"layers": layers, "bits": (3, 2), "loss": F.cross_entropy, "act_bits": act_bits}
    return Subject(net, batches=batches, ranges=ranges, **(quiet | fields | changes))


def score(subject: Subject, kind: direct.Score = "loss", work: Work | None = None) -> Sensitivity:
    [found] = Direct(kind).measure(subject, work or Work())
    return found


Compare = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(outputs before, outputs after, targets) -> score of a batch."""


def loss_increase(before: Tensor, after: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(after, y) - F.cross_entropy(before, y)


def torch_divergence(before: Tensor, after: Tensor, y: Tensor) -> Tensor:
    p, q = (torch.distributions.Categorical(logits=z) for z in (before, after))
    return torch.distributions.kl_divergence(p, q).mean()


def slow(subject: Subject, compare: Compare, x: Tensor, y: Tensor) -> np.ndarray:
    """(layers, bits + act_bits) of one batch."""
    plain = copy.deepcopy(subject.model).eval()
    table = []
    for layer in subject.layers:
        row = []
        for bits in (*subject.bits, *(-b for b in subject.act_bits)):
            twin = copy.deepcopy(plain)
            module = twin.get_submodule(layer.name)
            if bits > 0:
                rows = rows_of(module, subject.scheme.group_size)
                [error] = quantization_errors(module.weight, [bits], subject.scheme, rows)
                module.weight = nn.Parameter(module.weight + error)
            else:
                start = subject.ranges[layer.name, -bits]
                quantizer = activation_quantizer_for(-bits, *start, subject.scheme)
                original = module.forward
                module.forward = lambda x, q=quantizer, run=original: run(q(x))
            with torch.no_grad():
                row.append(compare(plain(x), twin(x), y).item())
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize(("kind", "compare"), [("loss", loss_increase), ("kl", torch_divergence)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(weight="minmax", act="minmax", group_size=2)])
def test_scores_and_errors_are_those_of_the_slow_loop(
    net: Net, batches: Batches, kind: direct.Score, compare: Compare, scheme: Scheme
) -> None:
    subject = subject_of(net, batches, scheme=scheme)
    found = score(subject, kind)
    assert (found.proxy, found.samples) == (kind, 11)
    assert found.weight.layers == found.act.layers == ("stem", "branch", "head")
    assert (found.weight.bits, found.act.bits) == ((3, 2), (4, 2))

    values = [slow(subject, compare, x, y) for x, y in batches]
    mean = sum(len(x) / 11 * v for (x, _), v in zip(batches, values, strict=True))
    # the variance of a weighted mean of three values, by hand
    squares = sum((len(x) / 11) ** 2 * (v - mean) ** 2 for (x, _), v in zip(batches, values))  # noqa: B905
    stderr = np.sqrt(squares * 3 / 2)
    for table, columns in ((found.weight, slice(0, 2)), (found.act, slice(2, 4))):
        np.testing.assert_allclose(table.score, mean[:, columns], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(table.stderr, stderr[:, columns], rtol=1e-9, atol=1e-14)
    assert (np.abs(mean) > 1e-8).all()
    if kind == "kl":
        assert (found.weight.score > 0).all()


def test_the_divergence_of_two_distributions_in_numbers() -> None:
    p, q = Tensor([[0.5, 0.25, 0.25], [1 / 3] * 3]), Tensor([[0.25, 0.5, 0.25], [1 / 3] * 3])
    log_p, log_q = (direct.log_probabilities(t.log()) for t in (p, q))
    # ½ ln 2 − ¼ ln 2, and nothing for the second sample
    assert direct.divergence(log_p, log_q).item() == pytest.approx(np.log(2) / 4 / 2, rel=1e-6)


def test_a_divergence_of_many_positions_is_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 2, 3, 4, 5, generator=generator)
    found = direct.divergence(*(direct.log_probabilities(z) for z in (one, other)))
    flat = [z.movedim(1, -1).reshape(-1, 3) for z in (one, other)]
    assert found.item() == pytest.approx(torch_divergence(*flat, flat[0]).item(), rel=1e-5)


def test_the_divergence_is_the_expected_loss_increase_at_the_models_own_labels() -> None:
    before, after = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = 0.0
    for z, changed in zip(before, after, strict=True):
        for label, p in enumerate(z.softmax(dim=0)):
            y = torch.tensor([label])
            expected += p.item() * loss_increase(z[None], changed[None], y).item() / 4
    found = direct.divergence(direct.log_probabilities(before), direct.log_probabilities(after))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["loss", "kl"])
def test_the_batching_does_not_change_the_mean(
    net: Net, batches: Batches, kind: direct.Score
) -> None:
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    subject = subject_of(net, batches)
    one, other, third = (
        score(dataclasses.replace(subject, batches=b), kind) for b in (batches, samples, whole)
    )
    for found in (other, third):
        np.testing.assert_allclose(found.weight.score, one.weight.score, rtol=1e-9)
        np.testing.assert_allclose(found.act.score, one.act.score, rtol=1e-9)
    # a single batch was measured in two halves, so that there is an error
    assert np.isfinite(third.weight.stderr).all()
    # samples one by one: the textbook's standard error
    values = np.array([slow(subject, loss_increase, x, y) for x, y in samples])
    if kind == "loss":
        expected = values.std(axis=0, ddof=1) / np.sqrt(11)
        np.testing.assert_allclose(other.weight.stderr, expected[:, :2], rtol=1e-9)


def test_targets_may_be_dictionaries_and_inputs_tuples(net: Net, batches: Batches) -> None:
    def named(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["label"])

    subject = subject_of(net, batches)
    dressed: Any = [((x,), {"label": y}) for x, y in batches]
    found = score(dataclasses.replace(subject, batches=dressed, loss=named))
    assert np.array_equal(found.weight.score, score(subject).weight.score)


def test_the_model_is_left_as_it_was(net: Net, batches: Batches) -> None:
    before = {key: value.clone() for key, value in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    score(subject_of(net, batches))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(parameters[k] is v for k, v in net.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("call", range(2, 14))
def test_the_model_is_left_as_it_was_when_the_loss_raises(
    net: Net, batches: Batches, call: int
) -> None:
    calls = 0

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyError("stop")
        return F.cross_entropy(outputs, targets)

    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(KeyError, match="stop"):
        score(subject_of(net, batches, loss=broken))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in net.modules())


def test_work_is_taken_up_where_it_was_left(net: Net, batches: Batches, tmp_path: Path) -> None:
    calls = 0

    def counting(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyError("killed")
        return F.cross_entropy(outputs, targets)

    subject, limit = subject_of(net, batches, loss=counting), None
    whole = score(subject)
    each = calls // 3
    assert each == 1 + 3 * 4
    calls, limit = 0, each + 2
    with pytest.raises(KeyError, match="killed"):
        score(subject, work=Work(tmp_path / "parts.jsonl"))
    calls, limit = 0, None
    resumed = score(subject, work=Work(tmp_path / "parts.jsonl"))
    assert calls == 2 * each
    calls = 0
    again = score(subject, work=Work(tmp_path / "parts.jsonl"))
    assert calls == 0
    for found in (resumed, again):
        assert {**found.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}


@pytest.mark.parametrize("kind", ["loss", "kl"])
def test_two_devices_find_what_one_finds(net: Net, batches: Batches, kind: direct.Score) -> None:
    subject = subject_of(net, batches)
    cpu = torch.device("cpu")
    one, two = score(subject, kind), score(subject, kind, Work(devices=(cpu, cpu)))
    assert {**two.to_json(), "seconds": 0} == {**one.to_json(), "seconds": 0}


def test_passes_count_what_was_computed_again(net: Net, batches: Batches) -> None:
    found = score(subject_of(net, batches))
    # multiply-accumulates of a sample: stem 4·9·16, branch 16·9·16, head 12
    macs = np.array([576, 2304, 12])
    shares = macs[::-1].cumsum()[::-1] / macs.sum()
    assert found.passes == pytest.approx(2 + 4 * shares.sum(), rel=0.02)


def test_memory_that_runs_out_makes_batches_smaller(net: Net, batches: Batches) -> None:
    def greedy(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) > 2:
            raise torch.OutOfMemoryError("a lot")
        return F.cross_entropy(outputs, targets)

    lines: list[str] = []
    found = score(subject_of(net, batches, loss=greedy, say=lines.append))
    expected = score(subject_of(net, batches))
    np.testing.assert_allclose(found.weight.score, expected.weight.score, rtol=1e-9)
    np.testing.assert_allclose(found.weight.stderr, expected.weight.stderr, rtol=1e-9)
    assert lines[0].startswith("out of memory with 5 samples at once")


class Counting(nn.Conv2d):
    """Leaves the number of its calls, which no replay can see."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Stateful(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Counting(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.stem.calls = 0
        return super().forward(x) * self.stem.calls


def test_a_model_that_cannot_be_replayed_is_scored_all_the_same(net: Net, batches: Batches) -> None:
    stateful = Stateful().double()
    stateful.load_state_dict(net.state_dict())
    lines: list[str] = []
    found = score(subject_of(stateful, batches, say=lines.append))
    expected = score(subject_of(net, batches))
    assert found.weight.to_json() == expected.weight.to_json()
    assert found.act.to_json() == expected.act.to_json()
    [line] = lines
    assert "every score takes a full pass" in line
    assert found.passes > 12


def test_without_widths_of_inputs_there_is_no_table_of_them(net: Net, batches: Batches) -> None:
    assert score(subject_of(net, batches, act_bits=())).act is None


def test_one_sample_has_no_spread(net: Net, batches: Batches) -> None:
    subject = subject_of(net, batches)
    for few in ([], [(batches[0][0][:1], batches[0][1][:1])]):
        with pytest.raises(InputError, match=f"at least 2 samples.*; got {len(few)}"):
            score(dataclasses.replace(subject, batches=few))


@pytest.mark.parametrize("outputs", [lambda z: (z, z), lambda z: z[:, :1], lambda z: z[:, 0]])
def test_kl_needs_class_scores(net: Net, batches: Batches, outputs: Any) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Any:
            return outputs(super().forward(x))

    with pytest.raises(InputError, match=r"one tensor of class scores, .* take loss instead"):
        score(subject_of(Other().double(), batches), "kl")


def test_a_loss_that_is_not_a_number_is_refused(net: Net, batches: Batches) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + (np.inf if bad(outputs) else 0.0)

    subject = subject_of(net, batches, loss=broken)
    bad: Callable[[Tensor], bool] = lambda outputs: True  # noqa: E731
    with pytest.raises(NonFiniteLossError, match="the loss of the FP32 model is inf"):
        score(subject)
    with torch.no_grad():
        right = copy.deepcopy(net).eval()(batches[0][0])
    bad = lambda outputs: not torch.equal(outputs, right)  # noqa: E731
    with pytest.raises(NonFiniteLossError, match="the weights at 3 bits of stem is inf"):
        score(subject)


def test_another_score_is_refused() -> None:
    with pytest.raises(InputError, match="expected loss or kl, got 'mse'"):
        Direct("mse")  # type: ignore[arg-type]
