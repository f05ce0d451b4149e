"""The same curvature from PyHessian and from curvlinops."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adq.proxies import gradient
from adq.proxies.base import Subject, quantization_errors
from adq.proxies.gradient import Gradients
from adq.proxies.trace import HessianTrace, _Products
from adq.proxies.work import Work
from adq.quant.layers import trace_layers
from adq.quant.scheme import Scheme

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they use of PyTorch is deprecated
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from pyhessian import hessian

# by torch.func.jvp, which curvlinops calls
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
NAMES = ("0", "4", "6")


def small_net() -> nn.Module:
    """One convolution and two linear layers with 18 + 24 + 9 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.Softplus(),
        nn.Linear(3, 3),
    )


@pytest.fixture
def subject() -> Subject:
    """Eight samples in unequal batches, double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_net().double().eval()
        model[1].running_var.fill_(0.6)
        x, y = torch.randn(8, 1, 4, 4).double(), torch.randint(0, 3, (8,))
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    layers = trace_layers(model, x)
    assert tuple(layer.name for layer in layers) == NAMES
    # a module: the other libraries ask it how it averages
    loss = nn.CrossEntropyLoss()
    return Subject(model, layers, (2, 3), batches, loss, scheme=Scheme(weight="minmax"))


def weights_of(subject: Subject) -> list[Tensor]:
    return [subject.model.get_parameter(f"{name}.weight") for name in NAMES]


def matrix_of(operator: Any, subject: Subject) -> Tensor:
    weights = weights_of(subject)
    linear = operator(
        subject.model, subject.loss, weights, list(subject.batches), check_deterministic=False
    )
    return (linear @ torch.eye(sum(w.numel() for w in weights), dtype=torch.float64)).detach()


def blocks_of(matrix: Tensor, subject: Subject) -> list[list[Tensor]]:
    sizes = [weight.numel() for weight in weights_of(subject)]
    return [list(part.split(sizes, dim=1)) for part in matrix.split(sizes)]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_products_are_those_of_curvlinops_hessian(subject: Subject, checkpoints: bool) -> None:
    weights = weights_of(subject)
    dense = matrix_of(HessianLinearOperator, subject)
    basis = torch.eye(len(dense), dtype=torch.float64).split([w.numel() for w in weights], dim=1)
    vectors = [
        [part[k].reshape(w.shape) for part, w in zip(basis, weights, strict=True)]
        for k in range(len(dense))
    ]
    products = _Products(subject, subject.model, weights, checkpoints).average(vectors)
    found = torch.stack([torch.cat([p.flatten() for p in product]) for product in products])
    torch.testing.assert_close(found, dense, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 6])
def test_traces_are_those_of_curvlinops_hessian(subject: Subject, rank: int) -> None:
    blocks = blocks_of(matrix_of(HessianLinearOperator, subject), subject)
    truth = np.array([blocks[i][i].trace().item() for i in range(3)])
    found = HessianTrace(rank, 200, 50, target=0).trace(subject, Work())
    assert (abs(found.trace - truth) < 4 * found.stderr).all()
    assert (found.stderr < 0.15 * abs(truth).max()).all()


@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_traces_are_those_of_pyhessian_layer_by_layer(subject: Subject) -> None:
    found = HessianTrace(4, 100, 50, target=0).trace(subject, Work())
    x, y = (torch.cat(part) for part in zip(*subject.batches, strict=True))
    for i, name in enumerate(NAMES):
        for key, parameter in subject.model.named_parameters():
            parameter.requires_grad_(key == f"{name}.weight")
        with torch.random.fork_rng():
            torch.manual_seed(i)
            other = hessian(subject.model, subject.loss, data=(x, y), cuda=False)
            draws = np.array(other.trace(maxIter=300, tol=-math.inf))  # never ends early
        assert len(draws) == 300
        error = math.hypot(found.stderr[i], draws.std(ddof=1) / 300**0.5)
        assert abs(found.trace[i] - draws.mean()) < 4 * error
        assert error < 0.2 * abs(found.trace).max()
        subject.model.zero_grad()


def test_gradient_scores_are_those_of_curvlinops_gauss_newton_matrix(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all patterns of signs; of two samples a batch, to keep them few."""
    x, y = (torch.cat(part) for part in zip(*subject.batches, strict=True))
    few = list(zip(x.split(2), y.split(2), strict=True))[:2]
    subject = Subject(subject.model, subject.layers, (2,), few, subject.loss, scheme=subject.scheme)
    blocks = blocks_of(matrix_of(GGNLinearOperator, subject), subject)
    errors = [quantization_errors(w, (2,), subject.scheme).flatten() for w in weights_of(subject)]
    names = ("gauss-newton", "fisher", "gauss-newton-trace")
    totals, pairs = np.zeros((3, 3)), np.zeros((3, 3))
    for pattern in itertools.product((-1, 1), repeat=6):
        monkeypatch.setattr(
            gradient,
            "_signs",
            lambda shape, _, like, p=pattern: torch.tensor(p).reshape(shape).to(like),
        )
        found = Gradients(names, pairs=3).measure(subject, Work())
        totals += np.array([score.weight.score[:, 0] for score in found]) / 2**6
        pairs += found[0].pairs.value[:, 0, :, 0] / 2**6
    for i, delta in enumerate(errors):
        g, power = blocks[i][i], delta.square()
        expected = [delta @ g @ delta, g.diagonal() @ power, g.trace() * power.mean()]
        assert totals[:, i] == pytest.approx([v.item() / 2 for v in expected], rel=1e-8)
        for j, other in enumerate(errors):
            value = 0 if i == j else (delta @ blocks[i][j] @ other).item()
            assert pairs[i, j] == pytest.approx(value, rel=1e-8, abs=1e-14)
