"""Linear and convolution layers that hold their weight packed, and run it by what is fastest.

On a CPU they unpack at the first call: to integers where the levels are multiples of one number,
the input is quantized, oneDNN's sums are exact and the layer is of a shape where that pays, else to
floats. On a GPU the packed kernels run, in integers where levels are uniform and the input is
quantized.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant import onednn
from adq.quant.kernels import packed_reference as reference
from adq.quant.onednn import Call, Geometry
from adq.quant.packed import (
    Float32Buffers,
    KernelInput,
    PackedInput,
    PackedWeight,
    is_channels_last,
)

INT8_MAX = 127
SMALL_MACS = 2**20
"""Multiply-accumulates of a sample below which oneDNN's calls, which take some 40 µs longer than
torch's own, do not pay. This and the next three were measured on an AVX2 core."""

INTEGER_TERMS = 256
"""Products in an output of a convolution from which integers are faster: below, the layout that
they want costs more than they save."""

INTEGER_LINEAR_TERMS = 256 if torch.cpu._is_vnni_supported() else 2**62
"""The same for Linear layers: without VNNI their integers are never faster."""

PREPACK_RATIO = 4
"""Weights for each output of a sample from which a convolution in oneDNN's own layout is faster."""


class _PackedLayer(Float32Buffers):
    """A layer that holds its weight as words, see `adq.quant.kernels.packed_reference`.

    words      int32, the codes of `bits` bits in the kernels' layout
    codebook   float32 (2^bits,)
    scale      float32 (N, G)
    bias       (N,), or None
    input_quantizer   a KernelInput, where the input is quantized

    What runs is made at the first call, for its device and dtype, and made anew after the module
    is moved, cast or loaded. Nothing here has a derivative.
    """

    in_float32 = ("codebook", "scale")
    words: Tensor
    codebook: Tensor
    scale: Tensor
    bias: nn.Parameter | None
    input_quantizer: KernelInput | None

    def __init__(
        self,
        codes: Tensor,
        weight: PackedWeight,
        scale: Tensor,
        bias: Tensor | None,
        quantizer: PackedInput | None,
        unpack: bool,
    ) -> None:
        super().__init__()
        self.bits, self.unpack = weight.bits, unpack
        self.register_buffer("words", reference.arrange(codes, weight.bits))
        self.register_buffer("codebook", weight.codebook.clone())
        self.register_buffer("scale", scale.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self.input_quantizer = None if quantizer is None else KernelInput.of(quantizer)
        self.forget()

    def forget(self) -> None:
        """What was made from the buffers is made anew at the next call."""
        self._run: Call | None = None
        self._dtype: torch.dtype | None = None
        self._dense: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> "_PackedLayer":
        super()._apply(fn, recurse)
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: not the weights in oneDNN's layout."""
        return {**self.__dict__, "_run": None, "_dtype": None, "_dense": None}

    @property
    def weight(self) -> Tensor:
        """The weight in the layer's shape and float32, for code that reads it. Made anew each time,
        unless this layer computes with it."""
        return self._values(torch.float32) if self._dense is None else self._dense

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.numel() == 0:
            return self._packed(x)
        run = self._run
        if run is None or self._dtype != x.dtype:
            with torch.inference_mode(False), torch.no_grad():
                run = self._made(x)
            self._run, self._dtype = run, x.dtype
        return run(x)

    def _made(self, x: Tensor) -> Call:
        """What runs on inputs like this one."""
        if x.device.type != "cpu" or not self.unpack:
            return self._packed_integer() or self._packed
        integers, prepacked = self._pays(x)
        call = self._integer(x) if integers else None
        return call or (self._float(x) if prepacked else self._plain(x))

    def _integers(self) -> tuple[Tensor, Tensor, float, int] | None:
        """(codes as int8 in the layer's shape, scale (N,), input scale, input zero point) with
        which oneDNN computes exactly; None where it does not."""
        quantizer = self.input_quantizer
        if quantizer is None or not onednn.has_integers() or self.scale.shape[1] != 1:
            return None
        found = multiples(self.codebook)
        zero_point = float(quantizer.zero_point)
        if found is None or zero_point != round(zero_point) or not 0 <= zero_point <= 255:
            return None
        unit, factors = found
        input_max = max(quantizer.thresholds.numel(), int(zero_point))
        codes = factors.to(torch.int8)[self._codes().int()]
        if not onednn.exact(int(factors.abs().max()), input_max, codes[0].numel()):
            return None
        return codes, self.scale[:, 0] * unit, float(quantizer.scale), int(zero_point)

    def _quantized(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def _codes(self) -> Tensor:
        """uint8, in the layer's shape."""
        raise NotImplementedError

    def _values(self, dtype: torch.dtype) -> Tensor:
        """The weight in the layer's shape."""
        raise NotImplementedError

    def _pays(self, x: Tensor) -> tuple[bool, bool]:
        """Whether oneDNN's integers pay on such inputs, and its layout for floats, whatever the
        batch: a layer computes the same for all."""
        raise NotImplementedError

    def _integer(self, x: Tensor) -> Call | None:
        """oneDNN's integers on a CPU."""
        raise NotImplementedError

    def _float(self, x: Tensor) -> Call:
        """The unpacked weight in the processor's layout."""
        return self._plain(x)

    def _plain(self, x: Tensor) -> Call:
        """The unpacked weight."""
        raise NotImplementedError

    def _packed_integer(self) -> Call | None:
        """The packed kernels' integers."""
        raise NotImplementedError

    def _packed(self, x: Tensor) -> Tensor:
        """The packed kernels' floats."""
        raise NotImplementedError

    def _uniform(self) -> tuple[float, float, KernelInput] | None:
        """(step, offset, input) where the packed kernels have integers for them."""
        quantizer, levels = self.input_quantizer, reference.uniform_levels(self.codebook)
        if quantizer is None or levels is None or self.scale.shape[1] != 1:
            return None
        if not reference.integer_supported(float(quantizer.zero_point), self._row()):
            return None
        return *levels, quantizer

    def _row(self) -> int:
        """Weights of an output channel, K."""
        raise NotImplementedError


class PackedLinear(_PackedLayer):
    """nn.Linear over packed weights: x (..., in_features) -> (..., out_features)."""

    def __init__(
        self,
        layer: nn.Linear,
        weight: PackedWeight,
        quantizer: PackedInput | None = None,
        unpack: bool = True,
    ) -> None:
        n, k = layer.out_features, layer.in_features
        codes = weight.matrix().view(n, k)
        super().__init__(codes, weight, weight.scale.view(n, -1), layer.bias, quantizer, unpack)
        self.in_features, self.out_features = k, n

    def _row(self) -> int:
        return self.in_features

    def _codes(self) -> Tensor:
        return reference.restore(self.words, self.bits, self.out_features, self.in_features)

    def _values(self, dtype: torch.dtype) -> Tensor:
        return reference.dequantize(
            self.words, self.codebook, self.scale, self.bits, self.in_features, dtype
        )

    def _integer(self, x: Tensor) -> Call | None:
        found, quantizer = self._integers(), self.input_quantizer
        if found is None or quantizer is None:
            return None
        bias = None if self.bias is None else self.bias.float()
        call = onednn.integer_linear(*found[:2], bias, *found[2:], tuple(x.shape))
        if x.dtype == torch.float32:
            return lambda x: call(quantizer.codes(x))
        return lambda x: call(quantizer.codes(x)).to(x.dtype)

    def _pays(self, x: Tensor) -> tuple[bool, bool]:
        return self.in_features >= INTEGER_LINEAR_TERMS, False

    def _plain(self, x: Tensor) -> Call:
        dense = self._dense = self._values(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.input_quantizer is None:
            return lambda x: F.linear(x, dense, bias)
        quantized = self.input_quantizer.call()
        return lambda x: F.linear(quantized(x), dense, bias)

    def _packed_integer(self) -> Call | None:
        from adq.quant.kernels import packed_ops

        found = self._uniform()
        if found is None:
            return None
        step, offset, quantizer = found
        sums = reference.code_sums(self._codes(), self.bits)

        def run(x: Tensor) -> Tensor:
            q = quantizer.codes(x)
            return packed_ops.linear_int(
                *(q, self.words, step, offset, self.scale, sums, self.bias),
                *(quantizer.scale, quantizer.zero_point, self.bits, x.dtype),
            )

        return run

    def _packed(self, x: Tensor) -> Tensor:
        from adq.quant.kernels import packed_ops

        return packed_ops.linear(
            self._quantized(x), self.words, self.codebook, self.scale, self.bias, self.bits
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class PackedConv2d(_PackedLayer):
    """nn.Conv2d over packed weights: x (B, C, H, W) or (C, H, W)."""

    def __init__(
        self,
        layer: nn.Conv2d,
        weight: PackedWeight,
        quantizer: PackedInput | None = None,
        unpack: bool = True,
    ) -> None:
        geometry = Geometry.of(layer)
        assert geometry is not None
        n = layer.out_channels
        codes = weight.matrix().view(layer.weight.shape).permute(0, 2, 3, 1).reshape(n, -1)
        super().__init__(codes, weight, weight.scale.view(n, 1), layer.bias, quantizer, unpack)
        self.in_channels, self.out_channels = layer.in_channels, n
        self.kernel_size, self.geometry = layer.kernel_size, geometry
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.padding_mode = layer.padding, layer.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x[None])[0]
        return super().forward(x)

    def _row(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1] * self.in_channels // self.groups

    def _shaped(self, rows: Tensor) -> Tensor:
        """(O, kh·kw·C/groups) -> (O, C/groups, kh, kw)."""
        return rows.view(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)

    def _codes(self) -> Tensor:
        codes = reference.restore(self.words, self.bits, self.out_channels, self._row())
        return self._shaped(codes).contiguous()

    def _values(self, dtype: torch.dtype) -> Tensor:
        rows = reference.dequantize(
            self.words, self.codebook, self.scale, self.bits, self._row(), dtype
        )
        return self._shaped(rows).contiguous()

    def _integer(self, x: Tensor) -> Call | None:
        found, quantizer = self._integers(), self.input_quantizer
        if found is None or quantizer is None:
            return None
        bias = None if self.bias is None else self.bias.float()
        call = onednn.integer_conv(*found[:2], bias, *found[2:], self.geometry, tuple(x.shape))

        def run(x: Tensor) -> Tensor:
            codes = quantizer.codes(x)
            y = call(codes.contiguous(memory_format=torch.channels_last)).to(x.dtype)
            return y if is_channels_last(x) else y.contiguous()

        return run

    def _float(self, x: Tensor) -> Call:
        if not onednn.has_floats() or x.dtype != torch.float32:
            return self._plain(x)
        bias = None if self.bias is None else self.bias.detach()
        call = onednn.float_conv2d(self._values(torch.float32), bias, self.geometry, tuple(x.shape))

        def run(x: Tensor) -> Tensor:
            # oneDNN's own way from one format to the other takes longer than the convolution
            y = call(self._quantized(x).contiguous(memory_format=torch.channels_last))
            return y if is_channels_last(x) else y.contiguous()

        return run

    def _plain(self, x: Tensor) -> Call:
        dense = self._dense = self._values(x.dtype)
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)

        if self.input_quantizer is None:
            return lambda x: F.conv2d(x, dense, bias, *self.geometry)
        quantized = self.input_quantizer.call()
        return lambda x: F.conv2d(quantized(x), dense, bias, *self.geometry)

    def _made(self, x: Tensor) -> Call:
        if x.device.type != "cpu" and not self._has_kernel():
            return self._plain(x)
        return super()._made(x)

    def _pays(self, x: Tensor) -> tuple[bool, bool]:
        sizes = reference.out_size(x.shape[2:], self.kernel_size, *self.geometry[:3])
        outputs = sizes[0] * sizes[1] * self.out_channels
        if outputs * self._row() < SMALL_MACS:
            return False, False
        weights = self.out_channels * self._row()
        return self._row() >= INTEGER_TERMS, weights >= PREPACK_RATIO * outputs

    def _has_kernel(self) -> bool:
        return reference.conv_supported(self.in_channels, self.out_channels, self.groups)

    def _packed_integer(self) -> Call | None:
        from adq.quant.kernels import packed_ops

        found = self._uniform()
        if found is None:
            return None
        step, offset, quantizer = found
        codes = reference.restore(self.words, self.bits, self.out_channels, self._row())
        sums = reference.code_sums(codes, self.bits)
        rest: tuple[Any, ...] = (self.kernel_size, *self.geometry)

        def run(x: Tensor) -> Tensor:
            q = quantizer.codes(x)
            y = packed_ops.conv2d_int(
                *(q, self.words, step, offset, self.scale, sums, self.bias),
                *(quantizer.scale, quantizer.zero_point, self.bits),
                *(*rest, x.dtype),
            )
            return y if is_channels_last(x) else y.contiguous()

        return run

    def _packed(self, x: Tensor) -> Tensor:
        from adq.quant.kernels import packed_ops

        if x.device.type != "cpu" and not self._has_kernel():
            return F.conv2d(self._quantized(x), self._values(x.dtype), self.bias, *self.geometry)
        y = packed_ops.conv2d(
            *(self._quantized(x), self.words, self.codebook, self.scale, self.bias, self.bits),
            *(self.kernel_size, *self.geometry),
        )
        return y if is_channels_last(x) else y.contiguous()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}, bits={self.bits}"
        )


def multiples(codebook: Tensor) -> tuple[float, Tensor] | None:
    """(unit, factors): codebook = unit·factors, whole numbers of 8 bits, up to rounding.

    None where the levels are no such multiples. Integer levels are, levels of half integers up to
    7 bits, and additive powers of two up to 6.
    """
    levels = codebook.double()
    largest = levels.abs().max()
    if largest == 0:
        return None
    tops = torch.arange(1, INT8_MAX + 2, dtype=torch.float64, device=levels.device)
    scaled = levels / largest * tops[:, None]
    # a level was rounded to float32 once, the largest as well
    close = (scaled - scaled.round()).abs() <= 2.0**-23 * scaled.abs()
    fitting = (close.all(dim=1) & (scaled.amax(dim=1) < INT8_MAX + 0.5)).nonzero()
    if len(fitting) == 0:
        return None
    first = int(fitting[0])
    return float(largest / tops[first]), scaled[first].round().to(torch.int64)
