"""The operators on the weights of a model: `adq::weights_forward`, `adq::weights_backward` and
`adq::codebook_step`. Their arguments are those of `weights_reference`.

A CUDA (or ROCm) tensor goes to the Triton kernels of `weights` and `codebooks`, which take all
layers in one launch; any other to the reference. Triton is imported at the first call on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from adq.quant.kernels import weights_reference as reference
from adq.quant.kernels.library import register
from adq.quant.kernels.weights_reference import EPSILON, RULES, Ints

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def quantize_weights(
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: str = "straight",
    gather: bool = False,
) -> Three:
    """(ŵ, codes, partial statistics) of all layers; gradients reach w and the scale."""
    index = RULES.index(rule)
    return _FORWARD(w, scale, levels, rows, sizes, bits, index, gather)


def codebook_step(
    partials: Tensor,
    levels: Tensor,
    counts: Tensor,
    sums: Tensor,
    bits: Ints,
    parts: Ints,
    decay: float,
    *,
    epsilon: float = EPSILON,
    split: bool = True,
    zero: bool = False,
) -> Four:
    """(levels, counts, sums, dead levels met) of all layers after one moving-average step."""
    return _STEP(partials, levels, counts, sums, bits, parts, decay, epsilon, split, zero)


def _forward(
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: int,
    gather: bool,
) -> Three:
    return reference.forward(w.contiguous(), scale, levels, rows, sizes, bits, gather)


def _backward(grad: Tensor, w: Tensor, *rest: Any) -> Two:
    return reference.backward(grad.contiguous(), w.contiguous(), *rest)


def _forward_on_gpu(
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: int,
    gather: bool,
) -> Three:
    from adq.quant.kernels import weights

    return weights.forward(w.contiguous(), scale, levels, rows, sizes, bits, gather)


def _backward_on_gpu(grad: Tensor, w: Tensor, *rest: Any) -> Two:
    from adq.quant.kernels import weights

    return weights.backward(grad.contiguous(), w.contiguous(), *rest)


def _step_on_gpu(*arguments: Any) -> Four:
    from adq.quant.kernels import codebooks

    return codebooks.codebook_step(*arguments)


def _fake_forward(
    w: Tensor,
    scale: Tensor,
    levels: Tensor,
    rows: Ints,
    sizes: Ints,
    bits: Ints,
    rule: int,
    gather: bool,
) -> Three:
    size = reference.partials_size(rows, sizes, bits) if gather else 0
    out = w.new_empty(w.shape)
    return out, w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(3, size, dtype=torch.float64)


def _fake_backward(grad: Tensor, w: Tensor, codes: Tensor, scale: Tensor, *_: Any) -> Two:
    return w.new_empty(w.shape), scale.new_empty(scale.shape)


def _fake_step(
    partials: Tensor, levels: Tensor, counts: Tensor, sums: Tensor, bits: Ints, *_: Any
) -> Four:
    dead = levels.new_empty(len(bits), dtype=torch.int32)
    return torch.empty_like(levels), torch.empty_like(counts), torch.empty_like(sums), dead


class _Differentiable(torch.autograd.Function):
    """`weights_forward` at the Autograd key: calls what lies below it, and knows the derivative."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Three:
        with torch._C._AutoDispatchBelowAutograd():
            out, codes, partials = _FORWARD(*inputs)
        w, scale, levels, *ctx.layout, ctx.rule, _ = inputs
        ctx.mark_non_differentiable(codes, partials)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, codes, scale, levels)
        return out, codes, partials

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * 8
        if torch.is_grad_enabled():  # create_graph=True: a gradient cut here would be silent
            raise RuntimeError("adq::weights_forward has no second derivative: it is a staircase")
        with torch._C._AutoDispatchBelowAutograd():
            found = _BACKWARD(grads[0], *ctx.saved_tensors, *ctx.layout, ctx.rule)
        return (*found, *(None,) * 6)


_FORWARD = register(
    "weights_forward(Tensor w, Tensor scale, Tensor levels, int[] rows, int[] sizes, int[] bits,"
    " int rule, bool gather) -> (Tensor out, Tensor codes, Tensor partials)",
    cpu=_forward,
    gpu=_forward_on_gpu,
    fake=_fake_forward,
    autograd=_Differentiable.apply,
)
_BACKWARD = register(
    "weights_backward(Tensor grad, Tensor w, Tensor codes, Tensor scale, Tensor levels, int[] rows,"
    " int[] sizes, int[] bits, int rule) -> (Tensor grad_w, Tensor grad_scale)",
    cpu=_backward,
    gpu=_backward_on_gpu,
    fake=_fake_backward,
)
_STEP = register(
    "codebook_step(Tensor partials, Tensor levels, Tensor counts, Tensor sums, int[] bits,"
    " int[] parts, float decay, float epsilon, bool split, bool zero)"
    " -> (Tensor levels, Tensor counts, Tensor sums, Tensor dead)",
    cpu=reference.codebook_step,
    gpu=_step_on_gpu,
    fake=_fake_step,
)
