"""Loss and metric of a model on a data set, with the metric's standard error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.batches import Batches, batch_size, device_of, evaluating, forward, to_device
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.qat import Loss

Metric = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> one value per sample, shape (batch,); higher is better."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and mean metric over `samples` samples.

    `metric_stderr` is s/√samples with s the sample standard deviation of the per-sample metric:
    how far the mean may be off because the evaluation set is finite.
    """

    loss: float
    metric: float
    metric_stderr: float
    samples: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, loss: Loss, metric: Metric) -> Evaluation:
    """Evaluate in eval mode; a short last batch counts by its samples, not as a full one.

    Raises NonFiniteLossError on a nan or infinite loss, InputError when there is no sample or the
    metric gives anything but one value per sample.
    """
    device = device_of(model)
    total_loss, values = 0.0, []
    with evaluating(model):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            outputs = forward(model, inputs)
            n = batch_size(batch)
            total_loss += loss(outputs, targets).item() * n
            per_sample = metric(outputs, targets)
            if per_sample.shape != (n,):
                raise InputError(
                    f"the metric must give one value per sample, shape ({n},); it gave shape "
                    f"{tuple(per_sample.shape)}"
                )
            values.append(per_sample.double().cpu())
    if not values:
        raise InputError("the evaluation batches are empty: expected at least one batch")
    all_values = torch.cat(values)
    samples = all_values.numel()
    mean_loss = total_loss / samples
    if not math.isfinite(mean_loss):
        raise NonFiniteLossError(f"the evaluation loss is {mean_loss}: check the data and the loss")
    if not all_values.isfinite().all():
        raise NonFiniteLossError("the metric is nan or infinite for some sample: check the metric")
    spread = all_values.std(correction=1).item() if samples > 1 else 0.0
    return Evaluation(mean_loss, all_values.mean().item(), spread / math.sqrt(samples), samples)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target class, else 0; shape (batch,)."""
    return (outputs.argmax(dim=-1) == targets).float()
