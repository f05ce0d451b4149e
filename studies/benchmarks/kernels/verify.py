"""Are the operators right, here and now? Nothing is timed before this has passed.

On every machine: what the CPU does against the formulas written out value by value, in float64. On
a machine with a GPU: the kernels of all three operators against the reference on the CPU. What one
element gets is compared exactly, sums within the rounding of their additions.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from adq.quant.kernels import (
    counting,
    n2uq_ops,  # noqa: F401 (registers the operators)
    n2uq_reference,
    weights_ops,  # noqa: F401 (the same)
    weights_reference,
)
from adq.quant.kernels.weights_reference import PART, RULES

BITS = (2, 4, 8)
SIZES = (1, 1023, 100_003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADDS = 128  # roundings on a number's way into a sum: a lane of a part adds 64, then a tree, twice

Layer = tuple[int, int, int]
"""(rows, weights of a row, bits)"""

LAYERS: list[Layer] = [(7, 9, 2), (2, PART + 8, 4), (40, 27, 8), (3, 341, 4), (1, 1, 3)]

N2UQ_FORWARD = torch.ops.adq.n2uq_forward
N2UQ_BACKWARD = torch.ops.adq.n2uq_backward


class WrongError(Exception):
    """A kernel and its reference differ; the message says which, where and by how much."""


def verify() -> int:
    """How many comparisons agreed. Raises WrongError at the first that does not."""
    checks = [_plain_n2uq(), _plain_weights()]
    if torch.cuda.is_available():
        checks += [_gpu_n2uq(), _gpu_weights(), _gpu_codebooks()]
    return sum(1 for check in checks for _ in check)


def activation_example(bits: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """x with values at the edges and on both sides of all of them, start, widths, σ and z."""
    generator = torch.Generator().manual_seed(bits)
    widths = 0.1 + torch.rand(2**bits - 1, generator=generator)
    start = -0.4 * widths.sum().reshape(1)
    x = 0.5 * widths.sum() * torch.randn(size, generator=generator)
    edges = n2uq_reference.edges_of(start, widths, torch.float32)
    if size > 2 * edges.numel():
        x[: edges.numel()] = edges
        x[edges.numel()] = math.inf
    return [x.to(dtype), start, widths, torch.tensor([0.3]), torch.tensor([2.0])]


def weights_example(
    layers: list[Layer], dtype: torch.dtype
) -> tuple[list[Tensor], list[list[int]]]:
    """[w, scale, levels] and [rows, sizes, bits]."""
    generator = torch.Generator().manual_seed(len(layers))
    rows, sizes, bits = (list(column) for column in zip(*layers, strict=True))
    levels = [1.5 * torch.randn(2**b, generator=generator).sort().values for b in bits]
    scale = 0.5 + torch.rand(sum(rows), generator=generator)
    w = 1.5 * torch.randn(sum(n * size for n, size, _ in layers), generator=generator)
    return [w.to(dtype), scale, torch.cat(levels)], [rows, sizes, bits]


def upstream(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def _expect(what: str, found: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> None:
    """`found` is `expected`, number by number, but for `slack`."""
    if found.shape != expected.shape:
        raise WrongError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    one, other = found.double(), expected.double()
    same = (one == other) | (one.isnan() & other.isnan())
    wrong = ~(same | ((one - other).abs() <= slack))
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        raise WrongError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {i}: "
            f"{one.flatten()[i]:.9g}, expected {other.flatten()[i]:.9g}"
        )


def _plain_n2uq() -> Iterator[None]:
    """The CPU's operators against the formulas at the head of `n2uq_reference`, in float64."""
    for bits in BITS:
        # the second size is one at which the CPU takes its other way
        for size in (1023, counting.MANY + 3):
            x, start, widths, scale, zero_point = activation_example(bits, size, torch.float32)
            what = f"N2UQ on the CPU, {bits} bits, {size} values"
            inputs = (x, start, widths, scale, zero_point)
            out, place, edges = N2UQ_FORWARD(*inputs)
            expected = torch.stack([edge <= x for edge in edges]).sum(0)
            _expect(f"{what}, place", place, expected)
            code = expected // 2
            _expect(f"{what}, x̂", out, (code.float() - zero_point) * scale)
            grad = upstream(x)
            found = N2UQ_BACKWARD(grad, x, place, edges, widths, scale, zero_point)
            a, g, sigma = widths.double(), grad.double(), scale.double()
            segment, left = expected - code, edges[::2].double()
            inside = (segment > 0) & (segment < 2**bits)
            sums, moments = torch.zeros(2, 2**bits - 1, dtype=torch.float64)
            at = segment[inside] - 1
            sums.index_add_(0, at, g[inside])
            moments.index_add_(0, at, g[inside] * (x[inside].double() - left[at]))
            above = (sums / a).flip(0).cumsum(0).flip(0)
            slope = torch.zeros_like(g)
            slope[inside] = (sigma / a)[at]
            _expect(f"{what}, ∂L/∂x", found[0], g * slope, 1e-6 * (g * slope).abs())
            wanted = (
                -sigma * above[:1],
                -sigma * (moments / a**2 + above - sums / a),
                (g * (code - zero_point.double())).sum().reshape(1),
            )
            for one, other in zip(found[1:], wanted, strict=True):
                _expect(f"{what}, a parameter's gradient", one, other, 1e-5 * g.abs().sum())
            yield


def _plain_weights() -> Iterator[None]:
    """The CPU's operator against the formulas at the head of `weights_reference`."""
    (w, scale, levels), layout = weights_example(LAYERS, torch.float32)
    out, codes, partials = torch.ops.adq.weights_forward(w, scale, levels, *layout, 0, True)
    for i, layer in enumerate(weights_reference.layers(*layout)):
        what = f"weights on the CPU, layer {i}"
        c, s = levels[layer.levels], scale[layer.scales].repeat_interleave(layer.size)
        x = w[layer.weights] / s
        code = torch.stack([t <= x for t in (c[1:] + c[:-1]) / 2]).sum(0)
        _expect(f"{what}, codes", codes[layer.weights], code)
        _expect(f"{what}, ŵ", out[layer.weights], c[code] * s)
        own = partials[:, layer.partials].unflatten(1, (-1, c.numel())).sum(1)
        for statistic, value in zip(own, (x**0, x, (x - c[code]) ** 2), strict=True):
            wanted = torch.stack([value[code == k].double().sum() for k in range(c.numel())])
            _expect(f"{what}, statistics", statistic, wanted, 1e-6 * value.abs().sum().double())
        yield


def _on_gpu(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def _gpu_n2uq() -> Iterator[None]:
    for bits in BITS:
        for size in SIZES:
            for dtype in DTYPES:
                what = f"N2UQ on the GPU, {bits} bits, {size} values, {dtype}"
                inputs = activation_example(bits, size, dtype)
                x, _, *parameters = inputs
                expected = N2UQ_FORWARD(*inputs)
                found = [t.cpu() for t in N2UQ_FORWARD(*_on_gpu(inputs))]
                for name, one, other in zip(("x̂", "place", "edges"), found, expected, strict=True):
                    _expect(f"{what}, {name}", one, other)
                grad = upstream(x)
                saved = (x, *expected[1:], *parameters)
                wanted = N2UQ_BACKWARD(grad, *saved)
                gradients = [t.cpu() for t in N2UQ_BACKWARD(*_on_gpu((grad, *saved)))]
                _expect(f"{what}, ∂L/∂x", gradients[0], wanted[0])
                # a sum is rounded in proportion to that of its terms without their signs
                unsigned = N2UQ_BACKWARD(grad.abs(), *saved[:-1], 0 * saved[-1])
                for one, other, most in zip(gradients[1:], wanted[1:], unsigned[1:], strict=True):
                    slack = ADDS * 2**-24 * most.double().abs()
                    _expect(f"{what}, a parameter's gradient", one, other, slack)
                yield


def _gpu_weights() -> Iterator[None]:
    for dtype in DTYPES:
        tensors, layout = weights_example(LAYERS, dtype)
        on_gpu = _on_gpu(tensors)
        for gather in (False, True):
            what = f"weights on the GPU, {dtype}, statistics {gather}"
            expected = torch.ops.adq.weights_forward(*tensors, *layout, 0, gather)
            found = torch.ops.adq.weights_forward(*on_gpu, *layout, 0, gather)
            out, codes, partials = (t.cpu() for t in found)
            _expect(f"{what}, ŵ", out, expected[0])
            _expect(f"{what}, codes", codes, expected[1])
            if gather:
                n, m, e = expected[2]
                _expect(f"{what}, n", partials[0], n)
                # |Σx| <= √(n·Σx²) and Σx² <= 2·(e + n·c²), c² < 100 here
                slack = ADDS * 2**-24 * (2 * n * (e + 100 * n)).sqrt()
                _expect(f"{what}, m", partials[1], m, slack)
                _expect(f"{what}, e", partials[2], e, ADDS * 2**-24 * e)
            yield
        grad = upstream(tensors[0])
        w, *rest = tensors
        for rule, name in enumerate(RULES):
            arguments = (grad, w, expected[1], *rest)
            wanted = torch.ops.adq.weights_backward(*arguments, *layout, rule)
            gradients = torch.ops.adq.weights_backward(*_on_gpu(arguments), *layout, rule)
            what = f"weights' gradients on the GPU, {dtype}, rule {name}"
            _expect(f"{what}, ∂L/∂w", gradients[0].cpu(), wanted[0])
            # the terms of a row's sum are the sums of rows of one weight
            sizes = torch.tensor([size for n, size, _ in LAYERS for _ in range(n)])
            single = ([n * size for n, size, _ in LAYERS], [1] * len(LAYERS), layout[2])
            own = (grad, w, expected[1], rest[0].repeat_interleave(sizes), rest[1])
            terms = torch.ops.adq.weights_backward(*own, *single, rule)[1].double().abs()
            unsigned = torch.stack([part.sum() for part in terms.split(sizes.tolist())])
            slack = ADDS * 2**-24 * unsigned
            _expect(f"{what}, ∂L/∂s", gradients[1].cpu(), wanted[1], slack)
            yield


def _gpu_codebooks() -> Iterator[None]:
    """With short binary fractions, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator).double()

    bits, parts = [2, 4, 8, 3, 4], [1, 300, 20, 2, 7]
    partials, levels, counts = [], [], []
    for b, p in zip(bits, parts, strict=True):
        k = 2**b
        here = torch.rand(k, generator=generator) > 0.3
        c = (integers(128, k) - 64).sort().values / 16
        n = integers(5, p, k) * here
        partials.append(torch.stack([n, n * c, integers(4, p, k) / 256 * n]).flatten(1))
        levels.append(c)
        counts.append(integers(9, k) * here)
    state = torch.cat(levels).float(), torch.cat(counts).float()
    tensors = (torch.cat(partials, dim=1), *state, state[0] * state[1])
    for split in (False, True):
        for zero in (False, True):
            rest = (bits, parts, 0.75, weights_reference.EPSILON, split, zero)
            expected = torch.ops.adq.codebook_step(*tensors, *rest)
            found = torch.ops.adq.codebook_step(*_on_gpu(tensors), *rest)
            for one, other in zip(found, expected, strict=True):
                _expect(f"codebooks on the GPU, split {split}, zero {zero}", one.cpu(), other)
            yield
