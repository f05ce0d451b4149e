"""BatchNorm in training over the samples of several ranks, on CPUs and GPUs alike.

With n, Σ over the samples and places of all ranks, x̂ = (x − μ)/√(σ² + ε), y = γx̂ + β:

    μ = Σx/n   σ² = Σ(x − μ)²/n
    ∂L/∂x = γ/√(σ² + ε)·(g − Σg/n − x̂·Σ(g·x̂)/n),   g = ∂L/∂y

(Ioffe & Szegedy, arXiv 1502.03167). Each rank's own μ and σ² are brought together exactly (Chan et
al., 1983, eq. 2.1), in double precision and one exchange of 2·channels + 1 numbers; the backward
pass takes another of 2·channels. γ and β get the rank's own part of their gradient.

torch's SyncBatchNorm takes no CPU tensors, and would replace the modules.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adq.quant.parallel import Group


class BatchNormOverRanks(TorchFunctionMode):
    """While active, F.batch_norm with the statistics of the batch takes those of all ranks' share.

    Whatever module calls it keeps its own rules (momentum, running statistics, eval mode). With
    `counts` False this rank's samples are left out of the statistics.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group, self.counts = group, True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.no_grad():
            mean, var, n = self._moments(input, dtype)
            if input.numel() <= input.shape[1] and n <= 1:
                raise ValueError("BatchNorm expected more than one value per channel in training")
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
        inverse = (var + eps).rsqrt()
        output: Tensor = _Normalize.apply(
            input,
            weight,
            bias,
            mean.to(dtype),
            inverse.to(dtype),
            n if self.counts else None,
            self.group,
        )
        return output

    def _moments(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """μ and σ² of each channel over all ranks, float64, and n."""
        var, mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
        n = x.numel() // x.shape[1] if self.counts else 0
        row = torch.cat([mean.double(), var.double(), mean.new_tensor([n], dtype=torch.float64)])
        if not self.counts:
            row.zero_()
        table = self.group.rows(row)
        means, variances, sizes = table.split([x.shape[1], x.shape[1], 1], dim=1)
        total = sizes.sum()
        mean = (sizes * means).sum(0) / total
        var = (sizes * (variances + (means - mean).square())).sum(0) / total
        return mean, var, total


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    return channels.view(1, -1, *[1] * (like.dim() - 2))


class _Normalize(torch.autograd.Function):
    """y of x, γ, β, μ, 1/√(σ² + ε) and n, which is None where x is not part of μ and σ²."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        n: Tensor | None,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, n)
        ctx.bias_dtype, ctx.group = None if bias is None else bias.dtype, group
        y = (x - _wide(mean, x)) * _wide(inverse if weight is None else inverse * weight, x)
        if bias is not None:
            y += _wide(bias, x)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, mean, inverse, n = ctx.saved_tensors
        g = gradient.to(mean.dtype)
        normal = (x - _wide(mean, x)) * _wide(inverse, x)
        d_bias, d_weight = g.sum(_others(x)), (g * normal).sum(_others(x))
        d_x = None
        if ctx.needs_input_grad[0]:
            sums = ctx.group.sum_(torch.stack([d_bias, d_weight]))
            if n is not None:
                sums = (sums / n).to(g.dtype)
                g = g - _wide(sums[0], x) - normal * _wide(sums[1], x)
            d_x = g * _wide(inverse if weight is None else inverse * weight, x)
            d_x = d_x.to(x.dtype)
        return (
            d_x,
            d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            d_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )
