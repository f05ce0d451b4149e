"""The Hessian's traces against dense Hessians, slow loops and their own standard error."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies.base import Subject, Table, quantization_errors
from adq.proxies.trace import HessianTrace, TraceEstimate, _Products, _Sketch
from adq.proxies.work import Work
from adq.quant.batches import batch_size
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo

Batches = list[tuple[Tensor, Tensor]]
CPU = torch.device("cpu")


def subject_of(
    model: nn.Module, batches: Batches, loss: Any = F.cross_entropy, **settings: Any
) -> Subject:
    """With every module that has a weight of two dimensions or more."""
    layers = tuple(
        LayerInfo(name, type(module).__name__, tuple(module.weight.shape), (), 0, 0)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    )
    return Subject(model, layers, (2, 4), batches, loss, **settings)


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


def unlike_statistics_(model: nn.Module) -> nn.Module:
    """Double precision, in training mode, with BatchNorm statistics unlike the data's."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.double().train()


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unlike_statistics_(Net())


@pytest.fixture
def batches() -> Batches:
    """12 samples and 2 that are quite unlike them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, 1, 4, 4, generator=generator).double()
    x[12:] *= 4
    y = torch.randint(0, 3, (14,), generator=generator)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


def dense(subject: Subject) -> np.ndarray:
    x, y = (torch.cat(part) for part in zip(*subject.batches, strict=True))
    model = copy.deepcopy(subject.model).eval()
    names = [f"{name}.weight" for name in subject.names]
    return np.array(oracles.dense_traces(model, names, x, y, subject.loss))


class Quadratic(nn.Module):
    """Gives its weights as outputs: with the loss ½ zᵀ H z its Hessian is H."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(i, o, bias=False).double() for o, i in shapes)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.cat([part.weight.flatten() for part in self.parts])
        return weights.expand(len(x), -1)


def quadratic(hessian: np.ndarray, *shapes: tuple[int, int]) -> Subject:
    h = torch.from_numpy(hessian)

    def loss(z: Tensor, _: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ni,ij,nj->n", z, h, z).mean()

    batch = (torch.zeros(2, 1).double(), torch.zeros(2))
    return subject_of(Quadratic(*shapes), [batch], loss)


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (q * eigenvalues) @ q.T


def block_traces(hessian: np.ndarray, *sizes: int) -> np.ndarray:
    return np.array([part.sum() for part in np.split(np.diag(hessian), np.cumsum(sizes)[:-1])])


@pytest.mark.parametrize("rank", [0, 8])
def test_the_estimate_is_the_dense_hessians_trace_within_its_error(
    net: nn.Module, batches: Batches, rank: int
) -> None:
    subject = subject_of(net, batches)
    truth = dense(subject)
    found = HessianTrace(rank, 480, 48, target=0).trace(subject, Work())
    assert (found.probes, found.products) == (480, 480 + 2 * rank)
    assert (abs(found.trace - truth) < 4 * found.stderr).all()
    # the test can tell: equal weights for both batches would be far outside
    apart = np.array([dense(replace(subject, batches=[batch])) for batch in batches])
    assert (abs(apart.mean(axis=0) - truth) > 8 * found.stderr).any()
    assert (found.stderr < 0.2 * abs(truth)).all()


def test_a_rank_that_spans_the_hessian_leaves_nothing_to_chance() -> None:
    values = np.zeros(20)
    values[:5] = [9, 4, 1, -0.5, -3]
    h = symmetric(values)
    for rank in (5, 8):
        found = HessianTrace(rank, 4).trace(quadratic(h, (3, 4), (2, 4)), Work())
        assert found.trace == pytest.approx(block_traces(h, 12, 8), rel=1e-9)
        assert found.stderr == pytest.approx([0, 0], abs=1e-8)
        assert found.probes == 4
    plain = HessianTrace(0, 4).trace(quadratic(h, (3, 4), (2, 4)), Work())
    assert (plain.stderr > 0.1).all()


def test_a_rank_above_that_of_a_nets_hessian(batches: Batches) -> None:
    # one sample and two classes: far fewer directions than weights have curvature
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    subject = subject_of(model, [(batches[0][0][:1], batches[0][1][:1].clamp(max=1))])
    found = HessianTrace(12, 4).trace(subject, Work())
    assert found.trace == pytest.approx(dense(subject), rel=1e-9)


def test_single_precision_keeps_the_sketch_orthonormal_on_a_steep_spectrum() -> None:
    # the Gram matrix of the sketch has squares of these, far below single precision
    h = symmetric(10.0 ** -np.arange(30))
    subject = quadratic(h, (4, 5), (2, 5))
    subject.model.float()
    single = replace(subject, loss=lambda z, y: subject.loss(z.double(), y))
    weights = [part.weight for part in single.model.parts]
    for seed in range(5):
        run = _Products(single, single.model, weights, checkpoints=False)
        q = _Sketch.draw(8, run, torch.Generator().manual_seed(seed)).q
        columns = torch.stack([torch.cat([t.flatten() for t in v]) for v in q]).detach().double()
        assert 5 <= len(q) <= 8
        torch.testing.assert_close(
            columns @ columns.T, torch.eye(len(q)).double(), rtol=0, atol=0.01
        )
        found = HessianTrace(8, 8, target=0).trace(replace(single, seed=seed), Work())
        assert found.trace == pytest.approx(block_traces(h, 20, 10), rel=1e-4)
        assert (found.stderr < 1e-5).all()


def test_a_diagonal_hessian_is_met_exactly_with_no_error() -> None:
    diagonal = np.arange(12.0) - 3
    found = HessianTrace(0, 4).trace(quadratic(np.diag(diagonal), (2, 3), (3, 2)), Work())
    assert found.trace == pytest.approx([diagonal[:6].sum(), diagonal[6:].sum()], rel=1e-12)
    assert found.stderr == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_batching_does_not_matter(net: nn.Module, batches: Batches, rank: int) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    estimates = []
    for size in (14, 5, 1):
        parts = [(x[i : i + size], y[i : i + size]) for i in range(0, 14, size)]
        estimates.append(HessianTrace(rank, 4).trace(subject_of(net, parts), Work()))
    for other in estimates[1:]:
        np.testing.assert_allclose(other.trace, estimates[0].trace, rtol=1e-8)
        np.testing.assert_allclose(other.stderr, estimates[0].stderr, rtol=1e-8)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_standard_error_is_calibrated(net: nn.Module, batches: Batches, rank: int) -> None:
    truth = dense(subject_of(net, batches[:1]))
    z = []
    for seed in range(100):
        subject = subject_of(net, batches[:1], seed=seed)
        found = HessianTrace(rank, 12, 12).trace(subject, Work())
        z.append((found.trace - truth) / found.stderr)
    # Student's t of 11 degrees of freedom has the spread sqrt(11/9) = 1.11. The spread of 100
    # draws is known to about 1/sqrt(200) = 7 %, their mean to 1/sqrt(100): four times that.
    spread = np.std(z, axis=0, ddof=1)
    assert (abs(spread - 1.11) < 0.31).all(), spread
    assert (abs(np.mean(z, axis=0)) < 0.4).all()


def test_the_standard_error_is_that_of_the_mean_over_probes() -> None:
    # one 2x2 block: H = [[3, 5], [5, 4]], so each probe gives 7 ± 10
    h = np.array([[3.0, 5], [5, 4]])
    found = HessianTrace(0, 64, 64).trace(quadratic(h, (1, 2)), Work())
    plus = round((found.trace[0] + 3) / 20 * 64)  # how many probes gave 7 + 10
    draws = np.array([17.0] * plus + [-3.0] * (64 - plus))
    assert 0 < plus < 64
    assert found.trace[0] == pytest.approx(draws.mean(), rel=1e-12)
    assert found.stderr[0] == pytest.approx(draws.std(ddof=1) / 8, rel=1e-12)


def test_a_few_large_eigenvalues_cost_a_sketch_no_accuracy() -> None:
    values = np.concatenate([[200, 150, 100, 80, 50], np.linspace(0, 1, 55)])
    h = symmetric(values)
    truth = block_traces(h, 40, 20)
    errors = {}
    for rank in (0, 8):
        probes = 32 - 2 * rank  # 32 products either way
        runs = []
        for seed in range(20):
            subject = replace(quadratic(h, (5, 8), (4, 5)), seed=seed)
            found = HessianTrace(rank, probes, target=0).trace(subject, Work())
            assert found.products == 32
            runs.append(found.trace - truth)
        errors[rank] = np.sqrt(np.mean(np.square(runs), axis=0))
    assert (errors[8] < errors[0] / 5).all(), errors


def kept_blocks(path: Path) -> list[np.ndarray]:
    return [np.array(json.loads(line)["result"]) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("target", [0.5, 0.2, 0.08])
@pytest.mark.parametrize("seed", range(3))
def test_probes_end_as_soon_as_the_target_holds_and_never_before(
    tmp_path: Path, target: float, seed: int
) -> None:
    subject = replace(quadratic(symmetric(np.linspace(-1, 3, 30)), (4, 5), (2, 5)), seed=seed)
    found = HessianTrace(0, 120, 4, target).trace(subject, Work(tmp_path / "kept"))
    blocks = kept_blocks(tmp_path / "kept")
    assert found.probes == 4 * len(blocks)
    for k in range(1, len(blocks) + 1):
        probes = np.concatenate(blocks[:k])
        mean, error = probes.mean(axis=0), probes.std(axis=0, ddof=1) / np.sqrt(len(probes))
        largest = max(abs(mean))
        holds = all(
            e <= target * max(abs(m), largest / 100) for m, e in zip(mean, error, strict=True)
        )
        assert holds == (k == len(blocks)) or k == 30
    assert found.trace == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(error, rel=1e-12)


def test_a_small_layer_need_only_be_known_to_a_hundredth_of_the_largest() -> None:
    # the second layer's trace is zero: no share of itself would ever do
    small = 0.05 * (np.eye(10)[::-1])
    h = np.block([[np.eye(10), np.zeros((10, 10))], [np.zeros((10, 10)), small]])
    estimates = [
        HessianTrace(0, 4000, 4, target=0.5).trace(
            replace(quadratic(h, (2, 5), (2, 5)), seed=seed), Work()
        )
        for seed in range(3)
    ]
    for found in estimates:
        assert 8 < found.probes < 4000
        assert found.stderr[1] <= 0.5 * 0.01 * found.trace[0]
        assert found.stderr[1] > 0.5 * abs(found.trace[1])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(vectors, samples) of each graph that is built."""
    calls = []
    batch_of = _Products._batch

    def counting(self: _Products, vectors: Any, batch: Any) -> Any:
        calls.append((len(vectors), batch_size(batch)))
        return batch_of(self, vectors, batch)

    monkeypatch.setattr(_Products, "_batch", counting)
    return calls


@pytest.mark.parametrize("rank", [0, 3])
def test_products_and_passes_are_those_that_were_made(
    net: nn.Module, batches: Batches, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    proxy, subject = HessianTrace(rank, 10, 4, target=0), subject_of(net, batches)
    found = proxy.trace(subject, Work())
    assert found.probes == 8  # whole blocks
    assert found.products == sum(vectors * n for vectors, n in calls) / 14 == 8 + 2 * rank
    del calls[:]
    [score] = proxy.measure(subject, Work())
    graphs = sum(n for _, n in calls) / 14
    assert score.passes == 3 * graphs + 4 * found.products
    assert score.samples == 8


def test_one_seed_gives_one_estimate_whatever_the_random_state(
    net: nn.Module, batches: Batches
) -> None:
    estimates = []
    for outside, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(outside)
        subject = subject_of(net, batches, seed=seed)
        estimates.append(HessianTrace(2, 4).trace(subject, Work()).trace.tolist())
    assert estimates[0] == estimates[1] != estimates[2]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_model_is_left_as_it_was(checkpoints: bool, batches: Batches) -> None:
    torch.manual_seed(0)
    model = nested()
    model[0][0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outside = torch.get_rng_state()
    HessianTrace(2, 4, checkpoints=checkpoints).measure(subject_of(model, batches), Work())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.0.weight"]
    assert all(m.training for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.backends.cuda.flash_sdp_enabled()


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.curved, self.unused = (nn.Linear(3, 2).double() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), self.curved(x), self.unused(x)


@pytest.mark.parametrize("rank", [0, 2])
def test_linear_and_unused_layers_have_no_curvature(rank: int) -> None:
    def loss(outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        return outputs[0].sum() / len(targets) + outputs[1].square().sum(dim=1).mean()

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    found = HessianTrace(rank, 200, 200).trace(subject_of(Heads(), [(x, x)], loss), Work())
    # the Hessian of Σ_o (w_o·x)² is 2·E[x xᵀ] for each of two outputs
    expected = 4 * x.square().sum(dim=1).mean().item()
    assert found.trace[[0, 2]].tolist() == found.stderr[[0, 2]].tolist() == [0, 0]
    assert abs(found.trace[1] - expected) < 4 * found.stderr[1]


def test_a_loss_without_any_curvature_has_no_trace() -> None:
    x = torch.ones(4, 3).double()
    subject = subject_of(Heads(), [(x, x)], lambda outputs, _: outputs[0].mean())
    found = HessianTrace(2, 40).trace(subject, Work())
    assert not found.trace.any()
    assert found.probes == 4


@pytest.mark.parametrize("settings", [(-1, 64, 4), (8, 3, 4), (8, 64, 1)])
def test_settings_without_a_spread_are_refused(settings: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=f"at least 2 probes, .*; got rank {settings[0]}"):
        HessianTrace(*settings)


def test_empty_batches_are_refused(net: nn.Module) -> None:
    with pytest.raises(InputError, match="no batches for the Hessian trace"):
        HessianTrace().trace(subject_of(net, []), Work())


def test_scores_are_half_the_mean_curvature_times_the_squared_error(
    net: nn.Module, batches: Batches
) -> None:
    subject = subject_of(net, batches, seed=5)
    [found] = HessianTrace(2, 8).measure(subject, Work())
    estimate = HessianTrace(2, 8).trace(subject, Work())
    assert (found.proxy, found.act, found.pairs, found.samples) == ("hessian", None, None, 8)
    assert (found.weight.layers, found.weight.bits) == (("conv", "hidden", "head"), (2, 4))
    assert found.seconds > 0
    for i, name in enumerate(subject.names):
        weight = net.get_parameter(f"{name}.weight")
        for j, error in enumerate(quantization_errors(weight, (2, 4))):
            factor = sum(e * e for e in error.flatten().tolist()) / (2 * weight.numel())
            assert found.weight.score[i, j] == pytest.approx(max(0, estimate.trace[i]) * factor)
            assert found.weight.stderr[i, j] == pytest.approx(estimate.stderr[i] * factor)


def test_a_score_foretells_the_loss_of_quantizing_a_quadratic_bowl() -> None:
    # loss ½‖w − w₀‖² around its minimum: the Hessian is the identity, so that HAWQ's mean
    # curvature loses nothing and the score is the true increase
    model = Quadratic((6, 20))
    minimum = model.parts[0].weight.detach().clone()

    def loss(weight: Tensor, _: Tensor) -> Tensor:
        return 0.5 * (weight - minimum.flatten()).square().sum(dim=1).mean()

    batch = (torch.zeros(4, 1), torch.zeros(4))
    [found] = HessianTrace(0, 4).measure(subject_of(model, [batch], loss), Work())
    for j, error in enumerate(quantization_errors(minimum, (2, 4))):
        with torch.no_grad():
            model.parts[0].weight.copy_(minimum + error)
        truth = loss(model(batch[0]), batch[1]).item()
        assert found.weight.score[0, j] == pytest.approx(truth, rel=1e-9)


def test_a_negative_trace_scores_zero_and_keeps_its_error(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, batches: Batches
) -> None:
    estimate = TraceEstimate(np.array([-1.0, 2.0, 0.0]), np.array([0.5, 0.5, 0.5]), 4, 4)
    monkeypatch.setattr(HessianTrace, "trace", lambda *_: estimate)
    [found] = HessianTrace().measure(subject_of(net, batches), Work())
    table: Table = found.weight
    assert not table.score[[0, 2]].any()
    assert (table.score[1] > 0).all()
    assert (table.stderr > 0).all()


class Residual(nn.Module):
    """Its branch is a list of blocks itself, that a checkpoint of the whole must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
            for _ in range(2)
        )

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.branch:
            x = x + scale * block(x)
        return x


def nested() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
    stages = (nn.Sequential(Residual(), Residual()), Residual())
    return unlike_statistics_(nn.Sequential(stem, *stages, nn.Flatten(), nn.Linear(48, 3)))


@pytest.mark.parametrize("rank", [0, 3])
def test_checkpoints_compute_the_same_numbers_again(batches: Batches, rank: int) -> None:
    torch.manual_seed(0)
    model, calls = nested(), []
    model[1][0].branch[0][0].register_forward_hook(lambda *_: calls.append(1))
    plain, saved = [], []
    for found, checkpoints in ((plain, False), (saved, True)):
        del calls[:]
        proxy = HessianTrace(rank, 8, checkpoints=checkpoints, target=0)
        found += [proxy.trace(subject_of(model, batches), Work()), len(calls)]
    np.testing.assert_allclose(saved[0].trace, plain[0].trace, rtol=1e-10)
    np.testing.assert_allclose(saved[0].stderr, plain[0].stderr, rtol=1e-10)
    assert saved[1] > plain[1]  # it did run again


def starved(loss: Any, most: int, seen: list[int]) -> Any:
    """The loss on a device where no more than `most` samples fit."""

    def limited(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        if len(outputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")
        return loss(outputs, targets)

    return limited


def test_running_out_of_memory_halves_the_batches_and_changes_nothing(
    net: nn.Module, batches: Batches
) -> None:
    whole = HessianTrace(2, 4).trace(subject_of(net, batches), Work())
    said, seen = [], []
    subject = subject_of(net, batches, starved(F.cross_entropy, 4, seen), say=said.append)
    found = HessianTrace(2, 4).trace(subject, Work())
    np.testing.assert_allclose(found.trace, whole.trace, rtol=1e-9)
    np.testing.assert_allclose(found.stderr, whole.stderr, rtol=1e-9)
    assert seen[:7] == [12, 6, 3, 3, 6, 3, 3]
    assert said[:2] == [
        "out of memory with 12 samples at once: going on with 6",
        "out of memory with 6 samples at once: going on with 3",
    ]


def test_a_single_sample_that_does_not_fit_is_told(net: nn.Module, batches: Batches) -> None:
    subject = subject_of(net, batches, starved(F.cross_entropy, 0, []), say=lambda _: None)
    with pytest.raises(InputError, match=r"single sample .*20\.00 MiB.*; measure on a device"):
        HessianTrace(0, 4).trace(subject, Work())
    assert all(m.training for m in net.modules())


def test_a_model_without_second_derivatives_is_refused(batches: Batches) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Hardsigmoid(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"no second derivative in PyTorch .*hardsigmoid"):
        HessianTrace(0, 4).trace(subject_of(model.double(), batches), Work())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope * ctx.saved_tensors[0]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_users_function_that_differentiates_once_is_refused(batches: Batches) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), Squared(), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="once_differentiable: it has no second"):
        HessianTrace(0, 4).trace(subject_of(model, batches), Work())


def test_other_errors_are_left_as_they_are(net: nn.Module, batches: Batches) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        HessianTrace(0, 4).trace(subject_of(net, batches, broken), Work())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.flatten(1, 2)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(dim=1))


@pytest.mark.parametrize("devices", [(), (CPU, CPU)])
def test_fused_attention_is_no_obstacle(devices: tuple[torch.device, ...]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 1, 5, 4), torch.arange(6) % 3
    subject = subject_of(Attention(), [(x, y)])
    found = HessianTrace(4, 200, 50, target=0).trace(subject, Work(devices=devices))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = dense(subject)
    assert (abs(found.trace - truth) < 4 * found.stderr).all()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_two_devices_give_the_numbers_of_one(net: nn.Module, batches: Batches) -> None:
    proxy, subject = HessianTrace(3, 40, 4, target=0.15), subject_of(net, batches)
    one = proxy.trace(subject, Work())
    two = proxy.trace(subject, Work(devices=(CPU, CPU)))
    assert one.trace.tolist() == two.trace.tolist()
    assert one.stderr.tolist() == two.stderr.tolist()
    assert (one.probes, one.products) == (two.probes, two.products)


def test_an_interrupted_measurement_goes_on_where_it_was(
    net: nn.Module, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "folder" / "hessian.jsonl"
    proxy, subject = HessianTrace(2, 16, 4, target=0), subject_of(net, batches)
    whole = proxy.trace(subject, Work(kept))
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    kept.write_bytes(b"".join(lines[:2]) + lines[2][:-20])
    calls = counted(monkeypatch)
    found = proxy.trace(subject, Work(kept))
    assert sum(vectors * n for vectors, n in calls) / 14 == 2 * 2 + 2 * 4
    assert found.trace.tolist() == whole.trace.tolist()
    assert kept.read_bytes() == b"".join(lines)
    del calls[:]
    assert proxy.trace(subject, Work(kept)).stderr.tolist() == whole.stderr.tolist()
    assert not calls
