"""The moving average of a model's weights over its training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """θ̄ ← d_t·θ̄ + (1 − d_t)·θ after each step, d_t = min(decay, (1 + t)/(10 + t)), t = 1, 2, ...

    θ̄ begins as the weights after step 0. d_t is what TensorFlow's ExponentialMovingAverage takes
    where it is told the step: a short training is not held back by the weights that it began with.
    The steps themselves are those of a training without it.

    Averaged are all parameters, learned scales and thresholds among them, and the running mean and
    variance of BatchNorms, which are taken again in any case where they are re-estimated after the
    training. Codebooks are not: their levels follow the weights by an average of their own, and
    stay still at the end; the averaged weights take the nearest of them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._live = [*model.parameters(), *_statistics(model)]
        self._mean = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are, after an optimizer step."""
        if self.steps == 0:
            torch._foreach_copy_(self._mean, self._live)
        else:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            for mean, live in _by_type(self._mean, self._live):
                get_ema_multi_avg_fn(decay)(mean, live, self.steps)
        self.steps += 1

    @torch.no_grad()
    def apply_(self) -> None:
        """Give the model its averaged weights; nothing where no step was made."""
        if self.steps:
            torch._foreach_copy_(self._live, self._mean)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        with torch.no_grad():
            torch._foreach_copy_(self._mean, state["mean"])


def _statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of all BatchNorms."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]


def _by_type(mean: list[Tensor], live: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs, those of a type and device together: torch's average wants them alike."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in zip(mean, live, strict=True):
        group = groups.setdefault((one.dtype, one.device), ([], []))
        group[0].append(one)
        group[1].append(other)
    return list(groups.values())
