"""The operators `adq::quantize_input` and `adq::input_codes`: one dispatch for every device.

They are for inference and have no derivative; `n2uq_ops` trains. A CUDA (or ROCm) tensor goes to
the Triton kernels of `inputs`, any other to `inputs_reference`. Results have the shape and the
memory format of x. Triton is imported at the first call on a GPU, and nowhere else.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adq.quant.kernels import inputs_reference as reference
from adq.quant.kernels.library import register


def quantize_input(x: Tensor, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x̂ = scale·(#{thresholds <= x} − zero_point), with the dtype and memory format of x.

    Shapes: x any, thresholds (n,) in ascending order, n from 1 to 255, scale and zero_point (1,).
    NaN gets the top code. Raises InputError for another number of thresholds.
    """
    reference.check(thresholds)
    return _QUANTIZE(x, thresholds, scale, zero_point)


def input_codes(x: Tensor, thresholds: Tensor) -> Tensor:
    """#{thresholds <= x}, uint8, with the memory format of x; shapes as in `quantize_input`."""
    reference.check(thresholds)
    return _CODES(x, thresholds)


def _dense(x: Tensor) -> Tensor:
    """`x` if its elements fill a stretch of memory, else a copy that does."""
    return x if x.is_contiguous() or torch.empty_like(x).stride() == x.stride() else x.clone()


def _in_memory_order(find: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """`find(x, ...)`, which wants x contiguous and looks at each element alone."""
    if x.is_contiguous():
        return find(x, *parameters)
    x = _dense(x)
    flat = x.as_strided((x.numel(),), (1,))
    return find(flat, *parameters).as_strided(x.shape, x.stride())


def _quantize(x: Tensor, *parameters: Tensor) -> Tensor:
    return _in_memory_order(reference.quantize, x, *parameters)


def _codes(x: Tensor, thresholds: Tensor) -> Tensor:
    return _in_memory_order(reference.codes, x, thresholds)


def _quantize_on_gpu(x: Tensor, *parameters: Tensor) -> Tensor:
    from adq.quant.kernels import inputs

    return inputs.quantize(_dense(x), *parameters)


def _codes_on_gpu(x: Tensor, thresholds: Tensor) -> Tensor:
    from adq.quant.kernels import inputs

    return inputs.codes(_dense(x), thresholds)


def _fake_quantize(x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_codes(x: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


_QUANTIZE = register(
    "quantize_input(Tensor x, Tensor thresholds, Tensor scale, Tensor zero_point) -> Tensor",
    cpu=_quantize,
    gpu=_quantize_on_gpu,
    fake=_fake_quantize,
)
_CODES = register(
    "input_codes(Tensor x, Tensor thresholds) -> Tensor",
    cpu=_codes,
    gpu=_codes_on_gpu,
    fake=_fake_codes,
)
