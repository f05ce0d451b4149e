import copy
import dataclasses
import itertools
import math
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from adq.quant.apply import quantize, quantized_layers
from adq.quant.distillation import distillation_loss, distils
from adq.quant.errors import CheckpointError, InputError, NonFiniteLossError
from adq.quant.flat import FlatWeights
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.qat import Epoch, TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

Batches = list[tuple[Tensor, Tensor]]


def data(samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] ** 2 > 1).long() + (x[:, 2] > 0).long())


def batches_of(samples: int = 48, size: int = 16) -> Batches:
    x, y = data(samples).tensors
    return [(x[i : i + size], y[i : i + size]) for i in range(0, samples, size)]


def network() -> nn.Module:
    """Draws on everything random: shuffled data outside, dropout inside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        )


def quantized() -> nn.Module:
    bits = BitVector({"0": 3, "4": 4}, {"0": 4, "4": 4})
    return quantize(network().eval(), bits, batches_of(), Scheme(split_dead=False))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("make", [network, quantized])
def test_one_seed_gives_the_same_weights_bit_for_bit_and_another_does_not(make) -> None:
    loader = DataLoader(data(), batch_size=16, shuffle=True)
    runs = []
    for outside, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(outside)  # the caller's random state must not matter
        model = make()
        epochs = train_(model, loader, F.cross_entropy, TrainingConfig(2), seed)
        runs.append((epochs, state(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert not same(runs[0][1], runs[2][1])


def test_epochs_see_the_data_in_different_orders() -> None:
    seen: list[list[float]] = [[]]

    def spy(outputs: Tensor, targets: Tensor) -> Tensor:
        seen[-1].append(torch.rand(()).item())
        return F.cross_entropy(outputs, targets)

    train_(network(), batches_of(), spy, TrainingConfig(3), 0, lambda *_: seen.append([]))
    first, second, third, _ = (tuple(draws) for draws in seen)
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("make", [network, quantized])
def test_the_loss_goes_down(make) -> None:
    epochs = train_(make(), batches_of(), F.cross_entropy, TrainingConfig(40, lr=3e-2), 0)
    losses = [epoch.loss for epoch in epochs]
    assert len(losses) == 40
    assert all(type(loss) is float for loss in losses)
    # the entropy of the targets is the loss of the best answer that never looks at the inputs
    shares = data().tensors[1].bincount() / 48
    assert losses[-1] < 0.8 * -(shares * shares.log()).sum().item()
    assert losses[-1] < min(losses[:10])


def test_an_epochs_loss_is_weighted_by_samples() -> None:
    batches = batches_of(40, 16)  # 16, 16 and 8 samples
    steps: list[float] = []

    def spy(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        steps.append(loss.item())
        return loss

    [found] = train_(network(), batches, spy, TrainingConfig(1), 0)
    assert found.loss == pytest.approx(np.average(steps, weights=[16, 16, 8]), rel=1e-12)


def test_on_epoch_hears_of_each_epoch_and_its_loss() -> None:
    heard: list[tuple[int, float]] = []
    epochs = train_(
        network(),
        batches_of(),
        F.cross_entropy,
        TrainingConfig(3),
        0,
        lambda epoch, loss: heard.append((epoch, loss)),
    )
    assert heard == [(i, epoch.loss) for i, epoch in enumerate(epochs)]


class Recorder(torch.optim.AdamW):
    """Keeps the rates that each step used."""

    rates: list[float]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        assert len({group["lr"] for group in self.param_groups}) == 1
        Recorder.rates.append(self.param_groups[0]["lr"])
        return super().step(*args, **kwargs)


def rates_of(monkeypatch: pytest.MonkeyPatch, config: TrainingConfig, batches: Any) -> list[float]:
    Recorder.rates = []
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    train_(network(), batches, F.cross_entropy, config, 0)
    return Recorder.rates


def test_the_rate_rises_to_its_peak_and_falls_by_half_a_cosine(monkeypatch) -> None:
    # 10 epochs of 2 batches, a quarter of the steps to warm up
    config = TrainingConfig(10, lr=0.02, warmup=0.25)
    rates = rates_of(monkeypatch, config, batches_of(32))
    assert len(rates) == 20
    assert rates[:5] == pytest.approx([0.02 * i / 6 for i in range(1, 6)])
    assert rates[5] == 0.02
    expected = [0.01 * (1 + math.cos(math.pi * i / 15)) for i in range(15)]
    assert rates[5:] == pytest.approx(expected)
    assert 0 < rates[-1] < 0.02 * 0.02  # half a cosine ends one step after the last


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_very_few_steps_has_positive_rates(monkeypatch, steps: int) -> None:
    rates = rates_of(monkeypatch, TrainingConfig(1, lr=1.0), batches_of()[:steps])
    assert len(rates) == steps
    assert all(0 < rate <= 1 for rate in rates)


def test_weight_decay_meets_weights_and_nothing_else(monkeypatch) -> None:
    def flat(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0 * outputs.sum()  # no gradient: what moves, moves by decay alone

    model = quantized()
    before = state(model)
    config = TrainingConfig(2, lr=0.1, weight_decay=0.5)
    Recorder.rates = []
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    train_(model, batches_of(), flat, config, 0)
    shrunk = math.prod(1 - 0.5 * rate for rate in Recorder.rates)
    for name, parameter in model.named_parameters():
        if name.endswith("weight.original"):
            torch.testing.assert_close(parameter.detach(), shrunk * before[name])
        else:
            assert torch.equal(parameter, before[name]), name


def test_all_parameters_are_trained_but_the_frozen_ones() -> None:
    model = quantized()
    model.get_parameter("0.parametrizations.weight.original").requires_grad_(False)
    before = state(model)
    train_(model, batches_of(), F.cross_entropy, TrainingConfig(2, lr=1e-2), 0)
    for name, parameter in model.named_parameters():
        still = torch.equal(parameter, before[name])
        assert still == (name == "0.parametrizations.weight.original"), name


def levels_of(model: nn.Module) -> list[Tensor]:
    return [weight_quantizer(layer).levels.clone() for _, layer in quantized_layers(model)]


@pytest.mark.parametrize(("freeze", "moving"), [(0.25, 6), (0.0, 8), (1.0, 0), (0.5, 4)])
def test_codebooks_follow_every_step_until_they_are_frozen(freeze: float, moving: int) -> None:
    model = quantized()
    history = [levels_of(model)]
    config = TrainingConfig(
        8, lr=1e-2, codebook_decay=0.8, codebook_freeze=freeze, weights_per_level=0
    )
    # one batch an epoch, so that an epoch is a step
    train_(
        model,
        batches_of()[:1],
        F.cross_entropy,
        config,
        0,
        lambda *_: history.append(levels_of(model)),
    )
    moved = [
        any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in itertools.pairwise(history)
    ]
    assert moved == [True] * moving + [False] * (8 - moving)


def test_codebooks_move_before_the_optimiser_and_with_the_configured_decay(monkeypatch) -> None:
    calls = []
    update = FlatWeights.update

    def spy(flat: FlatWeights, decay: float, weights_per_level: float) -> Tensor:
        calls.append((flat.weights[0].detach().clone(), decay))
        return update(flat, decay, weights_per_level)

    monkeypatch.setattr(FlatWeights, "update", spy)
    model = quantized()
    weight = model.get_parameter("0.parametrizations.weight.original")
    start = weight.detach().clone()
    config = TrainingConfig(1, codebook_decay=0.7, codebook_freeze=0.0, weights_per_level=0)
    train_(model, batches_of(), F.cross_entropy, config, 0)
    assert [decay for _, decay in calls] == [0.7] * 3
    # the weights of the forward pass, whose statistics are at hand
    assert torch.equal(calls[0][0], start)
    assert not torch.equal(calls[-1][0], weight.detach())


def test_freezing_is_refused_where_a_split_would_shift_the_codes() -> None:
    model = quantize(network().eval(), {"0": 3, "4": 4})
    for config in (TrainingConfig(1, freeze_above=0.1), TrainingConfig(0, freeze_above=0.1)):
        with pytest.raises(InputError, match=r"leave out codebook_decay, or set split_dead=False"):
            train_(model, batches_of(), F.cross_entropy, config, 0)
    still = TrainingConfig(1, freeze_above=0.1, codebook_decay=None)
    train_(model, batches_of(), F.cross_entropy, still, 0)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train: no parameter requires a gradient"):
        train_(model, batches_of(), F.cross_entropy, TrainingConfig(1), 0)


def test_a_model_whose_parts_are_quantized_apart_is_refused() -> None:
    model = nn.Sequential(quantize(nn.Sequential(nn.Linear(4, 4)), {"0": 3}), quantized())
    with pytest.raises(InputError, match="2 parts of the model are quantized apart"):
        train_(model, batches_of(), F.cross_entropy, TrainingConfig(1), 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"epochs": -1}, "epochs, checkpoint_every: expected 0 or more, got -1 and 0"),
        ({"momentum": 1.5}, "momentum: expected 0 to 1, got 1.5"),
        ({"codebook_decay": -0.1}, "codebook_decay: expected 0 to 1"),
        ({"lr": 0.0}, "lr and temperature: expected more than 0"),
        ({"temperature": 0.0}, "lr and temperature: expected more than 0"),
        ({"dampening": -1.0}, "dampening: 0 or more"),
        ({"weights_average": 1.1}, "weights_average: expected 0 to 1"),
        ({"parts": 0}, "parts: expected 1 or more, got 0"),
        ({"amp": "fp8"}, "amp: expected bf16, fp16 or none, got 'fp8'"),
        ({"optimizer": "lamb"}, "optimizer: expected adamw or sgd, got 'lamb'"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(**{"epochs": 1, **option})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_epoch_and_step(value: float) -> None:
    count = itertools.count(1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        # three batches an epoch: the fifth is the second of the second epoch
        return F.cross_entropy(outputs, targets) * (value if next(count) == 5 else 1)

    model = quantized()
    with pytest.raises(
        NonFiniteLossError, match=rf"loss became {value} in epoch 2, step 2: .*rate \(0\.003\)"
    ) as caught:
        train_(model, batches_of(), loss, TrainingConfig(4, lr=3e-3), 0)
    assert "\n" not in str(caught.value)
    # the step that gave it has not been taken
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_no_epochs_change_nothing() -> None:
    model = quantized()
    before = state(model)
    assert train_(model, batches_of(), F.cross_entropy, TrainingConfig(0), 0) == []
    assert same(before, state(model))
    assert not model.training


@pytest.mark.parametrize("batches", [[], iter([])])
def test_empty_batches_are_an_error(batches: Any) -> None:
    with pytest.raises(InputError, match="training batches are empty"):
        train_(network(), batches, F.cross_entropy, TrainingConfig(1), 0)


def test_a_generator_is_an_error_and_not_a_run_without_training() -> None:
    with pytest.raises(InputError, match=r"nothing in epoch 1: .* which a generator is not"):
        train_(network(), (b for b in batches_of()), F.cross_entropy, TrainingConfig(1), 0)


class Unsized:
    """Batches without a length, shuffled by the global random state."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = batches_of()
        random.shuffle(batches)
        return iter(batches)


def test_batches_need_no_length(monkeypatch) -> None:
    config = TrainingConfig(2, lr=1.0)
    rates = rates_of(monkeypatch, config, Unsized())
    assert rates == rates_of(monkeypatch, config, batches_of())
    one, other = network(), network()
    train_(one, Unsized(), F.cross_entropy, config, 0)
    train_(other, Unsized(), F.cross_entropy, config, 0)
    assert same(state(one), state(other))


def test_random_states_outside_are_untouched() -> None:
    loader = DataLoader(data(), batch_size=16, shuffle=True)

    def states() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    for batches in (loader, Unsized()):
        train_(network(), batches, F.cross_entropy, TrainingConfig(1), 3)
        assert states() == before


def test_training_starts_in_training_mode_and_ends_in_eval_mode() -> None:
    model = network().eval()
    modes = []

    def spy(outputs: Tensor, targets: Tensor) -> Tensor:
        modes.append(all(m.training for m in model.modules()))
        return F.cross_entropy(outputs, targets)

    train_(model, batches_of(), spy, TrainingConfig(1), 0)
    assert modes == [True] * 3
    assert not any(m.training for m in model.modules())


def test_a_step_is_that_of_adamw_written_out() -> None:
    # one step from fresh moments: w ← w(1 − lr·wd) − lr·g/(|g| + ε), the bias-corrected moments
    # being g and g² themselves
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    batch = batches_of()[0]
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    train_(model, [batch], F.cross_entropy, TrainingConfig(1, lr=0.1, weight_decay=0.3), 0)
    rate = 0.05  # one step is all warm-up: half the peak
    for name, decay in (("weight", 0.3), ("bias", 0.0)):
        w, g = twin.get_parameter(name).detach(), twin.get_parameter(name).grad
        expected = w * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear up to the peak, then half a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_a_hand_written_loop_with_nesterovs_momentum(decay: float) -> None:
    x, y = data().tensors
    targets = y[:, None].float()
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.25, 1.0, 0.125]]))
        model.bias.zero_()
    batches = [(x[:24], targets[:24]), (x[24:], targets[24:])]
    config = TrainingConfig(
        3, lr=0.05, weight_decay=decay, optimizer="sgd", momentum=0.8, warmup=0.2
    )
    epochs = train_(model, batches, F.mse_loss, config, 0)

    w, b = [0.5, -0.25, 1.0, 0.125], 0.0
    v, vb, losses = [0.0] * 4, 0.0, []
    for step in range(6):
        inputs, wanted = (t.tolist() for t in batches[step % 2])
        errors = [
            sum(wi * xi for wi, xi in zip(w, row, strict=True)) + b - t[0]
            for row, t in zip(inputs, wanted, strict=True)
        ]
        losses.append(sum(e * e for e in errors) / 24)
        grad = [
            2 / 24 * sum(e * row[i] for e, row in zip(errors, inputs, strict=True)) + decay * w[i]
            for i in range(4)
        ]
        of_bias = 2 / 24 * sum(errors)  # which does not decay
        lr = rate(step, 6, 0.05, 0.2)
        v, vb = [0.8 * vi + g for vi, g in zip(v, grad, strict=True)], 0.8 * vb + of_bias
        w = [wi - lr * (g + 0.8 * vi) for wi, g, vi in zip(w, grad, v, strict=True)]
        b -= lr * (of_bias + 0.8 * vb)
    assert model.weight[0].tolist() == pytest.approx(w, rel=1e-5)
    assert model.bias.item() == pytest.approx(b, rel=1e-5)
    # two batches of equal size
    assert [e.loss for e in epochs] == pytest.approx(
        [(one + other) / 2 for one, other in zip(losses[::2], losses[1::2], strict=True)], rel=1e-5
    )


def test_sgd_may_have_no_momentum() -> None:
    config = TrainingConfig(1, optimizer="sgd", momentum=0.0)
    assert train_(network(), batches_of(), F.cross_entropy, config, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: expected adamw or sgd, got 'adam'"),
        ({"amp": "int8"}, "amp: expected bf16, fp16 or none, got 'int8'"),
        ({"distillation": 1.5}, "distillation: expected 0 to 1, got 1.5"),
        ({"distillation": -0.1}, "distillation: expected 0 to 1, got -0.1"),
        ({"distillation": math.nan}, "distillation: expected 0 to 1, got nan"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingConfig(1, **options)


# --- distillation ---


def logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of class scores in dimension 1, as torch.distributions has it."""
    p = torch.distributions.Categorical(logits=teacher.movedim(1, -1) / temperature)
    q = torch.distributions.Categorical(logits=student.movedim(1, -1) / temperature)
    return torch.distributions.kl_divergence(p, q).mean()


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.5])
def test_the_distillation_loss_is_t_squared_times_the_divergence(
    shape: tuple[int, ...], temperature: float
) -> None:
    student, teacher = logits(*shape, seed=0), logits(*shape, seed=1)
    found = distillation_loss(student, teacher, temperature).item()
    expected = temperature**2 * divergence(student, teacher, temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)  # computed in single precision
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_distillation_gradient_points_from_the_teacher_to_the_student(
    temperature: float,
) -> None:
    student, teacher = logits(6, 4, seed=0).requires_grad_(), logits(6, 4, seed=1)
    distillation_loss(student, teacher, temperature).backward()
    # ∂/∂z of T²·KL = T·(softmax(z/T) − softmax(teacher/T)), a mean over 6 samples
    softened = [(t / temperature).softmax(dim=1) for t in (student.detach(), teacher)]
    expected = temperature * (softened[0] - softened[1]) / 6
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-7)
    nearer = student.detach() - 0.5 * student.grad
    assert divergence(nearer, teacher, temperature) < divergence(
        student.detach(), teacher, temperature
    )


Z = torch.zeros


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (Z(4, 3), Z(4, dtype=torch.int64), True),
        (Z(4, 3), Z(4, dtype=torch.int32), True),
        (Z(4, 3), Z(4, dtype=torch.uint8), True),
        (Z(4, 3).bfloat16(), Z(4, dtype=torch.int64), True),
        (Z(4, 3, 5, 5), Z(4, 5, 5, dtype=torch.int64), True),
        (Z(4, 3, 7), Z(4, 7, dtype=torch.int64), True),
        (Z(4, 2), Z(4, dtype=torch.int64), True),
        (Z(4, 1), Z(4, dtype=torch.int64), False),  # one class
        (Z(4), Z(4, dtype=torch.int64), False),
        (Z(4, 3), Z(4), False),  # targets are no classes
        (Z(4, 3), Z(4, dtype=torch.bool), False),
        (Z(4, 3), Z(4, 3), False),  # regression of three values
        (Z(4, 3), Z(4, 3, dtype=torch.int64), False),
        (Z(4, 3), Z(5, dtype=torch.int64), False),
        (Z(4, 3, 5, 5), Z(4, 5, dtype=torch.int64), False),
        (Z(4, 5, 3), Z(4, 5, dtype=torch.int64), False),  # classes last
        (Z(4, 3, dtype=torch.int64), Z(4, dtype=torch.int64), False),
        ((Z(4, 3),), Z(4, dtype=torch.int64), False),
        ({"out": Z(4, 3)}, Z(4, dtype=torch.int64), False),
        (Z(4, 3), [0, 1, 2, 0], False),
        (Z(4, 3), None, False),
    ],
)
def test_which_outputs_are_class_scores(outputs: Any, targets: Any, expected: bool) -> None:
    assert distils(outputs, targets) is expected


class Spy(nn.Module):
    """Counts its calls, and notes its mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.modes = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(any(m.training for m in self.modules()))
        assert not torch.is_grad_enabled()
        return self.inner(x)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_mixes_the_task_and_the_teacher(weight: float, temperature: float) -> None:
    model, teacher = nn.Linear(4, 3), Spy(network().eval())
    x, y = batches_of()[0]
    with torch.no_grad():
        outputs, taught = model(x), teacher.inner(x)
    expected = (1 - weight) * F.cross_entropy(outputs, y).item() + (
        weight * temperature**2 * divergence(outputs, taught, temperature).item()
    )
    config = TrainingConfig(1, distillation=weight, temperature=temperature)
    [epoch] = train_(model, [(x, y)], F.cross_entropy, config, 0, teacher=teacher)
    assert epoch.loss == pytest.approx(expected, rel=1e-5)
    assert len(teacher.modes) == (0 if weight == 0 else 1)


def test_the_teacher_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    teacher = Spy(network().train())
    teacher.inner[1].eval()
    modes = [m.training for m in teacher.modules()]
    before = state(teacher)
    model = quantized()
    train_(model, batches_of(), F.cross_entropy, TrainingConfig(2), 0, teacher=teacher)
    assert teacher.modes == [False] * 6
    assert [m.training for m in teacher.modules()] == modes
    assert same(before, state(teacher))
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_a_teacher_changes_nothing_random() -> None:
    # with all weight on the teacher, whose scores are those of another network with dropout
    runs = []
    for dropout in (0.2, 0.9):
        teacher = network()
        teacher[3].p = dropout
        model = network()
        train_(model, batches_of(), F.cross_entropy, TrainingConfig(2), 0, teacher=teacher)
        runs.append(state(model))
    assert same(*runs)


def test_a_teacher_is_not_asked_about_regression() -> None:
    x, y = data().tensors
    batches = [(x, torch.stack([y, y, y], dim=1).float())]
    teacher = Spy(network().eval())
    alone, taught = network(), network()
    train_(alone, batches, F.mse_loss, TrainingConfig(2), 0)
    train_(taught, batches, F.mse_loss, TrainingConfig(2), 0, teacher=teacher)
    assert teacher.modes == []
    assert same(state(alone), state(taught))


# --- mixed precision ---


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mixed_precision_computes_low_and_keeps_full_weights(
    amp: Any, dtype: torch.dtype, optimizer: Any
) -> None:
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    config = {"epochs": 4, "lr": 0.05, "optimizer": optimizer}
    full, low = quantized(), quantized()
    expected = train_(full, batches_of(), F.cross_entropy, TrainingConfig(**config), 0)
    found = train_(low, batches_of(), loss, TrainingConfig(**config, amp=amp), 0)
    assert set(seen) == {dtype}
    assert {t.dtype for t in low.state_dict().values() if t.is_floating_point()} == {torch.float32}
    # bfloat16 has 8 bits of significand; the two runs drift apart from there
    assert found[0].loss == pytest.approx(expected[0].loss, rel=0.05)
    assert not same(state(low), state(full))
    assert found[-1].loss < found[0].loss


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_whose_scaled_gradient_overflows_is_left_out(optimizer: Any) -> None:
    count = itertools.count()
    weights = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        weights.append(model.weight.detach().clone())
        # the loss of the second step is finite; times the scale, 2^16, it is not
        return F.cross_entropy(outputs, targets) * (1e37 if next(count) == 1 else 1)

    model = nn.Linear(4, 3)
    config = TrainingConfig(1, amp="fp16", optimizer=optimizer, lr=0.1)
    train_(model, [*batches_of(), *batches_of()], loss, config, 0)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise([*weights, model.weight])]
    assert moved == [True, False, True, True, True, True]
    assert torch.isfinite(model.weight).all()


# --- batches in parts ---


def smooth() -> nn.Module:
    """Without BatchNorm and dropout, whose samples depend on one another or on chance."""
    model = network().double()
    model[1] = model[3] = nn.Identity()
    return model


def smooth_quantized() -> nn.Module:
    bits = BitVector({"0": 3, "4": 4}, {"0": 4, "4": 4})
    batches = [(x.double(), y) for x, y in batches_of()]
    return quantize(smooth().eval(), bits, batches, Scheme(split_dead=False)).double()


@pytest.mark.parametrize("make", [smooth, smooth_quantized])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("more", [{}, {"dampening": 0.1, "freeze_above": 0.005}])
def test_parts_give_the_step_of_the_whole_batch(make, parts: int, more: dict[str, Any]) -> None:
    batches = [(x.double(), y) for x, y in batches_of(38, 11)]  # 11, 11, 11 and 5
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    results = []
    for count in (1, parts):
        model, config = make(), TrainingConfig(3, lr=1e-2, weights_per_level=0, **more)
        config = dataclasses.replace(config, parts=count)
        seen.clear()
        log = train_(model, batches, loss, config, 0, teacher=smooth())
        results.append((log, state(model)))
    assert sum(seen[: len(seen) // 3]) == 38
    assert max(seen) == math.ceil(11 / parts)
    assert min(seen) >= 2
    for one, other in zip(*(log for log, _ in results), strict=True):
        # gradients in double precision, distillation in single
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.flips == pytest.approx(other.flips, rel=1e-6)
        assert one.dead == other.dead
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_batchnorm_sees_the_parts_of_two_samples_or_more() -> None:
    sizes = []
    model = network()
    model[1].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    train_(model, batches_of(19, 8), F.cross_entropy, TrainingConfig(1, parts=3), 0)
    assert sizes == [2, 3, 3, 2, 3, 3, 3]  # of 8, 8 and 3


def test_a_checkpoint_may_be_gone_on_with_in_other_parts(tmp_path: Path) -> None:
    path, config = tmp_path / "c", options()
    with pytest.raises(KilledError):
        train_(quantized(), batches_of(), killing(4), config, 3, checkpoint=path)
    parts: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        parts.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    halved = dataclasses.replace(config, parts=2)
    first = read(path)["epochs"][0]["loss"]
    log = train_(quantized(), batches_of(), loss, halved, 3, checkpoint=path)
    assert parts == [8] * 6  # the second epoch's three batches in halves
    assert log[0].loss == first


# --- what is logged ---


def test_flips_are_logged_as_the_mean_fraction_of_each_layer() -> None:
    model = quantized()
    codes: list[dict[str, list[int]]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        codes.append(
            {
                name: weight_quantizer(layer).codes(original_weight(layer)).tolist()
                for name, layer in quantized_layers(model)
            }
        )
        return F.cross_entropy(outputs, targets)

    epochs = train_(model, batches_of(), loss, TrainingConfig(3, lr=0.05), 0)
    assert len(codes) == 9
    some = 0.0
    for index, epoch in enumerate(epochs):
        assert list(epoch.flips) == ["0", "4"]
        for name, found in epoch.flips.items():
            fractions = []
            for step in range(3 * index, 3 * index + 3):
                # before the first step of all there is nothing to compare with
                now, before = codes[step][name], codes[max(0, step - 1)][name]
                changed = sum(a != b for a, b in zip(now, before, strict=True))
                fractions.append(changed / len(now))
            assert found == pytest.approx(sum(fractions) / 3, rel=1e-5)
            some += found
    assert some > 0


def test_dead_levels_are_logged_for_each_layer_while_codebooks_adapt() -> None:
    bits = BitVector({"0": 2, "4": 2})
    model = quantize(network().eval(), bits, scheme=Scheme(split_dead=False))
    quantizer = weight_quantizer(model[4])
    quantizer.levels[-2:] += 1000  # no weight is near
    quantizer.counts[-2:] = 0
    quantizer.sums[-2:] = 0
    config = TrainingConfig(4, lr=1e-4, codebook_freeze=0.5, weights_per_level=0)
    epochs = train_(model, batches_of(), F.cross_entropy, config, 0)
    assert [epoch.dead for epoch in epochs] == [{"0": 0, "4": 2}] * 2 + [{}] * 2


def test_fp32_models_and_baselines_have_no_dead_levels_and_fp32_ones_no_flips() -> None:
    [plain] = train_(network(), batches_of(), F.cross_entropy, TrainingConfig(1), 0)
    assert (plain.flips, plain.dead) == ({}, {})
    model = quantize(network().eval(), {"0": 3, "4": 4}, scheme=Scheme("lsq"))
    [baseline] = train_(model, batches_of(), F.cross_entropy, TrainingConfig(1), 0)
    assert baseline.dead == {}
    assert set(baseline.flips) == {"0", "4"}


def test_a_compiled_model_trains_alike() -> None:
    model, twin = quantized(), quantized()
    # levels that follow: of those that stay some lie on a weight, and thresholds on another
    config = TrainingConfig(1, lr=1e-2, weights_per_level=0)
    expected = train_(model, batches_of(), F.cross_entropy, config, 0)
    compiled = torch.compile(twin, backend="aot_eager")
    found = train_(compiled, batches_of(), F.cross_entropy, config, 0)
    torch.compiler.reset()
    assert found[0].loss == pytest.approx(expected[0].loss, rel=1e-5)
    assert found[0].flips == pytest.approx(expected[0].flips)


# --- checkpoints ---


class KilledError(Exception):
    pass


class Augmented(Dataset):
    """Draws on all three random states for each sample."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = data(12)[index]
        noise = torch.rand(()).item() + random.random() + np.random.rand()
        return x + 0.1 * noise, y


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that draws on all three random states."""
    noise = torch.rand(()).item() + random.random() + np.random.rand()
    return F.cross_entropy(outputs, targets) * (0.5 + noise)


def killing(at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, which fails at the given step, counted from 1."""
    count = itertools.count(1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(count) == at:
            raise KilledError
        return noisy(outputs, targets)

    return loss


class KillingBatches:
    """The batches, which fail when they are asked for the given one, counted from 1."""

    def __init__(self, batches: Any, at: int) -> None:
        self.batches, self.at, self.count = batches, at, itertools.count(1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if next(self.count) == self.at:
                raise KilledError
            yield batch


def options(**more: Any) -> TrainingConfig:
    more = {"dampening": 0.01, "freeze_above": 0.005, "weights_per_level": 0, **more}
    more = {"epochs": 2, "lr": 0.05, **more}
    return TrainingConfig(**more)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def resumed_at_every_step_ends_alike(folder: Path, dataset: Any, config: TrainingConfig) -> None:
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    whole = quantized()
    expected = train_(whole, loader, noisy, config, 3, checkpoint=folder / "whole")
    final = read(folder / "whole")
    for at in range(1, 7):
        for how in ("loss", "batches"):
            if (how == "loss") != (at % 2 == 0) and config.optimizer == "sgd":
                continue  # one way of dying is enough for one of the optimisers
            path = folder / f"{how}{at}"
            loss = killing(at) if how == "loss" else noisy
            batches = loader if how == "loss" else KillingBatches(loader, at)
            torch.manual_seed(at)  # what is outside must not matter
            with pytest.raises(KilledError):
                train_(quantized(), batches, loss, config, 3, checkpoint=path)
            every = config.checkpoint_every or 3
            assert path.exists() == (at > every)
            model = quantized()
            found = train_(model, loader, noisy, config, 3, checkpoint=path)
            assert found == expected, (how, at)
            assert same(state(model), state(whole)), (how, at)
            # optimiser, oscillations and log; the random state at an epoch's end is the caller's
            assert equal({**read(path), "random": 0}, {**final, "random": 0}), (how, at)
            assert not model.training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_run_killed_at_any_step_goes_on_to_the_very_same_end(
    tmp_path: Path, optimizer: Any, checkpoint_every: int
) -> None:
    config = options(optimizer=optimizer, checkpoint_every=checkpoint_every)
    resumed_at_every_step_ends_alike(tmp_path, data(12), config)


@pytest.mark.parametrize(
    "checkpoint_every",
    [
        0,
        1,
    ],
)
def test_so_does_one_whose_samples_are_augmented_at_random(
    tmp_path: Path, checkpoint_every: int
) -> None:
    config = options(checkpoint_every=checkpoint_every)
    resumed_at_every_step_ends_alike(tmp_path, Augmented(), config)


def test_so_does_one_that_averages_its_weights(tmp_path: Path) -> None:
    config = options(checkpoint_every=1, weights_average=0.9)
    resumed_at_every_step_ends_alike(tmp_path, Augmented(), config)


def test_the_runs_that_are_compared_do_freeze_and_flip(tmp_path: Path) -> None:
    loader = DataLoader(data(12), batch_size=4, shuffle=True)
    epochs = train_(quantized(), loader, noisy, options(), 3, checkpoint=tmp_path / "c")
    assert any(epoch.flips["0"] for epoch in epochs)
    assert read(tmp_path / "c")["flips"]["frozen"].any()


def test_a_run_killed_twice_goes_on_twice(tmp_path: Path) -> None:
    config = options(checkpoint_every=1)
    whole = quantized()
    expected = train_(whole, batches_of(), noisy, config, 3)
    path = tmp_path / "c"
    for at in (3, 2):
        with pytest.raises(KilledError):
            train_(quantized(), batches_of(), killing(at), config, 3, checkpoint=path)
    model = quantized()
    assert train_(model, batches_of(), noisy, config, 3, checkpoint=tmp_path / "c") == expected
    assert same(state(model), state(whole))


def never(*_: Any) -> Tensor:
    raise AssertionError("a finished run needs no loss")


def test_a_finished_run_is_read_from_its_checkpoint_at_once(tmp_path: Path) -> None:
    path, heard = tmp_path / "c", []
    model, again = quantized(), quantized()
    expected = train_(model, batches_of(), noisy, options(), 3, checkpoint=path)
    content = path.read_bytes()
    found = train_(again, batches_of(), never, options(), 3, heard.append, checkpoint=path)
    assert found == expected
    assert all(type(epoch) is Epoch for epoch in found)
    assert same(state(again), state(model))
    assert not again.training
    assert heard == []
    assert path.read_bytes() == content


def test_with_a_checkpoint_the_run_is_that_without_one(tmp_path: Path) -> None:
    one, other = quantized(), quantized()
    epochs = train_(one, batches_of(), noisy, options(), 3)
    assert epochs == train_(other, batches_of(), noisy, options(), 3, checkpoint=tmp_path / "c")
    assert same(state(one), state(other))


def refused(path: Path, message: str, model: nn.Module, config: TrainingConfig, seed: int) -> None:
    """One line that names the file; neither the model nor the file is changed.

    Damage has a class of its own: whoever meets it may begin anew.
    """
    before, content = state(model), path.read_bytes()
    with pytest.raises(InputError, match=message) as caught:
        train_(model, batches_of(), never, config, seed, checkpoint=path)
    assert (type(caught.value) is CheckpointError) == ("is damaged" in message)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert same(before, state(model))
    assert path.read_bytes() == content


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path, config = tmp_path / "run.checkpoint", options(checkpoint_every=1)
    with pytest.raises(KilledError):
        train_(quantized(), batches_of(), killing(3), config, 3, checkpoint=path)
    return path


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 3},
        {"lr": 0.01},
        {"optimizer": "sgd"},
        {"amp": "bf16"},
        {"distillation": 0.4},
        {"freeze_above": None},
        {"weights_average": 0.9},
        {"checkpoint_every": 2},
    ],
)
def test_a_checkpoint_of_other_options_is_refused(saved: Path, other: dict[str, Any]) -> None:
    config = options(**{"checkpoint_every": 1, **other})
    refused(saved, "is of another run", quantized(), config, 3)


def test_a_checkpoint_of_another_seed_is_refused(saved: Path) -> None:
    refused(saved, "is of another run", quantized(), options(checkpoint_every=1), 4)


def other_model(kind: str) -> nn.Module:
    if kind == "fp32":
        return network()
    if kind == "bits":
        return quantize(
            network().eval(),
            BitVector({"0": 4, "4": 4}, {"0": 4, "4": 4}),
            batches_of(),
            Scheme(split_dead=False),
        )
    if kind == "frozen":
        model = quantized()
        model[1].weight.requires_grad_(False)
        return model
    model = network().eval()
    model[4] = nn.Linear(8, 5)
    bits = BitVector({"0": 3, "4": 4}, {"0": 4, "4": 4})
    return quantize(model, bits, batches_of(), Scheme(split_dead=False))


@pytest.mark.parametrize("kind", ["fp32", "bits", "frozen", "classes"])
def test_a_checkpoint_of_another_model_is_refused(saved: Path, kind: str) -> None:
    model, config = other_model(kind), options(checkpoint_every=1)
    with pytest.raises(InputError, match=r"is of another (run|model)") as caught:
        train_(model, batches_of(), never, config, 3, checkpoint=saved)
    assert "\n" not in str(caught.value)
    assert saved.name in str(caught.value)


@pytest.mark.parametrize("kind", ["fp32", "bits", "frozen", "classes"])
def test_a_refused_checkpoint_leaves_the_model_as_it_was(saved: Path, kind: str) -> None:
    model = other_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    refused(saved, "is of another (run|model)", model, options(checkpoint_every=1), 3)


def test_a_checkpoint_of_another_scheme_is_refused(tmp_path: Path) -> None:
    def model(weight: Any) -> nn.Module:
        return quantize(network().eval(), {"0": 3, "4": 4}, scheme=Scheme(weight))

    path = tmp_path / "c"
    train_(model("lsq"), batches_of(), noisy, options(), 3, checkpoint=path)
    refused(path, "is of another", model("apot"), options(), 3)


def test_a_checkpoint_cut_short_is_refused(saved: Path) -> None:
    content, model = saved.read_bytes(), quantized()
    for length in (*range(0, len(content), len(content) // 25), len(content) - 1):
        saved.write_bytes(content[:length])
        refused(saved, "is damaged", model, options(checkpoint_every=1), 3)


def test_files_that_are_no_checkpoints_are_refused(saved: Path, tmp_path: Path) -> None:
    config = options(checkpoint_every=1)
    for content, message in (
        (b"hello", "is damaged"),
        (b"", "is damaged"),
        (b"PK\x03\x04" + bytes(200), "is damaged"),
    ):
        saved.write_bytes(content)
        refused(saved, message, quantized(), config, 3)
    for value in ({"a": 1}, [1, 2], torch.zeros(3), network().state_dict()):
        torch.save(value, saved)
        refused(saved, "is of another run", quantized(), config, 3)
    torch.save({"model": network()}, saved)  # a pickled module could run code
    refused(saved, "is damaged", quantized(), config, 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    # it may be there again later, and is no reason to begin anew
    with pytest.raises(InputError, match=r"cannot read checkpoint .*folder") as caught:
        train_(quantized(), batches_of(), never, config, 3, checkpoint=folder)
    assert type(caught.value) is InputError


def test_a_checkpoint_with_a_flipped_bit_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    weight = read(saved)["model"]["0.parametrizations.weight.original"]
    place = bytes(content).find(weight.numpy().tobytes())
    assert place > 0
    content[place + 2] ^= 0x10
    saved.write_bytes(content)
    refused(saved, "is damaged", quantized(), options(checkpoint_every=1), 3)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_no_other_file(
    saved: Path, monkeypatch, error: BaseException
) -> None:
    content = saved.read_bytes()

    def half(state: Any, to: Any) -> None:
        if isinstance(to, Path):
            to.write_bytes(b"half of it")
        else:
            to.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    kind = InputError if isinstance(error, OSError) else KeyboardInterrupt
    config = options(checkpoint_every=1)
    with pytest.raises(kind, match=r"^cannot write .*No space left|^$"):
        train_(quantized(), batches_of(), noisy, config, 3, checkpoint=saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == content


def test_a_checkpoint_in_a_folder_that_is_none_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "c"
    with pytest.raises(InputError, match=r"cannot write .*missing"):
        train_(quantized(), batches_of(), noisy, options(), 3, checkpoint=path)


def test_a_disk_that_is_full_is_an_input_error_and_leaves_the_earlier_checkpoint(
    saved: Path,
) -> None:
    content, limit = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    config = options(checkpoint_every=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limit[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*run\.checkpoint"):
            train_(quantized(), batches_of(), noisy, config, 3, checkpoint=saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert saved.read_bytes() == content
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_checkpoint_of_an_earlier_training_is_replaced_and_one_of_a_later_is_not(
    tmp_path: Path,
) -> None:
    path, fresh = tmp_path / "c", quantized()
    log = train_(quantized(), batches_of(), noisy, options(), 3, checkpoint=path)
    expected = train_(fresh, batches_of(), noisy, options(), 4)
    model = quantized()
    found = train_(model, batches_of(), noisy, options(), 4, checkpoint=path, earlier=log)
    assert found == expected
    assert same(state(model), state(fresh))
    assert read(path)["earlier"] == [dataclasses.asdict(epoch) for epoch in log]
    again = quantized()
    assert found == train_(again, batches_of(), never, options(), 4, checkpoint=path, earlier=log)
    assert same(state(again), state(model))
    refused(path, "is of another run", quantized(), options(), 3)
