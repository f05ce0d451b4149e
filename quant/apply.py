"""Put a bit vector on a model, and take it off.

Weights are quantized by `torch.nn.utils.parametrize`: the layer keeps its class, its name and its
`weight` attribute, so that any code which reads `layer.weight` (a functional attention, a weight
norm, a user's own forward) sees the quantized one, and the FP32 weight is one call away. Inputs
are quantized by a forward pre-hook over a submodule, so that its state is in the state dict. A
pass of the whole model quantizes all weights in one call (`flat`).
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adq.quant.attention import expose_attention_
from adq.quant.baselines import activation_quantizer_for, weight_quantizer_for
from adq.quant.batches import Batches
from adq.quant.calibrate import Ranges, input_ranges
from adq.quant.errors import InputError
from adq.quant.flat import attach_flat, detach_flat
from adq.quant.fold import channel_factor
from adq.quant.layers import QUANTIZABLE
from adq.quant.modules import weight_quantizer
from adq.quant.rows import rows_of
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

INPUT_QUANTIZER = "input_quantizer"


def quantize(
    model: nn.Module,
    bits: BitVector | Mapping[str, int] | str | Path,
    batches: Batches | None = None,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
) -> nn.Module:
    """A copy of `model` that computes with the given bits and can be trained further.

    `bits` is a bit vector, a mapping from layer name to weight bits, or the path of a bit-vector
    file, as a study leaves in best.bits.json and `adq-search export NAME --format bits` writes.
    `batches` (inputs, targets) calibrate the input ranges and are needed when `bits` has
    activation bits. The projections of an nn.MultiheadAttention are its layers `in_proj` and
    `out_proj` (see `adq.quant.attention`). `scheme` says which quantizers. Call
    `update_codebooks(model)` before each optimiser step while training; `qat.train_` does:

        model = adq.quantize(model, "bits.json", batches)
        optimizer = torch.optim.AdamW(model.parameters())
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            adq.update_codebooks(model)
            optimizer.step()

    Raises InputError for a file that is missing or damaged, and for a layer that the model has not,
    or that cannot be quantized; `model` is never changed.
    """
    if isinstance(bits, str | Path):
        bits = BitVector.load(bits)
    elif not isinstance(bits, BitVector):
        bits = BitVector(dict(bits))
    model = expose_attention_(copy.deepcopy(model))
    for name in bits.weight:
        _layer(model, name)
    if bits.act and batches is None:
        raise InputError("activation bits need batches to calibrate the input ranges: none given")
    # no `batches or ()`: the truth of a DataLoader is its length, which an iterable one has not
    data = () if batches is None else batches
    wanted = {name: (b,) for name, b in bits.act.items()}
    ranges = input_ranges(model, wanted, data, scheme.act)
    return quantize_(model, bits, ranges, scheme)


def quantize_(
    model: nn.Module,
    bits: BitVector,
    ranges: Ranges,
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
) -> nn.Module:
    """`quantize`, changing `model` itself, with input ranges measured before.

    `ranges` has those of every (layer, bits) in `bits.act`. A model that cannot be quantized is
    left as it was.
    """
    if any(True for _ in quantized_layers(model)):
        raise InputError("the model is quantized already: give the plain FP32 model")
    layers = {name: _layer(model, name) for name in bits.weight}
    if len(set(layers.values())) < len(layers):
        name_of = {layer: name for name, layer in layers.items()}
        name = next(name for name, layer in layers.items() if name_of[layer] != name)
        raise InputError(
            f"bit vector names one layer twice, as {name!r} and {name_of[layers[name]]!r}: keep one"
        )
    starts = {name: ranges[name, b] for name, b in bits.act.items()}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        rows = rows_of(layer, scheme.group_size)
        parametrize.register_parametrization(
            layer, "weight", weight_quantizer_for(weight, rows, bits.weight[name], scheme)
        )
        if name in starts:
            quantizer = activation_quantizer_for(bits.act[name], *starts[name], scheme)
            attach_input_quantizer(layer, quantizer.to(weight.device))
    if layers:
        attach_flat(model, layers)
    return model


def dequantize_(model: nn.Module, *, keep_quantized_weights: bool = False) -> nn.Module:
    """Take every quantizer off; weights are the FP32 ones again, or stay at their levels.

    Raises InputError for the FP32 weights of a model whose BatchNorms have been folded: they are
    those of the model before.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    if not keep_quantized_weights and any(channel_factor(layer) is not None for layer in layers):
        raise InputError("BatchNorms are folded into this model: dequantize it first, then fold")
    detach_flat(model)
    for layer in layers:
        _own_class(layer)
        parametrize.remove_parametrizations(
            layer, "weight", leave_parametrized=keep_quantized_weights
        )
        if hasattr(layer, INPUT_QUANTIZER):
            handle = layer._adq_input_hook
            handle.remove()  # type: ignore[operator, union-attr]
            del layer._adq_input_hook
            delattr(layer, INPUT_QUANTIZER)
    return model


def _own_class(layer: nn.Module) -> None:
    """Give a parametrized layer a class that no deep copy of it shares.

    torch keeps the property `weight` on a class made for the layer, and removal deletes it there:
    a copy that is dequantized would take the weight off the original as well.
    """
    shared = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer whose weight is quantized."""
    for name, module in list(model.named_modules()):
        if weight_quantizer(module) is not None:
            yield name, module


def bits_of(model: nn.Module) -> BitVector:
    """The bit vector that is on the model."""
    weight: dict[str, int] = {}
    act: dict[str, int] = {}
    for name, layer in quantized_layers(model):
        quantizer = weight_quantizer(layer)
        assert quantizer is not None
        weight[name] = quantizer.bits
        if hasattr(layer, INPUT_QUANTIZER):
            act[name] = layer.input_quantizer.bits  # type: ignore[union-attr, assignment]
    return BitVector(weight, act)


def attach_input_quantizer(layer: nn.Module, quantizer: nn.Module) -> None:
    layer.add_module(INPUT_QUANTIZER, quantizer)
    layer._adq_input_hook = layer.register_forward_pre_hook(_quantize_input)  # type: ignore[assignment]


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(args[0]), *args[1:])  # type: ignore[operator]


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"bit vector names layer {name!r}, which {type(model).__name__} does not have"
        ) from None
    if parametrize.is_parametrized(layer, "weight"):
        raise InputError(
            f"layer {name!r} is quantized or parametrized already: give the plain FP32 model"
        )
    if not isinstance(layer, QUANTIZABLE):
        kinds = ", ".join(kind.__name__ for kind in QUANTIZABLE)
        raise InputError(f"layer {name!r} is a {type(layer).__name__}; quantizable are {kinds}")
    return layer
