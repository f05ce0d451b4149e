"""Slow, obvious versions of what the package computes: loops over plain numbers.

Each function is written from the formula alone and shares no code with what it judges. Where
exactness matters, feed values that are exact in binary (quarters, eighths), so that a loop in
double precision and a vectorised single-precision version must agree to the last bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

few_examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)

Numbers = Sequence[float]


def nearest_level(value: float, levels: Numbers) -> int:
    """The index of the level nearest to `value`; a tie goes to the upper level."""
    best = 0
    for k, level in enumerate(levels):
        if abs(level - value) <= abs(levels[best] - value):
            best = k
    return best


def mean_squared_error(values: Numbers, levels: Numbers) -> float:
    return sum((levels[nearest_level(v, levels)] - v) ** 2 for v in values) / len(values)


def quantile_midpoints(values: Numbers, k: int) -> list[float]:
    """The values of rank floor((i + 1/2)·n/k), i = 0..k−1, in whole-number arithmetic."""
    ordered, n = sorted(values), len(values)
    return [ordered[(2 * i + 1) * n // (2 * k)] for i in range(k)]


def signed_quantile_levels(values: Numbers, bits: int) -> list[float]:
    """Zero and 2^bits − 1 quantiles of the two signs; the sign with more values gets one more."""
    k = 2**bits
    positive, negative = [v for v in values if v > 0], [v for v in values if v < 0]
    if not positive and not negative:
        return [0.0] * k
    if not positive:
        return sorted([0.0, *quantile_midpoints(negative, k - 1)])
    if not negative:
        return sorted([0.0, *quantile_midpoints(positive, k - 1)])
    more, fewer = k // 2, k // 2 - 1
    of_positive, of_negative = (more, fewer) if len(positive) >= len(negative) else (fewer, more)
    return sorted(
        [
            *quantile_midpoints(negative, of_negative),
            0.0,
            *quantile_midpoints(positive, of_positive),
        ]
    )


def cells(values: Numbers, levels: Numbers) -> dict[int, list[float]]:
    """The values that each level serves; a level that serves none is absent."""
    out: dict[int, list[float]] = {}
    for value in values:
        out.setdefault(nearest_level(value, levels), []).append(value)
    return out


def lloyd(values: Numbers, levels: Numbers, steps: int) -> list[float]:
    """Each level moves to the mean of its cell, `steps` times; an empty cell's level stays."""
    levels = list(levels)
    for _ in range(steps):
        for k, members in cells(values, levels).items():
            # `cells` is evaluated once, before the first level moves
            levels[k] = math.fsum(members) / len(members)
    return levels


def uniform_levels(values: Numbers, bits: int, candidates: int = 64) -> list[float]:
    """The best of the grids (k − (K−1)/2)·Δ whose outermost level is i/64 of the largest value."""
    k = 2**bits
    largest = max(abs(v) for v in values)
    grids = [
        [(j - (k - 1) / 2) * (i / candidates * largest / ((k - 1) / 2)) for j in range(k)]
        for i in range(1, candidates + 1)
    ]
    return min(grids, key=lambda grid: mean_squared_error(values, grid))


Level = tuple[float, float, float]
"""(level, N, M)"""


def ema_step(state: Sequence[Level], values: Numbers, decay: float, epsilon: float) -> list[Level]:
    """One moving-average step over dictionaries, with the dead levels' re-seeding."""
    k = len(state)
    levels = [level for level, _, _ in state]
    served = cells(values, levels)
    counts = {i: decay * state[i][1] + (1 - decay) * len(served.get(i, [])) for i in range(k)}
    sums = {i: decay * state[i][2] + (1 - decay) * sum(served.get(i, [])) for i in range(k)}
    total = sum(counts.values())
    dead = [i for i in range(k) if counts[i] < 0.5]
    out = {}
    for i in range(k):
        smoothed = (counts[i] + epsilon) / (total + k * epsilon) * total
        out[i] = levels[i] if i in dead else sums[i] / smoothed
    errors = {
        i: sum((v - levels[i]) ** 2 for v in members)
        for i, members in served.items()
        if i not in dead and len(members) >= 2
    }
    worst_first = sorted((i for i in errors if errors[i] > 0), key=lambda i: (-errors[i], i))
    for taker, giver in zip(dead, worst_first, strict=False):
        spread = math.sqrt(errors[giver] / len(served[giver]))
        centre, half = out[giver], counts[giver] / 2
        for i, level in ((giver, centre - spread), (taker, centre + spread)):
            out[i], counts[i], sums[i] = level, half, half * level
    return sorted((out[i], counts[i], sums[i]) for i in range(k))


def thresholds(start: float, widths: Numbers) -> list[float]:
    """T_1 = s + a_1/2, T_i = T_{i−1} + (a_{i−1} + a_i)/2."""
    out = [start + widths[0] / 2]
    for i in range(1, len(widths)):
        out.append(out[-1] + (widths[i - 1] + widths[i]) / 2)
    return out


def code(value: float, limits: Numbers) -> int:
    """The i with T_i <= value < T_{i+1}."""
    i = 0
    while i < len(limits) and limits[i] <= value:
        i += 1
    return i


def curve(x: Tensor, start: Tensor, widths: Tensor) -> Tensor:
    """The piecewise linear curve through the knots: each segment adds its share of 0..1."""
    left, total = start, torch.zeros_like(x)
    for width in widths:
        total = total + ((x - left) / width).clamp(0, 1)
        left = left + width
    return total


def affine_grid(value: float, step: float, zero_point: int, bits: int) -> float:
    """The nearest point of step·(q − z), q in 0..2^bits−1; a tie goes up."""
    q = math.floor(value / step + zero_point + 0.5)
    return step * (min(max(q, 0), 2**bits - 1) - zero_point)


def range_of_least_error(values: Numbers, bits: int) -> tuple[float, int, float]:
    """(step, zero_point, error) by trying 50 shrunken ranges one after the other."""
    n = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    best = (1.0, 0, math.inf)
    for i in range(1, 51):
        step = (high - low) * i / 50 / n
        zero_point = round(-low / (high - low) * n)
        error = sum((affine_grid(v, step, zero_point, bits) - v) ** 2 for v in values)
        if error / len(values) < best[2]:
            best = (step, zero_point, error / len(values))
    return best


def packed(codes: Sequence[int], bits: int) -> bytes:
    """The codes as the digits of one big number in base 2^bits, written little-endian."""
    number = sum(c << (i * bits) for i, c in enumerate(codes))
    return number.to_bytes(math.ceil(len(codes) * bits / 8), "little")


def unpacked(stream: bytes, bits: int, count: int) -> list[int]:
    """The first `count` digits of that number."""
    number = int.from_bytes(stream, "little")
    return [number >> (i * bits) & (2**bits - 1) for i in range(count)]


def header_bytes(name: str, weights: int, scales: int, digits: int, act: bool) -> int:
    """What a quantized layer of a plain name takes in a packed file's header, written out: numbers
    that depend on bits as long as they get, each part filled up to a multiple of 8."""
    at = f'"data_offsets":[{"9" * digits},{"9" * digits}]'
    in_metadata = f'\\"{name}\\":8,'
    weight = (
        f'"{name}.weight.codes":{{"dtype":"U8","shape":[{weights}],{at}}},'
        f'"{name}.weight.codebook":{{"dtype":"F32","shape":[256],{at}}},'
        f'"{name}.weight.scale":{{"dtype":"F32","shape":[{scales}],{at}}},'
    )
    inputs = (
        f'"{name}.input.thresholds":{{"dtype":"F32","shape":[255],{at}}},'
        f'"{name}.input.scale":{{"dtype":"F32","shape":[1],{at}}},'
        f'"{name}.input.zero_point":{{"dtype":"F32","shape":[1],{at}}},'
    )
    parts = [weight, inputs] if act else [weight]
    return sum(8 * math.ceil(len(in_metadata + part) / 8) for part in parts)


def conv_macs(image: Sequence[int], layer: nn.Conv1d | nn.Conv2d) -> tuple[int, tuple[int, ...]]:
    """(MACs, output size) of a convolution over an image of the given side lengths.

    Every output value sums over its group's input channels and the kernel.
    """
    assert not isinstance(layer.padding, str)
    output = tuple(
        math.floor((side + 2 * p - d * (k - 1) - 1) / s) + 1
        for side, p, d, k, s in zip(
            image, layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    terms = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return layer.out_channels * math.prod(output) * terms, output


def dense_traces(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    targets: Any,
    loss: Callable[..., Tensor],
) -> list[float]:
    """tr(H_l) of the loss over one batch of everything, from each layer's full Hessian."""
    out = []
    for name in names:
        weight = model.get_parameter(name)

        def of_weight(w: Tensor, name: str = name) -> Tensor:
            return loss(torch.func.functional_call(model, {name: w}, (inputs,)), targets)

        hessian = torch.autograd.functional.hessian(of_weight, weight.detach())
        out.append(hessian.reshape(weight.numel(), weight.numel()).trace().item())
    return out


def dense_gauss_newton(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    curvature: Callable[[Tensor], Tensor],
) -> Tensor:
    """E[Jᵀ A J] over the samples, for all named parameters one after the other.

    `curvature` gives A of one sample from its outputs, both flat.
    """
    parameters = {name: model.get_parameter(name).detach() for name in names}
    total = torch.zeros(())
    for i in range(len(inputs)):

        def outputs(p: dict[str, Tensor], i: int = i) -> Tensor:
            return torch.func.functional_call(model, p, (inputs[i : i + 1],)).flatten()

        z = outputs(parameters)
        jacobian = torch.func.jacrev(outputs)(parameters)
        j = torch.cat([jacobian[name].reshape(len(z), -1) for name in names], dim=1).detach()
        total = total + j.T @ curvature(z.detach()) @ j
    return total / len(inputs)


def softmax_curvature(z: Tensor) -> Tensor:
    """∂²/∂z² of a cross-entropy: diag(p) − p pᵀ at any label."""
    p = [math.exp(v - max(z.tolist())) for v in z.tolist()]
    p = [v / sum(p) for v in p]
    rows = [[(a if i == j else 0.0) - a * b for j, b in enumerate(p)] for i, a in enumerate(p)]
    return torch.tensor(rows, dtype=z.dtype)


def monotone(scores: Sequence[Numbers], bits: Sequence[int]) -> list[list[float]]:
    """Each score, or the largest of those at as many bits or more, or zero."""
    return [
        [max(0.0, *(s for s, other in zip(row, bits, strict=True) if other >= b)) for b in bits]
        for row in scores
    ]


def cube_root_quantiles(values: Numbers, k: int, bins: int) -> list[float]:
    """Midpoints (i + 1/2)/k of the histogram's counts to the power 1/3, bin by bin."""
    low, high = min(values), max(values)
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        # bins are open below and closed above, but the first one holds the minimum
        counts[max(0, min(bins - 1, math.ceil((value - low) / width) - 1))] += 1
    mass = [count ** (1 / 3) for count in counts]
    found = []
    for i in range(k):
        wanted = (i + 0.5) / k * sum(mass)
        bin = 0
        while wanted > mass[bin]:
            wanted -= mass[bin]
            bin += 1
        found.append(low + width * (bin + wanted / mass[bin]))
    return found
