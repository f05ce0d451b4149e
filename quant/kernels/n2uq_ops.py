"""The operators `adq::n2uq_forward` and `adq::n2uq_backward`: one dispatch for every device.

A CUDA (or ROCm) tensor goes to the Triton kernels of `n2uq`, any other to `reference`; what is here
keeps the shape and the memory format. Tracers learn shapes from the fake implementations and
derivatives from the Autograd key, so that torch.compile, torch.export and
DistributedDataParallel take the operators as they are.

Triton is imported at the first call on a GPU, and nowhere else.
"""

from typing import Any

import torch
from torch import Tensor

from adq.quant.kernels import n2uq_reference as reference
from adq.quant.kernels.library import register

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def fake_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """x̂, with the shape, dtype and memory format of x; no gradient to the zero point.

    Shapes: x any, start, scale and zero_point (1,), widths (2^bits − 1,). Raises InputError for
    another number of widths.
    """
    reference.bits_of(widths)
    return _FORWARD(x, start, widths, scale, zero_point)[0]


def _dense(x: Tensor) -> Tensor:
    """`x` if its elements fill a stretch of memory, else a copy that does."""
    return x if x.is_contiguous() or torch.empty_like(x).stride() == x.stride() else x.clone()


def _like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the memory order of the dense tensor `x`, which has its shape."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """The elements of `t` in the memory order of the dense tensor `x`."""
    return t.reshape(-1) if x.is_contiguous() else _like(t, x).as_strided((x.numel(),), (1,))


def _forward(x: Tensor, *parameters: Tensor) -> Three:
    x = _dense(x)
    out, place, edges = reference.forward(_flat(x, x), *parameters)
    return out.as_strided(x.shape, x.stride()), place.as_strided(x.shape, x.stride()), edges


def _backward(grad: Tensor, x: Tensor, place: Tensor, *parameters: Tensor) -> Four:
    x = _dense(x)
    flat = _flat(grad, x), _flat(x, x), _flat(place, x)
    grad_x, grad_start, grad_widths, grad_scale = reference.backward(*flat, *parameters)
    return grad_x.as_strided(x.shape, x.stride()), grad_start, grad_widths, grad_scale


def _forward_on_gpu(x: Tensor, *parameters: Tensor) -> Three:
    from adq.quant.kernels import n2uq

    return n2uq.forward(_dense(x), *parameters)


def _backward_on_gpu(grad: Tensor, x: Tensor, place: Tensor, *parameters: Tensor) -> Four:
    from adq.quant.kernels import n2uq

    x = _dense(x)
    return n2uq.backward(_like(grad, x), x, _like(place, x), *parameters)


def _fake_forward(x: Tensor, start: Tensor, widths: Tensor, *_: Tensor) -> Three:
    n = widths.numel()
    place = torch.empty_like(x, dtype=reference.place_dtype(n))
    edges = widths.new_empty(2 * n + 1, dtype=reference.work_dtype(x, widths))
    return torch.empty_like(x), place, edges


def _fake_backward(
    grad: Tensor, x: Tensor, place: Tensor, edges: Tensor, widths: Tensor, scale: Tensor, _: Tensor
) -> Four:
    like = torch.empty_like
    return like(x), widths.new_empty(1), like(widths), like(scale)


class _Differentiable(torch.autograd.Function):
    """`n2uq_forward` at the Autograd key: calls what lies below it, and knows the derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Three:
        with torch._C._AutoDispatchBelowAutograd():
            out, place, edges = _FORWARD(*inputs)
        x, _, widths, scale, zero_point = inputs
        ctx.mark_non_differentiable(place, edges)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, place, edges, widths, scale, zero_point)
        return out, place, edges

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True: a gradient cut here would be silent
            raise RuntimeError("adq::n2uq_forward has no second derivative: q is piecewise linear")
        with torch._C._AutoDispatchBelowAutograd():
            return (*_BACKWARD(grads[0], *ctx.saved_tensors), None)


_FORWARD = register(
    "n2uq_forward(Tensor x, Tensor start, Tensor widths, Tensor scale, Tensor zero_point)"
    " -> (Tensor out, Tensor place, Tensor edges)",
    cpu=_forward,
    gpu=_forward_on_gpu,
    fake=_fake_forward,
    autograd=_Differentiable.apply,
)
_BACKWARD = register(
    "n2uq_backward(Tensor grad, Tensor x, Tensor place, Tensor edges, Tensor widths, Tensor scale,"
    " Tensor zero_point) -> (Tensor grad_x, Tensor grad_start, Tensor grad_widths,"
    " Tensor grad_scale)",
    cpu=_backward,
    gpu=_backward_on_gpu,
    fake=_fake_backward,
)
