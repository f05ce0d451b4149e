"""Which layers of a model can be quantized, found by running it once."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.batches import evaluating, first_tensor, forward
from adq.quant.errors import InputError
from adq.quant.rows import TRANSPOSED, rows_of

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear, *TRANSPOSED)


@dataclass(frozen=True)
class LayerInfo:
    """One quantizable layer, as a forward pass met it.

    `macs` counts multiply-accumulates per sample: weights times output positions. `input_shape`
    leaves the batch dimension out.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    macs: int
    out_channels: int

    @property
    def weight_numel(self) -> int:
        return prod(self.weight_shape)

    def scales(self, group_size: int | None = None) -> int:
        """How many scales the weight has: one a channel, or one for `group_size` weights."""
        size = self.weight_numel // self.out_channels
        if group_size is None or size % group_size:
            return self.out_channels
        return self.weight_numel // group_size


def trace_layers(model: nn.Module, inputs: Any) -> tuple[LayerInfo, ...]:
    """The layers with a weight to quantize that a forward pass runs, in the order it runs them:
    convolutions in one and two dimensions, transposed ones too, and Linear.

    A layer called several times is listed once, with the MACs of all its calls. Layers that the
    pass never reaches, and layers that share one weight tensor with another module (tied
    embeddings), are left out: they stay in FP32.

    Raises InputError when fewer than three layers are found, since first and last are pinned, and
    when one is given its input by keyword, which hooks of its input do not see.
    """
    names = {module: name for name, module in model.named_modules()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    samples = first_tensor(inputs).shape[0]
    found: dict[str, LayerInfo] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not args:
            raise InputError(
                f"layer {names[module]!r} is called with its input by keyword: write "
                "layer(x), not layer(input=x)"
            )
        weight = module.weight
        assert isinstance(weight, Tensor)
        channels = rows_of(module).channels
        # a weight meets every output position, in a transposed convolution every input position
        met, of = (
            (args[0], weight.shape[0]) if isinstance(module, TRANSPOSED) else (output, channels)
        )
        macs = weight.numel() * (met.numel() // (samples * of))
        name = names[module]
        if name in found:
            macs += found[name].macs
        found[name] = LayerInfo(
            name=name,
            kind=type(module).__name__,
            weight_shape=tuple(weight.shape),
            input_shape=tuple(args[0].shape[1:]),
            macs=macs,
            out_channels=channels,
        )

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, QUANTIZABLE) and owners.get(id(module.weight)) == 1
    ]
    try:
        with evaluating(model), torch.no_grad():
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < 3:
        raise InputError(
            f"{type(model).__name__} runs {len(found)} convolutions or Linear layers; a search "
            "needs at least 3 (the first and the last are pinned)"
        )
    return tuple(found.values())
