"""One score out of several, weighted by what some measured results say.

Each proxy p gives two features of a bit vector z: x_p(z) = Σ_l S_p[l, z_l] over the weights of the
layers, and the same of √S_p, element by element, since a fine-tuning repairs large damages more
than small ones. Their inputs, where it scores them, give two more: fine-tuning repairs weights far
better than inputs (studies/proxy_fidelity). S is the monotone table. The model is

    loss(z) ≈ c + Σ_k β_k x_k(z),   β_k >= 0.

It is linear in the tables, so what it says is itself a table, Σ_k β_k S_k, and as monotone.

β is a ridge regression on features of unit deviation: the features of several proxies are nearly
parallel and the results few, where least squares would put all weight on a single one of them, and
another one with each new result; the ridge shares it, and has a solution with fewer results than
features. It is fitted on bootstrap resamples of the results (bagging: Breiman 1996); their mean is
the estimate, and their standard deviation its standard error.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LinearRegression

from adq.proxies.base import Array, Sensitivity, Table
from adq.quant.errors import InputError
from adq.quant.spec import BitVector

MIN_RESULTS = 4
CONSTANT = 1e-9  # a feature that varies less, relative to its size, is rounding


@dataclass(frozen=True)
class Features:
    """The additive features of K tables: `score[k, i, j]` for `layers[i]` at `bits[j]`."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    score: Array

    def of(self, bits_of: Mapping[str, int]) -> Array:
        """Σ over the layers, shape (K,). Raises InputError for layers or bits without scores."""
        if unknown := [n for n, b in bits_of.items() if n not in self.layers or b not in self.bits]:
            name = unknown[0]
            raise InputError(
                f"no score of layer {name!r} at {bits_of[name]} bits: measure it first"
            )
        rows = [self.layers.index(name) for name in bits_of]
        columns = [self.bits.index(bits) for bits in bits_of.values()]
        return np.asarray(self.score[:, rows, columns].sum(axis=1))

    def weighted(self, coefficients: Array) -> Table:
        """Mean and standard deviation of Σ_k β_k S_k over the rows β of `coefficients`."""
        members = np.einsum("mk,kij->mij", coefficients, self.score)
        return Table(self.layers, self.bits, members.mean(axis=0), members.std(axis=0, ddof=1))


@dataclass(frozen=True)
class Ensemble:
    """M members c + Σ_k β_k x_k, in the unit of the losses.

    constants (M,), coefficients (M, K): for each proxy, in order, β of its S and of its √S of
    weights, then the same of inputs where there are tables of them
    results, seconds: what it was fitted on, and for how long
    """

    proxies: tuple[str, ...]
    weight: Features
    act: Features | None
    constants: Array
    coefficients: Array
    results: int
    seconds: float

    def predict(self, vectors: Sequence[BitVector]) -> tuple[Array, Array]:
        """(mean, standard error) of the expected loss of each, both (vectors,).

        The error is that of the weights β; the noise of a single result, and what no weighting of
        the tables explains, come on top. Raises InputError for layers or bits without scores.
        """
        x = features(vectors, self.weight, self.act)
        members = self.constants[:, None] + self.coefficients @ x.T
        return members.mean(axis=0), members.std(axis=0, ddof=1)

    @property
    def sensitivity(self) -> Sensitivity:
        """The tables Σ_k β_k S_k. They sum to `predict` less a constant."""
        cut = len(self.weight.score)
        act = None if self.act is None else self.act.weighted(self.coefficients[:, cut:])
        weight = self.weight.weighted(self.coefficients[:, :cut])
        return Sensitivity("ensemble", weight, act, self.results, self.seconds)


def fit_ensemble(
    sensitivities: Sequence[Sensitivity],
    vectors: Sequence[BitVector],
    losses: Sequence[float],
    members: int = 100,
    penalty: float = 0.1,
    seed: int = 0,
) -> Ensemble:
    """The ensemble of the proxies that explains the measured losses of bit vectors.

    `penalty` multiplies |β|² where features and losses have unit deviation; one result weighs 1.
    No unit matters, neither a proxy's nor that of the losses. Raises InputError for fewer than 4
    results, a loss that is not finite, or tables and vectors of different layers or bits.
    """
    begin = time.perf_counter()
    if len(losses) < MIN_RESULTS or len(losses) != len(vectors):
        raise InputError(
            f"an ensemble needs at least {MIN_RESULTS} bit vectors with one loss each: got "
            f"{len(vectors)} bit vectors and {len(losses)} losses"
        )
    y = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(y).all():
        at = int(np.flatnonzero(~np.isfinite(y))[0])
        raise InputError(f"loss {at} is {y[at]}: leave out results whose training failed")
    weight, act = stack([s.weight for s in sensitivities]), stack([s.act for s in sensitivities])
    if weight is None:
        raise InputError("an ensemble needs the scores of at least one proxy: got none")
    x = features(vectors, weight, act)
    middle, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > CONSTANT * np.abs(middle)
    unit = np.where(varies, deviation, np.inf)  # makes a constant feature 0
    y_unit = y.std() if y.std() > CONSTANT * abs(y.mean()) else 1.0
    x_scaled, y_scaled = (x - middle) / unit, (y - y.mean()) / y_unit
    rng = np.random.default_rng(seed)
    resamples = rng.integers(len(y), size=(members, len(y)))
    fits = [ridge(x_scaled[drawn], y_scaled[drawn], penalty) for drawn in resamples]
    coefficients = np.stack([beta for _, beta in fits]) * (y_unit / unit)
    constants = y.mean() + y_unit * np.array([c for c, _ in fits]) - coefficients @ middle
    return Ensemble(
        tuple(s.proxy for s in sensitivities),
        weight,
        act,
        constants,
        coefficients,
        len(losses),
        time.perf_counter() - begin,
    )


def ridge(x: Array, y: Array, penalty: float) -> tuple[float, Array]:
    """c and β >= 0 that minimise |y − c − xβ|² + penalty |β|².

    As least squares with a row √penalty for each feature, by active sets: exact, where the L-BFGS
    of scikit-learn's positive ridge stops short on parallel features.
    """
    x_mean, y_mean = x.mean(axis=0), y.mean()
    rows = np.vstack([x - x_mean, np.sqrt(penalty) * np.eye(x.shape[1])])
    values = np.concatenate([y - y_mean, np.zeros(x.shape[1])])
    beta = LinearRegression(positive=True, fit_intercept=False).fit(rows, values).coef_
    return float(y_mean - x_mean @ beta), beta


def stack(tables: Sequence[Table | None]) -> Features | None:
    """The monotone S and √S of each table, in the first one's order of layers and bits; zeros for
    a proxy without a table. None where no proxy has one."""
    first = next((table for table in tables if table is not None), None)
    if first is None:
        return None
    scores = []
    for table in tables:
        if table is None:
            scores += [np.zeros(first.score.shape)] * 2
            continue
        if {*table.layers} != {*first.layers} or {*table.bits} != {*first.bits}:
            raise InputError(
                f"proxies must score the same layers and bits: got {len(first.layers)} layers at "
                f"{sorted(first.bits)} bits, and {len(table.layers)}, not all of them the same, at "
                f"{sorted(table.bits)}"
            )
        rows = [table.layers.index(name) for name in first.layers]
        columns = [table.bits.index(bits) for bits in first.bits]
        score = table.monotone()[np.ix_(rows, columns)]
        scores += [score, np.sqrt(score)]
    return Features(first.layers, first.bits, np.stack(scores))


def features(vectors: Sequence[BitVector], weight: Features, act: Features | None) -> Array:
    """x[v, k], one row a bit vector: features of weights, then of inputs. Raises
    InputError for a vector of other layers than the tables'."""
    rows = []
    for vector in vectors:
        if missing := sorted({*weight.layers} - {*vector.weight}):
            raise InputError(
                f"a bit vector says nothing about layer {missing[0]!r}, which is scored"
            )
        row = weight.of(vector.weight)
        rows.append(row if act is None else np.concatenate([row, act.of(vector.act)]))
    return np.stack(rows)
