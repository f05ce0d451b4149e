"""Weight quantization of all layers of a model in plain PyTorch: the meaning of the kernels, and
the CPU's way.

The weights of L layers lie one layer after the other in a flat tensor w (N,). Layer l is a matrix
of rows[l] rows of sizes[l] weights, each row with one scale, and has K_l = 2^bits[l] sorted levels
c_0 <= ... <= c_{K−1}. Scales lie in a flat tensor s (Σ rows,), levels in one of ΣK.

Forward, with x = w/s and thresholds t_k = (c_k + c_{k+1})/2:

    code  k(x) = #{t : t <= x}  in 0..K−1 (ties go up; NaN counts as +∞)
    ŵ = s·c[k(x)], NaN where w is

Statistics, where asked for: per level the number n of finite x that it serves, their sum m and
their squared distance e = Σ(x − c)² from it. They come in parts, one for each PART weights of a
layer, a layer's last part being shorter: a (3, Σ_l parts[l]·K_l) float64 tensor that holds n, m and
e, layer after layer and part after part.

Backward, with g = ∂L/∂ŵ, by one of three rules for all layers:

    straight   ∂L/∂w = g                  ∂L/∂s = Σ_row g·(c[k] − x)
    lsq        ∂L/∂w = g inside, else 0   ∂L/∂s = Σ_row g·(c[k] − x inside, c[k] outside)
    pact       ∂L/∂w = g inside, else 0   ∂L/∂s = Σ_row g·(0 inside, c[k] outside)

where inside means c_0 < x < c_{K−1}. The outer cells of an adaptive codebook are unbounded, and so
it takes `straight`; `lsq` is eq. 3 of LSQ (Esser et al., arXiv 1902.08153), `pact` eq. 3 of PACT
(Choi et al., arXiv 1805.06085), for a step instead of the clipping value. Levels get no gradient.

Codebook step, per layer, from statistics, running counts N and running sums M (float32 or more):

    N ← γN + (1−γ)n,   M ← γM + (1−γ)m,   c = M/Ñ,   Ñ = (N+ε)/(ΣN + Kε)·ΣN

(van den Oord et al., arXiv 1711.00937, eq. 6 to 8, smoothed as in its public code). A level with
N < 1/2 is dead and keeps its place. With `split`, dead levels, in rising order, take one half of
the cells with the most squared error: the cell's level c becomes c ± σ, σ² = e/n, and N/2 and
(N/2)(c ± σ) are set for both, so that the next step does not undo it. With `zero`, the level
nearest to zero is set to zero. Then levels are sorted, with their N and M.

Bytes moved per weight: forward 9 (float32 and a byte of code), backward 13; the levels' share is
less than 1 % at 4 bits.

The passes go layer by layer, ten operations each on a view of its rows: looking up scale and layer
of every single weight would move more bytes than the quantization does. On the CPU the weights are
some 5 % of the time that 4-bit training adds to a step of ResNet-20, activations the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from adq.quant.kernels.counting import count

PART = 2**13  # weights of one partial sum
DEAD_COUNT = 0.5  # a level whose running count falls below half a weight serves nobody
EPSILON = 1e-5

RULES = ("straight", "lsq", "pact")
"""The backward rules; the operators take their index."""

Ints = Sequence[int]


@dataclass(frozen=True)
class Layer:
    """Where one layer's weights, scales, levels and statistics lie in the flat tensors."""

    rows: int
    size: int
    weights: slice
    scales: slice
    levels: slice
    partials: slice


@lru_cache(maxsize=256)
def _layers(rows: tuple[int, ...], sizes: tuple[int, ...], bits: tuple[int, ...]) -> list[Layer]:
    found: list[Layer] = []
    w = r = c = p = 0
    for n_rows, size, b in zip(rows, sizes, bits, strict=True):
        n, k = n_rows * size, 2**b
        q = parts(n) * k
        found.append(
            Layer(
                n_rows,
                size,
                slice(w, w + n),
                slice(r, r + n_rows),
                slice(c, c + k),
                slice(p, p + q),
            )
        )
        w, r, c, p = w + n, r + n_rows, c + k, p + q
    return found


def layers(rows: Ints, sizes: Ints, bits: Ints) -> list[Layer]:
    return _layers(tuple(rows), tuple(sizes), tuple(bits))


def parts(numel: int) -> int:
    """How many parts the statistics of a layer of `numel` weights come in."""
    return -(-numel // PART)


def partials_size(rows: Ints, sizes: Ints, bits: Ints) -> int:
    return sum(parts(n * size) * 2**b for n, size, b in zip(rows, sizes, bits, strict=True))


def work_dtype(w: Tensor) -> torch.dtype:
    """The dtype that x and the thresholds are computed in."""
    return torch.promote_types(w.dtype, torch.float32)


def codes_of(x: Tensor, levels: Tensor) -> Tensor:
    """k(x), uint8, shape of x."""
    return count(x, (levels[1:] + levels[:-1]) / 2)


def forward(
    w: Tensor, scale: Tensor, levels: Tensor, rows: Ints, sizes: Ints, bits: Ints, gather: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(ŵ, codes (N,) uint8, partial statistics); without `gather` these are (3, 0)."""
    out = torch.empty_like(w)
    codes = torch.empty_like(w, dtype=torch.uint8)
    partials = []
    dtype = work_dtype(w)
    scale, levels = scale.to(dtype), levels.to(dtype)
    for layer in layers(rows, sizes, bits):
        s, c = scale[layer.scales, None], levels[layer.levels]
        x = (w[layer.weights].view(layer.rows, layer.size) / s).view(-1)
        code = codes[layer.weights].copy_(codes_of(x, c))
        value = c.index_select(0, code.int())
        quantized = (value.view(layer.rows, layer.size) * s).view(-1)
        out[layer.weights] = torch.where(x.isnan(), x, quantized)
        if gather:
            partials.append(_statistics(x, code, value, c.numel()))
    return out, codes, torch.cat(partials, dim=1) if gather else w.new_empty(3, 0).double()


def _statistics(x: Tensor, code: Tensor, value: Tensor, k: int) -> Tensor:
    """n, m and e of one layer in its parts, shape (3, parts·K)."""
    n = x.numel()
    cell = code.int()
    if n > PART:
        cell += (
            torch.arange(n, dtype=torch.int32, device=x.device).div_(PART, rounding_mode="floor")
            * k
        )
    x, value = x.double(), value.double()
    if not x.isfinite().all():
        kept = x.isfinite()
        x, value, cell = x[kept], value[kept], cell[kept]
    size = parts(n) * k
    counts = torch.bincount(cell, minlength=size).double()
    sums = torch.bincount(cell, x, minlength=size)
    errors = torch.bincount(cell, (x - value).square_(), minlength=size)
    return torch.stack([counts, sums, errors])


def backward(
    grad: Tensor,
    w: Tensor,
    codes: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: int,
) -> tuple[Tensor, Tensor]:
    """(∂L/∂w, ∂L/∂s)."""
    grad_w, grad_scale = torch.empty_like(w), torch.empty_like(scale)
    dtype = work_dtype(w)
    for layer in layers(rows, sizes, bits):
        shape = (layer.rows, layer.size)
        c = levels[layer.levels].to(dtype)
        x = w[layer.weights].view(shape) / scale[layer.scales, None].to(dtype)
        g = grad[layer.weights].view(shape).to(dtype)
        value = c.index_select(0, codes[layer.weights].int()).view(shape)
        slope = value - x
        if rule:
            inside = (x > c[0]) & (x < c[-1])
            slope = torch.where(inside, slope if rule == 1 else 0.0, value)
            grad_w[layer.weights] = torch.where(inside, g, 0.0).view(-1)
        else:
            grad_w[layer.weights] = g.view(-1)
        grad_scale[layer.scales] = (g * slope).sum(dim=1)
    return grad_w, grad_scale


@dataclass(frozen=True)
class Table:
    """How flat levels become a table with one line per layer, padded to the largest K."""

    at: Tensor  # (L, K) index into the flat levels; 0 where there is none
    there: Tensor  # (L, K)
    level_of: Tensor  # (Σ parts·K,) index into the flat levels


@lru_cache(maxsize=64)
def _table(bits: tuple[int, ...], parts: tuple[int, ...], device: torch.device) -> Table:
    widest = 2 ** max(bits)
    at, there, level_of, first = [], [], [], 0
    for b, p in zip(bits, parts, strict=True):
        own = list(range(first, first + 2**b))
        at.append(own + [0] * (widest - 2**b))
        there.append([True] * 2**b + [False] * (widest - 2**b))
        level_of += own * p
        first += 2**b
    return Table(
        torch.tensor(at, device=device),
        torch.tensor(there, device=device),
        torch.tensor(level_of, device=device),
    )


def codebook_step(
    partials: Tensor,
    levels: Tensor,
    counts: Tensor,
    sums: Tensor,
    bits: Ints,
    parts: Ints,
    decay: float,
    epsilon: float,
    split: bool,
    zero: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(levels, counts, sums, number of dead levels met in each layer (L,) int32)."""
    table = _table(tuple(bits), tuple(parts), levels.device)
    now = partials.new_zeros(3, levels.numel()).index_add_(1, table.level_of, partials)
    fresh_n, fresh_m, error = now[:, table.at]
    c, n, m = (t.double()[table.at] for t in (levels, counts, sums))
    n = torch.where(table.there, decay * n + (1 - decay) * fresh_n, 0.0)
    m = decay * m + (1 - decay) * fresh_m
    total, k = n.sum(1, keepdim=True), table.there.sum(1, keepdim=True).double()
    smoothed = (n + epsilon) / (total + k * epsilon) * total
    dead = (n < DEAD_COUNT) & table.there
    c = torch.where(dead, c, m / smoothed)
    if split:
        c, n, m = _split(c, n, m, dead, table.there, fresh_n, error)
    if zero:
        nearest = torch.where(table.there, c.abs(), torch.inf).argmin(1, keepdim=True)
        c = c.scatter(1, nearest, 0.0)
    order = torch.where(table.there, c, torch.inf).argsort(dim=1, stable=True)
    c, n, m = (t.gather(1, order)[table.there] for t in (c, n, m))
    return (
        c.to(levels.dtype),
        n.to(counts.dtype),
        m.to(sums.dtype),
        dead.sum(1, dtype=torch.int32),
    )


def _split(
    c: Tensor, n: Tensor, m: Tensor, dead: Tensor, there: Tensor, fresh_n: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each dead level one half of a cell, the cells with most squared error first."""
    if not dead.any():
        return c, n, m
    # a cell can be split when it is alive and holds at least two values that differ
    error = torch.where(dead | ~there | (fresh_n < 2), 0.0, error)
    worst = error.argsort(dim=1, descending=True, stable=True)
    dead_first = dead.long().argsort(dim=1, descending=True, stable=True)
    pairs = torch.minimum(dead.sum(1), (error > 0).sum(1))
    line, rank = (torch.arange(c.shape[1], device=c.device) < pairs[:, None]).nonzero().T
    givers, takers = (line, worst[line, rank]), (line, dead_first[line, rank])
    spread = (error[givers] / fresh_n[givers]).sqrt()
    half, lower, upper = n[givers] / 2, c[givers] - spread, c[givers] + spread
    c, n, m = c.clone(), n.clone(), m.clone()
    for where, value in ((givers, lower), (takers, upper)):
        c[where], n[where], m[where] = value, half, half * value
    return c, n, m
