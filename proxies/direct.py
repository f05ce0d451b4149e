"""Scores measured by quantizing one layer at a time, without any expansion of the loss.

    loss   S[l, b] = E[ℓ(model with layer l alone at b bits)] − E[ℓ(model)]
    kl     S[l, b] = E[KL(p ‖ q)], p and q the softmax of the model's outputs without and with it

with weights w + δ, δ = Q_b(w) − w, or inputs Q_b(x). Both are in units of the loss where that is a
cross-entropy: KL(p ‖ q) is its increase at labels drawn from the model's own p. The loss may fall;
the divergence cannot.

A layer's variants are run from the layer on (`replay`): a batch costs about half a pass for each.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.proxies.base import Array, Sensitivity, Subject, Table, in_parts, mean_of_parts
from adq.proxies.memory import in_halves
from adq.proxies.replay import Recording
from adq.proxies.work import Work
from adq.quant.batches import Batch, batch_size, device_of, to_device
from adq.quant.errors import InputError, NonFiniteLossError

Score = Literal["loss", "kl"]


@dataclass(frozen=True)
class Direct:
    """The increase of the loss, or the divergence of the outputs, layer by layer."""

    score: Score = "loss"

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise InputError(f"expected loss or kl, got {self.score!r}")

    def measure(self, subject: Subject, work: Work) -> list[Sensitivity]:
        """Scores may be negative where the loss falls; `Table.monotone` lifts them to zero.

        Raises InputError for fewer than two samples, which have no standard error, and for `kl`
        where the outputs are not one tensor of class scores; NonFiniteLossError for a loss that is
        nan or infinite.
        """
        started = time.monotonic()
        singles = Singles(subject, self.score)
        parts = list(work.parts(subject.model, len(singles.batches), singles.compute))
        weight, act = singles.tables(parts)
        seconds = time.monotonic() - started
        passes = singles.passes(parts)
        return [Sensitivity(self.score, weight, act, subject.samples, seconds, passes)]


class Singles:
    """The scores of each layer alone; a part of the work is one of `batches`."""

    def __init__(self, subject: Subject, score: Score) -> None:
        self.subject, self.score, self.told = subject, score, False
        self.batches = in_parts(subject.batches)
        self.sizes = [batch_size(batch) for batch in self.batches]

    def weights(self, layer: int) -> Tensor:
        """A layer's quantized weights, (bits, *weight.shape), while its own is in place."""
        subject = self.subject
        weight = subject.model.get_parameter(f"{subject.names[layer]}.weight").detach()
        return weight + subject.errors[layer]

    def compute(self, model: nn.Module, part: int) -> Array:
        """The passes made, then the scores, (layers, bits + act_bits), as one row."""
        return self.over(self.batches[part], lambda batch: self._batch(model, batch))

    def over(self, batch: Batch, compute: Callable[[Batch], Array]) -> Array:
        """The mean over a batch, in smaller ones where memory runs out."""
        found = in_halves(lambda part: (compute(part), batch_size(part)), batch, self.subject.say)
        return mean_of_parts(*zip(*found, strict=True))[0]

    def scores(self, part: Array) -> Array:
        return part[1:].reshape(len(self.subject.layers), -1)

    def passes(self, parts: Sequence[Array]) -> float:
        """Over all samples, on average."""
        return float(np.average([part[0] for part in parts], weights=self.sizes))

    def tables(self, parts: Sequence[Array]) -> tuple[Table, Table | None]:
        """(of weights, of inputs)."""
        subject, cut = self.subject, len(self.subject.bits)
        score, stderr = mean_of_parts([self.scores(part) for part in parts], self.sizes)
        weight = Table(subject.names, subject.bits, score[:, :cut], stderr[:, :cut])
        if not subject.act_bits:
            return weight, None
        return weight, Table(subject.names, subject.act_bits, score[:, cut:], stderr[:, cut:])

    def _batch(self, model: nn.Module, batch: Batch) -> Array:
        subject = self.subject
        inputs, targets = to_device(batch, device_of(model))
        values: list[Tensor] = []
        with Recording(model, inputs) as recording:
            self._tell(recording)
            value = self._value(recording.outputs, targets)
            for index, name in enumerate(subject.names):
                layer = model.get_submodule(name)
                for weight in self.weights(index):
                    with weight_at(layer, weight):
                        values.append(value(recording.rerun(name)))
                for quantizer in subject.input_quantizers(name):
                    with input_through(layer, quantizer):
                        values.append(value(recording.rerun(name)))
        scores = torch.stack(values).cpu().numpy()
        self._check(scores.reshape(len(subject.layers), -1))
        return np.concatenate([[recording.passes], scores])

    def _value(self, outputs: Any, targets: Any) -> Callable[[Any], Tensor]:
        """Outputs of a changed model -> score, a scalar of double precision."""
        if self.score == "kl":
            log_p = log_probabilities(outputs)
            return lambda changed: divergence(log_p, log_probabilities(changed))
        before = loss_of(self.subject, outputs, targets)
        if not math.isfinite(before.item()):
            raise NonFiniteLossError(
                f"the loss of the FP32 model is {before.item()}: check the data and the loss"
            )
        return lambda changed: loss_of(self.subject, changed, targets) - before

    def _tell(self, recording: Recording) -> None:
        if not recording.exact and not self.told:
            self.told = True
            self.subject.say(
                "this model cannot be run again from one layer on: every score takes a full pass"
            )

    def _check(self, scores: Array) -> None:
        bad = np.argwhere(~np.isfinite(scores))
        if bad.size:
            layer, column = bad[0]
            subject = self.subject
            widths = [f"weights at {b} bits" for b in subject.bits]
            widths += [f"inputs at {b} bits" for b in subject.act_bits]
            raise NonFiniteLossError(
                f"the {self.score} with the {widths[column]} of {subject.names[layer]} is "
                f"{scores[layer, column]}: leave out that width, or check the loss"
            )


@torch.no_grad()
def loss_of(subject: Subject, outputs: Any, targets: Any) -> Tensor:
    return subject.loss(outputs, targets).detach().double()


@torch.no_grad()
def log_probabilities(outputs: Any) -> Tensor:
    """log softmax over dimension 1, in double precision.

    Raises InputError for anything but one tensor (samples, classes, ...) of two classes or more.
    """
    if isinstance(outputs, Tensor) and outputs.dim() > 1 and outputs.shape[1] > 1:
        return F.log_softmax(outputs.double(), dim=1)
    kind = type(outputs).__name__
    shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
    raise InputError(
        "kl needs outputs that are one tensor of class scores, (samples, classes, ...); the model "
        f"gave a {kind}{shape}: take loss instead"
    )


@torch.no_grad()
def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) over dimension 1, its mean over all others."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1).mean()


@contextmanager
def weight_at(layer: nn.Module, value: Tensor) -> Iterator[None]:
    """The layer with this weight; after that the very bits from before."""
    weight = layer.get_parameter("weight").data
    before = weight.clone()
    try:
        weight.copy_(value)
        yield
    finally:
        weight.copy_(before)


@contextmanager
def input_through(layer: nn.Module, quantizer: nn.Module) -> Iterator[None]:
    """The layer with its input quantized."""
    weight = layer.get_parameter("weight")
    quantizer.to(weight.device)

    def quantize(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantizer(args[0]), *args[1:])

    hook = layer.register_forward_pre_hook(quantize)
    try:
        yield
    finally:
        hook.remove()
