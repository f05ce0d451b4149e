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

WEIGHTS_PER_LEVEL = 16
"""A codebook with fewer weights to a level stays still. A level that serves one weight or two is no
mean of anything: following them with a lag, it only makes them late."""


class FlatWeights:
    """The quantized layers of a model, and what their last common pass found.

    After a forward pass of the model, until weights, scales or levels change:
    `codes` (N,) uint8, layer after layer and row after row, and while `tracking` the statistics
    that the next codebook step takes. `names` are the layers' names in the model.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self.tracking = False
        self._codes: Tensor | None = None
        self._out: Tensor | None = None
        self._partials: Tensor | None = None
        self._seen: list[tuple[Tensor, int]] = []

    @property
    def codes(self) -> Tensor:
        """k(w/s) of all weights as they are, (N,) uint8, layer after layer and row after row."""
        self._renew()
        assert self._codes is not None
        return self._codes

    def _present(self) -> dict[str, nn.Module]:
        """The layers that are still quantized."""
        return {n: m for n, m in self._layers.items() if weight_quantizer(m) is not None}

    @property
    def names(self) -> list[str]:
        return list(self._present())

    @property
    def layers(self) -> list[nn.Module]:
        return list(self._present().values())

    @property
    def quantizers(self) -> list[WeightQuantizer]:
        found = (weight_quantizer(layer) for layer in self.layers)
        return [quantizer for quantizer in found if quantizer is not None]

    @property
    def weights(self) -> list[Tensor]:
        """The weights under the quantizers."""
        return [original_weight(layer) for layer in self.layers]

    @property
    def adaptive(self) -> bool:
        """Whether there are codebooks to update."""
        return isinstance(self.quantizers[0], AdaptiveWeight)

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        quantizers = self.quantizers
        if len({(w.dtype, w.device) for w in self.weights}) != 1:
            return  # of several dtypes, or spread over devices; or none is quantized any more
        for quantizer, ready in zip(quantizers, self._quantize(self.tracking), strict=True):
            quantizer.ready = ready

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for quantizer in self.quantizers:
            quantizer.ready = None

    def _quantize(self, gather: bool) -> list[Tensor]:
        """Every layer's ŵ, in the shape of its weight."""
        quantizers = self.quantizers
        rows = [q.rows.split(w) for q, w in zip(quantizers, self.weights, strict=True)]
        out, codes, partials = quantize_weights(
            torch.cat([r.reshape(-1) for r in rows]),
            torch.cat([q.scale_of(r) for q, r in zip(quantizers, rows, strict=True)]),
            torch.cat([q.levels for q in quantizers]),
            *self._shape(),
            quantizers[0].rule,
            gather,
        )
        self._codes, self._out = codes, out.detach()
        self._partials, self._seen = (partials if gather else None), self._state()
        parts = out.split([r.numel() for r in rows])
        return [q.rows.join(part) for q, part in zip(quantizers, parts, strict=True)]

    def _shape(self) -> tuple[list[int], list[int], list[int]]:
        """The operators' `rows`, `sizes` and `bits`."""
        found = self.quantizers
        return [q.rows.count for q in found], [q.rows.size for q in found], [q.bits for q in found]

    def distance(self) -> Tensor:
        """Σ (w − stop_grad(ŵ))² over all weights and the last pass, a scalar."""
        pairs = zip(self.quantizers, self.weights, strict=True)
        w = torch.cat([q.rows.split(w).reshape(-1) for q, w in pairs])
        self._renew()
        assert self._out is not None
        return (w - self._out).square().sum()

    def per_layer(self, flat: Tensor) -> Tensor:
        """The mean of a flat tensor over each layer, (L,)."""
        return torch.stack([part.float().mean() for part in flat.split(self.sizes)])

    @property
    def sizes(self) -> list[int]:
        return [w.numel() for w in self.weights]

    def _stale(self) -> bool:
        """Whether a weight, a scale or a level was written to or replaced since the last pass."""
        now = self._state()
        return len(now) != len(self._seen) or any(
            t is not s or v != w for (t, v), (s, w) in zip(now, self._seen, strict=True)
        )

    @torch.no_grad()
    def _renew(self) -> None:
        """Quantize once more, if the last pass was none of ours (compiled, or over devices)."""
        if self._stale():
            self._quantize(gather=False)

    def _state(self) -> list[tuple[Tensor, int]]:
        tensors = [*self.weights]
        for quantizer in self.quantizers:
            tensors += [*quantizer.parameters(), *quantizer.buffers()]
        return [(t, t._version) for t in tensors]

    @torch.no_grad()
    def update(self, decay: float, weights_per_level: float = WEIGHTS_PER_LEVEL) -> Tensor:
        """One moving-average step of the codebooks of all layers that have so many weights.

        Returns the dead levels that each layer met, (L,) int32.
        """
        if self._partials is None or self._stale():
            self._quantize(gather=True)
        assert self._partials is not None
        partials, self._partials = self._partials, None
        sizes, quantizers = self.sizes, self.quantizers
        dead = torch.zeros(len(sizes), dtype=torch.int32, device=partials.device)
        chosen, books = [], []
        for i, quantizer in enumerate(quantizers):
            enough = sizes[i] >= weights_per_level * 2**quantizer.bits
            if enough and isinstance(quantizer, AdaptiveWeight):
                chosen.append(i)
                books.append(quantizer)
        if not books:
            return dead
        if len(books) < len(quantizers):
            where = reference.layers(*self._shape())
            partials = torch.cat([partials[:, where[i].partials] for i in chosen], dim=1)
        levels, counts, sums, dead[chosen] = codebook_step(
            partials,
            torch.cat([q.levels for q in books]),
            torch.cat([q.counts for q in books]),
            torch.cat([q.sums for q in books]),
            [q.bits for q in books],
            [reference.parts(sizes[i]) for i in chosen],
            decay,
            split=books[0].split_dead,
            zero=books[0].zero,
        )
        widths = [2**q.bits for q in books]
        for name, new in (("levels", levels), ("counts", counts), ("sums", sums)):
            torch._foreach_copy_([getattr(q, name) for q in books], new.split(widths))
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
    for module in model.modules():
        if hasattr(module, FLAT):
            _, handles = getattr(module, FLAT)
            for handle in handles:
                handle.remove()
            delattr(module, FLAT)


def flats_of(model: nn.Module) -> list[FlatWeights]:
    """The model's, or that of the model in a wrapper such as DistributedDataParallel; several where
    parts of it were quantized apart."""
    # a compiled module shows the attributes of the one inside
    found = {id(flat): flat for module in model.modules() if (flat := getattr(module, FLAT, None))}
    return [flat for flat, _ in found.values() if flat.quantizers]


@contextmanager
def tracking(flat: FlatWeights) -> Iterator[None]:
    """Gather the statistics of the codebooks in each forward pass, for the update after it."""
    flat.tracking = True
    try:
        yield
    finally:
        flat.tracking = False


def update_codebooks(
    model: nn.Module, decay: float = 0.99, weights_per_level: float = WEIGHTS_PER_LEVEL
) -> None:
    """One moving-average step, with decay γ, of each codebook towards its layer's weights.

    Layers with fewer than `weights_per_level` weights to a level keep their codebooks as they are.

    An explicit call, once for each optimiser step and before it, when the forward pass has just
    met the same weights: how often a forward pass reads them must not matter, and ranks with equal
    weights keep equal codebooks without communication. Does nothing to baselines.
    """
    for flat in flats_of(model):
        if flat.adaptive:
            flat.update(decay, weights_per_level)
