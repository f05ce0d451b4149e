"""Statistics of a model gathered from data, by explicit calls: input samples, BatchNorm."""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.activation import fit_range, full_range
from adq.quant.batches import Batches, device_of, evaluating, forward, to_device
from adq.quant.errors import InputError
from adq.quant.scheme import ActMethod

SAMPLE_VALUES = 2**15  # input values kept per layer: enough for a range to 1 part in 100
CALIBRATION_BATCHES = 8


@torch.no_grad()
def input_samples(
    model: nn.Module, layers: Sequence[str], batches: Batches, limit: int = CALIBRATION_BATCHES
) -> dict[str, Tensor]:
    """Values that enter each named layer, about 32,768 each at most, evenly taken from the batches.

    Runs `limit` batches in eval mode. The minimum and maximum of every call are always kept, so
    that thinning out never narrows the range. Raises InputError for a layer that got no input.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...]) -> None:
            flat = args[0].detach().flatten().float()
            # rounded up to odd: an even stride would meet the same column of every feature map
            stride = -(-flat.numel() * limit // SAMPLE_VALUES) | 1
            parts[name] += [flat[::stride], flat.min().reshape(1), flat.max().reshape(1)]

        return record

    hooks = [model.get_submodule(n).register_forward_pre_hook(recorder(n)) for n in layers]
    device = device_of(model)
    try:
        with evaluating(model):
            for index, (inputs, _) in enumerate(batches):
                if index == limit:
                    break
                forward(model, to_device(inputs, device))
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name, values in parts.items() if not values]:
        raise InputError(
            f"no calibration input reached {', '.join(missing)}: are the batches empty, or is the "
            "layer never run?"
        )
    return {name: torch.cat(values) for name, values in parts.items()}


Ranges = Mapping[tuple[str, int], tuple[float, int]]
"""(layer, bits of its input) -> (step, zero_point) of the uniform grid that it starts from."""


def input_ranges(
    model: nn.Module,
    act_bits: Mapping[str, Sequence[int]],
    batches: Batches,
    method: ActMethod = "n2uq",
) -> Ranges:
    """The uniform grid that each named layer's input starts from, at each of its bit-widths.

    That of least squared error, but for `minmax` the one that spans all values.

    They follow from the FP32 model and the batches alone: a search measures them once for all its
    candidates.
    """
    if not act_bits:
        return {}
    samples = input_samples(model, list(act_bits), batches)
    fit = full_range if method == "minmax" else fit_range
    return {
        (name, bits): fit(samples[name], bits)
        for name, widths in act_bits.items()
        for bits in widths
    }


@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, batches: Batches, limit: int = 16) -> None:
    """Set each BatchNorm's running mean and variance to their plain average over `limit` batches.

    Quantization shifts the activations, and the exponential average of a short fine-tuning still
    remembers the start; see Sun et al., "Hybrid 8-bit FP8", section 3.2, and Nagel et al.,
    arXiv 2203.11086, section 4.1. Does nothing to a model without BatchNorm.

    Raises InputError when there is no batch; the statistics are then unchanged.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats]
    if not norms:
        return
    leading = islice(batches, limit)
    first = next(leading, None)
    if first is None:
        raise InputError("the batches for BatchNorm are empty: expected at least one batch")
    momenta = [m.momentum for m in norms]
    device = device_of(model)
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for inputs, _ in chain([first], leading):
                forward(model, to_device(inputs, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
