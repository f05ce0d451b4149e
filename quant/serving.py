"""Layers that run packed weights: what a loaded model is made of.

    kernels    CPU                                               CUDA, ROCm
    auto       unpacked once, at the first call                  the packed kernels
    packed     unpacked at every call: little memory, slow       the packed kernels
    torch      a plain layer with a float weight: operators of ATen alone, for exporters

On a CPU `auto` computes in integers where the weight's levels are multiples of one number and the
input is quantized, provided that oneDNN's sums are exact for them and that it pays
(`packed_layers.INTEGER_TERMS`). Any other weight becomes a float one, in oneDNN's own layout where
there are many weights for each output (`packed_layers.PREPACK_RATIO`), else as torch has it.

Outputs have the dtype and the memory format of the input. Layers without a packed kernel
(transposed and one-dimensional convolutions, those with scales for parts of a channel or another
padding than zeros, subclasses, layers with hooks) are plain ones under all three.
"""

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from adq.quant.apply import attach_input_quantizer
from adq.quant.onednn import Geometry
from adq.quant.packed import KernelInput, PackedInput, PackedWeight
from adq.quant.packed_layers import PackedConv2d, PackedLinear
from adq.quant.rows import rows_of

Kernels = Literal["auto", "packed", "torch"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)


def serve(
    layer: nn.Module,
    weight: PackedWeight,
    quantizer: PackedInput | None = None,
    device: torch.device | str | None = None,
    kernels: Kernels = "auto",
) -> nn.Module:
    """What runs in the place of one layer, in eval mode; the layer itself stays as it is.

    Raises ValueError for a weight that is not this layer's.
    """
    weight = weight.fitted(layer)
    made = packed_layer(layer, weight, quantizer, kernels)
    if made is None:
        quantizer = copy.deepcopy(quantizer)
        made = unpack_(copy.deepcopy(layer), weight.values(), quantizer, kernels)
    return made.to(device or layer.get_parameter("weight").device).eval().requires_grad_(False)


def packed_layer(
    layer: nn.Module, weight: PackedWeight, quantizer: PackedInput | None, kernels: Kernels
) -> nn.Module | None:
    """The layer over its packed weight, on the CPU; None where there is none for it."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)
    if kernels == "torch" or any(hooks) or "forward" in vars(layer):
        return None
    if type(layer) is nn.Linear:
        return PackedLinear(layer, weight, quantizer, unpack=kernels == "auto")
    whole = weight.scale.numel() == rows_of(layer).channels
    if type(layer) is nn.Conv2d and whole and Geometry.of(layer) is not None:
        return PackedConv2d(layer, weight, quantizer, unpack=kernels == "auto")
    return None


def unpack_(
    layer: nn.Module, values: Tensor, quantizer: PackedInput | None, kernels: Kernels
) -> nn.Module:
    """Give a plain layer its weight and its input quantizer.

    The weight is a parameter of its own, even if another module has shared the one before.
    """
    old = layer.get_parameter("weight")
    layer.weight = nn.Parameter(values.to(old), requires_grad=False)
    if quantizer is not None:
        if kernels != "torch":
            quantizer = KernelInput.of(quantizer)
        attach_input_quantizer(layer, quantizer.to(old.device))
    return layer
