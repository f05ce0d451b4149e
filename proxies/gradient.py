"""A gradient score per layer: the empirical Fisher information met by the quantization error.

    S[l, b] = ½ · mean_i Σ_j (∂ℓ_i/∂w_j)² · δ_j²,    δ = Q_b(w_l) − w_l,   i over samples

the diagonal of the empirical Fisher standing for the Hessian's, as in FIT (arXiv 2210.08502,
eq. 7). The same for layer inputs with δ = Q_b(x_i) − x_i. For log-likelihood losses Fisher and
Hessian agree at the optimum; the empirical Fisher (labels as given) is a coarser stand-in.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adq.proxies.base import Sensitivity, Table, layer_errors
from adq.quant.batches import (
    Batches,
    device_of,
    differentiable,
    evaluating,
    forward,
    micro_batches,
    to_device,
)
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.qat import Loss
from adq.quant.scheme import Scheme


def gradient_sensitivity(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    bits: Sequence[int],
    act_bits: Sequence[int],
    batches: Batches,
    loss: Loss,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
) -> Sensitivity:
    """Score weights at `bits` and inputs at `act_bits` from one backward pass per sample.

    The per-sample values give the standard error s/√samples. One sample at a time asks nothing of
    the model but that it runs; BatchNorm uses its stored statistics.

    Raises InputError for fewer than two samples, which have no standard error.
    """
    started = time.monotonic()
    names = [layer.name for layer in layers]
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    errors = layer_errors(model, names, bits, scheme)
    squared_errors = [error.square().flatten(1) for error in errors]
    wanted = dict.fromkeys(names, act_bits) if act_bits else {}
    ranges = input_ranges(model, wanted, batches, scheme.act)

    inputs_of: dict[str, list[Tensor]] = {}

    def keep_input(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # A copy: the gradient is then that of this layer's use of the input alone, without
            # the skip connection beside it, and no later in-place operation can touch it.
            x = args[0].clone() if args[0].requires_grad else args[0].detach().requires_grad_()
            inputs_of.setdefault(name, []).append(x)
            return (x, *args[1:])

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep_input(n)) for n in names]
    device = device_of(model)
    weight_rows: list[list[list[float]]] = []  # (samples, layers, bits)
    act_rows: list[list[list[float]]] = []
    try:
        with evaluating(model), differentiable(weights):
            for sample in micro_batches(batches, 1):
                inputs, targets = to_device(sample, device)
                inputs_of.clear()
                value = loss(forward(model, inputs), targets)
                kept = [(name, x) for name in names for x in inputs_of[name]]
                grads = torch.autograd.grad(
                    value,
                    weights + ([x for _, x in kept] if act_bits else []),
                    materialize_grads=True,  # zero for a layer that the loss never meets
                )
                weight_rows.append(
                    [
                        (0.5 * (d @ g.flatten().square())).tolist()
                        for d, g in zip(squared_errors, grads, strict=False)
                    ]
                )
                if act_bits:
                    scores = {name: [0.0] * len(act_bits) for name in names}
                    for (name, x), g in zip(kept, grads[len(weights) :], strict=True):
                        for j, b in enumerate(act_bits):
                            error = _input_error(x, b, *ranges[name, b])
                            scores[name][j] += 0.5 * (g * error).square().sum().item()
                    act_rows.append([scores[name] for name in names])
    finally:
        for handle in hooks:
            handle.remove()
    if len(weight_rows) < 2:
        raise InputError(
            f"expected at least 2 samples, to know their spread; got {len(weight_rows)}"
        )
    weight = _table(names, bits, weight_rows)
    act = _table(names, act_bits, act_rows) if act_bits else None
    return Sensitivity("fisher", weight, act, len(weight_rows), time.monotonic() - started)


def _input_error(x: Tensor, bits: int, step: float, zero_point: int) -> Tensor:
    x = x.detach()
    code = (x / step + zero_point).round().clamp(0, 2**bits - 1)
    return (code - zero_point) * step - x


def _table(names: Sequence[str], bits: Sequence[int], rows: list[list[list[float]]]) -> Table:
    values = np.array(rows, dtype=np.float64)  # (samples, layers, bits)
    samples = len(values)
    stderr = values.std(axis=0, ddof=1) / samples**0.5
    return Table(tuple(names), tuple(bits), values.mean(axis=0), stderr)
