"""The adaptive codebook of ADQ's weights, as pure functions of one layer.

Notation, for one layer: weights `w` with one scale per output channel `s`, normalised weights
`x = w / s`, bits `b`, `K = 2^b` sorted levels `c_0 <= ... <= c_{K-1}` shared by the whole layer,
thresholds `t_k = (c_k + c_{k+1}) / 2`, codes `k(x) = #{t : t <= x}`, and `ŵ = s · c[k(w / s)]`.

Source: ADQ, arXiv 2510.19760, for one codebook per layer, its quantile initialisation (positive and
negative weights apart, and zero) and its exponential moving average; van den Oord et al.,
arXiv 1711.00937, appendix A.1, for the average's form. The rest is this project's design.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adq.quant.kernels.weights_ops import codebook_step, quantize_weights
from adq.quant.kernels.weights_reference import EPSILON, codes_of, parts
from adq.quant.scheme import INITIALISATIONS, Initialisation

LLOYD_STEPS = 20
SMALLEST_SCALE = 1e-2  # of a channel, relative to its layer's


def channel_scale(weight: Tensor) -> Tensor:
    """Root mean square of each output channel (dimension 0), shape (C, 1, ..., 1).

    Never less than a hundredth of the whole layer's: dividing by the scale of a channel that is
    zero or nearly so (pretrained depthwise filters have some) would give 0/0, or let one
    optimiser step throw its values far outside the codebook. A layer of zeros gets scale 1.
    """
    flat = weight.flatten(1).float()
    rms = flat.square().mean(dim=1).sqrt()
    floor = SMALLEST_SCALE * rms.square().mean().sqrt()
    rms = torch.maximum(rms, torch.where(floor > 0, floor, torch.ones_like(floor)))
    return rms.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)


def initial_levels(x: Tensor, bits: int, method: Initialisation = "quantile-lloyd") -> Tensor:
    """K = 2^bits sorted levels for the values of `x`, shape (K,).

    - `quantile`: quantiles of the positive and of the negative values, and an exact zero. This is
      the paper's start; its levels are as dense as the values, where least squared error wants
      the cube root of that density.
    - `quantile-lloyd`: quantile midpoints of the cube root of the values' density, then 20 Lloyd
      steps. (From quantiles of the density itself 20 steps do not reach the optimum: at 4, 6 and
      8 bits of a Gaussian they leave 1.15, 2.6 and 6.6 times the squared error.)
    - `midpoint`: the K quantile midpoints of all values: every level serves as many.
    - `uniform`: the symmetric grid (k − (K−1)/2)·Δ with the Δ of least squared error.
    """
    ordered = x.detach().flatten().float().sort().values
    if method == "quantile":
        return signed_quantiles(ordered, bits).to(x.dtype)
    if method == "quantile-lloyd":
        return lloyd(ordered, cube_root_quantiles(ordered, bits), LLOYD_STEPS).to(x.dtype)
    if method == "midpoint":
        return _quantiles(ordered, 2**bits).to(x.dtype)
    if method == "uniform":
        return best_uniform(ordered, bits).to(x.dtype)
    raise ValueError(f"initialisation: expected one of {INITIALISATIONS}, got {method!r}")


def _quantiles(ordered: Tensor, k: int) -> Tensor:
    """The k quantile midpoints (i + 1/2)/k of sorted values, by nearest rank.

    torch.quantile stops at 2^24 elements; sorted values need no more than an index.
    """
    n = ordered.numel()
    ranks = (torch.arange(k, dtype=torch.float64, device=ordered.device) + 0.5) / k * n
    return ordered[ranks.long().clamp(max=n - 1)]


def signed_quantiles(ordered: Tensor, bits: int) -> Tensor:
    """Zero, and quantile midpoints of each sign; the sign with more values gets the odd level."""
    k = 2**bits
    negative, positive = ordered[ordered < 0], ordered[ordered > 0]
    n_positive = k // 2 if positive.numel() >= negative.numel() else k // 2 - 1
    if negative.numel() == 0:
        n_positive = k - 1
    if positive.numel() == 0:
        n_positive = 0
    parts = [ordered.new_zeros(1)]
    if n_positive:
        parts.append(_quantiles(positive, n_positive) if positive.numel() else parts[0])
    if negative.numel():
        parts.append(_quantiles(negative, k - 1 - n_positive))
    levels = torch.cat(parts)
    # only an all-zero layer leaves levels over; repeat zero rather than invent one
    return torch.cat([levels, levels.new_zeros(k - levels.numel())]).sort().values


def cube_root_quantiles(ordered: Tensor, bits: int) -> Tensor:
    """The K quantile midpoints of the density p^(1/3), p estimated by a histogram.

    Many levels serve a density p with least squared error when their own density is proportional
    to p^(1/3) (Panter and Dite 1951; Gersho and Gray, Vector Quantization, section 5.6).
    """
    n, low, high = ordered.numel(), ordered[0].double(), ordered[-1].double()
    bins = min(1024, max(8, n // 16))
    edges = torch.lerp(low, high, torch.linspace(0, 1, bins + 1, device=ordered.device).double())
    below = torch.searchsorted(ordered, edges[1:].to(ordered.dtype), right=True)
    counts = torch.cat([below[:1], below.diff()])
    mass = torch.cat([edges.new_zeros(1), counts.double().pow(1 / 3).cumsum(0)])
    wanted = (torch.arange(2**bits, device=ordered.device).double() + 0.5) / 2**bits * mass[-1]
    cell = torch.searchsorted(mass, wanted).clamp(1, bins)
    fraction = (wanted - mass[cell - 1]) / (mass[cell] - mass[cell - 1])
    return torch.lerp(edges[cell - 1], edges[cell], fraction).to(ordered.dtype)


def lloyd(ordered: Tensor, levels: Tensor, steps: int) -> Tensor:
    """Lloyd's iteration on sorted one-dimensional data: each level moves to its cell's mean.

    With prefix sums a step costs O(K log n). A level whose cell is empty stays where it is.
    """
    prefix = torch.cat([ordered.new_zeros(1).double(), ordered.double().cumsum(0)])
    levels = levels.double()
    for _ in range(steps):
        thresholds = ((levels[1:] + levels[:-1]) / 2).to(ordered.dtype)
        inner = torch.searchsorted(ordered, thresholds)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), ordered.numel())])
        counts = edges.diff()
        sums = prefix[edges].diff()
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
    return levels.to(ordered.dtype)


def best_uniform(ordered: Tensor, bits: int, candidates: int = 64) -> Tensor:
    """The mid-rise grid (k − (K−1)/2)·Δ with the least squared error among `candidates` Δ."""
    k = 2**bits
    grid = torch.arange(k, dtype=ordered.dtype, device=ordered.device) - (k - 1) / 2
    sample = ordered[:: max(1, ordered.numel() // 2**16)]
    largest = sample.abs().max()
    if largest == 0:
        return torch.zeros_like(grid)
    fractions = torch.arange(1, candidates + 1, dtype=ordered.dtype, device=ordered.device)
    grids = (fractions / candidates * largest / grid[-1])[:, None] * grid
    errors = torch.stack([(sample - g[assign(sample, g)]).square().mean() for g in grids])
    return grids[errors.argmin()]


def assign(x: Tensor, levels: Tensor) -> Tensor:
    """The index of each value's nearest level, int64, shape of `x`; ties go to the upper level."""
    return codes_of(x.contiguous(), levels).long()


def fake_quantize(weight: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """ŵ = s · c[k(w/s)], with straight-through gradients.

    ∂ŵ/∂w = 1 (identity) and ∂ŵ/∂s = c[k(w/s)] − w/s, the learned-step gradient of LSQ
    (arXiv 1902.08153, eq. 3) without clipping, since the outer cells of a codebook are unbounded.
    Levels get no gradient: they follow the weights by `ema_step`.

    Shapes: weight (C, ...), scale (C, 1, ..., 1), levels (K,).
    """
    rows = weight.flatten(1)
    shape = ([rows.shape[0]], [rows.shape[1]], [_bits(levels)])
    out = quantize_weights(rows.reshape(-1), scale.flatten(), levels, *shape)[0]
    return out.reshape(weight.shape)


def _bits(levels: Tensor) -> int:
    return levels.numel().bit_length() - 1


@dataclass(frozen=True)
class Statistics:
    """What a layer's weights say about its levels: all of shape (K,), float64."""

    counts: Tensor
    sums: Tensor
    squared_errors: Tensor


def _partials(x: Tensor, levels: Tensor) -> Tensor:
    x = x.detach().flatten()
    shape = ([1], [x.numel()], [_bits(levels)])
    return quantize_weights(x, torch.ones_like(x[:1]), levels, *shape, gather=True)[2]


def statistics(x: Tensor, levels: Tensor) -> Statistics:
    """Per level: how many values it serves, their sum, and their squared distance from it."""
    parts = _partials(x, levels).reshape(3, -1, levels.numel())
    return Statistics(*parts.sum(dim=1))


@dataclass(frozen=True)
class Codebook:
    """Sorted levels, running counts N and running sums M (float32 or more), all of shape (K,)."""

    levels: Tensor
    counts: Tensor
    sums: Tensor


def new_codebook(
    x: Tensor, bits: int, method: Initialisation = "quantile-lloyd", *, zero: bool = False
) -> Codebook:
    """A codebook started from `x`: N counts the values of each level, and M = N·c.

    With `zero`, the level nearest to zero is put there.
    """
    levels = initial_levels(x, bits, method)
    if zero:
        levels[levels.abs().argmin()] = 0.0
    now = statistics(x, levels)
    dtype = torch.promote_types(x.dtype, torch.float32)  # float16 cannot count beyond 65504
    return Codebook(levels, now.counts.to(dtype), (now.counts * levels.double()).to(dtype))


def ema_step(
    codebook: Codebook,
    x: Tensor,
    decay: float,
    epsilon: float = EPSILON,
    *,
    split: bool = True,
    zero: bool = False,
) -> Codebook:
    """One exponential-moving-average step towards the cell means of `x`, with every dead level
    re-seeded: the codebook step of `adq.quant.kernels.weights_reference`, for one layer.

    All weights are seen at every step, so this is a Lloyd iteration damped to a lag of about
    1/(1−γ) steps.
    """
    levels, counts, sums, _ = codebook_step(
        _partials(x, codebook.levels),
        codebook.levels,
        codebook.counts,
        codebook.sums,
        [_bits(codebook.levels)],
        [parts(x.numel())],
        decay,
        epsilon=epsilon,
        split=split,
        zero=zero,
    )
    return Codebook(levels, counts, sums)
