import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adq.quant.batches import (
    batch_size,
    count_batches,
    device_of,
    differentiable,
    evaluating,
    first_tensor,
    forward,
    micro_batches,
    part,
    parts_of,
    random_state,
    reseed,
    seeded,
    set_random_state,
    take_samples,
    threads,
    to_device,
)


class Sum(nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return sum(inputs)


def test_forward_spreads_a_tuple_of_inputs_and_passes_one_tensor_alone() -> None:
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    assert forward(Sum(), x) == 1
    assert forward(Sum(), (x, y)) == 3
    assert forward(Sum(), [x, y, y]) == 5


def test_to_device_reaches_into_tuples_lists_and_dictionaries_and_leaves_the_rest() -> None:
    meta = torch.device("meta")
    value = (torch.zeros(2), [torch.zeros(3)], {"boxes": torch.zeros(4), "name": "a"}, 7)
    moved = to_device(value, meta)
    assert moved[0].device == moved[1][0].device == moved[2]["boxes"].device == meta
    assert type(moved[1]) is list
    assert moved[2]["name"] == "a"
    assert moved[3] == 7


def test_the_batch_size_is_that_of_the_first_input() -> None:
    assert batch_size((torch.zeros(5, 2), None)) == 5
    assert batch_size(((torch.zeros(3, 2), torch.zeros(9)), None)) == 3


def test_inputs_that_are_no_tensors_are_named() -> None:
    with pytest.raises(TypeError, match="inputs to be tensors, got str"):
        first_tensor("pixels")


@pytest.mark.parametrize("samples", [1, 3, 4, 5, 7, 8, 9, 10, 99])
def test_take_samples_gives_the_leading_samples_and_cuts_the_last_batch(samples: int) -> None:
    x = torch.arange(10)
    batches = [(x[i : i + 4], -x[i : i + 4]) for i in range(0, 10, 4)]
    taken = take_samples(batches, samples)
    assert torch.cat([inputs for inputs, _ in taken]).tolist() == list(range(min(samples, 10)))
    assert all(torch.equal(inputs, -targets) for inputs, targets in taken)


def test_take_samples_draws_no_batch_more_than_it_needs() -> None:
    drawn = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(5):
            drawn.append(i)
            yield torch.zeros(4), torch.zeros(4)

    take_samples(batches(), 8)
    assert drawn == [0, 1]


def test_take_samples_cuts_every_part_of_a_batch_alike() -> None:
    inputs = (torch.arange(6), [torch.arange(6)])
    targets = {"boxes": torch.arange(6), "kind": "box"}
    [(cut_inputs, cut_targets)] = take_samples([(inputs, targets)], 2)
    assert cut_inputs[0].tolist() == cut_inputs[1][0].tolist() == [0, 1]
    assert cut_targets["boxes"].tolist() == [0, 1]
    assert cut_targets["kind"] == "box"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 99])
def test_micro_batches_are_the_same_samples_in_smaller_batches(size: int) -> None:
    x = torch.arange(10)
    batches = [
        ((x[i : i + 4], [x[i : i + 4]]), {"label": -x[i : i + 4], "kind": "box"})
        for i in range(0, 10, 4)
    ]
    small = list(micro_batches(batches, size))
    # batches are cut, never joined: 4, 4 and 2 samples
    sizes = [min(size, n - start) for n in (4, 4, 2) for start in range(0, n, size)]
    assert [batch_size(batch) for batch in small] == sizes
    assert torch.cat([inputs[0] for inputs, _ in small]).tolist() == list(range(10))
    for (first, [second]), targets in small:
        assert torch.equal(first, second)
        assert torch.equal(first, -targets["label"])
        assert targets["kind"] == "box"


def test_threads_are_bounded_and_given_back() -> None:
    @threads(1)
    def fail() -> None:
        assert torch.get_num_threads() == 1
        raise KeyError("stop")

    before = torch.get_num_threads()
    with pytest.raises(KeyError, match="stop"):
        fail()
    assert torch.get_num_threads() == before
    with threads(before + 5):
        assert torch.get_num_threads() == before


def test_device_of_is_where_the_parameters_are() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.rand()


def states() -> tuple[list[int], object, object]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def test_seeded_sets_all_three_random_states_and_restores_them() -> None:
    before = states()
    with seeded(3):
        first = draw()
    assert states() == before
    with seeded(3):
        assert draw() == first
    with seeded(4):
        other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_seeded_restores_the_states_when_its_block_raises() -> None:
    @seeded(0)
    def draw_and_stop() -> None:
        draw()
        raise KeyError("stop")

    before = states()
    with pytest.raises(KeyError, match="stop"):
        draw_and_stop()
    assert states() == before


def test_seeds_beyond_32_bits_are_fine() -> None:
    with seeded(10_007 * 2**31):
        draw()


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()  # a frozen BatchNorm
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(KeyError, match="stop"), evaluating(model):
        raise KeyError("stop")
    assert [m.training for m in model.modules()] == modes


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it comes back from a file that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_random_state_that_is_put_back_draws_the_same_again(through_a_file: bool) -> None:
    with seeded(7):
        draw()
        np.random.randn()  # leaves a second Gaussian in numpy's cache
        random.gauss(0, 1)  # and one in Python's
        state = random_state()
        if through_a_file:
            state = stored(state)
        first = [*draw(), np.random.randn(), random.gauss(0, 1), torch.randn(()).item()]
        draw()
        set_random_state(state)
        assert [*draw(), np.random.randn(), random.gauss(0, 1), torch.randn(()).item()] == first


def test_reading_the_random_state_draws_nothing() -> None:
    with seeded(7):
        expected = draw()
    with seeded(7):
        random_state()
        assert draw() == expected


def test_a_state_read_is_not_changed_by_later_draws() -> None:
    with seeded(7):
        state = random_state()
        before = stored(state)
        draw()
        torch.manual_seed(99)
        np.random.seed(99)
        assert torch.equal(state["torch"], before["torch"])
        assert torch.equal(state["numpy"][1], before["numpy"][1])
        assert state["python"] == before["python"]


def test_frozen_parameters_are_differentiable_for_a_while() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    parameters = [layer.weight, layer.bias]

    @differentiable(parameters)
    def fail() -> None:
        assert all(p.requires_grad for p in parameters)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert [p.requires_grad for p in parameters] == [False, True]


def test_one_part_is_the_batch_itself() -> None:
    batch = (object(), object())
    [(found, n)] = parts_of(batch, 5, 1)
    assert found is batch
    assert n == 5


@pytest.mark.parametrize("samples", range(8))
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_are_even_and_empty_ones_hold_a_sample_that_does_not_count(
    samples: int, parts: int
) -> None:
    x = torch.arange(max(1, samples))
    found = parts_of(((x, [x]), {"y": -x}), samples, parts)
    assert len(found) == parts
    sizes = [n for _, n in found]
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    kept = [inputs[0] for ((inputs, _), n) in found if n]
    assert torch.cat([x[:0], *kept]).tolist() == list(range(samples))
    for (inputs, targets), n in found:
        assert torch.equal(inputs[0], inputs[1][0])
        assert torch.equal(inputs[0], -targets["y"])
        assert inputs[0].tolist() == ([0] if n == 0 else inputs[0].tolist())
        assert len(inputs[0]) == max(1, n)


def test_a_part_is_cut_from_every_tensor() -> None:
    x = torch.arange(5)
    assert [v.tolist() for v in part((x, x + 1), 1, 3)] == [[1, 2], [2, 3]]


def test_batches_are_counted_by_length_or_by_a_pass_that_leaves_no_trace() -> None:
    class Unsized:
        def __iter__(self) -> Iterator[float]:
            yield from (random.random() for _ in range(3))

    assert count_batches([1, 2], 0) == 2
    random.seed(1)
    expected = random.random()
    random.seed(1)
    assert count_batches(Unsized(), 0) == 3
    assert random.random() == expected


def test_reseeding_sets_what_seeded_sets() -> None:
    def draws() -> tuple[float, ...]:
        return torch.rand(()).item(), random.random(), np.random.rand()

    with seeded(9):
        expected = draws()
    with seeded(1):
        reseed(9)
        assert draws() == expected
