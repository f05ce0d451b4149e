"""The quantizers that ADQ is compared with, behind its interface.

Where a method learns a step or a clipping value, its logarithm is what is learned here, so that
an adaptive optimiser changes it in proportion at every layer, as it does ADQ's scale. Scales are
per row (output channel) for all methods alike.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adq.quant import activation
from adq.quant.codebook import assign, channel_scale
from adq.quant.modules import ActivationQuantizer, AdaptiveWeight, N2UQActivation, WeightQuantizer
from adq.quant.rows import Rows
from adq.quant.scheme import Scheme


def weight_quantizer_for(weight: Tensor, rows: Rows, bits: int, scheme: Scheme) -> WeightQuantizer:
    """The scheme's quantizer, started from this weight."""
    if scheme.weight == "adq":
        return AdaptiveWeight(
            weight, rows, bits, scheme.init, zero=scheme.zero, split_dead=scheme.split_dead
        )
    kinds: dict[str, Any] = {
        "lsq": LSQWeight,
        "n2uq": N2UQWeight,
        "apot": APoTWeight,
        "minmax": MinMaxWeight,
    }
    return kinds[scheme.weight](rows.split(weight.detach()), rows, bits)


def activation_quantizer_for(
    bits: int, step: float, zero_point: int, scheme: Scheme
) -> ActivationQuantizer:
    """The scheme's quantizer, started from this grid."""
    kinds: dict[str, type[ActivationQuantizer]] = {
        "n2uq": N2UQActivation,
        "lsq": LSQActivation,
        "pact": PACTActivation,
        "minmax": MinMaxActivation,
    }
    return kinds[scheme.act](bits, step, zero_point)


def integers(bits: int, like: Tensor) -> Tensor:
    """−2^(bits−1), ..., 2^(bits−1) − 1."""
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device=like.device).to(like.dtype)


def scale_gradient(value: Tensor, factor: float | Tensor) -> Tensor:
    """`value`, with its gradient multiplied by `factor`."""
    return (value - value.detach()) * factor + value.detach()


class LSQWeight(WeightQuantizer):
    """Learned step size: integer levels −2^(b−1)..2^(b−1) − 1 = Q_P times a learned step.

    The step starts at 2·mean|w|/√Q_P, and its gradient is multiplied by 1/√(N·Q_P), N being the
    weights that share it (Esser et al., arXiv 1902.08153, section 2).
    """

    rule: ClassVar[str] = "lsq"

    def __init__(self, weight: Tensor, rows: Rows, bits: int) -> None:
        super().__init__(rows, bits, integers(bits, weight))
        largest = 2 ** (bits - 1) - 1
        start = 2 * weight.abs().mean(dim=1) / largest**0.5
        smallest = 0.01 * channel_scale(weight).flatten() / largest
        self.log_scale = nn.Parameter(torch.maximum(start, smallest).log())
        self.factor = (rows.size * largest) ** -0.5

    def scale_of(self, rows: Tensor) -> Tensor:
        return scale_gradient(self.log_scale.exp(), self.factor)


class APoTWeight(WeightQuantizer):
    """Additive powers of two: a level is a sign and a sum of powers, times a learned scale.

    A magnitude of B = 2n bits is Σ_{i<n} p_i, p_i in {0, 2^−i, 2^−(i+n), 2^−(i+2n)}; an odd bit
    adds a last p in {0, 2^−2n}, and the powers after it move down by one (Li et al.,
    arXiv 1909.13144, eq. 4 and its public code). Weights get b − 1 bits of magnitude, so that
    2^b − 1 levels differ. The clipping value learns by the paper's eq. 7, which is LSQ's rule.
    It starts where the squared error is least.
    """

    rule: ClassVar[str] = "lsq"

    def __init__(self, weight: Tensor, rows: Rows, bits: int) -> None:
        levels = power_levels(bits).to(weight)
        super().__init__(rows, bits, levels)
        scale = channel_scale(weight)
        x = (weight / scale).flatten()
        x = x[:: max(1, x.numel() // 2**16)]
        clips = x.abs().max().clamp(min=1e-3) * torch.arange(1, 65).to(x) / 64
        errors = torch.stack(
            [(x - c * levels[assign(x / c, levels)]).square().mean() for c in clips]
        )
        self.log_scale = nn.Parameter((scale.flatten() * clips[errors.argmin()]).log())

    def scale_of(self, rows: Tensor) -> Tensor:
        return self.log_scale.exp()


def power_levels(bits: int) -> Tensor:
    """APoT's 2^bits − 1 signed levels in [−1, 1], the largest one twice; float64, sorted."""
    pairs, odd = divmod(bits - 1, 2)
    sums = torch.zeros(1, dtype=torch.float64)
    for i in range(pairs + odd):
        powers = [-i, -i - pairs, -i - 2 * pairs - odd] if i < pairs else [-2 * pairs]
        terms = torch.tensor([0.0, *(2.0**p for p in powers)], dtype=torch.float64)
        sums = (sums[:, None] + terms).flatten()
    positive = sums.sort().values[1:] / sums.max()
    return torch.cat([-positive.flip(0), sums.new_zeros(1), positive, positive[-1:]])


class N2UQWeight(WeightQuantizer):
    """N2UQ's weights: 2^b levels evenly over ±clip/2, in units of γ·mean|w| of each channel.

    γ = (2^b − 1)/2^(b−1); mean|w| is the present weight's, and the learned clip (1,), one for the
    layer, starts at 2 and learns from clipped weights alone (Liu et al., arXiv 2111.14826, and
    its public code). There the gradient reaches w/scale and is never multiplied back; here it is.
    """

    rule: ClassVar[str] = "pact"

    def __init__(self, weight: Tensor, rows: Rows, bits: int) -> None:
        k = 2**bits
        super().__init__(rows, bits, torch.arange(k, device=weight.device).to(weight) - (k - 1) / 2)
        self.log_clip = nn.Parameter(torch.full_like(weight[0, :1], 2.0).log())

    def scale_of(self, rows: Tensor) -> Tensor:
        k = 2**self.bits
        unit = (k - 1) / (k / 2) * rows.detach().abs().mean(dim=1)
        floor = 0.01 * channel_scale(rows.detach()).flatten()
        return torch.maximum(unit, floor) * self.log_clip.exp() / (k - 1)


class MinMaxWeight(WeightQuantizer):
    """Integer levels, the largest one for the largest weight of a row at the start. Not learned."""

    rule: ClassVar[str] = "lsq"
    scale: Tensor

    def __init__(self, weight: Tensor, rows: Rows, bits: int) -> None:
        super().__init__(rows, bits, integers(bits, weight))
        largest = torch.maximum(weight.abs().amax(dim=1), channel_scale(weight).flatten())
        self.register_buffer("scale", largest / (2 ** (bits - 1) - 1))

    def scale_of(self, rows: Tensor) -> Tensor:
        return self.scale


class _Uniform(ActivationQuantizer):
    """A uniform grid: all segments as wide as the step, which is one tensor for both sides."""

    def __init__(self, bits: int, step: float, zero_point: int) -> None:
        super().__init__(bits, step, zero_point)
        self.log_step = nn.Parameter(torch.tensor([step]).log())

    @property
    def output_scale(self) -> Tensor:
        return self.log_step.exp()

    def knots(self) -> tuple[Tensor, Tensor]:
        return self._knots(self.output_scale)

    def _knots(self, step: Tensor) -> tuple[Tensor, Tensor]:
        return -self.zero_point * step, step.expand(2**self.bits - 1)


class LSQActivation(_Uniform):
    """Learned step size: the gradient of N2UQ with equal widths and one scale is LSQ's.

    Inside the range ∂x̂/∂σ = (q − z) − x/σ, outside q − z (arXiv 1902.08153, eq. 3), multiplied
    by 1/√(N·Q_P), N being the features of a sample and Q_P the largest q − z (section 2.2 there).
    """

    def forward(self, x: Tensor) -> Tensor:
        # a tensor all along: a number would stop a GPU's queue and torch.compile's graph here
        largest = (2**self.bits - 1 - self.zero_point).clamp(min=1)
        step = scale_gradient(self.output_scale, (max(1, x.shape[1:].numel()) * largest).rsqrt())
        return activation.fake_quantize(x, *self._knots(step), step, self.zero_point)


class PACTActivation(_Uniform):
    """Learned clipping value α = n·σ: only clipped values tell it where to go.

    x̂ is the nearest grid point of y = clip(x, −z·σ, (n − z)·σ), ∂x̂/∂y = 1 (Choi et al.,
    arXiv 1805.06085, eq. 1 to 3, which is the unsigned case z = 0).
    """

    def forward(self, x: Tensor) -> Tensor:
        step = self.output_scale
        low = -self.zero_point * step
        high = low + (2**self.bits - 1) * step
        clipped = x.clamp(low.to(x.dtype), high.to(x.dtype))
        with torch.no_grad():
            quantized = super().forward(x)
        # exactly the grid point, as in codebook quantization: the bracket is an exact zero
        return quantized + (clipped - clipped.detach())


class MinMaxActivation(_Uniform):
    """The grid that it starts from, which is not learned."""

    def __init__(self, bits: int, step: float, zero_point: int) -> None:
        super().__init__(bits, step, zero_point)
        self.log_step.requires_grad_(False)
