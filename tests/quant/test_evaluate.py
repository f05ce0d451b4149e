import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.evaluate import accuracy, evaluate


def data(sizes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))


def test_a_short_last_batch_counts_by_its_samples() -> None:
    net = model().train()
    batches = data((8, 8, 3))
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    found = evaluate(net, batches, F.cross_entropy, accuracy)
    with torch.no_grad():
        logits = net.eval()(x)
    per_sample = [F.cross_entropy(o[None], t[None]).item() for o, t in zip(logits, y, strict=True)]
    right = np.array([int(o.argmax() == t) for o, t in zip(logits, y, strict=True)])
    assert found.samples == 19
    assert found.loss == pytest.approx(np.mean(per_sample), rel=1e-6)
    assert found.metric == right.mean()
    assert found.metric_stderr == pytest.approx(right.std(ddof=1) / math.sqrt(19), rel=1e-12)


def test_the_batching_does_not_matter() -> None:
    net = model()
    x, y = data((19,))[0]
    whole = evaluate(net, [(x, y)], F.cross_entropy, accuracy)
    for size in (1, 4, 18):
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 19, size)]
        parts = evaluate(net, batches, F.cross_entropy, accuracy)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert (parts.metric, parts.metric_stderr) == (whole.metric, whole.metric_stderr)


def test_any_metric_of_one_value_per_sample_will_do() -> None:
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.max(dim=1).values - outputs.min(dim=1).values

    batches = data((5, 2))
    net = model().eval()
    with torch.no_grad():
        values = torch.cat([margin(net(x), y) for x, y in batches]).double().numpy()
    found = evaluate(net, batches, F.cross_entropy, margin)
    assert found.metric == pytest.approx(values.mean(), rel=1e-12)
    assert found.metric_stderr == pytest.approx(values.std(ddof=1) / math.sqrt(7), rel=1e-12)


def test_one_sample_has_no_spread() -> None:
    found = evaluate(model(), data((1,)), F.cross_entropy, accuracy)
    assert (found.samples, found.metric_stderr) == (1, 0.0)


def test_evaluation_changes_nothing() -> None:
    net = model().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    evaluate(net, data((8, 3)), F.cross_entropy, accuracy)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (lambda o, t: accuracy(o, t).mean(), r"\(\)"),
        (lambda o, t: o, r"\(8, 3\)"),
        (lambda o, t: accuracy(o, t)[:-1], r"\(7,\)"),
        (lambda o, t: accuracy(o, t)[:, None], r"\(8, 1\)"),
    ],
)
def test_a_metric_of_the_wrong_shape_is_refused(metric, shape: str) -> None:
    message = rf"one value per sample, shape \(8,\); it gave shape {shape}"
    with pytest.raises(InputError, match=message):
        evaluate(model(), data((8,)), F.cross_entropy, metric)


def test_no_batches_are_an_error() -> None:
    with pytest.raises(InputError, match="evaluation batches are empty"):
        evaluate(model(), [], F.cross_entropy, accuracy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(NonFiniteLossError, match=f"the evaluation loss is {value}"):
        evaluate(model(), data((8, 3)), lambda o, t: o.new_tensor(value), accuracy)


def test_accuracy_is_one_where_the_largest_output_is_the_target() -> None:
    outputs = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 2.0], [-1.0, -2.0, -3.0]])
    assert accuracy(outputs, torch.tensor([1, 2, 0])).tolist() == [1.0, 0.0, 1.0]
