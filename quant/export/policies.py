"""Bit vectors in the formats that other quantization libraries read.

What travels: the bits of each layer's weights and inputs, one scale a channel (or a group) for
weights and one a layer for inputs, and whether an input's grid begins at zero. What does not: the
learned codebooks and thresholds. Their libraries put uniform grids in their place, so that the
model is to be calibrated and fine-tuned there again. A policy that a library cannot hold as a
whole is refused; none is written in part.

    modelopt            NVIDIA Model Optimizer 0.47: `quant_cfg`, an ordered list of patterns
    aimet               Qualcomm AIMET 2: encodings, version 0.6.1, with the ranges of the grids
    compressed-tensors  `quantization_config` of Hugging Face, LLM Compressor and vLLM; Linear only
    torchao             torchao 0.18: `FqnToConfig` as JSON; weights of Linear layers only

NNCF is none of them: see `NNCF`.

Sources: https://nvidia.github.io/Model-Optimizer/guides/_quant_cfg.html,
https://quic.github.io/aimet-pages/releases/latest/ (encoding format specification; what reads it
is `QuantizationSimModel.load_encodings`), and the configuration classes of compressed-tensors 0.20
and torchao 0.18.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_, read_packed
from adq.quant.files import write_json
from adq.quant.rows import TRANSPOSED, rows_of

NNCF = (
    "format nncf: NNCF 3 takes one number of bits for all layers; the JSON configuration whose "
    "bitwidth_per_scope named layers ended with NNCF 2. Choose modelopt, aimet or onnx"
)


@dataclass(frozen=True)
class _Grid:
    """Of a layer's input: x̂ = scale·(q − zero_point), q in 0..2^bits − 1."""

    bits: int
    scale: float
    zero_point: int


@dataclass(frozen=True)
class _Layer:
    """What a policy says of one layer; `group_size` is None where a channel has one scale."""

    name: str
    module: nn.Module
    bits: int
    weight: Tensor
    group_size: int | None
    input: _Grid | None

    @property
    def channel_axis(self) -> int:
        """The dimension of the weight whose entries have a scale each."""
        return 1 if isinstance(self.module, TRANSPOSED) else 0


def save_policy(format: str, packed: str | Path, model: nn.Module, out: str | Path) -> list[str]:
    """Write the policy of a packed file for another library; returns what its reader should know.

    `model` is the plain FP32 model that the other library is to quantize, which names the layers.

    Raises InputError for an unknown format, a file that is damaged or of another model, and a
    policy that the library cannot hold: nothing is written then.
    """
    if format == "nncf":
        raise InputError(NNCF)
    if format not in POLICIES:
        raise InputError(f"format: expected one of {', '.join(POLICIES)}, got {format!r}")
    policy = POLICIES[format]
    write_json(Path(out), policy.content(_layers(Path(packed), model, format)))
    return [note.replace("FILE", repr(str(out))) for note in (*policy.notes, _GRIDS)]


def _layers(packed: Path, model: nn.Module, format: str) -> list[_Layer]:
    file = read_packed(packed)
    loaded = load_packed_(copy.deepcopy(model), packed, kernels="torch")  # whether it fits
    found = []
    for name, bits in file.bits.weight.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"format {format}: {name} is a projection inside an nn.MultiheadAttention, where "
                "others find no layer; call adq.quant.attention.expose_attention_(model) first, "
                "there as here"
            ) from None
        grid = None
        if name in file.inputs:
            scale, zero_point = file.inputs[name].scale, file.inputs[name].zero_point
            grid = _Grid(file.bits.act[name], scale.item(), round(zero_point.item()))
        weight = file.weights[name].fitted(loaded.get_submodule(name))
        assert weight.rows is not None
        group = None if weight.rows.count == weight.rows.channels else weight.rows.size
        found.append(_Layer(name, module, bits, weight.values(), group, grid))
    return found


def _refuse(format: str, layers: Sequence[_Layer], why: str) -> None:
    if layers:
        names = ", ".join(layer.name for layer in layers[:3]) + (", ..." if layers[3:] else "")
        raise InputError(f"format {format}: {why} ({names})")


def _channels_only(format: str, layers: Sequence[_Layer]) -> None:
    """Refuse scales of groups of weights, and those of a grouped transposed convolution, whose
    channels lie in two dimensions of the weight."""
    _refuse(format, [x for x in layers if x.group_size], "it has no scales for groups of weights")
    crossed = [x for x in layers if x.channel_axis and x.module.groups != 1]
    _refuse(format, crossed, "it has no scale a channel for grouped transposed convolutions")


def _linear_only(format: str, layers: Sequence[_Layer]) -> None:
    others = [layer for layer in layers if not isinstance(layer.module, nn.Linear)]
    _refuse(format, others, "it quantizes Linear layers only, and the policy has others")


def _modelopt(layers: Sequence[_Layer]) -> dict[str, Any]:
    """`quant_cfg` for `mtq.quantize`; later entries win.

    Its integer grids are symmetric: amax/(2^(b−1) − 1)·q for signed values, so that 2 bits reach
    three levels, and amax/(2^b − 1)·q for unsigned ones.
    """
    _channels_only("modelopt", layers)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in layers:
        weight = {"num_bits": layer.bits, "axis": layer.channel_axis}
        entries.append({"quantizer_name": f"{layer.name}.weight_quantizer", "cfg": weight})
        if layer.input is not None:
            unsigned = layer.input.zero_point == 0
            cfg = {"num_bits": layer.input.bits, "axis": None, "unsigned": unsigned}
            entries.append({"quantizer_name": f"{layer.name}.input_quantizer", "cfg": cfg})
    return {"quant_cfg": entries, "algorithm": "max"}


def _aimet(layers: Sequence[_Layer]) -> dict[str, Any]:
    """Encodings: x̂ = scale·(q + offset), from `min` to `max`.

    An input's grid is that of the packed file, its thresholds those in the middle. A channel's
    weights get the symmetric grid up to the largest value that they have in the packed file, whose
    BatchNorms may be folded: so must be those of the model that the encodings are loaded on.
    """
    _channels_only("aimet", layers)
    params: dict[str, Any] = {}
    activations: dict[str, Any] = {}
    for layer in layers:
        largest = rows_of(layer.module).split(layer.weight).abs().amax(dim=1)
        low, high = -(2 ** (layer.bits - 1)), 2 ** (layer.bits - 1) - 1
        params[f"{layer.name}.weight"] = [
            _encoding(layer.bits, (value or high) / high, low, symmetric=True)
            for value in largest.double().tolist()
        ]
        if layer.input is not None:
            grid = layer.input
            encoding = _encoding(grid.bits, grid.scale, -grid.zero_point, symmetric=False)
            activations[layer.name] = {"input": {"0": encoding}}
    return {
        "version": "0.6.1",
        "activation_encodings": activations,
        "param_encodings": params,
    }


def _encoding(bits: int, scale: float, offset: int, *, symmetric: bool) -> dict[str, Any]:
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(symmetric),
        "scale": scale,
        "offset": offset,
        "min": scale * offset,
        "max": scale * (offset + 2**bits - 1),
    }


def _compressed_tensors(layers: Sequence[_Layer]) -> dict[str, Any]:
    """A `quantization_config` of quant_method `compressed-tensors`, one group for equal bits."""
    _linear_only("compressed-tensors", layers)
    groups: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name = f"w{layer.bits}" + (f"g{layer.group_size}" if layer.group_size else "")
        scheme: dict[str, Any] = {
            "targets": [],
            "weights": {
                "num_bits": layer.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if layer.group_size else "channel",
                "group_size": layer.group_size,
            },
        }
        if layer.input is not None:
            name += f"a{layer.input.bits}"
            scheme["input_activations"] = {
                "num_bits": layer.input.bits,
                "type": "int",
                "symmetric": False,
                "strategy": "tensor",
                "dynamic": False,
            }
        groups.setdefault(name, scheme)["targets"].append(layer.name)
    return {
        "quant_method": "compressed-tensors",
        "format": "fakequant",
        "quantization_status": "initialized",
        "config_groups": groups,
        "ignore": [],
    }


def _torchao(layers: Sequence[_Layer]) -> dict[str, Any]:
    """What `torchao.core.config.config_to_dict` gives for an `FqnToConfig` of weight-only layers.

    Its configurations of low-bit inputs measure the range in each call: 8 bits, none static.
    """
    _linear_only("torchao", layers)
    quantized = [layer for layer in layers if layer.input is not None]
    _refuse("torchao", quantized, "it has no low-bit inputs, and the policy has them")
    configs = {
        layer.name: _typed(
            "IntxWeightOnlyConfig",
            2,
            {
                "weight_dtype": {"_type": "torch.dtype", "_data": f"int{layer.bits}"},
                "granularity": _typed("PerGroup", 1, {"group_size": layer.group_size})
                if layer.group_size
                else _typed("PerAxis", 1, {"axis": 0}),
                "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
                "scale_dtype": None,
                "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
                "intx_choose_qparams_algorithm": {
                    "_type": "IntxChooseQParamsAlgorithm",
                    "_data": "AFFINE",
                },
            },
        )
        for layer in layers
    }
    return _typed("FqnToConfig", 1, {"fqn_to_config": configs})


def _typed(kind: str, version: int, data: dict[str, Any]) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


@dataclass(frozen=True)
class _Policy:
    content: Callable[[Sequence[_Layer]], dict[str, Any]]
    notes: tuple[str, ...]


_GRIDS = (
    "bits, scales and signs are the study's; uniform grids take the place of its learned codebooks "
    "and thresholds: fine-tune, and measure the accuracy, there"
)

POLICIES: Mapping[str, _Policy] = {
    "modelopt": _Policy(
        _modelopt,
        (
            "use it: mtq.quantize(model, json.load(open(FILE)), forward_loop)",
            "inputs whose grid begins at zero are unsigned: ModelOpt refuses negative values there",
        ),
    ),
    "aimet": _Policy(
        _aimet,
        (
            "use it: give each module of sim.qmodules() an input quantizer, q.input_quantizers[0] "
            "= QuantizeDequantize((), 0, 255, symmetric=False), then sim.load_encodings(FILE, "
            "strict=True, partial=False)",
            "its ranges are those of the packed weights: fold the model's BatchNorms first",
        ),
    ),
    "compressed-tensors": _Policy(
        _compressed_tensors,
        ("use it: apply_quantization_config(model, QuantizationConfig(**json.load(open(FILE))))",),
    ),
    "torchao": _Policy(
        _torchao,
        ("use it: quantize_(model, config_from_dict(json.load(open(FILE))), filter_fn=None)",),
    ),
}
