"""The weights' reference against loops over plain numbers, written from the formulas.

Scales are powers of two and all numbers short binary fractions, so that equality is exact.
"""

import math
from collections.abc import Sequence

import oracles
import pytest
import torch
from torch import Tensor

from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.weights_reference import PART, RULES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

ROWS, SIZES, BITS = [3, 1, 9, 2, 1], [5, 17, 1, 9, 1], [2, 5, 3, 8, 4]
LONG = [2, 1], [PART + 3, PART], [3, 2]  # three parts and one


def example(
    rows: Sequence[int], sizes: Sequence[int], bits: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiples of 1/4 that bfloat16 holds as well, and distinct levels."""
    generator = torch.Generator().manual_seed(0)
    count = sum(n * size for n, size in zip(rows, sizes, strict=True))
    w = torch.randint(-32, 33, (count,), generator=generator) / 4
    scale = 2.0 ** torch.randint(-1, 2, (sum(rows),), generator=generator)
    levels = [(torch.randperm(256, generator=generator)[: 2**b] - 128) / 16 for b in bits]
    work = torch.promote_types(dtype, torch.float32)
    return w.to(dtype), scale.to(work), torch.cat([c.sort().values for c in levels]).to(work)


def cut(flat: Tensor, sizes: Sequence[int]) -> list[list[float]]:
    return [t.tolist() for t in flat.split(list(sizes))]


def layers_of(
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Sequence[int],
    sizes: Sequence[int],
    bits: list[int],
) -> list[tuple[list[float], list[float], list[float]]]:
    """(w, the scale of each weight, levels) of each layer."""
    numels = [n * size for n, size in zip(rows, sizes, strict=True)]
    of_rows = cut(scale, rows)
    of_weights = [
        [s for s in own for _ in range(size)] for own, size in zip(of_rows, sizes, strict=True)
    ]
    return list(zip(cut(w, numels), of_weights, cut(levels, [2**b for b in bits]), strict=True))


def statistics(xs: Sequence[float], levels: Sequence[float]) -> list[list[float]]:
    """n, m and e of each level, part after part."""
    out: list[list[float]] = [[], [], []]
    for first in range(0, len(xs), PART):
        served = oracles.cells([x for x in xs[first : first + PART] if math.isfinite(x)], levels)
        for k, level in enumerate(levels):
            own = served.get(k, [])
            out[0].append(len(own))
            out[1].append(sum(own))
            out[2].append(sum((x - level) ** 2 for x in own))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [(ROWS, SIZES, BITS), LONG])
def test_the_forward_pass_is_that_of_a_slow_loop(
    layout: tuple[list[int], list[int], list[int]], dtype: torch.dtype
) -> None:
    w, scale, levels = example(*layout, dtype)
    found = reference.forward(w, scale, levels, *layout, True)
    out, codes, parts = [], [], [[], [], []]
    for own, scales, c in layers_of(w, scale, levels, *layout):
        xs = [v / s for v, s in zip(own, scales, strict=True)]
        places = [oracles.nearest_level(x, c) for x in xs]
        codes += places
        out += [s * c[k] for s, k in zip(scales, places, strict=True)]
        for line, more in zip(parts, statistics(xs, c), strict=True):
            line += more
    assert torch.equal(found[0], torch.tensor(out, dtype=torch.float64).to(dtype))
    assert found[1].tolist() == codes
    assert found[2].tolist() == parts
    assert found[2].shape[1] == reference.partials_size(*layout)
    assert reference.forward(w, scale, levels, *layout, False)[2].shape == (3, 0)


def test_values_that_are_not_finite_are_coded_and_counted_nowhere() -> None:
    w, c = torch.tensor([math.nan, math.inf, -math.inf, 1.0]), torch.tensor([-1.0, 0.0, 0.5, 2.0])
    out, codes, parts = reference.forward(w, torch.ones(1), c, [1], [4], [2], True)
    assert codes.tolist() == [3, 3, 0, 2]
    assert out[1:].tolist() == [2.0, -1.0, 0.5]
    assert out[0].isnan()
    assert parts.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0.25, 0]]


@pytest.mark.parametrize("size", [40, 20_000])  # both ways to find a place
def test_of_equal_levels_a_value_at_them_takes_the_last_and_one_below_the_first(size: int) -> None:
    c = torch.tensor([-1.0, 0.5, 0.5, 0.5])
    w = torch.tensor([0.5, 0.25, -0.25, -0.5]).repeat(size // 4)
    codes = reference.forward(w, torch.ones(1), c, [1], [size], [2], False)[1]
    assert codes.tolist() == [3, 1, 1, 0] * (size // 4)


def slopes(x: float, levels: Sequence[float], rule: str) -> tuple[float, float]:
    """(∂ŵ/∂w, ∂ŵ/∂s) of one weight."""
    c = levels[oracles.nearest_level(x, levels)]
    inside = levels[0] < x < levels[-1]
    if rule == "straight":
        return 1.0, c - x
    if rule == "lsq":
        return (1.0, c - x) if inside else (0.0, c)
    return (1.0, 0.0) if inside else (0.0, c)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_is_that_of_a_slow_loop(dtype: torch.dtype, rule: str) -> None:
    layout = ROWS, SIZES, BITS
    w, scale, levels = example(*layout, dtype)
    # the outermost levels lie inside the weights' range, and some weights at them
    levels = levels / 4
    grad = torch.randint(-4, 5, w.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes = reference.forward(w, scale, levels, *layout, False)[1]
    found = reference.backward(grad, w, codes, scale, levels, *layout, RULES.index(rule))
    grad_w, grad_scale, gs = [], [], iter(grad.tolist())
    for (own, scales, c), size in zip(layers_of(w, scale, levels, *layout), layout[1], strict=True):
        terms = []
        for v, s, g in zip(own, scales, gs, strict=False):
            of_w, of_s = slopes(v / s, c, rule)
            grad_w.append(g * of_w)
            terms.append(g * of_s)
        grad_scale += [sum(terms[i : i + size]) for i in range(0, len(terms), size)]
    assert found[0].dtype == dtype
    assert found[0].tolist() == grad_w
    assert found[1].dtype == scale.dtype
    assert found[1].tolist() == grad_scale


State = tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]


def state(dtype: torch.dtype) -> tuple[State, list[list[float]]]:
    """Arguments of a step, with dead levels among them, and the values of each layer."""
    bits, numels = [3, 2, 5, 4], [40, 9, 70, PART + 30]
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-40, 41, (sum(numels),), generator=generator) / 8
    levels = [(torch.randperm(129, generator=generator)[: 2**b] - 64) / 8 for b in bits]
    levels = torch.cat([c.sort().values for c in levels]).to(dtype)
    ones = [1] * len(bits)
    partials = reference.forward(x, torch.ones(len(bits)), levels, ones, numels, bits, True)[2]
    counts = torch.randint(0, 3, levels.shape, generator=generator).to(dtype) / 2
    parts = [reference.parts(n) for n in numels]
    return (partials, levels, counts, counts * levels, bits, parts), cut(x, numels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_codebook_step_is_that_of_a_slow_loop(dtype: torch.dtype) -> None:
    arguments, values = state(dtype)
    _, levels, counts, sums, bits, _ = arguments
    found = reference.codebook_step(*arguments, 0.5, 1e-5, True, False)
    assert (found[3] > 0).sum() >= 2
    sizes = [2**b for b in bits]
    columns = [cut(t, sizes) for t in (levels, counts, sums)]
    for i, xs in enumerate(values):
        before = list(zip(*(column[i] for column in columns), strict=True))
        after = oracles.ema_step(before, xs, 0.5, 1e-5)
        served = oracles.cells(xs, columns[0][i])
        deaths = sum(
            0.5 * n + 0.5 * len(served.get(k, [])) < 0.5 for k, (_, n, _) in enumerate(before)
        )
        assert found[3][i] == deaths
        slack = 1e-12 if dtype == torch.float64 else 2**-23
        for t, numbers in zip(found[:3], zip(*after, strict=True), strict=True):
            own = t.split(sizes)[i]
            torch.testing.assert_close(
                own, torch.tensor(numbers, dtype=dtype), rtol=slack, atol=1e-12
            )


def test_a_dead_level_that_is_not_split_keeps_its_place_and_fades() -> None:
    arguments, _ = state(torch.float64)
    _, levels, counts, sums, *_ = arguments
    empty = torch.zeros_like(arguments[0])
    found = reference.codebook_step(empty, *arguments[1:], 0.25, 1e-5, False, False)
    assert found[3].tolist() == [2**b for b in arguments[4]]
    for now, before in zip(found[:3], (levels, 0.25 * counts, 0.25 * sums), strict=True):
        assert torch.equal(now, before)


def test_the_level_nearest_to_zero_is_set_to_zero() -> None:
    arguments, _ = state(torch.float64)
    free = reference.codebook_step(*arguments, 0.5, 1e-5, True, False)
    found = reference.codebook_step(*arguments, 0.5, 1e-5, True, True)
    for c in free[0].split([2**b for b in arguments[4]]):
        c[c.abs().argmin()] = 0.0
    for one, other in zip(found, free, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_several_layers_at_once_are_each_layer_alone(zero: bool, split: bool) -> None:
    arguments, _ = state(torch.float32)
    partials, levels, counts, sums, bits, parts = arguments
    together = reference.codebook_step(*arguments, 0.75, 1e-5, split, zero)
    sizes = [2**b for b in bits]
    lengths = [p * k for p, k in zip(parts, sizes, strict=True)]
    alone = [
        reference.codebook_step(p, c, n, m, [b], [q], 0.75, 1e-5, split, zero)
        for p, c, n, m, b, q in zip(
            partials.split(lengths, dim=1),
            *(t.split(sizes) for t in (levels, counts, sums)),
            bits,
            parts,
            strict=True,
        )
    ]
    for one, others in zip(together, zip(*alone, strict=True), strict=True):
        # a row of zeros beside others of another length may change the order of its sum
        torch.testing.assert_close(one, torch.cat(others), rtol=2**-23, atol=0)
