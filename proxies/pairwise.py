"""What two layers lose together beyond the sum of what each loses alone (CLADO, Deng et al.,
arXiv 2307.05657, section 3):

    Ω[i, a, j, b] = L(i at a, j at b) − L(i at a) − L(j at b) + L(neither)
                  ≈ δ_iᵀ H_ij δ_j        to second order, δ = Q(w) − w.

Only for the layers where quantization costs most; the rest of the interactions are taken as zero.
With the earlier layer of a pair changed, a recorded run serves all variants of the later ones.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from torch import nn

from adq.proxies.base import Array, Interactions, Sensitivity, Subject, mean_of_parts
from adq.proxies.direct import Singles, loss_of, weight_at
from adq.proxies.replay import Recording
from adq.proxies.work import Work
from adq.quant.batches import Batch, device_of, to_device
from adq.quant.errors import InputError, NonFiniteLossError


@dataclass(frozen=True)
class Pairwise:
    """The scores of `Direct`, and Ω of all pairs among `layers` layers: those whose weights cost
    most at the fewest bits. Passes grow with the square of layers and of bits."""

    layers: int = 8

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise InputError(f"expected at least 2 layers, to make a pair; got {self.layers}")

    def measure(self, subject: Subject, work: Work) -> list[Sensitivity]:
        """The work has two parts a batch: all that score layers, then all that score pairs.

        Raises InputError and NonFiniteLossError as `Direct` does.
        """
        started = time.monotonic()
        singles = Singles(subject, "loss")
        count = len(singles.batches)
        parts = list(work.parts(subject.model, count, singles.compute))
        weight, act = singles.tables(parts)
        pairs = _Pairs(singles, parts, weight.score, self.layers)
        found = list(work.parts(subject.model, count, pairs.compute, first=count))
        value, stderr = mean_of_parts([pairs.interactions(p) for p in found], singles.sizes)
        interactions = Interactions(pairs.names, subject.bits, value, stderr)
        return [
            Sensitivity(
                "pairwise",
                weight,
                act,
                subject.samples,
                time.monotonic() - started,
                singles.passes(parts) + singles.passes(found),
                interactions,
            )
        ]


class _Pairs:
    """Ω of the `count` layers of the largest scores; a part of the work is one batch."""

    def __init__(self, singles: Singles, parts: list[Array], score: Array, count: int) -> None:
        fewest = int(np.argmin(singles.subject.bits))
        worst = np.argsort(-score[:, fewest], kind="stable")[:count]
        self.chosen = [int(layer) for layer in np.sort(worst)]
        self.singles = singles
        self.names = tuple(singles.subject.names[layer] for layer in self.chosen)
        self.alone = [singles.scores(part)[self.chosen] for part in parts]

    def compute(self, model: nn.Module, part: int) -> Array:
        """The passes made, then Ω[i, a, j, b], as one row."""
        number = part - len(self.alone)
        row = self.singles.over(self.singles.batches[number], partial(self._batch, model))
        together = self.interactions(row)
        if not np.isfinite(together).all():
            raise NonFiniteLossError(
                "the loss with two layers quantized is nan or infinite: leave out the fewest bits"
            )
        bits = together.shape[1]
        for i in range(len(self.chosen)):
            for j in range(i + 1, len(self.chosen)):
                together[i, :, j] -= self.alone[number][j, :bits]
                together[j, :, i] = together[i, :, j].T
        return np.concatenate([row[:1], together.ravel()])

    def interactions(self, part: Array) -> Array:
        shape = (len(self.chosen), len(self.singles.subject.bits))
        return part[1:].reshape(shape * 2)

    def _batch(self, model: nn.Module, batch: Batch) -> Array:
        """L(i at a, j at b) − L(i at a) for j after i, zero elsewhere."""
        subject = self.singles.subject
        inputs, targets = to_device(batch, device_of(model))
        layers = [model.get_submodule(name) for name in self.names]
        weights = [self.singles.weights(layer) for layer in self.chosen]
        together = np.zeros((len(layers), len(subject.bits)) * 2)
        passes, exact = 0.0, False
        for i, a in product(range(len(layers) - 1), range(len(subject.bits))):
            recording = Recording(model, inputs, verify=not exact)
            with weight_at(layers[i], weights[i][a]), recording:
                before = loss_of(subject, recording.outputs, targets)
                for j, b in product(range(i + 1, len(layers)), range(len(subject.bits))):
                    with weight_at(layers[j], weights[j][b]):
                        outputs = recording.rerun(self.names[j])
                    together[i, a, j, b] = loss_of(subject, outputs, targets) - before
            passes, exact = passes + recording.passes, recording.exact
        return np.concatenate([[passes], together.ravel()])
