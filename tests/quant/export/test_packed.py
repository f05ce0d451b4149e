"""The packed file: what is in it, its size, its way back, and every kind of damage."""

import copy
import json
import os
import struct
from pathlib import Path

import oracles
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer

from adq.quant import files
from adq.quant.apply import dequantize_, quantize, quantized_layers
from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export import packed
from adq.quant.export.loading import PackedInput, load_packed_, read_metadata
from adq.quant.export.packed import (
    PackedSize,
    input_bytes,
    packed_size,
    packed_tensors,
    save_packed,
    weight_bytes,
)
from adq.quant.fold import fold_batchnorm_
from adq.quant.layers import trace_layers
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector


class Net(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, groups=width, bias=False)
        self.line = nn.Conv1d(width, 7, 2)
        self.plain = nn.Linear(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(F.relu(self.conv(x))))  # a BatchNorm that stays
        x = F.relu(self.line(F.relu(x).mean(dim=3)))
        return self.head(F.relu(self.plain(x.mean(dim=2))))


# `plain` stays in FP32; the sizes divide neither by eight nor by each other
BITS = BitVector(
    {"conv": 8, "grouped": 3, "line": 2, "head": 5}, {"conv": 8, "grouped": 2, "head": 3}
)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (20,), generator=generator)
    return [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]


def fp32(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Trained, so that scales, thresholds and codebooks have left their starts."""
    model = quantize(fp32(), BITS, data())
    train_(model, data(), F.cross_entropy, TrainingConfig(5, lr=1e-2), 0)
    return model


@pytest.fixture
def file(trained: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_packed(trained, path, {"name": "net", "epochs": 5})
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def without(model: nn.Module, *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if key not in keys}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_loaded_model_gives_the_same_logits(trained: nn.Module, file: Path) -> None:
    loaded = load_packed_(fp32(seed=9).train(), file, kernels="torch")
    assert not loaded.training
    # no tolerance: both multiply the same single-precision scale and level, and compare with the
    # same thresholds, so that every layer sees equal numbers
    for x, _ in data():
        assert torch.equal(loaded(x), trained(x))
    for name, layer in quantized_layers(trained):
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), layer.weight)


def test_a_packed_input_agrees_with_its_quantizer_at_the_very_thresholds(
    trained: nn.Module, file: Path
) -> None:
    loaded = load_packed_(fp32(), file, kernels="torch")
    for name in BITS.act:
        quantizer = trained.get_submodule(name).input_quantizer
        limits = quantizer.thresholds.detach()
        x = torch.cat([limits, limits.nextafter(limits - 1), limits.nextafter(limits + 1)])
        assert torch.equal(loaded.get_submodule(name).input_quantizer(x), quantizer(x))


def test_a_loaded_model_is_the_fp32_model_with_other_weights(file: Path) -> None:
    loaded = load_packed_(fp32(), file, kernels="torch")
    own = {key for key in loaded.state_dict() if "input_quantizer" not in key}
    assert own == set(fp32().state_dict())
    assert {type(m) for m in loaded.modules()} - {PackedInput} == {
        type(m) for m in fp32().modules()
    }
    for name, bits in BITS.weight.items():
        assert all(len(row.unique()) <= 2**bits for row in loaded.get_parameter(f"{name}.weight"))


def test_metadata_and_bits_come_back(file: Path) -> None:
    metadata = read_metadata(file)
    assert (metadata["name"], metadata["epochs"]) == ("net", 5)
    assert metadata["schema"] == "adq-model/1"
    assert BitVector.from_json(metadata["bits"]) == BITS


def test_the_file_holds_the_tensors_of_its_documentation(trained: nn.Module, file: Path) -> None:
    stored = load_file(file)
    expected = set(fp32().state_dict())
    for name in BITS.weight:
        expected.remove(f"{name}.weight")
        expected |= {f"{name}.weight.{part}" for part in ("codes", "codebook", "scale")}
    for name in BITS.act:
        expected |= {f"{name}.input.{part}" for part in ("thresholds", "scale", "zero_point")}
    assert stored.keys() == expected

    for name, bits in BITS.weight.items():
        layer = trained.get_submodule(name)
        quantizer, weight = weight_quantizer(layer), original_weight(layer).detach()
        levels, scale = stored[f"{name}.weight.codebook"], stored[f"{name}.weight.scale"]
        assert torch.equal(levels, quantizer.levels)
        assert torch.equal(scale, quantizer.log_scale.exp())
        rows = (weight.flatten(1) / scale[:, None]).flatten().tolist()
        stream = bytes(stored[f"{name}.weight.codes"].tolist())
        codes = oracles.unpacked(stream, bits, weight.numel())
        assert oracles.packed(codes, bits) == stream
        # values, not codes: training may have brought two levels to one place
        found = [levels[code].item() for code in codes]
        assert found == [levels[oracles.nearest_level(w, levels.tolist())] for w in rows]
    for name in BITS.act:
        quantizer = trained.get_submodule(name).input_quantizer
        assert torch.equal(stored[f"{name}.input.thresholds"], quantizer.thresholds)
        assert torch.equal(stored[f"{name}.input.scale"], quantizer.output_scale)
        assert torch.equal(stored[f"{name}.input.zero_point"], quantizer.zero_point)
    assert torch.equal(stored["plain.weight"], trained.plain.weight)
    assert torch.equal(stored["norm.running_mean"], trained.norm.running_mean)


def test_byte_counts_in_numbers() -> None:
    # 45 codes of 3 bits are 135 bits, 17 bytes; 8 levels and 5 scales of 4 bytes
    assert weight_bytes(45, 5, 3) == 17 + 4 * 8 + 4 * 5
    assert weight_bytes(16, 4, 2) == 4 + 4 * 4 + 4 * 4
    assert weight_bytes(9, 1, 8) == 9 + 4 * 256 + 4
    # thresholds, one scale, one zero point
    assert input_bytes(2) == 4 * (3 + 2)
    assert input_bytes(8) == 4 * (255 + 2)
    assert input_bytes(None) == 0


def test_the_file_is_its_header_and_the_bytes_of_the_formulas(file: Path) -> None:
    # conv 5x1x3x3 = 45 weights, grouped 5x1x3x3 = 45, line 7x5x2 = 70, head 3x6 = 18
    layers = ((45, 5, 8), (45, 5, 3), (70, 7, 2), (18, 3, 5))
    weights = sum(weight_bytes(*layer) for layer in layers)
    inputs = input_bytes(8) + input_bytes(2) + input_bytes(3)
    # biases 5 + 7 + 6 + 3, `plain` 6x7, BatchNorm 4x5 floats, and its counter of 8 bytes
    rest = 4 * (21 + 42 + 20) + 8
    assert sum(t.nbytes for t in load_file(file).values()) == weights + inputs + rest
    [header] = struct.unpack("<Q", file.read_bytes()[:8])
    assert file.stat().st_size == 8 + header + weights + inputs + rest


def test_the_file_has_the_size_told_from_the_fp32_model(file: Path) -> None:
    counts = {"conv": (45, 5), "grouped": (45, 5), "line": (70, 7), "head": (18, 3)}
    size = PackedSize(counts, without(fp32(), *(f"{name}.weight" for name in counts)), {})
    assert file.stat().st_size == size.total(BITS)
    shares = [size.layer_bytes(n, b, BITS.act.get(n)) for n, b in BITS.weight.items()]
    assert size.fixed_bytes + sum(shares) == size.total(BITS)
    [length] = struct.unpack("<Q", file.read_bytes()[:8])
    header = file.read_bytes()[8 : 8 + length]
    assert length % 8 == 0
    assert len(header) - len(header.rstrip(b" ")) < 600


def test_a_file_without_the_padding_is_read_as_before(trained: nn.Module, tmp_path: Path) -> None:
    about = {"schema": "adq-model/1", "bits": BITS.to_json(), "folded": {}, "point": "t1"}
    tensors = packed_tensors(trained)
    digest = packed.digest_of(json.dumps(about), tensors)
    save_file(tensors, tmp_path / "m", {"adq": json.dumps(about), "sha256": digest})
    assert read_metadata(tmp_path / "m")["point"] == "t1"
    x = data()[0][0]
    assert torch.equal(
        load_packed_(fp32(seed=9), tmp_path / "m", kernels="torch")(x), trained.eval()(x)
    )


def test_the_weights_really_shrink() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 10))
    numel = 64 * 32 * 9
    for bits in range(2, 9):
        tensors = packed_tensors(quantize(model, {"0": bits}))
        codes = tensors["0.weight.codes"]
        assert codes.dtype == torch.uint8
        assert codes.nbytes == numel * bits // 8


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width_makes_the_round_trip(tmp_path: Path, bits: int) -> None:
    every = dict.fromkeys(("conv", "grouped", "line", "plain", "head"), bits)
    model = quantize(fp32(), BitVector(every, every), data())
    save_packed(model, tmp_path / "m", {})
    loaded = load_packed_(fp32(seed=3), tmp_path / "m", kernels="torch")
    x = data()[0][0]
    assert torch.equal(loaded(x), model.eval()(x))


def test_without_input_bits_the_file_has_no_input_tensors(tmp_path: Path) -> None:
    model = quantize(fp32(), BITS.weight)
    save_packed(model, tmp_path / "m", {})
    assert not any(".input." in key for key in load_file(tmp_path / "m"))
    x = data()[0][0]
    assert torch.equal(load_packed_(fp32(seed=3), tmp_path / "m", kernels="torch")(x), model(x))


def test_channels_last_models_are_packed_in_logical_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 2))
    turned = quantize(copy.deepcopy(model).to(memory_format=torch.channels_last), {"0": 3})
    save_packed(turned, tmp_path / "m", {})
    loaded = load_packed_(copy.deepcopy(model), tmp_path / "m", kernels="torch")
    assert torch.equal(loaded[0].weight, turned[0].weight)


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def test_tied_weights_are_saved_under_both_names_and_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize(TiedEmbedding(), {"body": 4})
    save_packed(model, tmp_path / "m", {})
    stored = sum(t.nbytes for t in load_file(tmp_path / "m").values())
    assert stored == weight_bytes(16, 4, 4) + 4 * (40 + 40 + 4)
    size = PackedSize({"body": (16, 4)}, without(TiedEmbedding(), "body.weight"), {})
    assert (tmp_path / "m").stat().st_size == size.total(BitVector({"body": 4}))
    loaded = load_packed_(TiedEmbedding(), tmp_path / "m", kernels="torch")
    tokens = torch.arange(10)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.head.weight is loaded.embed.weight


def test_saving_changes_nothing(trained: nn.Module, tmp_path: Path) -> None:
    before = state(trained)
    save_packed(trained, tmp_path / "m", {})
    assert same(before, state(trained))


def refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    """Loading raises InputError in one line that names the file, and the model is as it was."""
    model = fp32() if model is None else model
    model.train()
    before = state(model)
    with pytest.raises(InputError, match=message) as caught:
        load_packed_(model, path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert same(before, state(model))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_file_cut_short_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for length in (*range(64), *range(64, len(content), 97), len(content) - 1):
        broken.write_bytes(content[:length])
        refused(broken, "not a readable adq model")
    broken.write_bytes(content + b"\0")
    refused(broken, "not a readable adq model")


def test_a_flipped_bit_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    broken = tmp_path / "broken.safetensors"
    model = fp32()
    before = state(model)
    [header] = struct.unpack("<Q", content[:8])
    spaces = len(content[8 : 8 + header]) - len(content[8 : 8 + header].rstrip(b" "))
    padding = range(8 + header - spaces, 8 + header)
    for place in (*range(0, 8 + header, 17), *range(8 + header, len(content), 97)):
        if place in padding:
            continue  # one white space for another is no damage
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            broken.write_bytes(damaged)
            with pytest.raises(InputError, match=r"broken\.safetensors") as caught:
                load_packed_(model, broken)
            assert "\n" not in str(caught.value)
    assert same(before, state(model))


def test_flipped_tensor_bytes_are_called_damage(file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 0xFF
    (tmp_path / "broken.safetensors").write_bytes(content)
    refused(tmp_path / "broken.safetensors", "is damaged: its content does not match its checksum")
    with pytest.raises(InputError, match="is damaged"):
        read_metadata(tmp_path / "broken.safetensors")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path)
    refused(path, "a safetensors file, but not one that adq wrote")
    save_file({"conv.weight": torch.zeros(3)}, path, {"format": "pt"})
    refused(path, "a safetensors file, but not one that adq wrote")
    torch.save(fp32().state_dict(), path)
    refused(path, "not a readable adq model")
    path.write_text('{"weight_bits": {}}')
    refused(path, "not a readable adq model")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.safetensors", "not a readable adq model")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "not a readable adq model")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "below", "not a readable adq model")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "expected schema 'adq-model/1' in its metadata"),
        ('{"schema": "adq-model/2"}', "expected schema 'adq-model/1' in its metadata"),
        ('{"schema": "adq-model/1"}', "expected a JSON object with 'weight_bits'"),
        ("{", "not a readable adq model"),
    ],
)
def test_files_of_another_schema_are_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {"a": torch.zeros(3)}
    save_file(tensors, path, {"adq": header, "sha256": packed.digest_of(header, tensors)})
    refused(path, message)


class Renamed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.top = self.head
        del self.head


class Larger(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class Smaller(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.plain


class SameCount(Net):
    """As many weights in `head`, in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 6)


@pytest.mark.parametrize("make", [lambda: Net(width=6), Renamed, Larger, Smaller, SameCount])
def test_a_file_of_another_architecture_is_refused(file: Path, make) -> None:
    refused(file, r"does not fit \w+; was it written for another model\?", make())


def test_a_quantized_model_is_no_fp32_model_to_load_into(trained: nn.Module, file: Path) -> None:
    with pytest.raises(InputError, match="does not fit Net; was it written for another model"):
        load_packed_(copy.deepcopy(trained), file)


def test_a_failed_save_leaves_the_earlier_file(trained, file: Path, monkeypatch) -> None:
    before, names = file.read_bytes(), os.listdir(file.parent)

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of")
        raise SafetensorError("No space left on device (os error 28)")

    with pytest.raises(TypeError, match="not JSON serializable"):
        save_packed(trained, file, {"model": object()})
    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(InputError, match=r"cannot write .*model\.safetensors: No space left"):
        save_packed(trained, file, {})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == names


@pytest.mark.parametrize("parent", ["missing", "a-file"])
def test_a_folder_that_is_none_is_an_input_error(trained, tmp_path: Path, parent: str) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*m\.safetensors: ") as caught:
        save_packed(trained, tmp_path / parent / "m.safetensors", {})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a-file"]


def test_saving_again_replaces_the_file(trained, file: Path) -> None:
    save_packed(trained, file, {"name": "second"})
    assert read_metadata(file)["name"] == "second"
    assert os.listdir(file.parent) == [file.name]


def test_metadata_is_json_in_the_files_header(file: Path) -> None:
    [length] = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["adq"]) == read_metadata(file)


class Normed(nn.Module):
    """A BatchNorm after a plain, a depthwise and a transposed convolution, and one after nothing
    that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.norm2 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm3 = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1)
        self.norm4 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.norm2(self.depthwise(x)))
        x = F.relu(self.norm4(self.plain(self.norm3(self.up(x)))))
        return self.head(x.mean(dim=(2, 3)))


def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Normed().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.normal_()  # negative factors among them
                module.bias.data.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        return model


@pytest.mark.parametrize("group_size", [None, 9])
def test_batchnorms_are_folded_and_the_size_is_told_before(tmp_path: Path, group_size) -> None:
    model = normed()
    bits = {"conv": 8, "depthwise": 4, "up": 3, "head": 8}
    quantized = quantize(model, bits, scheme=Scheme(group_size=group_size))
    quantized.eval()
    path = tmp_path / "m"
    save_packed(quantized, path, {})
    assert read_metadata(path)["folded"] == {
        "norm": "conv",
        "norm2": "depthwise",
        "norm3": "up",
        "norm4": "plain",
    }
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    folded = load_packed_(normed(), path, kernels="torch")
    # the products of scale, level and factor are rounded in another order
    torch.testing.assert_close(folded(x), quantized(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    # no BatchNorm, and a bias for each layer: conv has got one
    stored = load_file(path)
    assert {k: v.numel() for k, v in stored.items() if "norm" in k or k == "conv.bias"} == {
        "conv.bias": 6
    }
    weights = {
        layer.name: (layer.weight_numel, layer.scales(group_size))
        for layer in trace_layers(model, x)
        if layer.name in bits
    }
    assert path.stat().st_size == packed_size(model, weights).total(BitVector(bits))


def test_a_model_that_is_folded_already_is_refused(tmp_path: Path) -> None:
    quantized = quantize(normed(), {"conv": 4, "up": 3, "head": 8}).eval()
    fold_batchnorm_(quantized)
    with pytest.raises(InputError, match="folded already: give the one before"):
        save_packed(quantized, tmp_path / "m", {})
    with pytest.raises(InputError, match="dequantize it first, then fold"):
        dequantize_(quantized)
    assert not (tmp_path / "m").exists()


def test_a_vision_transformers_attention_survives_the_file(tmp_path: Path) -> None:
    def vit() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
            nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
            return model.eval()

    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    names = [layer.name for layer in trace_layers(expose_attention_(vit()), x)]
    attention = "encoder.layers.encoder_layer_1.self_attention"
    assert {f"{attention}.in_proj", f"{attention}.out_proj"} <= set(names)
    bits = BitVector(dict.fromkeys(names, 4), dict.fromkeys(names[1:], 8))
    quantized = quantize(vit(), bits, [(x, None)]).eval()
    assert not torch.allclose(quantized(x), vit()(x))
    save_packed(quantized, tmp_path / "vit", {})
    assert torch.equal(load_packed_(vit(), tmp_path / "vit", kernels="torch")(x), quantized(x))
