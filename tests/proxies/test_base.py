import json

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples

from adq.proxies.base import Sensitivity, Table, quantization_errors
from adq.quant import codebook
from adq.quant.apply import quantize
from adq.quant.scheme import INITIALISATIONS, Initialisation, Scheme

scores = st.floats(-10, 10, allow_nan=False)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    bits = draw(st.lists(st.integers(2, 8), min_size=1, max_size=5, unique=True))
    layers = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
    rows = st.lists(
        st.lists(scores, min_size=len(bits), max_size=len(bits)),
        min_size=len(layers),
        max_size=len(layers),
    )
    return Table(tuple(layers), tuple(bits), np.array(draw(rows)), np.array(draw(rows)))


def same(one: Table, other: Table) -> bool:
    return (
        (one.layers, one.bits) == (other.layers, other.bits)
        and np.array_equal(one.score, other.score)
        and np.array_equal(one.stderr, other.stderr)
    )


def test_monotone_in_numbers() -> None:
    table = Table(
        ("a", "b"),
        (2, 4, 8),
        np.array([[5.0, 1.0, 2.0], [-1.0, -2.0, -3.0]]),
        np.zeros((2, 3)),
    )
    assert table.monotone().tolist() == [[5, 2, 2], [0, 0, 0]]
    assert table.score[0, 1] == 1  # the table itself keeps what was measured


@few_examples
@given(tables())
def test_monotone_is_that_of_the_slow_loop_in_any_order_of_bits(table: Table) -> None:
    found = table.monotone()
    assert found.tolist() == oracles.monotone(table.score.tolist(), table.bits)
    assert (found >= 0).all()
    assert (found >= table.score).all()
    ascending = found[:, np.argsort(table.bits)]
    assert (np.diff(ascending, axis=1) <= 0).all()


@few_examples
@given(tables())
def test_scores_that_are_monotone_already_stay(table: Table) -> None:
    once = table.monotone()
    again = Table(table.layers, table.bits, once, table.stderr).monotone()
    assert np.array_equal(once, again)


@few_examples
@given(tables())
def test_a_table_makes_the_round_trip_through_json(table: Table) -> None:
    assert same(Table.from_json(json.loads(json.dumps(table.to_json()))), table)


@few_examples
@given(tables(), st.none() | tables())
def test_a_sensitivity_makes_the_round_trip_through_json(weight: Table, act: Table | None) -> None:
    data = json.loads(json.dumps(Sensitivity("fisher", weight, act, 12, 0.5).to_json()))
    assert data["unit"] == "expected loss increase"
    found = Sensitivity.from_json(data)
    assert (found.proxy, found.samples, found.seconds) == ("fisher", 12, 0.5)
    assert same(found.weight, weight)
    if act is None:
        assert found.act is None
    else:
        assert same(found.act, act)


@pytest.mark.parametrize("init", INITIALISATIONS)
@pytest.mark.parametrize("shape", [(4, 30), (3, 5, 7), (6, 2, 3, 3)])
def test_errors_are_those_of_a_model_quantized_at_each_width(
    shape: tuple[int, ...], init: Initialisation
) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    errors = quantization_errors(weight, (8, 2, 5), Scheme(init=init))
    assert errors.shape == (3, *shape)
    assert not errors.requires_grad
    for bits, error in zip((8, 2, 5), errors, strict=True):
        scale = codebook.channel_scale(weight.detach())
        levels = codebook.initial_levels((weight / scale).detach(), bits, init)
        for c in range(shape[0]):
            s = scale[c].item()
            for w, e in zip(weight[c].flatten().tolist(), error[c].flatten().tolist(), strict=True):
                nearest = levels[oracles.nearest_level(w / s, levels.tolist())].item()
                assert e == pytest.approx(s * nearest - w, abs=1e-6)  # single precision


def test_errors_are_those_that_quantize_makes() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 6)
    model = torch.nn.Sequential(layer)
    errors = quantization_errors(layer.weight, (2, 4))
    for bits, error in zip((2, 4), errors, strict=True):
        made = quantize(model, {"0": bits})[0].weight - layer.weight
        torch.testing.assert_close(error, made.detach(), rtol=1e-4, atol=1e-6)


def test_more_bits_make_smaller_errors() -> None:
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    squares = quantization_errors(weight, range(2, 9)).square().sum(dim=(1, 2))
    assert (squares.diff() < 0).all()


def test_a_layer_of_zeros_has_no_error() -> None:
    assert not quantization_errors(torch.zeros(3, 4), (2, 8)).any()
