"""Policies for other libraries: what their own schemas, samples and classes make of the files."""

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant.apply import quantize
from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_, read_packed
from adq.quant.export.packed import save_packed
from adq.quant.export.policies import POLICIES, save_policy
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

SUPPORT = Path(__file__).parents[2] / "support"


@cache
def schema(name: str) -> dict[str, Any]:
    return json.loads((SUPPORT / f"{name}.schema.json").read_text())


class Convolutions(nn.Module):
    """Every kind of layer but attention; a BatchNorm that is folded, and an input below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.line = nn.Conv1d(6, 5, 2)
        self.plain = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.norm(self.first(x)))))
        return self.head(F.relu(self.plain(self.line(x.mean(dim=3)).mean(dim=2))))


BITS = BitVector(
    {"first": 8, "up": 3, "line": 2, "plain": 5, "head": 4}, {"first": 8, "up": 2, "plain": 4}
)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.one = nn.Linear(8, 16)
        self.two = nn.Linear(16, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.two(F.gelu(self.one(self.norm(x))))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def packed_file(
    folder: Path, model: nn.Module, bits: BitVector, x: Tensor, scheme: Scheme | None = None
) -> Path:
    batches = [(x, torch.zeros(len(x)))]
    path = folder / "model.safetensors"
    save_packed(quantize(model, bits, batches, scheme or Scheme()), path, {})
    return path


def images() -> Tensor:
    return torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def rows() -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def exported(format: str, packed: Path, model: nn.Module) -> dict[str, Any]:
    out = packed.with_name("policy.json")
    notes = save_policy(format, packed, model, out)
    assert any(repr(str(out)) in note for note in notes)
    return json.loads(out.read_text())


def modelopt_setting(policy: dict[str, Any], quantizer: str) -> dict[str, Any] | None:
    """What the ordered list says of a quantizer: the last pattern that matches, None where off."""
    found = None
    for entry in policy["quant_cfg"]:
        if fnmatchcase(quantizer, entry["quantizer_name"]):
            found = entry["cfg"] if entry.get("enable", True) else None
    return found


def test_modelopt_gives_each_quantizer_its_bits_and_switches_all_others_off(tmp_path) -> None:
    model = seeded(Convolutions)
    policy = exported("modelopt", packed_file(tmp_path, model, BITS, images()), model)
    jsonschema.validate(policy, schema("modelopt"), jsonschema.Draft202012Validator)
    for name, module in model.named_modules():
        weight = modelopt_setting(policy, f"{name}.weight_quantizer")
        given = modelopt_setting(policy, f"{name}.input_quantizer")
        assert modelopt_setting(policy, f"{name}.output_quantizer") is None
        if name not in BITS.weight:
            assert weight is given is None
            continue
        assert weight is not None
        # a scale a channel: the size of the axis is the number of channels
        channels = getattr(module, "out_channels", None) or module.out_features
        assert module.weight.shape[weight["axis"]] == channels
        assert weight["num_bits"] == BITS.weight[name]
        if name in BITS.act:
            assert given is not None
            assert (given["num_bits"], given["axis"]) == (BITS.act[name], None)
            # what is behind a ReLU is unsigned; images and the mean of a convolution are not
            assert given["unsigned"] is (name == "up")
        else:
            assert given is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p["quant_cfg"][1]["cfg"].update(bits=3),
        lambda p: p["quant_cfg"][1].pop("quantizer_name"),
        lambda p: p.update(note="x"),
    ],
)
def test_the_schema_of_modelopt_refuses_what_its_class_refuses(tmp_path, damage) -> None:
    model = seeded(Convolutions)
    policy = exported("modelopt", packed_file(tmp_path, model, BITS, images()), model)
    damage(policy)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(policy, schema("modelopt"), jsonschema.Draft202012Validator)


def on_grid(x: Tensor, encoding: dict[str, Any]) -> Tensor:
    """Quantized and dequantized by an encoding: scale·(q + offset), q in 0..2^bitwidth − 1.

    AIMET's specification of encodings, version 0.6.1.
    """
    q = (x / encoding["scale"]).round() - encoding["offset"]
    return encoding["scale"] * (q.clamp(0, 2 ** encoding["bitwidth"] - 1) + encoding["offset"])


def test_aimet_encodings_hold_the_grids_of_the_packed_file(tmp_path) -> None:
    model = seeded(Convolutions)
    packed = packed_file(tmp_path, model, BITS, images())
    policy, file = exported("aimet", packed, model), read_packed(packed)
    assert policy["version"] == "0.6.1"
    assert policy["activation_encodings"].keys() == BITS.act.keys()
    assert policy["param_encodings"].keys() == {f"{name}.weight" for name in BITS.weight}
    sweep = torch.linspace(-6, 6, 4001)
    for name, bits in BITS.act.items():
        encoding = policy["activation_encodings"][name]["input"]["0"]
        assert (encoding["bitwidth"], encoding["is_symmetric"]) == (bits, "False")
        # a start that nothing was learned from has uniform thresholds: all values are equal, but
        # for those that rounding puts on the other side
        ours, theirs = file.inputs[name](sweep), on_grid(sweep, encoding)
        same = (ours - theirs).abs() < 1e-5 * encoding["scale"] * 2**bits
        assert same.double().mean() > 0.999
        edges = torch.tensor([encoding["min"], encoding["max"]])
        torch.testing.assert_close(edges, torch.stack([ours.min(), ours.max()]))
    loaded = load_packed_(copy.deepcopy(model), packed, kernels="torch")
    for name, bits in BITS.weight.items():
        weight = loaded.get_submodule(name).weight
        channels = weight.transpose(0, 1) if name == "up" else weight
        encodings = policy["param_encodings"][f"{name}.weight"]
        assert len(encodings) == len(channels)
        for channel, encoding in zip(channels, encodings, strict=True):
            assert (encoding["bitwidth"], encoding["is_symmetric"]) == (bits, "True")
            step = encoding["scale"]
            assert encoding["min"] == pytest.approx(-step * 2 ** (bits - 1))
            assert encoding["max"] == pytest.approx(step * (2 ** (bits - 1) - 1))
            assert encoding["max"] == pytest.approx(channel.abs().max().item())
            assert (on_grid(channel, encoding) - channel).abs().max() <= step * 0.5001


LINEAR_BITS = BitVector({"one": 3, "two": 2, "out": 3}, {"one": 4, "out": 4})


def test_compressed_tensors_groups_layers_of_equal_bits(tmp_path) -> None:
    model = seeded(Linears)
    packed = packed_file(tmp_path, model, LINEAR_BITS, rows())
    policy = exported("compressed-tensors", packed, model)
    jsonschema.validate(policy, schema("compressed_tensors"), jsonschema.Draft202012Validator)
    found = {}
    for group in policy["config_groups"].values():
        for name in group["targets"]:
            assert name not in found
            given = group.get("input_activations")
            found[name] = group["weights"]["num_bits"], given and given["num_bits"]
    assert found == {"one": (3, 4), "two": (2, None), "out": (3, 4)}
    assert len(policy["config_groups"]) == 2
    policy["config_groups"]["w2"]["weights"]["num_bits"] = "two"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(policy, schema("compressed_tensors"), jsonschema.Draft202012Validator)


# config_to_dict(FqnToConfig(OrderedDict(one=IntxWeightOnlyConfig(torch.int3),
# two=IntxWeightOnlyConfig(torch.int2, PerGroup(4))))) of torchao 0.18.0, but for the deprecated
# second copy under `module_fqn_to_config`
TORCHAO = """
{"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": {
 "one": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {
  "weight_dtype": {"_type": "torch.dtype", "_data": "int3"},
  "granularity": {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}},
  "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "scale_dtype": null,
  "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
  "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"}}},
 "two": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {
  "weight_dtype": {"_type": "torch.dtype", "_data": "int2"},
  "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 4}},
  "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "scale_dtype": null,
  "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
  "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"}}}}}}
"""


def test_torchao_json_is_what_torchao_writes_itself(tmp_path) -> None:
    model = nn.Sequential()
    model.one, model.two = nn.Linear(3, 8), nn.Linear(8, 2)  # groups of 4 do not divide 3
    bits = BitVector({"one": 3, "two": 2})
    packed = packed_file(tmp_path, model, bits, torch.randn(4, 3), Scheme(group_size=4))
    assert exported("torchao", packed, model) == json.loads(TORCHAO)


def refused(format: str, packed: Path, model: nn.Module) -> str:
    out = packed.with_name("refused.json")
    with pytest.raises(InputError) as error:
        save_policy(format, packed, model, out)
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_library_cannot_hold_is_refused_in_one_line(tmp_path) -> None:
    model = seeded(Convolutions)
    packed = packed_file(tmp_path, model, BITS, images())
    for format in ("torchao", "compressed-tensors"):
        assert "Linear layers only" in refused(format, packed, model)
        assert "(first, up, line)" in refused(format, packed, model)
    assert "one number of bits for all layers" in refused("nncf", packed, model)
    assert f"expected one of {', '.join(POLICIES)}, got 'gguf'" in refused("gguf", packed, model)
    assert "another model" in refused("modelopt", packed, seeded(Linears))
    packed.write_bytes(packed.read_bytes()[:-1])
    assert "not a readable adq model" in refused("aimet", packed, model)


def test_inputs_scales_of_groups_and_inner_projections_are_refused_where_unknown(tmp_path) -> None:
    model = seeded(Linears)
    packed = packed_file(tmp_path, model, LINEAR_BITS, rows())
    assert "no low-bit inputs, and the policy has them (one, out)" in refused(
        "torchao", packed, model
    )
    packed = packed_file(tmp_path, model, LINEAR_BITS, rows(), Scheme(group_size=4))
    for format in ("modelopt", "aimet"):
        assert "no scales for groups of weights (one, two, out)" in refused(format, packed, model)
    grouped = seeded(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1))
    )
    packed = packed_file(tmp_path, grouped, BitVector({"0": 3, "1": 3}), torch.randn(2, 4, 3, 3))
    for format in ("modelopt", "aimet"):
        assert "grouped transposed convolutions (0)" in refused(format, packed, grouped)


def test_projections_inside_an_attention_need_an_exposed_model(tmp_path) -> None:
    attention = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    bits = BitVector({"self_attn.in_proj": 3, "self_attn.out_proj": 4, "linear1": 2})
    packed = packed_file(tmp_path, attention, bits, torch.randn(4, 5, 8))
    assert "expose_attention_(model) first" in refused("modelopt", packed, attention)
    policy = exported("modelopt", packed, expose_attention_(copy.deepcopy(attention)))
    setting = modelopt_setting(policy, "self_attn.in_proj.weight_quantizer")
    assert setting == {"num_bits": 3, "axis": 0}


# the libraries themselves, where they are installed; they warn of much
library = pytest.mark.filterwarnings("ignore")


@library
def test_modelopt_itself_quantizes_as_the_policy_says(tmp_path) -> None:
    pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    import modelopt.torch.quantization as mtq

    model = seeded(Convolutions)
    policy = exported("modelopt", packed_file(tmp_path, model, BITS, images()), model)
    quantized = mtq.quantize(copy.deepcopy(model), policy, lambda m: m(images()))
    for name, bits in BITS.weight.items():
        layer = quantized.get_submodule(name)
        assert layer.weight_quantizer.is_enabled
        assert layer.weight_quantizer.num_bits == bits
        assert layer.input_quantizer.is_enabled is (name in BITS.act)
        assert not layer.output_quantizer.is_enabled
    on = [n for n, m in quantized.named_modules() if getattr(m, "is_enabled", False) is True]
    assert len(on) == len(BITS.weight) + len(BITS.act)
    assert quantized(images()).isfinite().all()


@library
def test_aimet_itself_loads_the_encodings(tmp_path) -> None:
    pytest.importorskip("aimet_torch", reason="aimet-torch is not installed")
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.v2.quantization.affine import QuantizeDequantize

    model = seeded(Convolutions)
    packed = packed_file(tmp_path, model, BITS, images())
    exported("aimet", packed, model)
    loaded = load_packed_(copy.deepcopy(model), packed, kernels="torch")
    for name in BITS.act:  # AIMET traces a model of plain layers
        layer = loaded.get_submodule(name)
        layer._forward_pre_hooks.clear()
        del layer.input_quantizer
    sim = QuantizationSimModel(loaded, images()[:1])
    for layer in sim.qmodules():
        layer.input_quantizers[0] = QuantizeDequantize((), 0, 255, symmetric=False)
    sim.load_encodings(str(tmp_path / "policy.json"), strict=True, partial=False)
    for name, bits in BITS.weight.items():
        layer = sim.model.get_submodule(name)
        assert layer.param_quantizers["weight"].bitwidth == bits
        grid = layer.input_quantizers[0]
        assert (grid and grid.bitwidth) == BITS.act.get(name)
    assert sim.model(images()).isfinite().all()


@library
def test_compressed_tensors_itself_applies_the_config(tmp_path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = seeded(Linears)
    packed = packed_file(tmp_path, model, LINEAR_BITS, rows())
    policy = exported("compressed-tensors", packed, model)
    apply_quantization_config(model, QuantizationConfig(**policy))
    for name, bits in LINEAR_BITS.weight.items():
        scheme = model.get_submodule(name).quantization_scheme
        given = scheme.input_activations
        assert scheme.weights.num_bits == bits
        assert (given and given.num_bits) == LINEAR_BITS.act.get(name)
        assert (
            model.get_submodule(name).weight_scale.numel() == model.get_submodule(name).out_features
        )


@library
def test_torchao_itself_quantizes_as_the_policy_says(tmp_path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    model = seeded(Linears)
    packed = packed_file(tmp_path, model, BitVector(LINEAR_BITS.weight), rows())
    quantize_(model, config_from_dict(exported("torchao", packed, model)), filter_fn=None)
    for name, bits in LINEAR_BITS.weight.items():
        assert model.get_submodule(name).weight.target_dtype == getattr(torch, f"int{bits}")
    assert model(rows()).isfinite().all()
