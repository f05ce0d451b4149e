"""Learning from the class scores of a teacher (Hinton et al., arXiv 1503.02531)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def distils(outputs: Any, targets: Any) -> bool:
    """Whether outputs are class scores (N, C, ...) for whole-number targets (N, ...), C >= 2."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.is_floating_point()
        and outputs.dim() >= 2
        and outputs.shape[1] >= 2
        and targets.dtype in (torch.int64, torch.int32, torch.uint8)
        and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    )


def distillation_loss(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(outputs/T)) over dimension 1, mean over the rest."""
    log_p = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
    log_q = F.log_softmax(outputs.float() / temperature, dim=1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2
