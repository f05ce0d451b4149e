"""A quantized model in one safetensors file, its weights packed at their true width.

Tensors, for each quantized layer L with n weights of b bits in R rows (see `adq.quant.rows`):

    L.weight.codes      uint8    (ceil(n·b/8),)  row after row, see `adq.quant.packing`
    L.weight.codebook   float32  (2^b,)
    L.weight.scale      float32  (R,)            row r = scale[r] · codebook[codes of r]
    L.input.thresholds  float32  (2^a − 1,)      only where the input has a bits
    L.input.scale       float32  (1,)            input = scale · (#{thresholds <= x} − zero_point)
    L.input.zero_point  float32  (1,)

and every other parameter and buffer under its own name. A module registered in several places has
several names: L is its first, all else is there under each. BatchNorms are folded into the layers
before them where they can be (see `adq.quant.fold`): their factors are in the scales, which may
then be negative, and their shifts in the biases.

The file's metadata has two entries. `adq`: JSON with `schema` ("adq-model/1"), `bits` (a bit
vector), `folded` (name of a BatchNorm -> name of the layer that it is folded into) and what the
writer adds. `sha256`: a digest of that JSON and of all tensors, since safetensors checks lengths
only. Spaces at the header's end bring the file to the size that `PackedSize` tells before training:

    | 8: length H | H: JSON {"__metadata__": {}, name: dtype, shape, offsets}, spaces | tensors |
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from adq.quant.apply import INPUT_QUANTIZER, bits_of, quantized_layers
from adq.quant.errors import InputError
from adq.quant.files import write_tensors
from adq.quant.fold import batchnorm_pairs, channel_factor, fold_batchnorm_
from adq.quant.modules import ActivationQuantizer, original_weight, weight_quantizer
from adq.quant.packing import pack, packed_bytes
from adq.quant.rows import rows_of
from adq.quant.spec import MAX_BITS, BitVector

SCHEMA = "adq-model/1"
METADATA_BYTES = 256
"""Room in the header for the writer's metadata: `"task":"digits",` takes 20 bytes of it, since
each quote is escaped."""
_FLOAT_BYTES = 4


def weight_bytes(numel: int, scales: int, bits: int) -> int:
    """Bytes of one layer's weight in the file: codes, codebook and scales."""
    return packed_bytes(numel, bits) + _FLOAT_BYTES * (2**bits + scales)


def input_bytes(bits: int | None) -> int:
    """Bytes of one layer's input quantizer in the file; none for an FP32 input."""
    return 0 if bits is None else _FLOAT_BYTES * (2**bits - 1 + 2)


class PackedSize:
    """The size of the file that `save_packed` writes, exactly, before anything is trained.

        bytes = fixed_bytes + Σ_l layer_bytes(l, b_l, a_l)      l over all quantized layers

    A layer's share is its tensors, their entries in the header, and its bits in the metadata; all
    else is fixed. Entries tell shapes and offsets, whose digits depend on the bits, the offsets on
    those of every layer. Each counts as many digits as it has at the most, and `save_packed` fills
    up with spaces: the header depends on which inputs have bits, not on how many. Its shares are
    multiples of 8 bytes, as the whole must be.

    A file is larger where its writer's metadata needs more than METADATA_BYTES, by at most the
    excess.

    weights  (number of weights, number of scales) of each quantized layer
    rest     every other tensor of the file
    folded   the BatchNorms that are folded, and into which layers
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[int, int]],
        rest: Mapping[str, Tensor],
        folded: Mapping[str, str],
    ) -> None:
        rest_bytes = sum(t.nbytes for t in rest.values())
        # no offset is above this
        end = rest_bytes + sum(
            weight_bytes(*counts, MAX_BITS) + input_bytes(MAX_BITS) for counts in weights.values()
        )
        header = METADATA_BYTES + _json_bytes(
            {"__metadata__": {"adq": _compact(_about(BitVector({}), folded)), "sha256": "0" * 64}}
        )
        for name, tensor in rest.items():
            header += _entry_bytes(name, _dtype_name(tensor.dtype), tuple(tensor.shape), end)
        self.fixed_bytes = 8 + _aligned(header) + rest_bytes

        self._weights = dict(weights)
        self._weight_header: dict[str, int] = {}
        self._input_header: dict[str, int] = {}
        for name, (numel, scales) in weights.items():
            bits = _json_bytes(_compact({name: MAX_BITS})[1:-1]) - 2 + 1  # no quotes, a comma
            self._weight_header[name] = _aligned(
                bits
                + _entry_bytes(f"{name}.weight.codes", "U8", (packed_bytes(numel, MAX_BITS),), end)
                + _entry_bytes(f"{name}.weight.codebook", "F32", (2**MAX_BITS,), end)
                + _entry_bytes(f"{name}.weight.scale", "F32", (scales,), end)
            )
            self._input_header[name] = _aligned(
                bits
                + _entry_bytes(f"{name}.input.thresholds", "F32", (2**MAX_BITS - 1,), end)
                + _entry_bytes(f"{name}.input.scale", "F32", (1,), end)
                + _entry_bytes(f"{name}.input.zero_point", "F32", (1,), end)
            )

    def layer_bytes(self, name: str, weight: int, act: int | None) -> int:
        """One layer's share at these bits; an FP32 input (None) takes nothing."""
        total = weight_bytes(*self._weights[name], weight) + self._weight_header[name]
        return total if act is None else total + input_bytes(act) + self._input_header[name]

    def total(self, bits: BitVector) -> int:
        """The file's bytes under a bit vector that names every layer."""
        return self.fixed_bytes + sum(
            self.layer_bytes(name, bits.weight[name], bits.act.get(name)) for name in self._weights
        )


def packed_size(model: nn.Module, weights: Mapping[str, tuple[int, int]]) -> PackedSize:
    """The sizes of an FP32 model's files; `weights` as in PackedSize."""
    folded, names, rest = batchnorm_pairs(model), module_names(model), model.state_dict()
    for norm, layer in folded.items():
        for key in model.get_submodule(norm).state_dict():
            for same in names[norm]:
                del rest[f"{same}.{key}"]
        rows = rows_of(model.get_submodule(layer))
        bias = model.get_parameter(f"{layer}.weight").new_empty(rows.channels)
        rest.update({f"{same}.bias": bias for same in names[layer]})
    for name in weights:
        for same in names.get(name, ()):
            del rest[f"{same}.weight"]
    return PackedSize(weights, rest, folded)


def _about(bits: BitVector, folded: Mapping[str, str]) -> dict[str, Any]:
    return {"schema": SCHEMA, "bits": bits.to_json(), "folded": dict(folded)}


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _json_bytes(data: Any) -> int:
    """Bytes of JSON as safetensors writes it: compact, in UTF-8."""
    return len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())


def _entry_bytes(name: str, dtype: str, shape: tuple[int, ...], end: int) -> int:
    """Bytes of a tensor's entry in the header with a comma, at the longest up to offset `end`."""
    entry = {name: {"dtype": dtype, "shape": shape, "data_offsets": (end, end)}}
    return _json_bytes(entry) - 2 + 1  # no braces, a comma


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    name: str = json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"]
    return name


def _aligned(count: int) -> int:
    return -(-count // 8) * 8


def module_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name of a module -> all names of that module, the first one first.

    A module that is registered in several places has its tensors in the state dict once for each.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {name: same for same in names.values() for name in same}


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a quantized model as the file holds them."""
    tensors: dict[str, Tensor] = {}
    names = module_names(model)
    own: set[str] = set()
    for name, layer in quantized_layers(model):
        quantizer = weight_quantizer(layer)
        assert quantizer is not None
        weight = original_weight(layer)
        with torch.no_grad():
            scale = quantizer.scale_of(quantizer.rows.split(weight))
            factor = channel_factor(layer)
            if factor is not None:
                scale = scale * quantizer.rows.split(factor.expand_as(weight))[:, 0]
        tensors[f"{name}.weight.codes"] = pack(quantizer.codes(weight), quantizer.bits)
        tensors[f"{name}.weight.codebook"] = quantizer.levels.float()
        tensors[f"{name}.weight.scale"] = scale.float()
        own |= {f"{same}.parametrizations.weight." for same in names[name]}
        if hasattr(layer, INPUT_QUANTIZER):
            act = layer.input_quantizer
            assert isinstance(act, ActivationQuantizer)
            tensors[f"{name}.input.thresholds"] = act.thresholds.detach().float()
            tensors[f"{name}.input.scale"] = act.output_scale.detach().float()
            tensors[f"{name}.input.zero_point"] = act.zero_point.float()
            own |= {f"{same}.{INPUT_QUANTIZER}." for same in names[name]}
    for key, value in model.state_dict().items():
        if not key.startswith(tuple(own)):
            tensors[key] = value
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def save_packed(model: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Write a quantized model; `metadata` is JSON data that `read_metadata` gives back.

    The file is that of a copy whose BatchNorms are folded, equal in eval mode up to rounding. It
    has the size that `PackedSize` tells, or more where `metadata` needs more than METADATA_BYTES.
    """
    if any(channel_factor(layer) is not None for _, layer in quantized_layers(model)):
        raise InputError("the model is folded already: give the one before")
    model = copy.deepcopy(model)
    folded = fold_batchnorm_(model)
    bits = bits_of(model)
    header = _compact({**_about(bits, folded), **metadata})
    tensors = packed_tensors(model)
    size_bytes = _size_of(model, tensors, folded).total(bits)
    write_tensors(path, tensors, {"adq": header, "sha256": digest_of(header, tensors)}, size_bytes)


def _size_of(model: nn.Module, tensors: dict[str, Tensor], folded: Mapping[str, str]) -> PackedSize:
    """The same as from the FP32 model: these counts and shapes do not change in training."""
    rest = dict(tensors)
    weights: dict[str, tuple[int, int]] = {}
    for name, layer in quantized_layers(model):
        scales = rest.pop(f"{name}.weight.scale").numel()
        weights[name] = original_weight(layer).numel(), scales
        for part in ("weight.codes", "weight.codebook"):
            del rest[f"{name}.{part}"]
        if hasattr(layer, INPUT_QUANTIZER):
            for part in ("thresholds", "scale", "zero_point"):
                del rest[f"{name}.input.{part}"]
    return PackedSize(weights, rest, folded)


def digest_of(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
