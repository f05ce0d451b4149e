import copy
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from adq.quant.apply import quantize, quantized_layers
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.flat import FlatWeights
from adq.quant.modules import weight_quantizer
from adq.quant.qat import TrainingConfig, train_
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
    return quantize(network().eval(), bits, batches_of())


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
    config = TrainingConfig(8, lr=1e-2, codebook_decay=0.8, codebook_freeze=freeze)
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

    def spy(flat: FlatWeights, decay: float) -> Tensor:
        calls.append((flat.weights[0].detach().clone(), decay))
        return update(flat, decay)

    monkeypatch.setattr(FlatWeights, "update", spy)
    model = quantized()
    weight = model.get_parameter("0.parametrizations.weight.original")
    start = weight.detach().clone()
    config = TrainingConfig(1, codebook_decay=0.7, codebook_freeze=0.0)
    train_(model, batches_of(), F.cross_entropy, config, 0)
    assert [decay for _, decay in calls] == [0.7] * 3
    # the weights of the forward pass, whose statistics are at hand
    assert torch.equal(calls[0][0], start)
    assert not torch.equal(calls[-1][0], weight.detach())


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
