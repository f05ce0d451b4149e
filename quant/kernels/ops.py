"""The operators `adq::n2uq_forward` and `adq::n2uq_backward`: one dispatch for every device.

A CUDA (or ROCm) tensor goes to the Triton kernels of `n2uq`, any other to `reference`. Both see
flat tensors in memory order; what is here keeps the shape and the memory format. Shapes are known
to tracers through the fake implementations and derivatives through the registered formula, so that
torch.compile, torch.export and DistributedDataParallel take the operators as they are.

Triton is imported at the first call on a GPU, and nowhere else.
"""

from typing import Any

import torch
from torch import Tensor

from adq.quant.kernels import reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def fake_quantize(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """x̂, the shape, dtype and memory format of x; gradients to all arguments but the zero point.

    Shapes: x any, start, scale and zero_point (1,), widths (2^bits − 1,), bits in 2..8.
    """
    out: Tensor = torch.ops.adq.n2uq_forward(x, start, widths, scale, zero_point)[0]
    return out


def _dense(x: Tensor) -> Tensor:
    """`x` if its elements fill a stretch of memory, else a copy that does."""
    return x if torch.empty_like(x).stride() == x.stride() else x.clone()


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """The elements of `x` in the memory order of the dense tensor `like`."""
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def _implementation(x: Tensor) -> Any:
    if x.is_cuda:
        from adq.quant.kernels import n2uq

        return n2uq
    return reference


@torch.library.custom_op("adq::n2uq_forward", mutates_args=())
def n2uq_forward(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, place, edges), see `reference`."""
    x = _dense(x)
    out, place, edges = _implementation(x).forward(_flat(x, x), start, widths, scale, zero_point)
    return out.as_strided(x.shape, x.stride()), place.as_strided(x.shape, x.stride()), edges


@n2uq_forward.register_fake
def _(
    x: Tensor, start: Tensor, widths: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n = widths.numel()
    place = torch.empty_like(x, dtype=reference.place_dtype(n))
    edges = widths.new_empty(2 * n + 1, dtype=reference.work_dtype(x, widths))
    return torch.empty_like(x), place, edges


@torch.library.custom_op("adq::n2uq_backward", mutates_args=())
def n2uq_backward(
    grad: Tensor,
    x: Tensor,
    place: Tensor,
    edges: Tensor,
    widths: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> Four:
    """(∂L/∂x, ∂L/∂s, ∂L/∂a, ∂L/∂σ), see `reference`."""
    x = _dense(x)
    flat = [_flat(t, x) for t in (grad, x, place)]
    grad_x, *grads = _implementation(x).backward(*flat, edges, widths, scale, zero_point)
    return (grad_x.as_strided(x.shape, x.stride()), *grads)


@n2uq_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    place: Tensor,
    edges: Tensor,
    widths: Tensor,
    scale: Tensor,
    zero_point: Tensor,
) -> Four:
    like = torch.empty_like
    return like(x), widths.new_empty(1), like(widths), like(scale)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, _, widths, scale, zero_point = inputs
    _, place, edges = output
    ctx.mark_non_differentiable(place, edges)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, place, edges, widths, scale, zero_point)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return (*torch.ops.adq.n2uq_backward(grad, *ctx.saved_tensors), None)


n2uq_forward.register_autograd(_backward, setup_context=_setup_context)
