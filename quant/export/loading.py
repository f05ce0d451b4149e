"""Read what `packed` wrote, and put it on a model.

Nothing here trains: a service needs this module, `adq.quant.serving` and the model's own code.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export.packed import SCHEMA, digest_of, module_names
from adq.quant.fold import replace_
from adq.quant.layers import QUANTIZABLE
from adq.quant.packed import PackedInput, PackedWeight
from adq.quant.rows import rows_of
from adq.quant.serving import KERNELS, Kernels, packed_layer, unpack_
from adq.quant.spec import BitVector

__all__ = [
    "PackedFile",
    "PackedInput",
    "PackedWeight",
    "load_packed_",
    "read_metadata",
    "read_packed",
]


@dataclass(frozen=True)
class _File:
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    bits: BitVector


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds: see `packed`.

    weights  layer -> its weight, which learns its shape from the layer (`PackedWeight.fitted`)
    inputs   layer -> its input quantizer, where it has one
    tensors  everything else, under its own name
    folded   name of a BatchNorm -> name of the layer that it is folded into
    """

    metadata: dict[str, Any]
    bits: BitVector
    weights: dict[str, PackedWeight]
    inputs: dict[str, PackedInput]
    tensors: dict[str, Tensor]
    folded: dict[str, str]


def _read(path: str | Path) -> _File:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable adq model ({error})") from None
    if "adq" not in stored:
        raise InputError(f"{path}: a safetensors file, but not one that adq wrote")
    if stored.get("sha256") != digest_of(stored["adq"], tensors):
        raise InputError(f"{path} is damaged: its content does not match its checksum")
    try:
        metadata = json.loads(stored["adq"])
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError
        raise InputError(f"{path}: not a readable adq model ({error})") from None
    if not isinstance(metadata, dict) or metadata.get("schema") != SCHEMA:
        raise InputError(f"{path}: expected schema {SCHEMA!r} in its metadata")
    try:
        bits = BitVector.from_json(metadata.get("bits"), str(path))
    except InputError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise InputError(f"{where}{error}") from None
    return _File(tensors, metadata, bits)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a packed file; raises InputError if it is missing, damaged or foreign."""
    return _read(path).metadata


def read_packed(path: str | Path) -> PackedFile:
    """A packed file's content, checked as far as no model is needed.

    Raises InputError if it is missing, damaged or foreign, lacks a tensor that its bits ask for, or
    has one of another type or shape, or numbers that are not finite.
    """
    file = _read(path)
    tensors = dict(file.tensors)
    weights: dict[str, PackedWeight] = {}
    inputs: dict[str, PackedInput] = {}
    folded = file.metadata.get("folded", {})
    try:
        if not isinstance(folded, dict) or not all(isinstance(v, str) for v in folded.values()):
            raise ValueError("'folded' must map names of BatchNorms to names of layers")
        for name, bits in file.bits.weight.items():
            codes = _taken(tensors, f"{name}.weight.codes", torch.uint8)
            codebook = _taken(tensors, f"{name}.weight.codebook", torch.float32, 2**bits)
            scale = _taken(tensors, f"{name}.weight.scale", torch.float32)
            weights[name] = PackedWeight(codes, bits, codebook, scale)
        for name, bits in file.bits.act.items():
            thresholds = _taken(tensors, f"{name}.input.thresholds", torch.float32, 2**bits - 1)
            if not bool((thresholds.diff() >= 0).all()):
                raise ValueError(f"{name}.input.thresholds do not ascend")
            scale = _taken(tensors, f"{name}.input.scale", torch.float32, 1)
            zero_point = _taken(tensors, f"{name}.input.zero_point", torch.float32, 1)
            inputs[name] = PackedInput(thresholds, scale, zero_point)
    except (KeyError, ValueError) as error:
        said = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: not a model that adq wrote ({said})") from None
    return PackedFile(file.metadata, file.bits, weights, inputs, tensors, dict(folded))


def _taken(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype, count: int | None = None
) -> Tensor:
    """The tensor of this name, out of the rest; raises KeyError or ValueError."""
    tensor = tensors.pop(key)
    if tensor.dtype != dtype or tensor.dim() != 1 or count not in (None, tensor.numel()):
        shape = f"({'n' if count is None else count},)"
        raise ValueError(
            f"{key}: expected {dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}"
        )
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise ValueError(f"{key} has values that are not finite")
    return tensor


def load_packed_(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    kernels: Kernels = "auto",
) -> nn.Module:
    """Put a packed file on a freshly built FP32 `model`, for inference: eval mode, no gradients.

    `kernels` says what runs, see `adq.quant.serving`: "auto" is the fastest on `device` (the
    model's own if not given), "torch" plain layers, for torch.export and ONNX. With "auto" and
    "packed", Linear and Conv2d layers become `PackedLinear` and `PackedConv2d`. The model can be
    moved, and cast to half precision, later.

    How its outputs compare with those of the quantized model in eval mode, in FP32 on one device:

    - `kernels="torch"` and no BatchNorm folded: equal, bit by bit. Both multiply the same float32
      scale and level, compare with the same thresholds, and call the same operators.
    - otherwise sums of the same products are rounded in another order or place, by a relative 2⁻²⁴
      at each addition: over tens of layers that is less than 1e-5 of the largest output.
    - with quantized inputs there is more: a value that lies within such a rounding of a threshold,
      one in 10⁵ or so, gets the next level, and moves others over theirs. A deep network's outputs
      are then as far from the quantized model's in float64 as those of the quantized model in
      float32 are (3 % for a random ResNet-18 at 4 and 8 bits, `studies/benchmarks/packed`).
      Without a value so close to a threshold, the bound is the one above.

    Raises InputError when the file is damaged or was written for another architecture, and for an
    unknown `kernels` or a device that is not there; the model is then as it was.
    """
    if kernels not in KERNELS:
        raise InputError(f"kernels: expected one of {', '.join(KERNELS)}, got {kernels!r}")
    if device is not None:
        _check_device(device)
    file = read_packed(path)
    with _as_before_on_error(model):
        expose_attention_(model)
        try:
            layers = {name: _layer(model, name) for name in file.weights}
            weights = {name: w.fitted(layers[name]) for name, w in file.weights.items()}
            _check_tensors(model, file)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: does not fit {type(model).__name__}; was it written for another model? "
                f"({error})"
            ) from None
        norms = [(model.get_submodule(n), model.get_submodule(f)) for n, f in file.folded.items()]
        for _, layer in norms:
            if layer.bias is None:
                weight = layer.get_parameter("weight")
                layer.bias = nn.Parameter(weight.new_zeros(rows_of(layer).channels))
        for norm, _ in norms:
            replace_(model, norm, nn.Identity())
        model.load_state_dict(file.tensors, strict=False)
        for name, layer in layers.items():
            device_now = layer.get_parameter("weight").device
            served = packed_layer(layer, weights[name], file.inputs.get(name), kernels)
            if served is None:
                unpack_(layer, weights[name].values(), file.inputs.get(name), kernels)
            else:
                replace_(model, layer, served.to(device_now))
        if device is not None:
            model.to(device)
    return model.eval().requires_grad_(False)


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all of them
        said = str(error).partition("\n")[0]
        raise InputError(f"device {str(device)!r} is not available here ({said})") from None


def _layer(model: nn.Module, name: str) -> nn.Module:
    layer = model.get_submodule(name)
    if not isinstance(layer, QUANTIZABLE):
        raise ValueError(f"{name} is a {type(layer).__name__}")
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"{name} is quantized or parametrized already")
    return layer


def _check_tensors(model: nn.Module, file: PackedFile) -> None:
    """Raises ValueError where the rest of the file is not the rest of the model."""
    expected = {k: (v.shape, v.is_floating_point()) for k, v in model.state_dict().items()}
    names = module_names(model)
    for layer in file.weights:
        for same in names[layer]:
            del expected[f"{same}.weight"]
    for norm, layer in file.folded.items():
        if not isinstance(model.get_submodule(norm), nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{norm} is no BatchNorm")
        for key in model.get_submodule(norm).state_dict():
            for same in names[norm]:
                expected.pop(f"{same}.{key}", None)
        channels = rows_of(_layer(model, layer)).channels
        for same in names[layer]:
            expected[f"{same}.bias"] = torch.Size([channels]), True
    found = {k: (v.shape, v.is_floating_point()) for k, v in file.tensors.items()}
    if found != expected:
        wrong = sorted(k for k in found.keys() | expected if found.get(k) != expected.get(k))
        raise ValueError(f"its tensors are not those of the model, {wrong[0]!r} for one")


@contextmanager
def _as_before_on_error(model: nn.Module) -> Iterator[None]:
    """Undo what was changed in the structure of a model, if the block fails."""
    before = [(m, m.__class__, dict(vars(m)), _registered(m)) for m in model.modules()]
    copies = [[dict(part) for part in parts] for *_, parts in before]
    try:
        yield
    except BaseException:
        for (module, kind, state, parts), parts_before in zip(before, copies, strict=True):
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            for part, was in zip(parts, parts_before, strict=True):
                part.clear()
                part.update(was)
        raise


def _registered(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules
