"""Quantizers as trainable modules: the interface, and ADQ's two.

Every weight quantizer is sorted levels and a scale per row, every activation quantizer thresholds,
a scale and a zero point: whatever was trained, packing and kernels see the same thing. The
baselines are in `baselines`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adq.quant import activation, codebook
from adq.quant.codebook import Codebook
from adq.quant.kernels.weights_ops import quantize_weights
from adq.quant.rows import Rows
from adq.quant.scheme import Initialisation

MIN_WIDTH = 1e-2  # of the output step: a threshold segment never vanishes (N2UQ clamps as well)


def _recomputed_later() -> bool:
    """Whether tensors saved here are packed by hooks, as in `torch.utils.checkpoint`: a layer that
    is run again in the backward pass quantizes its weight alone, and must have done so before."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class WeightQuantizer(nn.Module):
    """A parametrization: weight -> fake-quantized weight ŵ = s·c[k(w/s)].

    State: `levels` c (2^bits,), sorted, one set for the layer; what `scale_of` makes the scales of.
    `rule` names the backward rule in `adq.quant.kernels.weights_reference`.

    `forward` changes no state. While `ready` holds a weight (see `flat`) it is that.
    """

    rule: ClassVar[str] = "straight"
    levels: Tensor

    def __init__(self, rows: Rows, bits: int, levels: Tensor) -> None:
        super().__init__()
        self.rows, self.bits = rows, bits
        self.register_buffer("levels", levels)
        self.ready: Tensor | None = None

    def scale_of(self, rows: Tensor) -> Tensor:
        """The scale of each row of a weight, (count,), all positive."""
        raise NotImplementedError

    def _quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows.split(weight)
        shape = ([self.rows.count], [self.rows.size], [self.bits])
        scale = self.scale_of(rows)
        return quantize_weights(rows.reshape(-1), scale, self.levels, *shape, self.rule)[:2]

    def forward(self, weight: Tensor) -> Tensor:
        ready = self.ready
        if ready is not None and not _recomputed_later():
            return ready
        return self.rows.join(self._quantized(weight)[0])

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """k(w/s) of each weight, row by row, uint8, (numel,)."""
        return self._quantized(weight)[1]

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def weight_quantizer(layer: nn.Module) -> WeightQuantizer | None:
    """The quantizer of a layer's weight, None where there is none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    quantizer = layer.parametrizations["weight"][0]  # type: ignore[index]
    return quantizer if isinstance(quantizer, WeightQuantizer) else None


def original_weight(layer: nn.Module) -> Tensor:
    """The FP32 weight under the quantizer."""
    return layer.parametrizations["weight"].original  # type: ignore[index, union-attr]


class AdaptiveWeight(WeightQuantizer):
    """ADQ: one codebook for the layer, which follows the weights.

    State beside the levels: `log_scale` (count,), learned, kept as a logarithm so that the scale
    stays positive and an optimiser step changes it in proportion; `counts` and `sums` (2^bits,) of
    the moving average, see `flat.update_codebooks`.
    """

    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        weight: Tensor,
        rows: Rows,
        bits: int,
        init: Initialisation = "quantile-lloyd",
        *,
        zero: bool = False,
        split_dead: bool = True,
    ) -> None:
        split = rows.split(weight.detach())
        scale = codebook.channel_scale(split)
        start = codebook.new_codebook(split / scale, bits, init, zero=zero)
        super().__init__(rows, bits, start.levels)
        self.zero, self.split_dead = zero, split_dead
        self.log_scale = nn.Parameter(scale.flatten().log())
        self.register_buffer("counts", start.counts)
        self.register_buffer("sums", start.sums)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveWeight":
        """As in nn.Module, but for half precision: that cannot count beyond 65504."""
        kept = {name: self._buffers[name] for name in ("counts", "sums")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype.itemsize < 4:
                self._buffers[name] = before.to(now.device)
        return self

    def scale_of(self, rows: Tensor) -> Tensor:
        return self.log_scale.exp()

    @property
    def codebook(self) -> Codebook:
        return Codebook(self.levels, self.counts, self.sums)


class ActivationQuantizer(nn.Module):
    """Fake-quantizes a layer's input: x̂ = σ·(#{thresholds <= x} − z), started from a calibrated
    uniform grid of `step` σ and `zero_point` z, which is fixed."""

    zero_point: Tensor

    def __init__(self, bits: int, step: float, zero_point: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("zero_point", torch.tensor([float(zero_point)]))

    def knots(self) -> tuple[Tensor, Tensor]:
        """s (1,) and a_1..a_n (2^bits − 1,) of `activation`, in the units of the input."""
        raise NotImplementedError

    @property
    def output_scale(self) -> Tensor:
        """σ, shape (1,)."""
        raise NotImplementedError

    @property
    def thresholds(self) -> Tensor:
        """T_1..T_n in the units of the input, shape (2^bits − 1,)."""
        return activation.thresholds(*self.knots())

    def forward(self, x: Tensor) -> Tensor:
        return activation.fake_quantize(x, *self.knots(), self.output_scale, self.zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class N2UQActivation(ActivationQuantizer):
    """Learned non-uniform thresholds, uniform output levels (N2UQ).

    Learned: `log_input_scale` and `log_output_scale` (1,), `start` (1,), `widths` (2^bits − 1,),
    the last two in units of the input scale.
    """

    def __init__(self, bits: int, step: float, zero_point: int) -> None:
        super().__init__(bits, step, zero_point)
        log_step = torch.tensor([step]).log()
        self.log_input_scale = nn.Parameter(log_step.clone())
        self.log_output_scale = nn.Parameter(log_step.clone())
        self.start = nn.Parameter(torch.tensor([-float(zero_point)]))
        self.widths = nn.Parameter(torch.ones(2**bits - 1))

    @property
    def output_scale(self) -> Tensor:
        return self.log_output_scale.exp()

    def knots(self) -> tuple[Tensor, Tensor]:
        scale = self.log_input_scale.exp()
        return self.start * scale, self.widths.clamp(min=MIN_WIDTH) * scale
