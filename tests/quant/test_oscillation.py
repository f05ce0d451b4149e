"""Flips and freezing against a loop over single weights, on sequences of codes written by hand."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.apply import quantize
from adq.quant.baselines import power_levels
from adq.quant.flat import FlatWeights, flats_of
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.oscillation import MOMENTUM, Flips
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme


def flat_of(model: nn.Module) -> FlatWeights | None:
    return next(iter(flats_of(model)), None)


BITS = {"0": 2, "1": 3, "2": 4}


def model(scheme: Scheme = Scheme()) -> nn.Module:  # noqa: B008 (it is frozen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        return quantize(nn.Sequential(*layers), BITS, scheme=scheme)


class Script:
    """What `Flips` needs of a model's weights, with codes that a test sets."""

    def __init__(self) -> None:
        self.of, self.codes = flat_of(model()), torch.zeros(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def scripted(steps: int, flat: FlatWeights | Script) -> list[list[int]]:
    """Codes of all weights at each step: some rest, some drift, some jump to and fro."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.rand(steps, sum(flat.sizes), generator=generator)
    rows = []
    for t in range(steps):
        kinds = [i % 4 for i in range(sum(flat.sizes))]
        rows.append(
            [(2, t // 8 % 4, 1 + t % 2, int(draw[t, i] * 4))[kind] for i, kind in enumerate(kinds)]
        )
    return rows


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


class Slow:
    """Algorithm 1 of arXiv 2203.11086 for one weight: lines 3 to 11 on its integer weight."""

    def __init__(self, code: int, threshold: float) -> None:
        self.code, self.threshold = code, threshold
        self.direction, self.frequency, self.average, self.frozen = 0, 0.0, float(code), False

    def step(self, code: int) -> None:
        change = code - self.code
        oscillates = change != 0 and self.direction != 0 and sign(change) != self.direction
        self.frequency = MOMENTUM * oscillates + (1 - MOMENTUM) * self.frequency
        self.average = MOMENTUM * code + (1 - MOMENTUM) * self.average
        if change:
            self.direction = sign(change)
        self.frozen = self.frozen or self.frequency > self.threshold
        self.code = code


def test_the_momentum_is_that_of_the_paper() -> None:
    assert MOMENTUM == 0.01


@pytest.mark.parametrize("threshold", [None, 0.02])
def test_flips_are_counted_layer_by_layer(threshold: float | None) -> None:
    flat = Script()
    flips, sequence = Flips(flat, threshold), scripted(12, flat)
    before = sequence[0]
    for codes in sequence:
        flat.codes = torch.tensor(codes, dtype=torch.uint8)
        found, expected, start = flips.step().tolist(), [], 0
        for size in (20, 25, 15):
            pairs = zip(before[start : start + size], codes[start : start + size], strict=True)
            expected.append(sum(a != b for a, b in pairs) / size)
            start += size
        assert found == pytest.approx(expected)
        before = codes


def test_codes_at_both_ends_of_a_byte_are_no_wrap_around() -> None:
    flat = Script()
    flips = Flips(flat, 0.005)
    for code in (0, 255, 0):
        flat.codes = torch.full((60,), code, dtype=torch.uint8)
        flips.step()
    # up, then down: one oscillation
    assert flips.state["frequency"].tolist() == pytest.approx([MOMENTUM] * 60)
    assert flips.state["direction"].tolist() == [-1] * 60
    assert flips.state["frozen"].all()


@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_freezing_is_that_of_algorithm_1(threshold: float) -> None:
    flat = Script()
    flips, sequence = Flips(flat, threshold), scripted(60, flat)
    slow = [Slow(code, threshold) for code in sequence[0]]
    ever = set()
    for t, codes in enumerate(sequence):
        flat.codes = torch.tensor(codes, dtype=torch.uint8)
        flips.step()
        for one, code in zip(slow, codes, strict=True):
            one.step(code)
        assert flips.state["frozen"].tolist() == [one.frozen for one in slow], t
        for key in ("frequency", "average"):
            expected = [getattr(one, key) for one in slow]
            assert flips.state[key].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert flips.state["direction"].tolist() == [one.direction for one in slow]
        ever |= {i for i, one in enumerate(slow) if one.frozen}
    kinds = {i % 4 for i in ever}
    assert 2 in kinds  # what jumps to and fro at each step is frozen
    assert not kinds & {0, 1}  # what rests or drifts never is


def test_what_moves_in_one_direction_never_freezes() -> None:
    flat = Script()
    flips = Flips(flat, 0.0)
    for code in (0, 1, 2, 3, 5, 9, 15):
        flat.codes = torch.full((60,), code, dtype=torch.uint8)
        flips.step()
    assert not flips.state["frozen"].any()


@pytest.mark.parametrize("weight", ["adq", "lsq", "minmax"])
@pytest.mark.parametrize("group_size", [None, 5])
def test_a_frozen_weight_is_held_in_the_middle_of_its_average_level(
    weight: Any, group_size: int | None
) -> None:
    net = model(Scheme(weight, group_size=group_size))
    flat = flat_of(net)
    flips = Flips(flat, 0.5)
    net(torch.zeros(1, 4))
    flips.step()
    before = [w.detach().clone() for w in flat.weights]
    flips.hold_()  # nothing is frozen
    assert all(torch.equal(a, b) for a, b in zip(before, flat.weights, strict=True))

    frozen = torch.arange(60) % 3 == 0
    average = torch.arange(60) % 4 + torch.tensor([0.0, 0.4, -0.4]).repeat(20)
    flips.state |= {"frozen": frozen, "average": average.clamp(min=0)}
    flips.hold_()
    place = 0
    for layer, was in zip(flat.layers, before, strict=True):
        quantizer = weight_quantizer(layer)
        found = quantizer.rows.split(original_weight(layer).detach())
        scale = quantizer.scale_of(found).tolist()
        for row, (values, old) in enumerate(
            zip(found.tolist(), quantizer.rows.split(was).tolist(), strict=True)
        ):
            for value, kept in zip(values, old, strict=True):
                if place % 3:
                    assert value == kept
                else:
                    level = quantizer.levels[round(average[place].item())].item()
                    assert value == pytest.approx(level * scale[row], rel=1e-6)
                place += 1
    assert place == 60


def oscillating() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    return model(), [(x, x[:, :3].argmax(dim=1))]


def test_frozen_weights_keep_their_level_while_training_goes_on(monkeypatch) -> None:
    net, batches = oscillating()
    history: list[tuple[Tensor, Tensor]] = []
    step = Flips.step

    def spy(flips: Flips) -> Tensor:
        found = step(flips)
        history.append((flips.state["codes"].clone(), flips.state["frozen"].clone()))
        return found

    monkeypatch.setattr(Flips, "step", spy)
    # one oscillation is enough; the rate makes nearly every weight oscillate
    config = TrainingConfig(40, lr=0.2, freeze_above=0.005, codebook_decay=None)
    epochs = train_(net, batches, F.cross_entropy, config, 0)
    for (_, earlier), (_, later) in itertools.pairwise(history):
        assert (later >= earlier).all()  # for good
    assert 0 < history[-1][1].sum() < 60
    # a weight is put to its level after the step that froze it, and the next one finds it there
    first_frozen: dict[int, int] = {}
    for t, (_, frozen) in enumerate(history):
        for place in frozen.nonzero().flatten().tolist():
            first_frozen.setdefault(place, t)
    for place, t in first_frozen.items():
        levels = {int(codes[place]) for codes, _ in history[t + 1 :]}
        assert len(levels) <= 1, place
    assert sum(epochs[-1].flips.values()) < sum(epochs[3].flips.values())


@pytest.mark.parametrize("bits", [2, 3])
def test_a_weight_that_crosses_the_clipping_value_of_apot_does_not_flip(bits: int) -> None:
    net = quantize(nn.Sequential(nn.Linear(2, 1, bias=False)), {"0": bits}, scheme=Scheme("apot"))
    flat = flat_of(net)
    flips, scale = Flips(flat), weight_quantizer(net[0]).log_scale.exp()
    assert power_levels(bits)[-1] == power_levels(bits)[-2]
    found = []
    for factor in (0.99, 1.01, 0.99):
        with torch.no_grad():
            original_weight(net[0]).fill_(factor * scale.item())
        out = net(torch.ones(1, 2)).item()
        assert out == pytest.approx(2 * scale.item())  # the same weights all along
        found += flips.step().tolist()
    assert found == [0, 0, 0]


def test_without_a_threshold_nothing_is_held() -> None:
    net = model()
    flips = Flips(flat_of(net))
    net(torch.zeros(1, 4))
    flips.step()
    before = [w.detach().clone() for w in flips.flat.weights]
    flips.hold_()
    assert all(torch.equal(a, b) for a, b in zip(before, flips.flat.weights, strict=True))
    assert set(flips.state_dict()) == {"codes"}


def test_its_state_goes_on_in_another_object_through_a_file(tmp_path: Path) -> None:
    flat = Script()
    sequence = scripted(40, flat)
    one = Flips(flat, 0.02)
    for codes in sequence[:25]:
        flat.codes = torch.tensor(codes, dtype=torch.uint8)
        one.step()
    torch.save(one.state_dict(), tmp_path / "state")
    other = Flips(flat, 0.02)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for codes in sequence[25:]:
        flat.codes = torch.tensor(codes, dtype=torch.uint8)
        assert torch.equal(one.step(), other.step())
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)
    assert one.state["frozen"].any()


def test_dampening_pulls_each_weight_to_its_level() -> None:
    # the loss alone gives no gradient: what a step of SGD moves, dampening moves, by
    # λ(t)·2(w − ŵ) with λ(t) = λ/2·(1 − cos(πt/T)), eq. 6
    net, batches = oscillating()
    flat = flat_of(net)
    config = TrainingConfig(
        4,
        lr=0.1,
        optimizer="sgd",
        momentum=0.5,
        weight_decay=0.0,
        warmup=0.0,
        dampening=0.3,
        codebook_freeze=1.0,
    )
    weights = [w.detach().clone().double() for w in flat.weights]
    velocity = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        strength = 0.15 * (1 - torch.tensor(torch.pi * step / 4).double().cos())
        # one step of warm-up is the least
        rate = 0.05 if step == 0 else 0.05 * (1 + torch.tensor(torch.pi * (step - 1) / 3).cos())
        for layer, w, v in zip(flat.layers, weights, velocity, strict=True):
            quantizer = weight_quantizer(layer)
            rows = quantizer.rows.split(w)
            scale = quantizer.log_scale.detach().exp()[:, None].double()
            distance = (rows / scale)[..., None] - quantizer.levels.double()
            nearest = quantizer.levels.double()[distance.abs().argmin(dim=-1)] * scale
            grad = 2 * strength * (w - quantizer.rows.join(nearest))
            v.mul_(0.5).add_(grad)
            w -= rate * (grad + 0.5 * v)  # Nesterov
    train_(net, batches, lambda out, _: 0 * out.sum(), config, 0)
    for found, expected in zip(flat.weights, weights, strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-6)
