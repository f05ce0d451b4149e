"""Layers that must share their bits, found by running the model once.

A kernel adds or joins integers of one width, and reads an input that it shares in one width. So
layers are tied whose outputs meet in an addition or in a concatenation, and Linear layers that
read one tensor. HAWQ-V3 (Yao et al., arXiv 2011.10680) ties the convolution on a shortcut to the
branch that it is added to.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from adq.quant.batches import evaluating, forward
from adq.quant.layers import LayerInfo

# Names of ATen operators, without the underscore of those in place. Every view carries too.
ADDITION = re.compile("add|sub|rsub")
SCALING = re.compile("mul|div|neg")
CARRYING = re.compile(
    ".*(batch|layer|group|rms)_norm.*|.*_pad(1d|2d|_nd)|clone|_to_copy|_unsafe_view"
    "|roll|flip|repeat|pixel_(un)?shuffle|channel_shuffle|_?upsample_nearest.*"
)
ACTIVATION = re.compile(
    "relu|leaky_relu|_prelu_kernel|gelu|silu|mish|elu|celu|softplus|threshold|hardtanh|hardswish"
    "|clamp|clamp_min|clamp_max"
)
JOIN = re.compile("cat|stack")
FACTORY = re.compile("new_.*|.*_like")  # take a shape, not values


def trace_ties(
    model: nn.Module, inputs: Any, layers: Sequence[LayerInfo]
) -> tuple[tuple[str, ...], ...]:
    """Groups of at least two of `layers` that must share their bits: disjoint, in model order.

    One forward pass in eval mode follows each activation to the layer it comes from. Tied are

    additions       the layers that the two operands come from directly: through normalisation,
                    reshaping, padding, copies (as in nearest upsampling, on the way down a feature
                    pyramid), and a constant that is added or multiplied
    concatenations  the layers that the parts come from, through activation functions too, unless
                    they are joined along dimension 0
    projections     Linear layers of one parent module that read the very same tensor, as query,
                    key and value, or gate and up

    Whatever else an activation passes ends its trail: pooling, softmax, a product with another
    activation, an addition or concatenation itself. So blocks along a chain of identity shortcuts
    stay free. A layer that is called several times is tied by any of its calls, and groups with a
    common layer are one.
    """
    tracer = _Tracer()
    names = [layer.name for layer in layers]

    def mark(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                tracer.read(args[0], name)
            tracer.sources[output] = _Source(name)

        return record

    hooks = [model.get_submodule(name).register_forward_hook(mark(name)) for name in names]
    try:
        with evaluating(model), torch.no_grad(), tracer:
            tracer.set(inputs, _Source())
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = {id(group): group for group in tracer.groups.values() if len(group) > 1}
    ordered = [tuple(name for name in names if name in group) for group in found.values()]
    return tuple(sorted(ordered, key=lambda group: names.index(group[0])))


@dataclass(frozen=True)
class _Source:
    """The layer that an activation comes from, None if from no single one."""

    layer: str | None = None
    activated: bool = False  # through an activation function


class _Tracer(TorchDispatchMode):
    """Keeps the source of every tensor that depends on the model's inputs; others are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.sources = WeakTensorKeyDictionary()
        self.reads = WeakTensorKeyDictionary()
        self.groups: dict[str, set[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        operands = [self.sources[t] for t in tensors if t in self.sources]
        name = func.overloadpacket.__name__.removesuffix("_")
        if operands and not FACTORY.fullmatch(name):
            self.set(output, self._source(name, func.is_view, args, operands, output))
            if func._schema.is_mutable and isinstance(output, Tensor) and output._base is not None:
                self.sources[output._base] = _Source()  # a part of it was written
        return output

    def set(self, value: Any, source: _Source) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.sources[tensor] = source

    def read(self, tensor: Tensor, layer: str) -> None:
        """Tie a Linear layer to those beside it that read the same memory before it changed."""
        base = tensor if tensor._base is None else tensor._base
        version = 0 if tensor.is_inference() else tensor._version
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), version)
        readers = self.reads.setdefault(base, {}).setdefault((view, layer.rpartition(".")[0]), [])
        readers.append(layer)
        self.tie(readers)

    def tie(self, layers: Iterable[str | None]) -> None:
        named = {layer for layer in layers if layer is not None}
        merged = named.union(*(self.groups.get(layer, ()) for layer in named))
        self.groups.update(dict.fromkeys(merged, merged))

    def _source(
        self, name: str, view: bool, args: tuple[Any, ...], operands: list[_Source], output: Any
    ) -> _Source:
        """The source of what an operator gives; ties the layers that it brings together."""
        if JOIN.fullmatch(name):
            dim = args[1] if len(args) > 1 else 0
            if dim % output.dim():
                self.tie(s.layer for s in operands)
        elif len(operands) > 1:
            if ADDITION.fullmatch(name):
                self.tie(s.layer for s in operands if not s.activated)
        elif view or any(kind.fullmatch(name) for kind in (ADDITION, SCALING, CARRYING)):
            return operands[0]
        elif ACTIVATION.fullmatch(name):
            return replace(operands[0], activated=True)
        return _Source()
