"""Weights that move between two levels: how many do, and two ways of keeping them still.

A weight near a threshold of its codebook can jump between two levels for as long as training goes
on, and BatchNorm then averages over networks that do not exist (Nagel et al., arXiv 2203.11086).
"""

from typing import Any

import torch
from torch import Tensor

from adq.quant.baselines import APoTWeight
from adq.quant.flat import FlatWeights

MOMENTUM = 0.01  # m of the frequency's moving average, as in the paper


class Flips:
    """Which weights changed their level since the last step, layer by layer.

    With a `threshold`, weights that oscillate are frozen (the paper's algorithm 1): o = 1 where a
    weight changes its level in the opposite direction to its last change, f ← m·o + (1−m)·f, and
    once f exceeds the threshold the weight is held at the level round(average of its codes).
    """

    def __init__(self, flat: FlatWeights, threshold: float | None = None) -> None:
        self.flat, self.threshold = flat, threshold
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> Tensor:
        """After a forward pass: the fraction of each layer's weights that changed level, (L,)."""
        codes, state = self._codes(), self.state
        if not state:
            state["codes"] = codes.clone()
            if self.threshold is not None:
                state["direction"] = torch.zeros_like(codes, dtype=torch.int8)
                state["frequency"] = torch.zeros_like(codes, dtype=torch.float32)
                state["average"] = codes.float()
                state["frozen"] = torch.zeros_like(codes, dtype=torch.bool)
        change = codes.short() - state["codes"].short()
        if self.threshold is not None:
            direction = change.sign().to(torch.int8)
            opposite = direction * state["direction"] < 0
            state["frequency"].lerp_(opposite.float(), MOMENTUM)
            state["average"].lerp_(codes.float(), MOMENTUM)
            state["direction"] = torch.where(direction != 0, direction, state["direction"])
            state["frozen"] |= state["frequency"] > self.threshold
        state["codes"] = codes.clone()
        return self.flat.per_layer(change != 0)

    def _codes(self) -> Tensor:
        """The last pass's; APoT's largest level has two of them, which count as one."""
        codes = self.flat.codes
        assert codes is not None
        if not isinstance(self.flat.quantizers[0], APoTWeight):
            return codes
        parts = zip(codes.split(self.flat.sizes), self.flat.quantizers, strict=True)
        return torch.cat([part.clamp(max=2**q.bits - 2) for part, q in parts])

    @torch.no_grad()
    def hold_(self) -> None:
        """After an optimiser step: put frozen weights back to the middle of their level."""
        if self.threshold is None or not self.state["frozen"].any():
            return
        sizes = self.flat.sizes
        parts = zip(
            self.flat.quantizers,
            self.flat.weights,
            self.state["average"].round().long().split(sizes),
            self.state["frozen"].split(sizes),
            strict=True,
        )
        for quantizer, weight, codes, frozen in parts:
            rows = quantizer.rows.split(weight)
            value = quantizer.levels[codes].view_as(rows) * quantizer.scale_of(rows)[:, None]
            weight.copy_(quantizer.rows.join(torch.where(frozen.view_as(rows), value, rows)))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.flat.weights[0].device
        self.state = {key: value.to(device) for key, value in state.items()}
