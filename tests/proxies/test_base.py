import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples

from adq.proxies.base import (
    Interactions,
    Sensitivity,
    Subject,
    Table,
    aligned,
    combined,
    in_parts,
    mean_of_parts,
    predicted,
    quantization_errors,
)
from adq.quant import codebook
from adq.quant.apply import quantize
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.scheme import INITIALISATIONS, Initialisation, Scheme
from adq.quant.spec import BitVector

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


@st.composite
def interactions(draw: st.DrawFn) -> Interactions:
    bits = draw(st.lists(st.integers(2, 8), min_size=1, max_size=3, unique=True))
    layers = draw(st.lists(st.text(), min_size=2, max_size=3, unique=True))
    shape = (len(layers), len(bits)) * 2
    numbers = st.lists(scores, min_size=math.prod(shape), max_size=math.prod(shape))
    value, stderr = (np.array(draw(numbers)).reshape(shape) for _ in range(2))
    return Interactions(tuple(layers), tuple(bits), value, stderr)


def same_pairs(one: Interactions, other: Interactions) -> bool:
    return (
        (one.layers, one.bits) == (other.layers, other.bits)
        and np.array_equal(one.value, other.value)
        and np.array_equal(one.stderr, other.stderr)
    )


@few_examples
@given(interactions())
def test_interactions_make_the_round_trip_through_json(pairs: Interactions) -> None:
    assert same_pairs(Interactions.from_json(json.loads(json.dumps(pairs.to_json()))), pairs)


@few_examples
@given(tables(), st.none() | tables(), st.none() | interactions())
def test_a_sensitivity_makes_the_round_trip_through_json(
    weight: Table, act: Table | None, pairs: Interactions | None
) -> None:
    sensitivity = Sensitivity("fisher", weight, act, 12, 0.5, 7.5, pairs)
    data = json.loads(json.dumps(sensitivity.to_json()))
    assert data["unit"] == "expected loss increase"
    found = Sensitivity.from_json(data)
    assert (found.proxy, found.samples, found.seconds, found.passes) == ("fisher", 12, 0.5, 7.5)
    assert same(found.weight, weight)
    assert (found.act is None) == (act is None)
    assert (found.pairs is None) == (pairs is None)
    if act is not None:
        assert same(found.act, act)
    if pairs is not None:
        assert same_pairs(found.pairs, pairs)


def test_an_unknown_error_survives_json() -> None:
    table = Table(("a",), (2,), np.array([[1.0]]), np.array([[np.nan]]))
    found = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert np.isnan(found.stderr).all()


@pytest.mark.parametrize("kind", [Table, Interactions])
@pytest.mark.parametrize(
    ("name", "shape", "number"),
    [
        ("score", (2, 3), np.nan),
        ("score", (2, 3), np.inf),
        ("score", (3, 2), 1.0),
        ("stderr", (2, 2), 1.0),
        ("stderr", (3, 2), 1.0),
    ],
)
def test_scores_that_are_not_finite_or_of_other_shapes_are_refused(
    kind: type, name: str, shape: tuple[int, int], number: float
) -> None:
    own = "score" if kind is Table else "value"
    name = own if name == "score" else name
    times = 1 if kind is Table else 2
    wrong = np.ones(shape * times)
    wrong.flat[-1] = number
    data = {"layers": ["a", "b"], "bits": [2, 4, 8]}
    right = {key: np.ones((2, 3) * times).tolist() for key in (own, "stderr")}
    assert kind.from_json(data | right).layers == ("a", "b")
    with pytest.raises(ValueError, match=f"{own}: expected finite numbers of shape"):
        kind.from_json(data | right | {name: wrong.tolist()})


def test_the_mean_of_parts_by_hand() -> None:
    # shares 1/2, 1/4, 1/4; mean 4/2 + 1/4 + 7/4 = 4; deviations 0, −3, 3;
    # Σ share²·deviation² = 9/16 + 9/16 = 9/8, times 3/2
    mean, stderr = mean_of_parts([np.array([4.0]), np.array([1.0]), np.array([7.0])], [4, 2, 2])
    assert mean == pytest.approx([4])
    assert stderr == pytest.approx([(27 / 16) ** 0.5])


def test_the_mean_of_equal_parts_has_the_usual_standard_error() -> None:
    parts = list(np.random.default_rng(0).standard_normal((9, 2, 3)))
    mean, stderr = mean_of_parts(parts, [5] * 9)
    np.testing.assert_allclose(mean, np.mean(parts, axis=0), rtol=1e-12)
    np.testing.assert_allclose(stderr, np.std(parts, axis=0, ddof=1) / 3, rtol=1e-12)


def test_the_error_of_unequal_parts_is_that_of_many_draws() -> None:
    generator, counts = np.random.default_rng(0), [20, 20, 20, 20, 20, 5]
    draws = [
        mean_of_parts([generator.standard_normal(n).mean(keepdims=True) for n in counts], counts)
        for _ in range(2000)
    ]
    true = 1 / sum(counts) ** 0.5
    assert np.std([mean for mean, _ in draws]) == pytest.approx(true, rel=0.06)
    assert np.mean([stderr**2 for _, stderr in draws]) ** 0.5 == pytest.approx(true, rel=0.06)


def test_a_single_part_has_no_known_error() -> None:
    mean, stderr = mean_of_parts([np.ones((2, 3))], [4])
    assert mean.tolist() == np.ones((2, 3)).tolist()
    assert stderr.shape == (2, 3)
    assert np.isnan(stderr).all()


def subject() -> Subject:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    layers = (LayerInfo("0", "Linear", (2, 3), (3,), 6, 2),)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    ranges = {("0", 3): (0.25, 1), ("0", 2): (0.5, 2)}
    return Subject(
        model, layers, (2, 4), batches, torch.nn.functional.mse_loss, (3, 2), ranges=ranges
    )


def nudged(name: str) -> Callable[[Subject], Subject]:
    def change(subject: Subject) -> Subject:
        subject.model.state_dict()[name].flatten()[0] += 1
        return subject

    return change


def other_data(part: int) -> Callable[[Subject], Subject]:
    def change(subject: Subject) -> Subject:
        batch = list(subject.batches[1])
        batch[part] = batch[part].flip(0)
        return replace(subject, batches=[subject.batches[0], tuple(batch)])

    return change


def with_(**fields: Any) -> Callable[[Subject], Subject]:
    return lambda subject: replace(subject, **fields)


@pytest.mark.parametrize(
    "change",
    [
        nudged("0.weight"),
        nudged("0.bias"),
        nudged("1.running_var"),
        other_data(0),
        other_data(1),
        lambda s: replace(s, batches=s.batches[:1]),
        with_(bits=(2, 3)),
        with_(bits=(4, 2)),
        with_(act_bits=(3,)),
        with_(bits=(2, 4, 3), act_bits=(2,)),
        with_(scheme=Scheme(weight="lsq")),
        with_(scheme=Scheme(group_size=3)),
        with_(ranges={("0", 3): (0.25, 1), ("0", 2): (0.5, 3)}),
        with_(seed=1),
        with_(layers=()),
    ],
)
def test_the_key_changes_with_all_that_scores_depend_on(
    change: Callable[[Subject], Subject],
) -> None:
    before = subject().key("settings")
    assert change(subject()).key("settings") != before
    assert subject().key("other settings") != before
    assert subject().key(("settings", 1)) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        with_(say=lambda _: None),
        with_(devices=(torch.device("cpu"), torch.device("cpu"))),
        with_(ranges={("0", 2): (0.5, 2), ("0", 3): (0.25, 1)}),  # in another order
        with_(layers=(LayerInfo("0", "Linear", (2, 3), (7, 3), 42, 2),)),
        lambda s: replace(s, model=s.model.eval()),
        lambda s: replace(s, model=s.model.requires_grad_(False)),
        lambda s: replace(s, batches=tuple((x.clone(), y.clone()) for x, y in s.batches)),
    ],
)
def test_the_key_changes_with_nothing_else(change: Callable[[Subject], Subject]) -> None:
    assert change(subject()).key("settings") == subject().key("settings")


def test_samples_and_names_of_a_subject() -> None:
    assert (subject().samples, subject().names) == (8, ("0",))


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


def test_a_proxy_that_expects_no_loss_has_no_say_on_weights_and_keeps_its_inputs() -> None:
    def table(score: list[list[float]]) -> Table:
        return Table(("a", "b"), (2, 4), np.array(score), np.zeros((2, 2)))

    first = Sensitivity("loss", table([[3, 1], [1, 0]]), None, 8, 0.0)
    inputs = table([[9, 1], [5, 0]])
    below_zero = Sensitivity("kl", table([[-1, -2], [-3, -1]]), inputs, 8, 0.0)
    found = combined([first, below_zero])
    assert found.weight.score.tolist() == [[3, 1], [1, 0]]
    assert found.act is not None
    assert found.act.score.tolist() == [[9, 1], [5, 0]]


def drawn_table(rng: np.random.Generator, layers: tuple[str, ...] = ("a", "b", "c")) -> Table:
    """Falling with bits, which are in no order."""
    bits = (4, 2, 8)
    score = rng.uniform(1, 2, (len(layers), 3)) * 4.0 ** -np.array(bits)
    return Table(layers, bits, score, rng.uniform(0, 1, score.shape))


def drawn_pairs(rng: np.random.Generator) -> Interactions:
    """Of two of the layers, symmetric, zero with themselves."""
    half = rng.normal(size=(2, 3, 2, 3))
    value = half + half.transpose(2, 3, 0, 1)
    value[[0, 1], :, [0, 1], :] = 0
    return Interactions(("c", "a"), (4, 2, 8), value, rng.uniform(0, 1, value.shape))


def test_what_a_proxy_expects_of_a_bit_vector_is_the_sum_over_layers_inputs_and_pairs() -> None:
    rng = np.random.default_rng(0)
    weight, act, pairs = drawn_table(rng), drawn_table(rng, ("a", "c")), drawn_pairs(rng)
    bits = BitVector({"a": 2, "b": 8, "c": 4}, {"c": 8})  # the input of a stays as it is
    of_weights = weight.score[0, 1] + weight.score[1, 2] + weight.score[2, 0]
    assert predicted(Sensitivity("s", weight, None, 1, 0.0), bits) == pytest.approx(of_weights)
    found = predicted(Sensitivity("s", weight, act, 1, 0.0, pairs=pairs), bits)
    together = pairs.value[0, 0, 1, 1]  # c at 4 bits and a at 2: one pair, once
    assert found == pytest.approx(of_weights + act.score[1, 2] + together)


def test_aligned_proxies_expect_the_geometric_mean_of_the_fewest_bits() -> None:
    rng = np.random.default_rng(1)
    first = Sensitivity("a", drawn_table(rng), drawn_table(rng), 8, 1.0, 3.0, drawn_pairs(rng))
    big = drawn_table(rng)
    second = Sensitivity("b", replace(big, score=1000 * big.score), None, 5, 2.0, 4.0)
    none = Sensitivity("c", replace(big, score=0 * big.score), None, 9, 4.0, 5.0)
    sizes = [s.weight.score[:, 1].sum() for s in (first, second)]  # 2 bits are second
    factors = [math.sqrt(sizes[1] / sizes[0]), math.sqrt(sizes[0] / sizes[1]), 1.0]
    found = aligned([first, second, none])
    for before, after, factor in zip((first, second, none), found, factors, strict=True):
        np.testing.assert_allclose(after.weight.score, factor * before.weight.score)
        np.testing.assert_allclose(after.weight.stderr, factor * before.weight.stderr)
        # one has scores of inputs, which all get
        np.testing.assert_allclose(after.act.score, factors[0] * first.act.score)
        np.testing.assert_allclose(after.act.stderr, factors[0] * first.act.stderr)
    np.testing.assert_allclose(found[0].pairs.value, factors[0] * first.pairs.value)
    np.testing.assert_allclose(found[0].pairs.stderr, factors[0] * first.pairs.stderr)
    assert (found[1].pairs, found[2].pairs) == (None, None)
    assert [s.act for s in aligned([second, none])] == [None, None]


def test_combined_proxies_are_the_mean_of_the_aligned_ones() -> None:
    rng = np.random.default_rng(2)
    first = Sensitivity("a", drawn_table(rng), drawn_table(rng), 8, 1.0, 3.0, drawn_pairs(rng))
    second = Sensitivity("b", drawn_table(rng), drawn_table(rng), 5, 2.0, 4.5)
    one, other = aligned([first, second])
    found = combined([first, second])
    for mean, a, b in (
        (found.weight, one.weight, other.weight),
        (found.act, one.act, other.act),
    ):
        np.testing.assert_allclose(mean.score, (a.score + b.score) / 2)
        np.testing.assert_allclose(mean.stderr, np.hypot(a.stderr, b.stderr) / 2)
    assert (found.proxy, found.samples, found.seconds, found.passes) == ("combined", 5, 3.0, 7.5)
    assert found.pairs is None
    assert combined([replace(first, act=None), replace(second, act=None)]).act is None


def test_samples_are_in_two_parts_at_least() -> None:
    x = torch.arange(7)
    assert [part.tolist() for part, _ in in_parts([(x, x)])] == [[0, 1, 2, 3], [4, 5, 6]]
    batches = [(x[:1], x[:1]), (x[1:], x[1:])]
    assert in_parts(batches) == batches
    with pytest.raises(InputError, match="at least 2 samples, to know their spread; got 1"):
        in_parts([(x[:1], x[:1])])


def test_pairs_within_two_standard_errors_of_zero_add_nothing() -> None:
    values = [3.0, -3.0, 2.1, -2.1, 2.0, -2.0, 0.5]
    value, stderr = np.zeros((2, 7, 2, 7)), np.ones((2, 7, 2, 7))
    value[0, 0, 1], value[1, :, 0, 0] = values, values
    stderr[0, 0, 1, 0] = 2.0  # three is less than two of these
    found = Interactions(("a", "b"), (2, 3, 4, 5, 6, 7, 8), value, stderr).significant()
    assert found.value[0, 0, 1].tolist() == [0, -3, 2.1, -2.1, 0, 0, 0]
    assert found.value[1, :, 0, 0].tolist() == [3, -3, 2.1, -2.1, 0, 0, 0]
    assert (found.layers, found.bits) == (("a", "b"), (2, 3, 4, 5, 6, 7, 8))
    assert np.array_equal(found.stderr, stderr)
