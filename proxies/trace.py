"""Hessian trace per layer by Hutchinson's estimator, and the HAWQ-V2 score made of it.

For a probe v of independent ±1 entries, E[v_lᵀ (H v)_l] = tr(H_ll) for every layer's block l at
once: the cross terms v_lᵀ H_lm v_m have mean zero (Hutchinson 1989; Dong et al., HAWQ-V2,
arXiv 1911.03852, eq. 7). One Hessian-vector product thus samples the trace of every layer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adq.proxies.base import Array, Sensitivity, Table, layer_errors
from adq.quant.batches import (
    Batches,
    batch_size,
    device_of,
    differentiable,
    evaluating,
    forward,
    to_device,
)
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.qat import Loss
from adq.quant.scheme import Scheme


@dataclass(frozen=True)
class TraceEstimate:
    """Traces of the diagonal blocks of the Hessian of the mean loss, shape (layers,)."""

    trace: Array
    stderr: Array
    probes: int


def hutchinson_trace(
    model: nn.Module,
    weights: Sequence[Tensor],
    batches: Batches,
    loss: Loss,
    probes: int,
    seed: int,
) -> TraceEstimate:
    """tr(H_l) for each of `weights`, H being the Hessian of the mean loss over all samples.

    Batches count by their samples, BatchNorm runs on its stored statistics. The standard error is
    that of the mean over the probes: it covers the estimator's noise, not the choice of data. The
    graph of the gradient is built once a batch and used by all probes.

    Raises InputError for fewer than two probes, which have no standard error, or without samples.
    """
    if probes < 2:
        raise InputError(f"expected at least 2 probes, to know their spread; got {probes}")
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    vectors = [
        [_rademacher(w, generator) for w in weights]  # (probes, layers) of tensors
        for _ in range(probes)
    ]
    estimates = torch.zeros(probes, len(weights), dtype=torch.float64)
    samples = 0
    with evaluating(model), differentiable(weights):
        for batch in batches:
            inputs, targets = to_device(batch, device)
            n = batch_size(batch)
            value = loss(forward(model, inputs), targets)
            gradients = torch.autograd.grad(
                value, weights, create_graph=True, materialize_grads=True
            )
            # a linear path, or a weight that the loss never meets, leaves a gradient that depends
            # on no weight; autograd must be told that its derivative is zero
            gradients = tuple(
                g if g.requires_grad else g + 0 * w for g, w in zip(gradients, weights, strict=True)
            )
            for p, v in enumerate(vectors):
                products = torch.autograd.grad(
                    gradients, weights, v, retain_graph=p + 1 < probes, materialize_grads=True
                )
                for layer, (hv, vl) in enumerate(zip(products, v, strict=True)):
                    estimates[p, layer] += n * (hv * vl).sum().item()
            samples += n
    if samples == 0:
        raise InputError("the batches for the Hessian trace are empty: expected at least one batch")
    estimates /= samples
    return TraceEstimate(
        estimates.mean(dim=0).numpy(),
        (estimates.std(dim=0, correction=1) / probes**0.5).numpy(),
        probes,
    )


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.float32)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def trace_sensitivity(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    bits: Sequence[int],
    batches: Batches,
    loss: Loss,
    probes: int = 32,
    seed: int = 0,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
) -> Sensitivity:
    """S[l, b] = ½ · tr(H_l)/n_l · ‖Q_b(w_l) − w_l‖², HAWQ-V2's Ω with the ½ of Taylor's series.

    A negative trace (possible away from a minimum, or by noise) scores its layer zero.
    """
    started = time.monotonic()
    weights = [model.get_parameter(f"{layer.name}.weight") for layer in layers]
    estimate = hutchinson_trace(model, weights, batches, loss, probes, seed)
    errors = np.array(
        [
            error.double().square().flatten(1).sum(dim=1).tolist()
            for error in layer_errors(model, [layer.name for layer in layers], bits, scheme)
        ]
    )
    factor = errors / (2 * np.array([[layer.weight_numel] for layer in layers]))
    table = Table(
        tuple(layer.name for layer in layers),
        tuple(bits),
        np.maximum(estimate.trace, 0.0)[:, None] * factor,
        estimate.stderr[:, None] * factor,
    )
    return Sensitivity("hessian-trace", table, None, probes, time.monotonic() - started)
