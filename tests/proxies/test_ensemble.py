"""The ensemble on losses made from tables, so that what it should find is known."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from adq.proxies.base import Sensitivity, Table
from adq.proxies.ensemble import fit_ensemble, ridge
from adq.quant.errors import InputError
from adq.quant.spec import BitVector

Array = npt.NDArray[np.float64]
LAYERS = tuple(f"l{i}" for i in range(10))
BITS = (4, 2, 8)  # in no order
ACT_BITS = (4, 8)


def table(rng: np.random.Generator, bits: Sequence[int] = BITS) -> Table:
    """Falling with bits, over two decades of layers."""
    layer = 10 ** rng.uniform(-2, 0, (len(LAYERS), 1))
    noise = np.exp(rng.normal(0, 0.2, (len(LAYERS), len(bits))))
    score = layer * 4.0 ** -np.array(bits) * noise
    return Table(LAYERS, tuple(bits), score, np.zeros_like(score))


def proxy(name: str, weight: Table, act: Table | None = None) -> Sensitivity:
    return Sensitivity(name, weight, act, 1, 0.0)


def draw(rng: np.random.Generator, count: int, inputs: bool = False) -> list[BitVector]:
    """Any bits, and where `inputs`, two thirds of the inputs at some too."""

    def act() -> dict[str, int]:
        bits = {name: int(rng.choice([0, *ACT_BITS])) for name in LAYERS}
        return {name: b for name, b in bits.items() if b and inputs}

    return [
        BitVector({name: int(rng.choice(BITS)) for name in LAYERS}, act()) for _ in range(count)
    ]


def table_sum(
    s: Sensitivity,
    vectors: Sequence[BitVector],
    transform: Callable[[float], float] = float,
    monotone: bool = True,
) -> Array:
    """By a loop over layers."""

    def score(t: Table, name: str, bits: int) -> float:
        values = t.monotone() if monotone else t.score
        return transform(float(values[t.layers.index(name), t.bits.index(bits)]))

    sums = []
    for vector in vectors:
        total = sum(score(s.weight, name, b) for name, b in vector.weight.items())
        if s.act is not None:
            total += sum(score(s.act, name, b) for name, b in vector.act.items())
        sums.append(total)
    return np.array(sums)


def two_proxies(seed: int) -> tuple[np.random.Generator, list[Sensitivity]]:
    rng = np.random.default_rng(seed)
    return rng, [proxy("a", table(rng)), proxy("b", table(rng), table(rng, ACT_BITS))]


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_of_noiseless_losses_are_found(seed: int) -> None:
    """Three of the features make the loss, of weights and inputs apart; members of a negligible
    penalty all agree."""
    rng, (a, b) = two_proxies(seed)
    assert b.act is not None
    inputs_alone = replace(b, weight=replace(b.weight, score=np.zeros_like(b.weight.score)))

    def losses_of(vectors: list[BitVector]) -> Array:
        of_weights = 2 * table_sum(a, vectors) + 3 * table_sum(
            replace(b, act=None), vectors, np.sqrt
        )
        return 0.7 + of_weights + 5 * table_sum(inputs_alone, vectors)

    vectors = draw(rng, 60, inputs=True)
    found = fit_ensemble([a, b], vectors, losses_of(vectors).tolist(), members=20, penalty=1e-12)
    # S and √S of a and b: of weights, then of inputs, which a does not score
    expected = np.tile([2, 0, 0, 3, 0, 0, 5, 0], (20, 1))
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.constants, 0.7, rtol=1e-5)
    new = draw(rng, 20, inputs=True)
    mean, stderr = found.predict(new)
    np.testing.assert_allclose(mean, losses_of(new), rtol=1e-5)
    assert (stderr < 1e-5 * losses_of(new)).all()


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_the_ridge_meets_the_conditions_of_its_minimum(penalty: float) -> None:
    """The gradient is zero where β is positive, and not negative where it is zero."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 9)), rng.normal(size=7)
    c, beta = ridge(x, y, penalty)
    residual = y - c - x @ beta
    gradient = -x.T @ residual + penalty * beta
    assert residual.sum() == pytest.approx(0, abs=1e-12)
    assert (beta >= 0).all()
    assert 0 < (beta > 0).sum() < 9
    assert np.abs(gradient[beta > 0]).max() < 1e-12
    assert (gradient[beta == 0] > 0).all()


@pytest.mark.parametrize("inputs", [False, True])
def test_the_tables_sum_to_the_prediction_less_a_constant(inputs: bool) -> None:
    rng, proxies = two_proxies(0)
    vectors = draw(rng, 12, inputs)
    ensemble = fit_ensemble(proxies, vectors, rng.uniform(1, 2, 12).tolist())
    found = ensemble.sensitivity
    new = draw(rng, 30, inputs)
    offset = ensemble.predict(new)[0] - table_sum(found, new, monotone=False)
    assert found.proxy == "ensemble"
    assert found.samples == 12
    np.testing.assert_allclose(offset, ensemble.constants.mean(), rtol=1e-12)


def test_the_error_of_an_entry_is_the_spread_of_the_members_there() -> None:
    rng, proxies = two_proxies(1)
    vectors = draw(rng, 8)
    ensemble = fit_ensemble(proxies, vectors, rng.uniform(1, 2, 8).tolist())
    found = ensemble.sensitivity.weight
    a, b = (p.weight.monotone()[3, 1] for p in proxies)
    of_weights = ensemble.coefficients[:, :4]
    entries = [float(beta @ [a, np.sqrt(a), b, np.sqrt(b)]) for beta in of_weights]
    assert found.score[3, 1] == pytest.approx(np.mean(entries))
    assert found.stderr[3, 1] == pytest.approx(np.std(entries, ddof=1))


@pytest.mark.parametrize("seed", range(10))
def test_the_tables_are_monotone_whatever_the_scores_and_losses(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def noise(bits: Sequence[int]) -> Table:
        shape = (len(LAYERS), len(bits))
        return Table(LAYERS, tuple(bits), rng.normal(size=shape), np.ones(shape))

    proxies = [proxy("a", noise(BITS), noise(ACT_BITS)), proxy("b", noise(BITS))]
    vectors = draw(rng, 6, inputs=True)
    found = fit_ensemble(proxies, vectors, rng.normal(size=6).tolist()).sensitivity
    assert found.act is not None
    for of_kind in (found.weight, found.act):
        np.testing.assert_allclose(of_kind.score, of_kind.monotone(), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-12, 3e-7, 1e12])
def test_the_units_of_a_proxy_and_of_the_losses_do_not_matter(unit: float) -> None:
    rng, (a, b) = two_proxies(2)
    vectors, losses = draw(rng, 9), rng.uniform(1, 2, 9)
    other = proxy("a", Table(LAYERS, BITS, a.weight.score * unit, a.weight.stderr))
    mean, stderr = fit_ensemble([a, b], vectors, losses.tolist()).predict(vectors)
    found = fit_ensemble([other, b], vectors, (losses * unit).tolist())
    # parallel features: last bits grow by their condition
    np.testing.assert_allclose(found.predict(vectors)[0], mean * unit, rtol=1e-9)
    np.testing.assert_allclose(found.predict(vectors)[1], stderr * unit, rtol=1e-6)


def test_the_order_of_layers_and_bits_does_not_matter() -> None:
    rng, (a, b) = two_proxies(3)
    vectors, losses = draw(rng, 9), rng.uniform(1, 2, 9).tolist()
    rows, columns = rng.permutation(len(LAYERS)), rng.permutation(len(BITS))
    shuffled = Table(
        tuple(LAYERS[i] for i in rows),
        tuple(BITS[j] for j in columns),
        b.weight.score[np.ix_(rows, columns)],
        b.weight.stderr,
    )
    found = fit_ensemble([a, proxy("b", shuffled, b.act)], vectors, losses)
    assert np.array_equal(found.coefficients, fit_ensemble([a, b], vectors, losses).coefficients)


def test_a_seed_gives_the_same_ensemble_and_another_one_does_not() -> None:
    rng, proxies = two_proxies(4)
    vectors, losses = draw(rng, 9), rng.uniform(1, 2, 9).tolist()
    one, same, other = (fit_ensemble(proxies, vectors, losses, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one.coefficients, same.coefficients)
    assert not np.array_equal(one.coefficients, other.coefficients)


def test_two_standard_errors_hold_the_truth_about_as_often_as_they_should() -> None:
    """20 results of noise as large as half their spread, the model being true. A normal estimate
    lies within two errors in 95 of 100; a bootstrap of few, shrunk weights is off by more."""
    covered = []
    for seed in range(40):
        rng, (a, b) = two_proxies(seed)
        vectors, new = draw(rng, 20), draw(rng, 20)

        def truth(at: Sequence[BitVector], a: Sensitivity = a, b: Sensitivity = b) -> Array:
            return 10 * table_sum(a, at) + table_sum(b, at, np.sqrt)

        noiseless = truth(vectors)
        losses = noiseless + rng.normal(0, 0.5 * noiseless.std(), 20)
        mean, stderr = fit_ensemble([a, b], vectors, losses.tolist()).predict(new)
        covered.append(np.abs(mean - truth(new)) < 2 * stderr)
    assert 0.85 < np.mean(covered) < 0.99


def test_a_dozen_results_rank_better_than_either_proxy() -> None:
    """Each proxy errs by a factor of e, one standard deviation, in each layer, independently; the
    loss is concave in the true score. Over ten problems of 12 results."""
    ranks = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        true = table(rng)
        errs = [np.exp(rng.normal(size=(len(LAYERS), 1))) for _ in range(2)]
        a, b = (
            proxy(name, Table(LAYERS, BITS, true.score * err, true.stderr))
            for name, err in zip("ab", errs, strict=True)
        )
        vectors, new = draw(rng, 12), draw(rng, 100)
        losses = table_sum(proxy("true", true), vectors, np.sqrt)
        losses += rng.normal(0, 0.2 * losses.std(), 12)
        at_new = table_sum(proxy("true", true), new, np.sqrt)
        guesses = [
            fit_ensemble([a, b], vectors, losses.tolist()).predict(new)[0],
            table_sum(a, new),
            table_sum(b, new),
        ]
        ranks.append([spearmanr(guess, at_new).statistic for guess in guesses])
    ensemble, one, other = np.array(ranks).T
    assert (ensemble > np.maximum(one, other)).sum() >= 9
    assert ensemble.mean() > max(one.mean(), other.mean()) + 0.05


def test_features_that_do_not_vary_get_no_weight() -> None:
    """A proxy that sees nothing, and results of equal bits."""
    rng, (a, _) = two_proxies(5)
    blind = proxy("blind", Table(LAYERS, BITS, np.zeros((10, 3)), np.zeros((10, 3))))
    vectors, losses = draw(rng, 8), rng.uniform(1, 2, 8).tolist()
    assert not fit_ensemble([a, blind], vectors, losses).coefficients[:, 2:].any()
    equal = fit_ensemble([a, blind], vectors[:1] * 8, losses)
    assert not equal.coefficients.any()
    mean, stderr = equal.predict(vectors)
    # the means of 100 resamples: within four of their standard error
    assert np.abs(mean - np.mean(losses)).max() < 4 * stderr[0] / 10


def test_losses_that_do_not_vary_are_predicted() -> None:
    rng, proxies = two_proxies(6)
    vectors = draw(rng, 5)
    mean, stderr = fit_ensemble(proxies, vectors, [0.1] * 5).predict(vectors)
    np.testing.assert_allclose(mean, 0.1, rtol=1e-12)
    np.testing.assert_allclose(stderr, 0, atol=1e-12)


def test_what_cannot_be_fitted_is_refused_in_one_line() -> None:
    rng, (a, b) = two_proxies(7)
    vectors = draw(rng, 5)
    losses = [1.0, 2.0, 3.0, 4.0, 5.0]
    fewer = Table(LAYERS[1:], BITS, a.weight.score[1:], a.weight.stderr[1:])
    other_bits = Table(LAYERS, (4, 2, 3), a.weight.score, a.weight.stderr)
    with_five = BitVector({**vectors[0].weight, "l3": 5})
    with_more = BitVector({**vectors[0].weight, "head": 4})
    without = BitVector(dict.fromkeys(LAYERS[1:], 4))
    refused: list[tuple[list[Sensitivity], list[BitVector], list[float], str]] = [
        ([a, b], vectors[:3], losses[:3], "at least 4 .* got 3 bit vectors and 3 losses"),
        ([a, b], vectors, losses[:4], "got 5 bit vectors and 4 losses"),
        ([a, b], vectors, [*losses[:4], float("nan")], "loss 4 is nan"),
        ([a, b], vectors, [float("inf"), *losses[:4]], "loss 0 is inf"),
        ([], vectors, losses, "at least one proxy"),
        ([a, proxy("c", fewer)], vectors, losses, "same layers and bits: got 10 layers .* and 9"),
        ([a, proxy("c", other_bits)], vectors, losses, r"at \[2, 4, 8\] bits.* at \[2, 3, 4\]"),
        ([a, b], [*vectors[:4], with_five], losses, "'l3' at 5 bits"),
        ([a, b], [*vectors[:4], with_more], losses, "'head' at 4 bits"),
        ([a, b], [*vectors[:4], without], losses, "nothing about layer 'l0'"),
    ]
    for proxies, at, of, match in refused:
        with pytest.raises(InputError, match=match) as error:
            fit_ensemble(proxies, at, of)
        assert "\n" not in str(error.value)
