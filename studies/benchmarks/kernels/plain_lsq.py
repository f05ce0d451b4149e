"""LSQ as its paper writes it, in plain PyTorch: what a user would have without this package.

Esser et al. (arXiv 1902.08153), section 2 and appendix A: one learned step per tensor,

    v̂ = round(clip(v/s, −Q_N, Q_P))·s

with the straight-through estimator for `round`, autograd for everything else, and the gradient of
s multiplied by g = 1/√(N·Q_P), N being the weights of the layer or the features of one sample.
Weights are signed, inputs unsigned (they come out of ReLUs here). Steps start at 2·mean|v|/√Q_P,
that of an input from the first batch. No operator, hook or class of `adq` is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def round_straight_through(v: Tensor) -> Tensor:
    """round(v), with the gradient of v."""
    return v + (v.round() - v).detach()


def scale_gradient(s: Tensor, factor: float) -> Tensor:
    """s, with its gradient multiplied by `factor`."""
    scaled = s * factor
    return scaled + (s - scaled).detach()


class LSQ(nn.Module):
    """Fake-quantizes a weight (a parametrization) or an input."""

    def __init__(self, bits: int, signed: bool, v: Tensor) -> None:
        super().__init__()
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        features = v.numel() if signed else v[0].numel()
        self.factor = (features * self.high) ** -0.5
        self.step = nn.Parameter(2 * v.detach().abs().mean() / self.high**0.5)

    def forward(self, v: Tensor) -> Tensor:
        step = scale_gradient(self.step, self.factor)
        return round_straight_through((v / step).clamp(self.low, self.high)) * step


def quantize_plainly_(
    model: nn.Module, weight: Mapping[str, int], act: Mapping[str, int], images: Tensor
) -> nn.Module:
    """Put LSQ on the weights and inputs of these layers; `images` start the inputs' steps."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            inputs[name] = args[0]

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in act:
        note(name)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for name, bits in weight.items():
        layer = model.get_submodule(name)
        w = layer.weight
        assert isinstance(w, Tensor)
        if name in act:
            layer.add_module("input_lsq", LSQ(act[name], False, inputs[name]))
            layer.register_forward_pre_hook(lambda layer, args: (layer.input_lsq(args[0]),))
        parametrize.register_parametrization(layer, "weight", LSQ(bits, True, w))
    return model
