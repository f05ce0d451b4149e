"""The surrogate's guesses against the textbook's formulas, and on functions it should learn."""

import numpy as np
import pytest
from toy_lattice import Case

from adq.search.samplers.surrogate import Features, Surrogate

SIZES = [(40, 3, 1), (50, 4, 6), (60, 5, 2), (30, 7, 1)]


@pytest.fixture
def case() -> Case:
    found = Case(SIZES, bits=(2, 3, 4), act=(2, 4, 0))
    found.lattice.scores[:] = np.abs(found.lattice.scores)
    return found


def test_features_are_the_bits_of_choices_and_logarithms_of_sums(case: Case) -> None:
    points = case.lattice.random(np.random.default_rng(0), 7)
    bits, trend = Features(case.lattice).of(points)
    for point, of_bits, of_trend in zip(points, bits, trend, strict=True):
        options = case.lattice.decode(point)
        assert of_bits.tolist() == [x for w, a in options for x in (2.0**-w, 2.0**-a if a else 0)]
        expected = sum(row[i] for row, i in zip(case.lattice.scores, point, strict=True))
        assert of_trend[0] == pytest.approx(np.log(expected))
        totals = [case.totals(options)[name] for name in case.lattice.names]
        assert of_trend[1:] == pytest.approx(np.log(totals))


def test_choices_of_one_are_no_features() -> None:
    case = Case(SIZES, bits=(2, 4), act=(8,), first_last=8)
    bits, _ = Features(case.lattice).of(case.lattice.random(np.random.default_rng(0), 3))
    assert bits.shape == (3, 2)


def test_a_guess_is_the_textbooks(case: Case) -> None:
    """Rasmussen & Williams, eq. 2.25 and 2.26, on what the line leaves."""
    rng = np.random.default_rng(0)
    points = case.lattice.random(rng, 30)
    metric = points.sum(axis=1) + 0.1 * rng.standard_normal(30)
    features = Features(case.lattice)
    surrogate = Surrogate(features, points, metric)
    asked = case.lattice.random(rng, 9)

    x = np.column_stack(features.of(points))
    centre, spread = x.mean(axis=0), x.std(axis=0)
    x, at = (x - centre) / spread, (np.column_stack(features.of(asked)) - centre) / spread
    trend = x.shape[1] - 1 - len(case.lattice.names)
    y = (metric - metric.mean()) / metric.std()
    slope, cut = surrogate.line.coef_[0], surrogate.line.intercept_
    left = y - slope * x[:, trend] - cut
    scale = left.std()
    parts = surrogate.process.kernel_.get_params()
    own, length = parts["k1__k1__constant_value"], parts["k1__k2__length_scale"]
    noise = parts["k2__noise_level"]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return own * np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))

    inverse = np.linalg.inv(kernel(x, x) + noise * np.eye(30))
    mean = kernel(at, x) @ inverse @ (left / scale)
    variance = own + noise - np.diag(kernel(at, x) @ inverse @ kernel(x, at))
    line = slope * at[:, trend] + cut
    found_mean, found_std = surrogate.predict(asked)
    assert found_mean == pytest.approx(metric.mean() + metric.std() * (line + scale * mean))
    assert found_std == pytest.approx(metric.std() * scale * np.sqrt(variance), rel=1e-5)


def test_it_learns_what_adds_up_and_knows_how_well(case: Case) -> None:
    rng = np.random.default_rng(1)
    points = np.unique(case.lattice.random(rng, 400), axis=0)
    points = points[rng.permutation(len(points))]
    of_weights, of_inputs = rng.random((2, 4))
    truth = np.array(
        [
            -sum(
                u * 4.0**-w + v * (4.0**-a if a else 0.0)
                for u, v, (w, a) in zip(
                    of_weights, of_inputs, case.lattice.decode(point), strict=True
                )
            )
            for point in points
        ]
    )
    noisy = truth + 0.002 * rng.standard_normal(len(points))
    surrogate = Surrogate(Features(case.lattice), points[:120], noisy[:120])
    mean, std = surrogate.predict(points[120:])
    assert np.corrcoef(mean, truth[120:])[0, 1] > 0.95
    within = np.abs(mean - noisy[120:]) < 2 * std
    assert within.mean() > 0.85
    assert std.mean() < truth.std() / 2


def test_equal_results_are_guessed_everywhere(case: Case) -> None:
    points = case.lattice.random(np.random.default_rng(0), 20)
    mean, std = Surrogate(Features(case.lattice), points, np.full(20, 0.5)).predict(points)
    assert mean == pytest.approx(np.full(20, 0.5))
    assert np.isfinite(std).all()
