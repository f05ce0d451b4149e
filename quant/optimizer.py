"""The optimiser of a training: what it trains, how much of it decays, and its rate."""

import math
from typing import Any

import torch
from torch import nn

from adq.quant.errors import InputError
from adq.quant.modules import ActivationQuantizer, WeightQuantizer
from adq.quant.scheme import Optimizer


def schedule(step: int, total: int, warmup: float) -> float:
    """Linear rise, then half a cosine to zero; in [0, 1]."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / (rise + 1)
    # a pass may give more batches than the one that was counted: the rate then stays at its end
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))


def new_optimizer(
    model: nn.Module, kind: Optimizer, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum; InputError where there is nothing to train."""
    groups = _parameter_groups(model, weight_decay)
    if not any(group["params"] for group in groups):
        raise InputError("there is nothing to train: no parameter requires a gradient")
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    # torch refuses Nesterov without any momentum
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    quantizers = (WeightQuantizer, ActivationQuantizer)
    learned = {
        p for m in model.modules() if isinstance(m, quantizers) for p in m.parameters()
    }  # scales and thresholds: pulled to zero they would shrink the range
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.dim() < 2 or parameter in learned else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
