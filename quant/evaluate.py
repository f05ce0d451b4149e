"""Loss and metric of a model on a data set, with the metric's standard error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.batches import (
    Batch,
    Batches,
    batch_size,
    device_of,
    evaluating,
    forward,
    loaded,
    ready,
)
from adq.quant.errors import InputError, NonFiniteLossError
from adq.quant.parallel import group_of
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
def evaluate(
    model: nn.Module, batches: Batches, loss: Loss, metric: Metric, *, parallel: bool = False
) -> Evaluation:
    """Evaluate in eval mode; a short last batch counts by its samples, not as a full one.

    With `parallel`, the ranks of torch.distributed's process group deal the batches out among them,
    each whole, and all return what one process would, to the bit on equal devices. All must call
    this with the same model, batches and random state.

    Raises NonFiniteLossError on a nan or infinite loss, InputError when there is no sample or the
    metric gives anything but one value per sample.
    """
    device = device_of(model)
    group = group_of(parallel, device)

    def own() -> list[tuple[int, float, Tensor]]:
        with evaluating(model):
            return [
                (number, *_results(model, ready(batch, batches, device), loss, metric))
                for number, batch in group.deal(loaded(batches))
            ]

    found = sorted(chain(*group.gather(own)), key=itemgetter(0))
    if not found:
        raise InputError("the evaluation batches are empty: expected at least one batch")
    if found[-1][0] != len(found) - 1:
        raise InputError("the ranks have different numbers of batches: give all the same")
    all_values = torch.cat([values for _, _, values in found])
    samples = all_values.numel()
    mean_loss = sum(total for _, total, _ in found) / samples
    if not math.isfinite(mean_loss):
        raise NonFiniteLossError(f"the evaluation loss is {mean_loss}: check the data and the loss")
    if not all_values.isfinite().all():
        raise NonFiniteLossError("the metric is nan or infinite for some sample: check the metric")
    spread = all_values.std(correction=1).item() if samples > 1 else 0.0
    return Evaluation(mean_loss, all_values.mean().item(), spread / math.sqrt(samples), samples)


def _results(model: nn.Module, batch: Batch, loss: Loss, metric: Metric) -> tuple[float, Tensor]:
    """The sum of the loss over the batch's samples and their metric, float64."""
    inputs, targets = batch
    outputs = forward(model, inputs)
    n = batch_size(batch)
    per_sample = metric(outputs, targets)
    if per_sample.shape != (n,):
        raise InputError(
            f"the metric must give one value per sample, shape ({n},); it gave shape "
            f"{tuple(per_sample.shape)}"
        )
    return loss(outputs, targets).item() * n, per_sample.double().cpu()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the target class, else 0; shape (batch,)."""
    return (outputs.argmax(dim=-1) == targets).float()
