"""Loading a packed file to serve it: equal outputs, state dicts both ways, and hostile files."""

import copy
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.vision_transformer import VisionTransformer

from adq.loading import load
from adq.quant.apply import quantize
from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export import packed
from adq.quant.export.loading import load_packed_, read_packed
from adq.quant.export.packed import save_packed
from adq.quant.files import write_tensors
from adq.quant.fold import fold_batchnorm_
from adq.quant.layers import trace_layers
from adq.quant.packed import PackedInput
from adq.quant.packed_layers import PackedConv2d, PackedLinear
from adq.quant.scheme import ACT_METHODS, WEIGHT_METHODS, Scheme
from adq.quant.spec import BitVector
from adq.search.tasks.resnet import ResNet

KERNELS = ["auto", "packed", "torch"]


class Net(nn.Module):
    """A convolution of each kind, a layer called twice, and one that stays in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.again = self.twice
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 5, 3)
        self.plain = nn.Linear(5, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.again(F.relu(self.twice(self.depthwise(x)))))
        x = F.relu(self.up(x))
        x = F.relu(self.line(x.view(x.size(0), 6, -1)))
        return self.head(F.relu(self.plain(x.mean(dim=2))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))))


def vit() -> nn.Module:
    model = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "net": (Net, lambda: torch.randn(4, 3, 6, 6)),
    "resnet": (
        lambda: ResNet(3, 5, widths=(8, 16, 32), blocks=1),
        lambda: torch.randn(2, 3, 16, 16),
    ),
    "mobilenet": (
        lambda: mobilenet_v2(num_classes=5, width_mult=0.25),
        lambda: torch.randn(2, 3, 32, 32),
    ),
    "vit": (vit, lambda: torch.randn(4, 3, 16, 16)),
    "encoder": (encoder, lambda: torch.randn(3, 5, 8)),
    "tied": (Tied, lambda: torch.arange(12).view(3, 4)),
}


def seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def built(name: str, seed: int = 0) -> nn.Module:
    """In eval mode, with BatchNorms that have seen data."""
    model = seeded(MODELS[name][0], seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(-1.0, 1.5, generator=generator)
    return model


def saved(
    path: Path,
    name: str,
    weight: int | None = None,
    act: int | None = None,
    scheme: Scheme = Scheme(),  # noqa: B008
) -> tuple[nn.Module, Tensor]:
    """The quantized model that is now in the file, and an input."""
    quantized, x, content = quantized_model(name, weight, act, scheme)
    path.write_bytes(content)
    return quantized, x


@cache
def quantized_model(
    name: str, weight: int | None, act: int | None, scheme: Scheme
) -> tuple[nn.Module, Tensor, bytes]:
    model, x = built(name), seeded(MODELS[name][1], 1)
    layers = ["body", "head"]  # of `tied`; no search quantizes a weight that others use
    if name != "tied":
        layers = [n.name for n in trace_layers(expose_attention_(copy.deepcopy(model)), x)]
        layers = [n for n in layers if n != "plain"]
    bits = {n: weight or 2 + i % 7 for i, n in enumerate(layers)}
    vector = BitVector(bits, {} if act is None else dict.fromkeys(layers[1:], act))
    quantized = quantize(model, vector, None if act is None else [(x, None)], scheme).eval()
    with TemporaryDirectory() as folder:
        save_packed(quantized, Path(folder) / "m", {})
        return quantized, x, (Path(folder) / "m").read_bytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    saved(path, "net", act=4)
    return path


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_gives_the_quantized_models_outputs(tmp_path: Path, name, kernels) -> None:
    quantized, x = saved(tmp_path / "m", name)
    loaded = load_packed_(built(name, seed=7).train(), tmp_path / "m", kernels=kernels)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        wanted, got = quantized(x), loaded(x)
    # sums in another order: 2^-24 for each of the additions in a row, tens of layers deep
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    folds = any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules())
    if kernels == "torch" and not folds:
        assert torch.equal(got, wanted)
    own = [m for m in loaded.modules() if isinstance(m, PackedLinear | PackedConv2d)]
    assert bool(own) == (kernels != "torch")
    assert not any(hasattr(m, "parametrizations") for m in loaded.modules())


def near_thresholds(model: nn.Module, x: Tensor, within: float) -> int:
    """Values that a layer's input quantizer meets so close to one of its thresholds."""
    count = 0

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal count
        limits = module.thresholds.detach()
        distance = (args[0].flatten()[:, None] - limits).abs().amin(1)
        count += int((distance <= within * limits.abs().max()).sum())

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if hasattr(m, "thresholds")]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["net", "resnet", "vit", "encoder"])
def test_with_quantized_inputs_only_values_at_a_threshold_may_differ(
    tmp_path: Path, name: str, kernels: Any
) -> None:
    quantized, x = saved(tmp_path / "m", name, act=3)
    loaded = load_packed_(built(name, seed=7), tmp_path / "m", kernels=kernels)
    with torch.no_grad():
        wanted, got = quantized(x), loaded(x)
    if near_thresholds(quantized, x, 1e-5) == 0 or (
        not any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules()) and kernels == "torch"
    ):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # a flipped code is one step of one input, far from what another model would give
    assert (got - wanted).norm() <= 0.15 * wanted.norm()


@pytest.mark.parametrize("kernels", ["auto", "packed"])
@pytest.mark.parametrize("weight", WEIGHT_METHODS)
@pytest.mark.parametrize(("act", "bits"), list(zip(ACT_METHODS, (2, 4, 8, 5), strict=True)))
def test_every_quantizer(tmp_path: Path, kernels, weight, act, bits: int) -> None:
    scheme = Scheme(weight=weight, act=act)
    quantized, x = saved(tmp_path / "m", "net", weight=bits, act=bits, scheme=scheme)
    loaded = load_packed_(built("net", seed=7), tmp_path / "m", kernels=kernels)
    with torch.no_grad():
        wanted, got = quantized(x), loaded(x)
    if near_thresholds(quantized, x, 1e-5) == 0:
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (got - wanted).norm() <= 0.15 * wanted.norm()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["net", "vit"])
def test_scales_for_groups_of_weights(tmp_path: Path, name: str, kernels: Any) -> None:
    quantized, x = saved(tmp_path / "m", name, scheme=Scheme(group_size=4))
    loaded = load_packed_(built(name, seed=7), tmp_path / "m", kernels=kernels)
    with torch.no_grad():
        wanted, got = quantized(x), loaded(x)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_quantized_layer_whose_weight_another_module_uses(tmp_path: Path) -> None:
    quantized, _ = saved(tmp_path / "m", "tied")
    assert not torch.equal(quantized.embed.weight, quantized.head.weight)
    for kernels in KERNELS:
        loaded = load_packed_(built("tied", seed=3), tmp_path / "m", kernels=kernels)
        assert torch.equal(loaded.embed.weight, quantized.embed.weight)
        assert torch.equal(loaded.head.weight, quantized.head.weight)


def test_a_layer_with_two_names_is_one_layer(tmp_path: Path) -> None:
    saved(tmp_path / "m", "net")
    for kernels in KERNELS:
        loaded = load_packed_(built("net"), tmp_path / "m", kernels=kernels)
        assert loaded.twice is loaded.again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernels", KERNELS)
def test_half_precision_before_and_after_loading(tmp_path: Path, dtype, kernels) -> None:
    quantized, x = saved(tmp_path / "m", "resnet", weight=4)
    with torch.no_grad():
        wanted = quantized(x)
        after = load_packed_(built("resnet", 7), tmp_path / "m", kernels=kernels).to(dtype)
        before = load_packed_(built("resnet", 7).to(dtype), tmp_path / "m", kernels=kernels)
        for model in (after, before):
            got = model(x.to(dtype))
            assert got.dtype == dtype
            # roundings of 2^-8 or 2^-11 at each of 20 layers, random and so √20 of them
            assert (got.float() - wanted).norm() <= 0.06 * wanted.norm()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_loaded_models_state_goes_through_safetensors(file: Path, tmp_path, kernels) -> None:
    x = seeded(MODELS["net"][1], 1)
    loaded = load_packed_(built("net"), file, kernels=kernels)
    wanted = loaded(x)
    save_model(loaded, tmp_path / "state")  # knows layers with two names
    other = load_packed_(built("net", seed=5), file, kernels=kernels)
    for value in other.state_dict().values():
        value.zero_()
    load_model(other, tmp_path / "state", strict=True)
    assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_plain_state_dict_is_contiguous_and_loads_strictly(tmp_path: Path, kernels) -> None:
    _, x = saved(tmp_path / "m", "vit", act=4)
    loaded = load_packed_(built("vit"), tmp_path / "m", kernels=kernels)
    wanted = loaded(x)
    save_file(loaded.state_dict(), tmp_path / "state")
    other = load_packed_(built("vit", seed=5), tmp_path / "m", kernels=kernels)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(load_file(tmp_path / "state"), strict=True)
    assert torch.equal(other(x), wanted)
    if kernels == "packed":
        stored = sum(t.nbytes for t in load_file(tmp_path / "state").values())
        assert stored < sum(t.nbytes for t in built("vit").state_dict().values())


def test_a_quantized_models_state_goes_through_safetensors(tmp_path: Path) -> None:
    quantized, x = saved(tmp_path / "m", "vit", act=4)
    save_file(quantized.state_dict(), tmp_path / "state")
    other = copy.deepcopy(quantized)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    assert not torch.allclose(other(x), quantized(x))
    other.load_state_dict(load_file(tmp_path / "state"), strict=True)
    assert torch.equal(other(x), quantized(x))


def test_a_file_without_folding_is_read_as_well(tmp_path: Path) -> None:
    quantized, x = saved(tmp_path / "m", "net", act=4)
    about = json.dumps(
        {"schema": "adq-model/1", "bits": read_packed(tmp_path / "m").bits.to_json()}
    )
    tensors = packed.packed_tensors(quantized)
    digest = packed.digest_of(about, tensors)
    write_tensors(tmp_path / "n", tensors, {"adq": about, "sha256": digest})
    loaded = load_packed_(built("net", seed=7), tmp_path / "n", kernels="torch")
    assert torch.equal(loaded(x), quantized(x))


def test_what_a_packed_file_holds(file: Path) -> None:
    content = read_packed(file)
    model = fold(built("net"))
    assert set(content.weights) == set(content.bits.weight)
    assert set(content.inputs) == set(content.bits.act)
    assert content.folded == {"norm": "stem"}
    for name, weight in content.weights.items():
        layer = model.get_submodule(name)
        values = weight.fitted(layer).values()
        assert values.shape == layer.weight.shape
        assert len(values.unique()) <= 2**weight.bits * weight.scale.numel()
    assert "plain.weight" in content.tensors
    assert not any("stem.weight" in key for key in content.tensors)
    assert all(type(quantizer) is PackedInput for quantizer in content.inputs.values())


def fold(model: nn.Module) -> nn.Module:
    fold_batchnorm_(model)
    return model


def test_importing_what_a_service_needs_imports_no_search(file: Path) -> None:
    code = f"""
import sys
from adq.quant.export.loading import load_packed_
import adq
sys.path.insert(0, {str(Path(__file__).parent)!r})
heavy = {{"optuna", "ray", "pandas", "sklearn", "matplotlib", "sqlalchemy", "triton", "onnx"}}
heavy |= {{"adq.search.config", "adq.proxies.base", "adq.quant.qat"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_kernels_and_devices_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match="kernels: expected one of auto, packed, torch, got"):
        load_packed_(built("net"), file, kernels="cuda")  # type: ignore[arg-type]
    for device in ("nonsense", "cuda:99"):
        model = built("net")
        before = signature(model)
        with pytest.raises(InputError, match=f"device '{device}' is not available") as caught:
            load(file, model, device=device)
        assert "\n" not in str(caught.value)
        assert signature(model) == before
    assert next(load(file, built("net"), device="cpu").parameters()).device.type == "cpu"


# Hostile files. Loading has to end in one InputError of one line that names the file, and to leave
# the model as it was: its classes, its names and its values.


def signature(model: nn.Module) -> list[Any]:
    found: list[Any] = [(n, type(m), m.training, len(m._forward_pre_hooks)) for n, m in
                        model.named_modules(remove_duplicate=False)]  # fmt: skip
    for key, value in model.state_dict(keep_vars=True).items():
        found.append((key, id(value), value.requires_grad, value.detach().numpy().tobytes()))
    return found


def refused(model: nn.Module, path: Path) -> None:
    before = signature(model)
    with pytest.raises(InputError) as caught:
        load_packed_(model, path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert signature(model) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file with attention in it, and its content."""
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    saved(path, "encoder", weight=3, act=2)
    return path, path.read_bytes()


FAST = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@FAST
@given(data=st.data())
def test_a_file_cut_off_or_changed_anywhere_is_refused(small, tmp_path: Path, data) -> None:
    _, content = small
    broken = tmp_path / "broken.safetensors"
    place = data.draw(st.one_of(st.integers(0, 4000), st.integers(0, len(content) - 1)))
    if data.draw(st.booleans()):
        broken.write_bytes(content[:place])
    else:
        changed = bytearray(content)
        changed[place] ^= data.draw(st.integers(1, 255))
        if content[place] in b" " and bytes(changed[place : place + 1]).isspace():
            return  # one white space for another is no damage
        broken.write_bytes(changed)
    refused(built("encoder"), broken)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
SIZES = st.integers(-(2**63), 2**64) | st.integers(-2, 300)


@FAST
@given(data=st.data())
def test_headers_that_lie_are_refused(small, tmp_path: Path, data) -> None:
    _, content = small
    [length] = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[key]
    kind = data.draw(st.integers(0, 5))
    if kind == 0:
        entry["shape"] = data.draw(st.lists(SIZES, max_size=4))
    elif kind == 1:
        entry["data_offsets"] = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    elif kind == 2:
        entry["dtype"] = data.draw(st.sampled_from(["F64", "F16", "I64", "BOOL", "F8_E4M3", "X"]))
    elif kind == 3:
        header[key] = data.draw(JSON)
    elif kind == 4:
        header["__metadata__"] = data.draw(JSON)
    else:
        del header[key]
    if header == json.loads(content[8 : 8 + length]):
        return
    text = json.dumps(header).encode()
    claimed = data.draw(st.sampled_from([len(text)] * 6 + [0, 1, 2**32, 2**63, 2**64 - 1]))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(struct.pack("<Q", claimed) + text + content[8 + length :])
    refused(built("encoder"), broken)


def forged(path: Path, about: Any, tensors: dict[str, Tensor]) -> Path:
    """A file whose checksum is right, whatever is in it."""
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, path, {"adq": text, "sha256": packed.digest_of(text, tensors)})
    return path


@FAST
@given(data=st.data())
def test_tensors_that_do_not_belong_are_refused(small, tmp_path: Path, data) -> None:
    path, _ = small
    about = read_packed(path).metadata
    tensors = load_file(path)
    names = sorted(tensors)
    one = data.draw(st.sampled_from(names))
    value = tensors[one]
    kind = data.draw(st.integers(0, 4))
    if kind == 0:
        other = data.draw(st.sampled_from(names))
        tensors[one], tensors[other] = tensors[other], tensors[one]
        if tensors[one].shape == value.shape and tensors[one].dtype == value.dtype:
            return  # other numbers: nobody can tell
    elif kind == 1:
        wanted = data.draw(st.sampled_from([torch.int64, torch.float16, torch.bool, torch.int8]))
        if value.is_floating_point() == wanted.is_floating_point and ".in" not in one:
            return
        tensors[one] = value.to(wanted)
        own = (".codes", ".codebook", ".scale", ".thresholds", ".zero_point")
        if not one.endswith(own) and wanted == torch.float16:
            return  # a float is a float: the rest is cast
    elif kind == 2:
        del tensors[one]
    elif kind == 3:
        tensors[data.draw(st.text(max_size=8)) or "x"] = value.clone()
        if tensors.keys() == set(names):
            return
    else:
        cut = data.draw(st.integers(0, max(0, value.shape[0] - 1)))
        tensors[one] = value[:cut].contiguous()
    refused(built("encoder"), forged(tmp_path / "broken.safetensors", about, tensors))


@FAST
@given(data=st.data())
def test_metadata_that_lies_is_refused(small, tmp_path: Path, data) -> None:
    path, _ = small
    about = copy.deepcopy(read_packed(path).metadata)
    names = sorted(about["bits"]["weight_bits"])
    name = data.draw(st.sampled_from(names))
    kind = data.draw(st.integers(0, 6))
    value = data.draw(JSON)
    if kind == 0:
        about["bits"]["weight_bits"][name] = value
    elif kind == 1:
        about["bits"]["weight_bits"][name] = data.draw(st.sampled_from([2, 4, 8, 9, -1, 10**30]))
    elif kind == 2:
        about["folded"] = data.draw(
            JSON.filter(lambda v: v != {}) | st.just({"layers.0.norm1": names[0]})
        )
    elif kind == 3:
        about["bits"]["weight_bits"][data.draw(st.text(max_size=6))] = 3
    elif kind == 4:
        del about["bits"]["weight_bits"][name]
    elif kind == 5:
        about[data.draw(st.sampled_from(["schema", "bits"]))] = value
    else:
        about["bits"]["act_bits"] = value if value != {} else None
    refused(built("encoder"), forged(tmp_path / "broken.safetensors", about, load_file(path)))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("weight.scale", torch.nan, "not finite"),
        ("weight.codebook", torch.inf, "not finite"),
        ("input.thresholds", torch.nan, "not finite"),
        ("input.scale", torch.nan, "not finite"),
        ("input.zero_point", -torch.inf, "not finite"),
    ],
)
def test_numbers_that_are_none_are_refused(small, tmp_path: Path, part, value, said) -> None:
    path, _ = small
    content = read_packed(path)
    name = sorted(content.inputs)[0]
    tensors = load_file(path)
    tensors[f"{name}.{part}"][0] = value
    broken = forged(tmp_path / "broken.safetensors", content.metadata, tensors)
    with pytest.raises(InputError, match=said):
        read_packed(broken)
    refused(built("encoder"), broken)
    tensors[f"{name}.input.thresholds"] = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(InputError, match=r"thresholds do not ascend|not finite"):
        read_packed(forged(broken, content.metadata, tensors))


def test_deep_or_huge_metadata_ends_soon(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    started = time.perf_counter()
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 1_000_000, '"' + "\\u0000" * 10_000):
        refused(built("encoder"), forged(path, text, {"x": torch.zeros(1)}))
    with open(path, "wb") as file:  # sparse: it takes no room on the disk
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**32)
    refused(built("encoder"), path)
    os.truncate(path, 7)
    refused(built("encoder"), path)
    assert time.perf_counter() - started < 20


def test_a_batchnorm_of_another_layer_is_not_folded_into_it(tmp_path: Path, file: Path) -> None:
    content = read_packed(file)
    for folded in ({"norm": "head"}, {"stem": "norm"}, {"missing": "stem"}, {"norm": "norm"}, {}):
        about = {**content.metadata, "folded": folded}
        refused(built("net"), forged(tmp_path / "broken", about, load_file(file)))
