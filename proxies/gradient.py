"""Scores from gradients: one backward pass a batch serves all layers and all bit-widths.

With z the outputs of a sample, J = ∂z/∂w and A = ∂²ℓ/∂z² = B Bᵀ, the Gauss-Newton matrix is
G = E[Jᵀ A J]. For random signs r the vector g = Jᵀ B r has E[g gᵀ] = G, for every sample, so that
from such gradients follow, without bias and never negative,

    gauss-newton        ½ δᵀ G δ          = ½ E[(g·δ)²]
    fisher              ½ Σ_j G_jj δ_j²   = ½ E[Σ_j g_j² δ_j²]      (FIT, arXiv 2210.08502, eq. 7)
    gauss-newton-trace  ½ tr(G)/n ‖δ‖²    = ½ E[‖g‖²]/n ‖δ‖²        (HAWQ-V2 with G for H)

For cross-entropy and other log-likelihoods of the outputs G is the Fisher information (Martens,
arXiv 1412.1193, section 9). The signs are independent from sample to sample: the gradient of a
whole batch has the sum of the samples' squares as its expected square. The same three for layer
inputs have δ = Q_b(x) − x. With the gradients of the loss at the given labels instead, times a
random sign a sample, the squares are those of the empirical Fisher, which vanishes as the training
samples are fitted:

    empirical-fisher    ½ E[Σ_j (∂ℓ/∂w_j)² δ_j²]
    output-gradient     ½ E[Σ (∂ℓ/∂y ⊙ (y_q − y))²]   over a layer's outputs y, as NVIDIA's ModelOpt

A layer is linear in its weight, so g·δ of a sample is ∂z/∂y · (y_q − y): no gradient of a single
sample is ever needed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adq.proxies.base import (
    Array,
    Interactions,
    Sensitivity,
    Subject,
    Table,
    in_parts,
    mean_of_parts,
)
from adq.proxies.memory import in_halves
from adq.proxies.work import Work
from adq.quant.batches import (
    Batch,
    batch_size,
    device_of,
    differentiable,
    evaluating,
    forward,
    resized,
    to_device,
)
from adq.quant.errors import InputError
from adq.quant.qat import Loss

Labels = Literal["model", "given"]
SCORES: dict[str, Labels] = {
    "gauss-newton": "model",
    "fisher": "model",
    "gauss-newton-trace": "model",
    "empirical-fisher": "given",
    "output-gradient": "given",
}
"""Each score, and whose labels its gradients are taken at."""

_OF_OUTPUTS = {"gauss-newton", "output-gradient"}
_OF_WEIGHTS = set(SCORES) - _OF_OUTPUTS
MAX_OUTPUTS = 2048


@dataclass(frozen=True)
class Gradients:
    """Some of SCORES, all at the same labels.

    `pairs` says among how many layers, the most sensitive ones at the fewest bits, gauss-newton
    gives interactions: Ω = δ_iᵀ G_ij δ_j = E[(g_i·δ_i)(g_j·δ_j)].
    """

    scores: tuple[str, ...] = ("gauss-newton",)
    pairs: int = 0

    def measure(self, subject: Subject, work: Work) -> list[Sensitivity]:
        """Raises InputError for outputs that are not one tensor with a row a sample; for fewer
        than two samples, which have no standard error; and, at the model's labels, for a loss
        that is not a mean over samples or has more than 2048 outputs a sample."""
        started = time.monotonic()
        gradients = _Pass(subject, self.scores)
        work_done = work.parts(subject.model, len(gradients.batches), gradients.compute)
        parts = [gradients.split(rows) for rows in work_done]
        found = []
        for name in self.scores:
            inputs = "projected inputs" if name == "gauss-newton" else "squared inputs"
            act = pairs = None
            if name == "gauss-newton" and self.pairs > 1:
                pairs = _interactions(subject, [part[name] for part in parts], self.pairs)
            weight = _table(subject.names, subject.bits, [_squares(part, name) for part in parts])
            if subject.act_bits:
                squares = [_squares(part, inputs) for part in parts]
                act = _table(subject.names, subject.act_bits, squares)
            seconds = time.monotonic() - started
            found.append(
                Sensitivity(name, weight, act, subject.samples, seconds, gradients.passes, pairs)
            )
        return found


class _Pass:
    """What is done with one batch. Gives blocks of the shape (samples, layers, bits) that hold
    g·δ for each sample where a score squares it ("projected"), squares otherwise."""

    def __init__(self, subject: Subject, scores: tuple[str, ...]) -> None:
        (self.labels,) = {SCORES[name] for name in scores}
        self.subject, self.batches = subject, in_parts(subject.batches)
        self.errors = subject.errors
        self.by_sample = _first_is_sample(subject)
        self.blocks = dict.fromkeys(scores, len(subject.bits))
        if subject.act_bits:
            inputs = {"gauss-newton": "projected inputs"}
            kinds = [inputs.get(name, "squared inputs") for name in scores]
            self.blocks |= dict.fromkeys(kinds, len(subject.act_bits))
        # a score that looks at the change of a layer's output runs the layer once a width
        self.passes = 3.0 + len(subject.bits) * bool(_OF_OUTPUTS & set(scores))

    def split(self, rows: Array) -> dict[str, Array]:
        """The blocks in what `compute` gives."""
        layers, widths = len(self.subject.layers), list(self.blocks.values())
        ends = np.cumsum([layers * width for width in widths])[:-1]
        parts = np.split(rows, ends, axis=1)
        return {
            name: part.reshape(len(rows), layers, width)
            for (name, width), part in zip(self.blocks.items(), parts, strict=True)
        }

    def compute(self, model: nn.Module, part: int) -> Array:
        generator = torch.Generator().manual_seed(self.subject.seed * 1_000_003 + part)
        run = partial(self._batch, model, generator)
        return np.concatenate(list(in_halves(run, self.batches[part], self.subject.say)))

    def _batch(self, model: nn.Module, generator: torch.Generator, batch: Batch) -> Array:
        subject = self.subject
        inputs, targets = to_device(batch, device_of(model))
        n = batch_size(batch)
        by_weight = bool(_OF_WEIGHTS & set(self.blocks))
        weights = [model.get_parameter(f"{name}.weight") for name in subject.names]
        with evaluating(model), differentiable(weights), _calls(model, subject) as calls:
            outputs = forward(model, inputs)
            cotangent = _cotangent(subject.loss, outputs, targets, n, self.labels, generator)
            wanted = [y for *_, y in calls]
            wanted += [x for _, x, _ in calls] if subject.act_bits else []
            wanted += weights if by_weight else []
            grads = list(torch.autograd.grad(outputs, wanted, cotangent, materialize_grads=True))
        out = {name: np.zeros((n, len(subject.layers), w)) for name, w in self.blocks.items()}
        with torch.no_grad():
            for layer, x, _ in calls:
                self._add_outputs(out, model, layer, x, grads.pop(0))
            for layer, x, _ in calls if subject.act_bits else ():
                self._add_inputs(out, layer, x, grads.pop(0))
            for layer, g in enumerate(grads):
                self._add_weights(out, layer, g)
        return np.concatenate([block.reshape(n, -1) for block in out.values()], axis=1)

    def _rows(self, values: Tensor, n: int, power: int) -> Any:
        """Sums over the values of each sample, or, where they cannot be told apart, a number that
        to the given `power` has the mean over the samples as its expectation."""
        if self.by_sample:
            return values.reshape(n, -1).double().sum(dim=1).cpu().numpy()
        return values.double().sum().item() / n ** (1 / power)

    def _add_outputs(
        self, out: dict[str, Array], model: nn.Module, layer: int, x: Tensor, gy: Tensor
    ) -> None:
        names = _OF_OUTPUTS & set(out)
        if not names:
            return
        module = model.get_submodule(self.subject.names[layer])
        bias = getattr(module, "bias", None)
        others = {} if bias is None else {"bias": torch.zeros_like(bias)}
        n = len(next(iter(out.values())))
        for bit, error in enumerate(self.errors[layer]):
            change = functional_call(module, {"weight": error.to(x.device), **others}, (x,))
            product = gy * change
            if "gauss-newton" in names:
                out["gauss-newton"][:, layer, bit] += self._rows(product, n, 2)
            if "output-gradient" in names:
                squares = self._rows(product.square_(), n, 1)
                out["output-gradient"][:, layer, bit] += 0.5 * squares

    def _add_inputs(self, out: dict[str, Array], layer: int, x: Tensor, gx: Tensor) -> None:
        n = len(next(iter(out.values())))
        for bit, quantizer in enumerate(self.subject.input_quantizers(self.subject.names[layer])):
            product = gx * (quantizer.to(x.device)(x) - x)
            if "projected inputs" in out:
                out["projected inputs"][:, layer, bit] += self._rows(product, n, 2)
            if "squared inputs" in out:
                squares = self._rows(product.square_(), n, 1)
                out["squared inputs"][:, layer, bit] += 0.5 * squares

    def _add_weights(self, out: dict[str, Array], layer: int, g: Tensor) -> None:
        n, squares = len(next(iter(out.values()))), g.double().square()
        for bit, error in enumerate(self.errors[layer]):
            power = error.to(g.device).double().square()
            for name in ("fisher", "empirical-fisher"):
                if name in out:
                    out[name][:, layer, bit] = 0.5 * (squares * power).sum().item() / n
            if "gauss-newton-trace" in out:
                trace = squares.sum().item() / n
                out["gauss-newton-trace"][:, layer, bit] = 0.5 * trace * power.mean().item()


def _table(names: tuple[str, ...], bits: tuple[int, ...], parts: list[Array]) -> Table:
    score, stderr = mean_of_parts([p.mean(axis=0) for p in parts], [len(p) for p in parts])
    return Table(names, bits, score, stderr)


def _squares(part: dict[str, Array], block: str) -> Array:
    """A block as squares, halved."""
    projected = block in ("gauss-newton", "projected inputs")
    return 0.5 * part[block] ** 2 if projected else part[block]


def _interactions(subject: Subject, parts: list[Array], count: int) -> Interactions:
    """The second moments of the projections, of two different layers."""
    at_fewest = np.argmin(subject.bits)
    squares = sum((p[:, :, at_fewest] ** 2).sum(axis=0) for p in parts)
    chosen = np.sort(np.argsort(-squares)[:count])
    means = [np.einsum("nia,njb->iajb", p[:, chosen], p[:, chosen]) / len(p) for p in parts]
    value, stderr = mean_of_parts(means, [len(p) for p in parts])
    for i in range(len(chosen)):
        value[i, :, i, :] = stderr[i, :, i, :] = 0
    return Interactions(tuple(subject.names[i] for i in chosen), subject.bits, value, stderr)


def _first_is_sample(subject: Subject) -> bool:
    """Whether the first dimension of every layer's output is made of equal parts, one a sample,
    in the order of the samples: whether a third sample leaves the parts of two as they were."""
    found: list[list[Tensor]] = []
    model = subject.model
    inputs = to_device(subject.batches[0][0], device_of(model))
    for samples in (2, 3):
        with evaluating(model), torch.no_grad(), _calls(model, subject) as calls:
            forward(model, resized(inputs, samples))
        found.append([y for *_, y in calls])
    two, three = found
    return len(two) == len(three) and all(map(_continued, two, three))


def _continued(two: Tensor, three: Tensor) -> bool:
    """Whether the leading two thirds of a layer's output for three samples are that for two."""
    if 3 * len(two) != 2 * len(three) or two.shape[1:] != three.shape[1:]:
        return False
    off = (two - three[: len(two)]).abs().max()
    return bool(off <= 1e-3 * two.abs().max())  # kernels may depend on the size


Call = tuple[int, Tensor, Tensor]
"""(number of the layer, its input, its output)."""


@contextmanager
def _calls(model: nn.Module, subject: Subject) -> Iterator[list[Call]]:
    """Each call of a scored layer, for as long as the context lasts.

    Both tensors are the layer's own: neither a skip connection beside it nor an operation in place
    behind it touches them.
    """
    calls: list[Call] = []
    entered: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        if subject.act_bits and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()
        entered.append(x)
        return (x, *args[1:])

    def after(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            calls.append((layer, entered.pop(), output))
            return output.clone()

        return hook

    hooks = []
    for layer, name in enumerate(subject.names):
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(after(layer)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _cotangent(
    loss: Loss, outputs: Any, targets: Any, n: int, labels: Labels, generator: torch.Generator
) -> Tensor:
    """What is sent back from the outputs: B r of each sample, or ± ∂ℓ/∂z."""
    if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != n:
        kind = type(outputs).__name__
        shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
        raise InputError(
            f"gradient scores need outputs that are one tensor with a row for each of the {n} "
            f"samples; the model gave a {kind}{shape}"
        )
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(z.clone(), targets)  # which it may change in place
        (slope,) = torch.autograd.grad(value, z, create_graph=labels == "model")
    if labels == "given":
        signs = _signs((n, *[1] * (z.dim() - 1)), generator, z)
        return slope * n * signs
    count = z[0].numel()
    if count > MAX_OUTPUTS:
        raise InputError(
            f"scores at the model's labels need at most {MAX_OUTPUTS} outputs a sample, the model "
            f"has {count}; take empirical-fisher, output-gradient or loss"
        )
    curvature = n * _curvature(slope, z)
    values, vectors = torch.linalg.eigh(curvature.double())
    factor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    signs = _signs((n, count, 1), generator, factor)
    return (factor @ signs).reshape(z.shape).to(z.dtype)


def _curvature(slope: Tensor, z: Tensor) -> Tensor:
    """∂²L/∂z_i² of each sample i, (samples, outputs, outputs).

    Raises InputError where samples meet in the loss.
    """
    n, count = len(z), z[0].numel()
    if not slope.requires_grad:  # a loss that is linear in the outputs
        return z.new_zeros(n, count, count)

    def response(directions: Tensor) -> Tensor:
        """∂²L/∂z² times `directions`, both (samples, outputs)."""
        (found,) = torch.autograd.grad(
            slope, z, directions.reshape(z.shape), retain_graph=True, materialize_grads=True
        )
        return found.reshape(n, count)

    # not constant over the outputs: no softmax would respond to that
    alone = torch.zeros(n, count, dtype=z.dtype, device=z.device)
    alone[0] = torch.arange(1, count + 1).cos()
    touched = response(alone).abs()
    if n > 1 and touched[1:].max() > 1e-4 * touched.max():
        raise InputError(
            "scores at the model's labels need a loss that is a mean over samples: here a sample's "
            "output changes another's gradient"
        )
    basis = torch.eye(count, dtype=z.dtype, device=z.device)
    return torch.stack([response(e.expand(n, count)) for e in basis], dim=1)


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)
