"""What a metric may be at points not tried yet: a Gaussian process on bits, scores and costs."""

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Kernel, WhiteKernel
from sklearn.linear_model import BayesianRidge

from adq.search.lattice import Floats, Indices, Lattice
from adq.search.space import FP32

LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Length scales that are tried, in units of the distance √d of random points of d features."""
NOISES = (0.1, 0.03, 0.3)
"""Variances of the noise that are tried, relative to the process's own."""


class Features:
    """Points of a lattice as numbers of which a metric may be a smooth function.

    2⁻ᵇ for each choice of bits b, since the error of a quantizer with b bits goes as 2⁻ᵇ; an input
    in FP32 has 0. `trend` are the logarithms of the expected loss increase and of every cost.
    """

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        groups = lattice.space.groups
        self._bits = np.zeros((*lattice.scores.shape, 2))
        for g, options in enumerate(lattice.options):
            for i, (w, a) in enumerate(options):
                self._bits[g, i] = 2.0**-w, 0.0 if a == FP32 else 2.0**-a
        free = np.array([(len(g.weight) > 1, len(g.act) > 1) for g in groups])
        self._free = free.reshape(-1)
        self._groups = np.arange(len(groups))

    def of(self, points: Indices) -> tuple[Floats, Floats]:
        """(points, groups) -> bits (points, choices), trend (points, 1 + costs)."""
        bits = self._bits[self._groups, points].reshape(len(points), -1)[:, self._free]
        lattice = self.lattice
        expected = lattice.expected(points)
        least = max(lattice.scores.max(), 0.0) * 1e-9 + np.finfo(np.float64).tiny
        totals = np.maximum(1, lattice.totals(points)).astype(np.float64)
        return bits, np.log(np.column_stack([np.maximum(expected, least), totals]))


class Surrogate:
    """The metric's mean and standard deviation, given results.

    A ridge regression on `trend` (BayesianRidge), and a Gaussian process over all features on what
    it leaves: Rasmussen & Williams, Gaussian Processes for Machine Learning (2006), section 2.7.
    Of LENGTHS, and then of NOISES, it takes what makes the results most likely.
    """

    def __init__(self, features: Features, points: Indices, metric: Floats) -> None:
        self.features = features
        bits, trend = features.of(points)
        x = np.column_stack([bits, trend])
        self._centre, self._spread = x.mean(axis=0), x.std(axis=0)
        self._spread[self._spread == 0] = np.inf  # says nothing here
        self._mean, self._scale = metric.mean(), metric.std() or 1.0
        y = (metric - self._mean) / self._scale
        x = (x - self._centre) / self._spread
        self._trend = slice(bits.shape[1], bits.shape[1] + 1)
        self.line = BayesianRidge().fit(x[:, self._trend], y)
        left = y - self.line.predict(x[:, self._trend])
        self._left = left.std() or 1.0
        unit, process = np.sqrt(x.shape[1]), None
        for length in LENGTHS:
            process = _likelier(process, _kernel(length * unit, NOISES[0]), x, left / self._left)
        assert process is not None
        best = process.kernel_.get_params()["k1__k2__length_scale"]
        for noise in NOISES[1:]:
            process = _likelier(process, _kernel(best, noise), x, left / self._left)
        self.process = process

    def predict(self, points: Indices) -> tuple[Floats, Floats]:
        """(points, groups) -> mean and standard deviation, in the metric's unit."""
        x = (np.column_stack(self.features.of(points)) - self._centre) / self._spread
        line = self.line.predict(x[:, self._trend])
        mean, std = self.process.predict(x, return_std=True)
        scale = self._left * self._scale
        return self._mean + self._scale * line + scale * mean, scale * std


def _kernel(length: float, noise: float) -> Kernel:
    return ConstantKernel(1 / (1 + noise)) * RBF(length) + WhiteKernel(noise / (1 + noise))


def _likelier(
    process: GaussianProcessRegressor | None, kernel: Kernel, x: Floats, y: Floats
) -> GaussianProcessRegressor:
    """The process, or one with this kernel if the results are likelier under it."""
    other = GaussianProcessRegressor(kernel, optimizer=None).fit(x, y)
    if process is None or _likelihood(other) > _likelihood(process):
        return other
    return process


def _likelihood(process: GaussianProcessRegressor) -> float:
    return float(process.log_marginal_likelihood_value_)
