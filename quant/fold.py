"""Fold BatchNorm into the layer before it, for inference.

In eval mode BatchNorm is y = factor·x + shift per channel, so that

    factor·(W·x + b) + shift = (factor·W)·x + (factor·b + shift)

and the layer alone can compute both. A quantized weight keeps its codes: the factor comes after
the quantizer, as a second parametrization.
"""

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from adq.quant.attention import Attention
from adq.quant.batches import evaluating

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Layer = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class ChannelFactor(nn.Module):
    """A parametrization: weight -> factor·weight, `factor` broadcastable to the weight's shape."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, weight: Tensor) -> Tensor:
        return (self.factor * weight).to(weight.dtype)


def batchnorm_pairs(model: nn.Module) -> dict[str, str]:
    """BatchNorm's name -> name of the layer directly before it, for those that can be folded.

    The layer is a Conv1d, Conv2d, ConvTranspose2d or Linear whose output only the BatchNorm uses;
    each of the two is called exactly once. Left out are layers whose weight or bias another module
    or the forward itself uses too, subclasses with a forward of their own, BatchNorms without
    running statistics, and those where a forward hook looks on between the two.

    Found by symbolic tracing (torch.fx) in eval mode with the optional arguments of `forward` at
    their defaults. A model that cannot be traced, because its control flow depends on data, gives
    {}: nothing is folded then. Tracing sees no shapes: a Linear before a BatchNorm1d is taken to
    have inputs (N, features), the only ones where both mean the same channels.
    """
    graph = _trace(model)
    if graph is None:
        return {}
    uses = _Uses.of(model, graph)
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) != 1:
            continue
        if uses.foldable_norm(node.target) and uses.foldable_layer(source.target):
            norm, layer = (model.get_submodule(n.target) for n in (node, source))
            if _out_channels(layer) == norm.num_features:
                pairs[node.target] = source.target
    return pairs


@torch.no_grad()
def fold_factors(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """(factor, shift), each (C,): in eval mode the BatchNorm is y = factor·x + shift.

        factor = γ/√(var + ε)      shift = β − factor·mean

    with γ = 1, β = 0 without affine parameters. Computed in float64, returned in the BatchNorm's
    own dtype.

    Raises ValueError when the BatchNorm has no running statistics (track_running_stats=False).
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError(
            "expected a BatchNorm with running statistics, got one with track_running_stats=False: "
            "its factor depends on the batch, so leave it in the model"
        )
    factor = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -factor * mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor.to(var.dtype), shift.to(var.dtype)


@torch.no_grad()
def fold_batchnorm_(model: nn.Module) -> dict[str, str]:
    """Fold every pair of `batchnorm_pairs` in place; returns the pairs.

    The layer computes what it and the BatchNorm computed in eval mode, and an nn.Identity stands
    where the BatchNorm was. A plain weight is multiplied in place. A parametrized one (quantized,
    weight-normed) gets a `ChannelFactor` after its parametrizations: original, codes and scales
    stay as they are, and each channel has as many levels as before. A layer without a bias gets
    one.

    Fold last. Taking quantizers off afterwards with the FP32 weights takes the factor off too, and
    gives another model; with `keep_quantized_weights` it stays.
    """
    pairs = batchnorm_pairs(model)
    for norm_name, layer_name in pairs.items():
        norm, layer = model.get_submodule(norm_name), model.get_submodule(layer_name)
        assert isinstance(norm, _NORMS)
        assert isinstance(layer, _LAYERS)
        _fold_(layer, *fold_factors(norm))
        replace_(model, norm, nn.Identity().train(norm.training))
    return pairs


def channel_factor(layer: nn.Module) -> Tensor | None:
    """What a folded layer's parametrized weight is multiplied by; None where nothing is folded."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    last = layer.parametrizations["weight"][-1]  # type: ignore[index]
    return last.factor if isinstance(last, ChannelFactor) else None


def _fold_(layer: Layer, factor: Tensor, shift: Tensor) -> None:
    weight = layer.weight
    spread = _along_output(layer, factor)
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.register_parametrization(layer, "weight", ChannelFactor(spread))
    else:
        weight.copy_(spread * weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    else:
        layer.bias.copy_(factor * layer.bias + shift)


def _along_output(layer: Layer, factor: Tensor) -> Tensor:
    """`factor` (C,) in a shape that multiplies the weight's output channels."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return factor.view(-1, *[1] * (layer.weight.dim() - 1))
    # weight (in, C/groups, ...): input channels of group g make outputs g·C/groups + j
    by_group = factor.view(layer.groups, -1)
    rows = by_group.repeat_interleave(layer.in_channels // layer.groups, dim=0)
    return rows[:, :, None, None]


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


class _Tracer(fx.Tracer):
    """Goes down to layers and norms, parametrized or subclassed ones too, and not into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (*_LAYERS, *_NORMS, Attention))
        return own or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph | None:
    """The graph of calls, or None for a model that cannot be traced."""
    if getattr(model.forward, "__func__", None) is not type(model).forward:
        return None  # fx would trace the class's forward, not the one that runs
    parameters = inspect.signature(model.forward).parameters.values()
    plain = bool | int | float | str | None  # what fx can hold fixed
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, plain)}
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx has no assertion for every kind of default
        try:
            return _Tracer().trace(model, concrete_args=defaults)
        except Exception:  # noqa: BLE001 (a user's forward may raise anything)
            return None


@dataclass(frozen=True)
class _Uses:
    """How often a traced model uses its modules and parameters."""

    modules: dict[str, nn.Module]
    calls: Counter[nn.Module]
    owners: Counter[int]
    reads: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, graph: fx.Graph) -> "_Uses":
        modules = dict(model.named_modules())
        called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        return cls(
            modules=modules,
            calls=Counter(inner for name in called for inner in modules[name].modules()),
            owners=Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False)),
            reads=frozenset(
                str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
            ),
        )

    def _once(self, name: str) -> bool:
        """Called once, its parts not called from elsewhere, and its parameters never read."""
        return name not in self.reads and all(
            self.calls[inner] == 1 for inner in self.modules[name].modules()
        )

    def foldable_norm(self, name: str) -> bool:
        norm = self.modules[name]
        return (
            isinstance(norm, _NORMS)
            and _has_forward_of(norm, _NORMS)
            and norm.running_mean is not None
            and not norm._forward_pre_hooks
            and not norm._forward_hooks
            and self._once(name)
        )

    def foldable_layer(self, name: str) -> bool:
        layer = self.modules[name]
        return (
            isinstance(layer, _LAYERS)
            and _has_forward_of(layer, _LAYERS)
            and not layer._forward_hooks
            and (parametrize.is_parametrized(layer, "weight") or self._owns(layer, "weight"))
            and (layer.bias is None or self._owns(layer, "bias"))
            and self._once(name)
        )

    def _owns(self, layer: nn.Module, kind: str) -> bool:
        parameter = layer._parameters.get(kind)
        return parameter is not None and self.owners[id(parameter)] == 1


def _has_forward_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    own = getattr(module.forward, "__func__", None)
    return any(own is cls.forward for cls in classes)
