"""Quantizer modules: the trainable state over the pure functions of `codebook` and `activation`."""

import torch
from torch import Tensor, nn

from adq.quant import activation, codebook
from adq.quant.codebook import Codebook, Initialisation

MIN_WIDTH = 1e-2  # of the output step: a threshold segment never vanishes (N2UQ clamps as well)


class WeightQuantizer(nn.Module):
    """A parametrization: weight -> fake-quantized weight, one codebook for the layer.

    State: `log_scale` (C, 1, ..., 1), learned, kept as a logarithm so that the scale stays
    positive and an optimiser step changes it in proportion; `levels`, `counts`, `sums` (2^bits,),
    which `update` moves by exponential moving average. `forward` changes no state.
    """

    levels: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, weight: Tensor, bits: int, init: Initialisation = "quantile-lloyd") -> None:
        super().__init__()
        self.bits = bits
        scale = codebook.channel_scale(weight.detach())
        self.log_scale = nn.Parameter(scale.log())
        start = codebook.new_codebook(weight.detach() / scale, bits, init)
        self.register_buffer("levels", start.levels)
        self.register_buffer("counts", start.counts)
        self.register_buffer("sums", start.sums)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        return codebook.fake_quantize(weight, self.scale, self.levels)

    @torch.no_grad()
    def update(self, weight: Tensor, decay: float) -> None:
        """Move the levels one step towards the cell means of `weight`."""
        state = Codebook(self.levels, self.counts, self.sums)
        state = codebook.ema_step(state, weight / self.scale, decay)
        self.levels.copy_(state.levels)
        self.counts.copy_(state.counts)
        self.sums.copy_(state.sums)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class ActivationQuantizer(nn.Module):
    """Fake-quantizes a layer's input by N2UQ, started from a calibrated uniform grid.

    Learned: `log_input_scale` and `log_output_scale` (1,), `start` (1,), `widths` (2^bits − 1,),
    the last two in units of the input scale. `zero_point` (1,) is fixed by calibration.
    """

    zero_point: Tensor

    def __init__(self, bits: int, step: float, zero_point: int) -> None:
        super().__init__()
        self.bits = bits
        log_step = torch.tensor([step]).log()
        self.log_input_scale = nn.Parameter(log_step.clone())
        self.log_output_scale = nn.Parameter(log_step.clone())
        self.start = nn.Parameter(torch.tensor([-float(zero_point)]))
        self.widths = nn.Parameter(torch.ones(2**bits - 1))
        self.register_buffer("zero_point", torch.tensor([float(zero_point)]))

    @property
    def thresholds(self) -> Tensor:
        """T_1..T_n in the units of the input, shape (2^bits − 1,)."""
        return activation.thresholds(*self._knots())

    @property
    def output_scale(self) -> Tensor:
        return self.log_output_scale.exp()

    def _knots(self) -> tuple[Tensor, Tensor]:
        scale = self.log_input_scale.exp()
        return self.start * scale, self.widths.clamp(min=MIN_WIDTH) * scale

    def forward(self, x: Tensor) -> Tensor:
        start, widths = self._knots()
        return activation.fake_quantize(x, start, widths, self.output_scale, self.zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
