"""Read what `packed` wrote, and put it on a model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adq.quant.apply import attach_input_quantizer
from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export.packed import SCHEMA, digest_of, module_names
from adq.quant.fold import replace_
from adq.quant.packing import unpack
from adq.quant.rows import Rows, rows_of
from adq.quant.spec import BitVector


@dataclass(frozen=True)
class _File:
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    bits: BitVector


def _read(path: str | Path) -> _File:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        if "adq" not in stored:
            raise InputError(f"{path}: a safetensors file, but not one that adq wrote")
        if stored.get("sha256") != digest_of(stored["adq"], tensors):
            raise InputError(f"{path} is damaged: its content does not match its checksum")
        metadata = json.loads(stored["adq"])
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable adq model ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("schema") != SCHEMA:
        raise InputError(f"{path}: expected schema {SCHEMA!r} in its metadata")
    return _File(tensors, metadata, BitVector.from_json(metadata.get("bits"), str(path)))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a packed file; raises InputError if it is missing, damaged or foreign."""
    return _read(path).metadata


def load_packed_(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a packed file's weights and input quantizers on a freshly built FP32 `model`, eval mode.

    Raises InputError when the file is damaged or was written for another architecture; the model
    then computes what it did before.
    """
    file = _read(path)
    expose_attention_(model)
    names = module_names(model)
    tensors = dict(file.tensors)
    inputs: dict[str, PackedInput] = {}
    try:
        for name, bits in file.bits.weight.items():
            weight = model.get_parameter(f"{name}.weight")
            codes = unpack(tensors.pop(f"{name}.weight.codes"), bits, weight.numel()).long()
            levels = tensors.pop(f"{name}.weight.codebook")
            scale = tensors.pop(f"{name}.weight.scale")
            rows = rows_of(model.get_submodule(name))
            rows = Rows(rows.shape, weight.numel() // scale.numel(), rows.groups)
            values = rows.join(scale[:, None] * levels[codes].reshape(rows.count, rows.size))
            tensors.update({f"{same}.weight": values for same in names[name]})
        for name in file.bits.act:
            inputs[name] = PackedInput(
                *(tensors.pop(f"{name}.input.{k}") for k in ("thresholds", "scale", "zero_point"))
            )
        folded = dict(file.metadata.get("folded", {}))
        expected = _expected_shapes(model, folded)
        if {key: value.shape for key, value in tensors.items()} != expected:
            raise ValueError("its tensors are not those of the model")
    except (AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: does not fit {type(model).__name__}; was it written for another model? "
            f"({error})"
        ) from None
    for norm, name in folded.items():
        layer, old = model.get_submodule(name), model.get_submodule(norm)
        layer.bias = nn.Parameter(tensors[f"{name}.bias"].to(layer.get_parameter("weight")))
        replace_(model, old, nn.Identity())
    model.load_state_dict(tensors)
    for name, quantizer in inputs.items():
        layer = model.get_submodule(name)
        attach_input_quantizer(layer, quantizer.to(next(layer.parameters()).device))
    return model.eval()


def _expected_shapes(model: nn.Module, folded: dict[str, str]) -> dict[str, torch.Size]:
    """The tensors of a model once these BatchNorms are folded into these layers."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    names = module_names(model)
    for norm, layer in folded.items():
        for key in model.get_submodule(norm).state_dict():
            for same in names[norm]:
                del shapes[f"{same}.{key}"]
        channels = rows_of(model.get_submodule(layer)).channels
        shapes.update({f"{same}.bias": torch.Size([channels]) for same in names[layer]})
    return shapes


class PackedInput(nn.Module):
    """A layer's input quantizer as the file holds it: x -> scale · (#{thresholds <= x} − z)."""

    thresholds: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, thresholds: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.bucketize(x.contiguous(), self.thresholds, right=True).to(x.dtype)
        return (self.scale * (code - self.zero_point)).to(x.dtype)
