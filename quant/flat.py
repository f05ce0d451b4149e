"""All weights of a model quantized at once: one operator call per forward pass, one per update.

`FlatWeights` hangs on a model as a pair of forward hooks. Before the model's forward it quantizes
every layer's weight in one call and hands each quantizer its own; after it, nothing is left. A
layer that is run by itself, or under torch.compile, quantizes its weight alone, to the same bits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.weights_ops import codebook_step, quantize_weights
from adq.quant.modules import (
    AdaptiveWeight,
    WeightQuantizer,
    original_weight,
    weight_quantizer,
)

FLAT = "_adq_flat"


class FlatWeights:
    """The quantized layers of a model, and what their last common pass found.

    After a forward pass of the model, until weights, scales or levels change:
    `codes` (N,) uint8, layer after layer and row after row, and while `tracking` the statistics
    that the next codebook step takes. `names` are the layers' names in the model.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names, self.layers = list(layers), list(layers.values())
        self.tracking = False
        self.codes: Tensor | None = None
        self._out: Tensor | None = None
        self._partials: Tensor | None = None
        self._versions: list[int] = []

    @property
    def quantizers(self) -> list[WeightQuantizer]:
        found = (weight_quantizer(layer) for layer in self.layers)
        return [quantizer for quantizer in found if quantizer is not None]

    @property
    def weights(self) -> list[Tensor]:
        """The weights under the quantizers."""
        return [original_weight(layer) for layer in self.layers]

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        quantizers = self.quantizers
        if len({(w.dtype, w.device) for w in self.weights}) > 1 or any(
            q.ready is not None for q in quantizers
        ):
            return  # spread over devices, or called again from within itself
        for quantizer, ready in zip(quantizers, self._quantize(self.tracking), strict=True):
            quantizer.ready = ready

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for quantizer in self.quantizers:
            quantizer.ready = None

    def _quantize(self, gather: bool) -> list[Tensor]:
        """Every layer's ŵ, in the shape of its weight."""
        quantizers = self.quantizers
        rows = [q.rows.split(w) for q, w in zip(quantizers, self.weights, strict=True)]
        shape = (
            [q.rows.count for q in quantizers],
            [q.rows.size for q in quantizers],
            [q.bits for q in quantizers],
        )
        out, codes, partials = quantize_weights(
            torch.cat([r.reshape(-1) for r in rows]),
            torch.cat([q.scale_of(r) for q, r in zip(quantizers, rows, strict=True)]),
            torch.cat([q.levels for q in quantizers]),
            *shape,
            quantizers[0].rule,
            gather,
        )
        self.codes, self._out = codes, out.detach()
        if gather:
            self._partials, self._versions = partials, self._state()
        parts = out.split([r.numel() for r in rows])
        return [q.rows.join(part) for q, part in zip(quantizers, parts, strict=True)]

    def distance(self) -> Tensor:
        """Σ (w − stop_grad(ŵ))² over all weights and the last pass, a scalar."""
        pairs = zip(self.quantizers, self.weights, strict=True)
        w = torch.cat([q.rows.split(w).reshape(-1) for q, w in pairs])
        assert self._out is not None
        return (w - self._out).square().sum()

    def per_layer(self, flat: Tensor) -> Tensor:
        """The mean of a flat tensor over each layer, (L,)."""
        return torch.stack([part.float().mean() for part in flat.split(self.sizes)])

    @property
    def sizes(self) -> list[int]:
        return [w.numel() for w in self.weights]

    def _state(self) -> list[int]:
        """Changes whenever a weight, a scale or a level is written to."""
        tensors = [*self.weights]
        for quantizer in self.quantizers:
            tensors += [*quantizer.parameters(), *quantizer.buffers()]
        return [t._version for t in tensors]

    @torch.no_grad()
    def update(self, decay: float) -> Tensor:
        """One moving-average step of all codebooks; the dead levels that each met, (L,) int32."""
        if self._partials is None or self._versions != self._state():
            self._quantize(gather=True)
        books = [q for q in self.quantizers if isinstance(q, AdaptiveWeight)]
        assert self._partials is not None
        levels, counts, sums, dead = codebook_step(
            self._partials,
            torch.cat([q.levels for q in books]),
            torch.cat([q.counts for q in books]),
            torch.cat([q.sums for q in books]),
            [q.bits for q in books],
            [reference.parts(n) for n in self.sizes],
            decay,
            split=books[0].split_dead,
            zero=books[0].zero,
        )
        sizes = [2**q.bits for q in books]
        for name, new in (("levels", levels), ("counts", counts), ("sums", sums)):
            torch._foreach_copy_([getattr(q, name) for q in books], new.split(sizes))
        self._partials = None
        return dead


def attach_flat(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Let `model` quantize the weights of these layers in one call per forward pass."""
    flat = FlatWeights(layers)
    handles = (
        model.register_forward_pre_hook(flat.before),
        # also when the forward fails: a weight left ready would outlive its gradients
        model.register_forward_hook(flat.after, always_call=True),
    )
    setattr(model, FLAT, (flat, handles))


def detach_flat(model: nn.Module) -> None:
    if hasattr(model, FLAT):
        _, handles = getattr(model, FLAT)
        for handle in handles:
            handle.remove()
        delattr(model, FLAT)


def flat_of(model: nn.Module) -> FlatWeights | None:
    """The model's, or that of the model in a wrapper such as DistributedDataParallel."""
    for module in model.modules():
        if hasattr(module, FLAT):
            found: FlatWeights = getattr(module, FLAT)[0]
            return found
    return None


@contextmanager
def tracking(flat: FlatWeights) -> Iterator[None]:
    """Gather the statistics of the codebooks in each forward pass, for the update after it."""
    flat.tracking = True
    try:
        yield
    finally:
        flat.tracking = False


def update_codebooks(model: nn.Module, decay: float = 0.95) -> None:
    """One moving-average step, with decay γ, of every codebook towards its layer's weights.

    An explicit call, once for each optimiser step and before it, when the forward pass has just
    met the same weights: how often a forward pass reads them must not matter, and ranks with equal
    weights keep equal codebooks without communication. Does nothing to baselines.
    """
    flat = flat_of(model)
    if flat is not None and isinstance(flat.quantizers[0], AdaptiveWeight):
        flat.update(decay)
