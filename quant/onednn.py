"""oneDNN's kernels for CPUs that PyTorch ships, and that no layer of torch.nn reaches.

- floats: a convolution whose weight is laid out for the processor once, not at every call
- integers: u8 inputs, s8 weights with a scale for each output channel, sums in 32 bits, float32 out

A processor without VNNI adds pairs of integer products in saturating 16 bits: see `exact`.
"""

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]

X86 = ("x86_64", "AMD64")
INT16_MAX = 2**15 - 1
INT32_MAX = 2**31 - 1
# an output in float32, without a scale of its own, and nothing fused behind
_TAIL: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


class Geometry(NamedTuple):
    """What a convolution is but for its weight."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @staticmethod
    def of(layer: nn.Module) -> "Geometry | None":
        """A convolution's; None where it pads with other numbers than zero, or unevenly."""
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            return None
        dilation: Any = layer.dilation
        if padding == "valid":
            padding = [0] * len(dilation)
        elif padding == "same":
            sizes: Any = layer.kernel_size
            total = [d * (k - 1) for d, k in zip(dilation, sizes, strict=True)]
            if any(t % 2 for t in total):
                return None
            padding = [t // 2 for t in total]
        stride: Any = layer.stride
        groups: Any = layer.groups
        return Geometry(list(stride), list(padding), list(dilation), groups)


def has_floats() -> bool:
    found: Any = torch.backends.mkldnn
    reorder = hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    return bool(found.is_available() and found.enabled and reorder)


def has_integers() -> bool:
    return platform.machine() in X86 and hasattr(torch.ops.onednn, "qconv_pointwise")


def exact(weight_max: int, input_max: int, terms: int) -> bool:
    """Whether integer sums are right, whatever the numbers: |weights| and inputs up to these.

    Without VNNI two neighbouring products are added in 16 bits: 2·127·129 no longer fits.
    """
    if terms * weight_max * input_max > INT32_MAX:
        return False
    return torch.cpu._is_vnni_supported() or 2 * weight_max * input_max <= INT16_MAX


def float_conv2d(
    weight: Tensor, bias: Tensor | None, geometry: Geometry, shape: tuple[int, ...]
) -> Call:
    """A convolution in float32; `shape` is that of a typical input, any other works as well."""
    stride, padding, dilation, groups = geometry
    prepared = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), padding, stride, dilation, groups, list(shape)
    )
    run = torch.ops.mkldnn._convolution_pointwise.default
    return lambda x: run(x, prepared, bias, padding, stride, dilation, groups, "none", [], "")


def integer_linear(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    zero_point: int,
    shape: tuple[int, ...],
) -> Call:
    """u8 (..., K) -> float32 (..., N): x_scale·scale[n]·Σ_k codes[n, k]·(u[k] − zero_point) + bias.

    Shapes: codes (N, K) int8, scale (N,) float32; `shape` is that of a typical input.
    """
    prepared = torch.ops.onednn.qlinear_prepack(codes, list(shape))
    zeros = torch.zeros(len(codes), dtype=torch.long)
    run = torch.ops.onednn.qlinear_pointwise.default
    return lambda u: run(u, x_scale, zero_point, prepared, scale, zeros, bias, *_TAIL)


def integer_conv(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    zero_point: int,
    geometry: Geometry,
    shape: tuple[int, ...],
) -> Call:
    """The same for convolutions in one and two dimensions; fastest on channels-last inputs.

    What lies outside of the input is `zero_point`, that is 0.
    """
    stride, padding, dilation, groups = geometry
    prepared = torch.ops.onednn.qconv_prepack(
        codes, scale, x_scale, zero_point, stride, padding, dilation, groups, list(shape)
    )
    zeros = torch.zeros(len(codes), dtype=torch.long)
    run = torch.ops.onednn.qconv_pointwise.default
    rest = (stride, padding, dilation, groups, *_TAIL)
    return lambda u: run(u, x_scale, zero_point, prepared, scale, zeros, bias, *rest)
