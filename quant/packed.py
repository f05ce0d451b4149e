"""What a packed file holds of a layer, ready to compute: its weight and its input quantizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adq.quant.kernels import counting, inputs_ops
from adq.quant.packing import packed_bytes, unpack
from adq.quant.rows import Rows, rows_of


@dataclass(frozen=True)
class PackedWeight:
    """A layer's weight as the file holds it: row r is scale[r]·codebook[codes of r].

    codes      uint8 (ceil(n·bits/8),), see `adq.quant.packing`
    codebook   float32 (2^bits,)
    scale      float32 (R,)
    rows       how the n weights lie in the layer; None until `fitted` to one
    """

    codes: Tensor
    bits: int
    codebook: Tensor
    scale: Tensor
    rows: Rows | None = None

    def fitted(self, layer: nn.Module) -> "PackedWeight":
        """The weight of this layer; raises ValueError if it is another one's."""
        whole = rows_of(layer)
        numel, count = whole.count * whole.size, self.scale.numel()
        if count == 0 or count % whole.count or numel % count:
            raise ValueError(f"{count} scales do not fit a weight of shape {whole.shape}")
        expected = packed_bytes(numel, self.bits)
        if self.codes.numel() != expected:
            raise ValueError(
                f"expected {expected} bytes for a weight of shape {whole.shape} at {self.bits} "
                f"bits, got {self.codes.numel()}"
            )
        return replace(self, rows=Rows(whole.shape, numel // count, whole.groups))

    def matrix(self) -> Tensor:
        """The codes, row by row, uint8 (R, n/R)."""
        assert self.rows is not None
        count, size = self.rows.count, self.rows.size
        return unpack(self.codes, self.bits, count * size).view(count, size)

    def values(self) -> Tensor:
        """The weight in float32, in the layer's shape."""
        assert self.rows is not None
        levels = self.codebook[self.matrix().int()]
        return self.rows.join(self.scale[:, None] * levels)


class Float32Buffers(nn.Module):
    """Keeps the buffers named here in float32 when the model goes to half precision."""

    in_float32: tuple[str, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> "Float32Buffers":
        kept = {name: self._buffers[name] for name in self.in_float32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype.itemsize < 4:
                self._buffers[name] = before.to(now.device)
        return self


class PackedInput(Float32Buffers):
    """A layer's input quantizer as the file holds it: x -> scale · (#{thresholds <= x} − z).

    In plain PyTorch. Under torch.compile and torch.export the search is one of gathers and
    comparisons, which every exporter knows.
    """

    in_float32 = ("thresholds", "scale", "zero_point")
    thresholds: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        search = _halve if torch.compiler.is_compiling() else _bucketize
        work = x.to(torch.promote_types(x.dtype, self.thresholds.dtype))
        code = search(work, self.thresholds.to(work.dtype)).to(work.dtype)
        return (self.scale * (code - self.zero_point)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.thresholds.numel().bit_length()}"


class KernelInput(PackedInput):
    """The same by the operator `adq::quantize_input`, which has a kernel on every device."""

    @staticmethod
    def of(other: PackedInput) -> "KernelInput":
        return KernelInput(other.thresholds, other.scale, other.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return self.call()(x)

    def call(self) -> Callable[[Tensor], Tensor]:
        """`forward` with the buffers as they are now."""
        thresholds, scale, zero_point = self.thresholds, self.scale, self.zero_point

        def run(x: Tensor) -> Tensor:
            if _is_plain(x, thresholds):
                return counting.quantize(x, thresholds, scale, zero_point)
            return inputs_ops.quantize_input(x, thresholds, scale, zero_point)

        return run

    def codes(self, x: Tensor) -> Tensor:
        """#{thresholds <= x}, uint8."""
        if _is_plain(x, self.thresholds):
            return counting.count(x, self.thresholds)
        return inputs_ops.input_codes(x, self.thresholds)


def _is_plain(x: Tensor, thresholds: Tensor) -> bool:
    """Whether what the operator comes down to can be called without it: to dispatch takes as long
    as to quantize some thousand values."""
    return (
        type(x) is Tensor
        and x.dtype == thresholds.dtype
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
    )


def _bucketize(x: Tensor, thresholds: Tensor) -> Tensor:
    if is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
        return torch.bucketize(x, thresholds, right=True).permute(0, 3, 1, 2)
    return torch.bucketize(x.contiguous(), thresholds, right=True)


def _halve(x: Tensor, thresholds: Tensor) -> Tensor:
    """#{thresholds <= x} for 2^a − 1 thresholds by a comparisons; NaN is below none of them."""
    code = torch.zeros_like(x, dtype=torch.int64)
    step = (thresholds.numel() + 1) // 2
    while step:
        below = x < thresholds[code + (step - 1)]
        code = code + step * below.logical_not().to(torch.int64)
        step //= 2
    return code


def is_channels_last(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and (x.stride(1) == 1 or not x.is_contiguous())
    )
