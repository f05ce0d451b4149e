"""The training loop: FP32 training and quantization-aware fine-tuning alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.apply import quantized_layers, update_codebooks
from adq.quant.batches import Batches, batch_size, device_of, forward, seeded, to_device
from adq.quant.errors import InputError, NonFiniteLossError

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> mean loss of the batch, a scalar."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are those of a short fine-tuning.

    epochs           passes over the training batches
    lr               peak learning rate of AdamW; cosine decay to zero, per step
    weight_decay     of weights with two or more dimensions; scales, thresholds and biases get none
    warmup           fraction of the steps over which the rate rises linearly
    codebook_decay   γ of the codebooks' moving average
    codebook_freeze  last fraction of the steps in which codebooks stay still
    """

    epochs: int
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    codebook_decay: float = 0.95
    codebook_freeze: float = 0.25


def train_(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    config: TrainingConfig,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place; returns the mean training loss of each epoch.

    Codebooks of quantized layers follow the weights after every step. Everything random (data
    order, augmentation, dropout) comes from `seed` and the epoch's number, so that a run repeats.

    Raises NonFiniteLossError at the first step whose loss is nan or infinite.
    """
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay), lr=config.lr, fused=True
    )
    quantized = any(True for _ in quantized_layers(model))
    device = device_of(model)
    losses: list[float] = []
    steps_per_epoch = _count(batches, seed)
    if steps_per_epoch == 0:
        raise InputError("the training batches are empty: expected at least one batch")
    total = config.epochs * steps_per_epoch
    step = 0
    model.train()
    for epoch in range(config.epochs):
        epoch_loss, samples = 0.0, 0
        with seeded(seed * 10_007 + epoch):
            for batch in batches:
                inputs, targets = to_device(batch, device)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * _schedule(step, total, config.warmup)
                value = loss(forward(model, inputs), targets)
                number = value.item()
                if not math.isfinite(number):
                    raise NonFiniteLossError(
                        f"the training loss became {number} in epoch {epoch + 1}, step "
                        f"{step % steps_per_epoch + 1}: check the data and the loss, or lower the "
                        f"learning rate ({config.lr:g})"
                    )
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                if quantized and step < (1 - config.codebook_freeze) * total:
                    update_codebooks(model, config.codebook_decay)
                n = batch_size(batch)
                epoch_loss, samples, step = epoch_loss + number * n, samples + n, step + 1
        if samples == 0:
            raise InputError(
                f"the training batches gave nothing in epoch {epoch + 1}: they must be iterable "
                "again and again, which a generator is not"
            )
        losses.append(epoch_loss / samples)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    model.eval()
    return losses


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear rise, then half a cosine to zero; in (0, 1]."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_scale = name.rpartition(".")[2].startswith("log_")
            (plain if parameter.dim() < 2 or is_scale else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _count(batches: Batches, seed: int) -> int:
    """The number of batches in a pass: by `len`, or by going through them once."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        with seeded(seed):
            return sum(1 for _ in batches)
