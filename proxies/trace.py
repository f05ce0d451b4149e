"""Hessian traces of all layers at once, and the HAWQ-V2 score made of them.

For a probe ω of independent ±1 entries, E[ω_lᵀ (H ω)_l] = tr(H_ll) for every layer's block l at
once: the cross terms ω_lᵀ H_lm ω_m have mean zero (Hutchinson 1989; Dong et al., HAWQ-V2,
arXiv 1911.03852, eq. 7). One Hessian-vector product thus samples the trace of every layer.

Most of that estimate's variance comes from a few large eigenvalues. As in Hutch++ (Meyer et al.,
arXiv 2010.09649), an orthonormal basis Q of the span of H Ω takes them out, here for the blocks of
all layers at once. With P = Q Qᵀ, E_l the projection on layer l, and a fresh probe ω,

    tr(E_l H) = tr(E_l P H) + tr(E_l H P) − tr(E_l P H P) + E[ω_lᵀ ((I − P) H (I − P) ω)_l],

the first three terms exactly known from H Q. This holds for any P that does not depend on ω, and
the probes' spread tells the standard error. (XTrace, arXiv 2301.07825, lets every probe serve as
both. It was tried here: fewer products, but its estimates depend on each other, and their spread
understated the error by a third.)

Where the outputs are piecewise linear in each layer's weight (ReLU, max-pooling, BatchNorm on its
stored statistics) every H_ll is the Gauss-Newton matrix's, and `gauss-newton-trace` of `gradient`
has the same expectation at a fraction of the cost (studies/benchmarks/proxies).
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adq.proxies.base import Array, Sensitivity, Subject, Table
from adq.proxies.memory import checkpointing, in_halves
from adq.proxies.work import Work
from adq.quant.batches import (
    Batch,
    batch_size,
    device_of,
    differentiable,
    evaluating,
    forward,
    to_device,
)
from adq.quant.errors import InputError

NEGLIGIBLE = 1e-2
"""Layers whose trace is below this share of the largest need not be known more closely."""

NO_SECOND_DERIVATIVE = ("is not implemented", "double backwards is not supported")
"""What PyTorch says of operations without one."""


@dataclass(frozen=True)
class TraceEstimate:
    """Traces of the diagonal blocks of the Hessian of the mean loss, shape (layers,).

    `stderr` covers the estimator's noise, not the choice of data. `products` counts the
    Hessian-vector products over all data.
    """

    trace: Array
    stderr: Array
    probes: int
    products: int


@dataclass(frozen=True)
class HessianTrace:
    """S[l, b] = ½ · tr(H_l)/n_l · ‖Q_b(w_l) − w_l‖², HAWQ-V2's Ω with the ½ of Taylor's series.

    `rank` is how many products find the large eigenvalues; 0 is Hutchinson's plain estimator.
    Probes are drawn in blocks of `block`, `probes` at most, until the standard error of every
    layer's trace is within `target` of it (of a hundredth of the largest, for small ones); no
    other rule ends it early. Memory: `rank` + 4·`block` vectors of the length of all weights
    (3·`rank` at the start), and the graph of a batch's gradient, which `checkpoints` makes smaller
    and slower.
    """

    rank: int = 16
    probes: int = 64
    block: int = 4
    target: float = 0.1
    checkpoints: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0 or self.block < 2 or self.probes < self.block:
            raise InputError(
                "expected a rank of 0 or more and at least one block of at least 2 probes, to know "
                f"their spread; got rank {self.rank}, {self.probes} probes in blocks of "
                f"{self.block}"
            )

    def measure(self, subject: Subject, work: Work) -> list[Sensitivity]:
        """A negative trace (possible away from a minimum, or by noise) scores its layer zero.

        Raises InputError for a model without second derivatives, or without batches.
        """
        started = time.monotonic()
        found = self.trace(subject, work)
        errors = subject.errors
        powers = [error.double().square().flatten(1).mean(dim=1).tolist() for error in errors]
        factor = np.array(powers) / 2
        score = np.maximum(found.trace, 0.0)[:, None] * factor
        table = Table(subject.names, subject.bits, score, found.stderr[:, None] * factor)
        graphs = found.probes // self.block + (2 if self.rank else 0)
        passes = 3.0 * graphs + 4.0 * found.products
        seconds = time.monotonic() - started
        return [Sensitivity("hessian", table, None, found.probes, seconds, passes)]

    def trace(self, subject: Subject, work: Work) -> TraceEstimate:
        """tr(H_l) of each layer's weight, H being the Hessian of the mean loss over all samples."""
        if not subject.batches:
            raise InputError("there are no batches for the Hessian trace: expected at least one")
        sketches: dict[nn.Module, _Sketch] = {}

        def block(model: nn.Module, part: int) -> Array:
            weights: Vector = [model.get_parameter(f"{name}.weight") for name in subject.names]
            run = _Products(subject, model, weights, self.checkpoints)
            if model not in sketches:  # one for each copy of the model, all alike
                sketches[model] = _Sketch.draw(self.rank, run, _generator(subject.seed, 0))
            sketch, generator = sketches[model], _generator(subject.seed, part + 1)
            probes = [_rademacher(weights, generator) for _ in range(self.block)]
            rest = sketch.deflated(run.average(sketch.deflated(probes)))
            return sketch.known + np.einsum("lpp->pl", _dots(probes, rest))

        estimates = np.zeros((0, len(subject.layers)))
        # the fused attentions have no second derivative; the choice holds for all threads at once
        with sdpa_kernel(SDPBackend.MATH):
            for part in work.parts(subject.model, self.probes // self.block, block):
                estimates = np.concatenate([estimates, part])
                trace = estimates.mean(axis=0)
                stderr = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
                size = np.maximum(np.abs(trace), NEGLIGIBLE * np.abs(trace).max(initial=0.0))
                if (stderr <= self.target * size).all():
                    break
        return TraceEstimate(trace, stderr, len(estimates), len(estimates) + 2 * self.rank)


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + part)


Vector = list[Tensor]
"""One tensor a layer, of its weight's shape."""


@dataclass(frozen=True)
class _Products:
    """Hessian-vector products with the weights of all layers."""

    subject: Subject
    model: nn.Module
    weights: Vector
    checkpoints: bool

    def average(self, vectors: list[Vector]) -> list[Vector]:
        """H v of each vector, H that of the mean loss over all samples."""
        sums = [[torch.zeros_like(w) for w in self.weights] for _ in vectors]
        for batch in self.subject.batches:
            for part in in_halves(partial(self._batch, vectors), batch, self.subject.say):
                for total, product in zip(sums, part, strict=True):
                    torch._foreach_add_(total, product)
                del part, product  # before the next ones are computed
        for total in sums:
            torch._foreach_div_(total, self.subject.samples)
        return sums

    def _batch(self, vectors: list[Vector], batch: Batch) -> list[Vector]:
        """n·H v over a batch of n samples; the graph of the gradient is built once for all v."""
        weights, n = self.weights, batch_size(batch)
        inputs, targets = to_device(batch, device_of(self.model))
        saving = checkpointing(self.model) if self.checkpoints else nullcontext()
        with evaluating(self.model), differentiable(weights), saving:
            value = n * self.subject.loss(forward(self.model, inputs), targets)
            slopes = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
            # a linear path, or a weight that the loss never meets, leaves a gradient that depends
            # on no weight; autograd must be told that its derivative is zero
            slopes = tuple(
                g if g.requires_grad else g + 0 * w for g, w in zip(slopes, weights, strict=True)
            )
            if "torch::autograd::Error" in _node_names(slopes):
                # autograd takes what lies behind such a node for zero, and says nothing
                raise InputError(
                    "this model has a function of its own that is marked @once_differentiable: it "
                    "has no second derivative; take a proxy of gradients or of losses"
                )
            try:
                return [
                    list(
                        torch.autograd.grad(
                            slopes,
                            weights,
                            vector,
                            retain_graph=p + 1 < len(vectors),
                            materialize_grads=True,
                        )
                    )
                    for p, vector in enumerate(vectors)
                ]
            except RuntimeError as error:
                if not any(words in str(error) for words in NO_SECOND_DERIVATIVE):
                    raise
                text = " ".join(str(error).split())[:80]
                raise InputError(
                    f"this model has no second derivative in PyTorch ({text})"
                ) from None


def _node_names(tensors: Sequence[Tensor]) -> set[str]:
    """Of all operations in the graph of some tensors."""
    waiting = [t.grad_fn for t in tensors]
    found = set(waiting)
    while waiting:
        node = waiting.pop()
        for other, _ in () if node is None else node.next_functions:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return {node.name() for node in found if node is not None}


@dataclass(frozen=True)
class _Sketch:
    """An orthonormal basis Q of the span of H Ω, and what H Q tells of each layer's trace:
    tr(E_l P H) + tr(E_l H P) − tr(E_l P H P)."""

    q: list[Vector]
    known: Array

    @staticmethod
    def draw(rank: int, run: _Products, generator: torch.Generator) -> "_Sketch":
        nothing = _Sketch([], np.zeros(len(run.weights)))
        if rank == 0:
            return nothing
        q = run.average([_rademacher(run.weights, generator) for _ in range(rank)])
        for _ in range(2):  # once leaves errors of single precision, enlarged for the small ones
            # by the eigenvectors of Yᵀ Y: the weights are never put together in one matrix
            values, vectors = np.linalg.eigh(_dots(q, q).sum(axis=0))
            kept = values > 1e-10 * values.max()  # fewer where H has a lower rank
            if not kept.any():
                return nothing
            q = _combined(q, vectors[:, kept] / np.sqrt(values[kept]))
        hq = run.average(q)
        of_layers = _dots(q, hq)
        qhq = of_layers.sum(axis=0)
        known = 2 * np.trace(of_layers, axis1=1, axis2=2)
        known -= np.einsum("jk,ljk->l", (qhq + qhq.T) / 2, _dots(q, q))
        return _Sketch(q, known)

    def deflated(self, vectors: list[Vector]) -> list[Vector]:
        """(I − P) v of each vector."""
        if not self.q:
            return vectors
        shadows = _combined(self.q, _dots(self.q, vectors).sum(axis=0))
        return [list(torch._foreach_sub(v, s)) for v, s in zip(vectors, shadows, strict=True)]


def _combined(vectors: list[Vector], coefficients: Array) -> list[Vector]:
    """Σ_j vectors[j]·coefficients[j, k] for each k."""
    found = []
    for column in coefficients.T:
        total = torch._foreach_mul(vectors[0], float(column[0]))
        for vector, factor in zip(vectors[1:], column[1:], strict=True):
            torch._foreach_add_(total, vector, alpha=float(factor))
        found.append(list(total))
    return found


def _dots(first: list[Vector], second: list[Vector]) -> Array:
    """Inner products within each layer, (layers, vectors of `first`, vectors of `second`)."""

    def matrix(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.flatten() for tensor in tensors])

    layers = zip(zip(*first, strict=True), zip(*second, strict=True), strict=True)
    return np.stack([(matrix(a) @ matrix(b).T).double().cpu().numpy() for a, b in layers])


def _rademacher(like: Vector, generator: torch.Generator) -> Vector:
    def signs(w: Tensor) -> Tensor:
        bits = torch.randint(0, 2, w.shape, generator=generator, dtype=torch.float32)
        return (2 * bits - 1).to(device=w.device, dtype=w.dtype)

    return [signs(w) for w in like]
