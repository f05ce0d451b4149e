"""torch.export programs of packed models: the same numbers, no operator of ours, read back."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from export_nets import ACT_BITS, WEIGHT_BITS, Net, Packed, fp32, images, packed_net
from torch import Tensor, nn
from torch.export import ExportedProgram

from adq.quant.apply import quantize
from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_, read_packed
from adq.quant.export.packed import save_packed
from adq.quant.export.program import PackedLookup, export_program, save_program
from adq.quant.spec import BitVector


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Packed:
    return packed_net(tmp_path_factory.mktemp("net"), ACT_BITS)


@pytest.fixture(scope="module")
def programs(net: Packed) -> dict[str, ExportedProgram]:
    return {
        "fp32": export_program(net.model, images(1)),
        "packed": export_program(net.model, images(), packed=net.path),
    }


def operators(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    targets = {node.target for node in program.graph.nodes}
    return {target for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("weights", ["fp32", "packed"])
def test_a_program_gives_the_same_numbers_for_any_batch(net, programs, weights: str) -> None:
    run = programs[weights].module()
    for samples in (1, 2, 24):
        x = images(samples)
        assert torch.equal(run(x), net.model(x))


@pytest.mark.parametrize("weights", ["fp32", "packed"])
def test_a_program_has_operators_of_aten_alone(programs, weights: str) -> None:
    assert {operator.namespace for operator in operators(programs[weights])} == {"aten"}


def test_decomposed_it_has_operators_of_core_aten_and_the_same_numbers(net, programs) -> None:
    core = programs["packed"].run_decompositions()
    # an assertion about dtypes, which exporters leave out
    asserted = torch.ops.aten._assert_tensor_metadata.default
    other = {op for op in operators(core) - {asserted} if torch.Tag.core not in op.tags}
    assert not other
    x = images(5)
    torch.testing.assert_close(core.module()(x), net.model(x), rtol=1e-5, atol=1e-6)


def test_weights_are_fp32_or_codes_of_the_next_width(programs) -> None:
    plain, packed = (programs[weights].state_dict for weights in ("fp32", "packed"))
    for layer, bits in WEIGHT_BITS.items():
        weight = plain[f"{layer}.weight"]
        assert weight.dtype == torch.float32
        own = [t for key, t in packed.items() if key.startswith(f"{layer}.parametrizations.")]
        [codes] = [t for t in own if t.dtype == torch.uint8]
        width = {2: 2, 3: 4, 4: 4}.get(bits, 8)
        assert codes.numel() == -(-weight.numel() * width // 8)
        rows = fp32().get_submodule(layer)
        table = 256 * 8 // width
        assert sum(t.numel() for t in own) == codes.numel() + table + channels(rows)


def channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_lookup_is_the_weight_of_the_file(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(bits)
    for layer in (nn.Linear(7, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(5, 3, 1)):
        model = nn.Sequential(layer)
        save_packed(quantize(model, {"0": bits}), tmp_path / "m", {})
        weight = read_packed(tmp_path / "m").weights["0"].fitted(model[0])
        lookup = PackedLookup(weight)
        assert torch.equal(lookup(torch.empty(0)), weight.values())


def test_a_saved_program_is_read_back_and_holds_no_pickle(net: Packed, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    save_program(net.model, path, images())
    x = images(7)
    assert torch.equal(torch.export.load(path).module()(x), net.model(x))
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert str(Path(__file__).parents[3]).encode() not in content
            if name.endswith("_config.json"):
                config = json.loads(content)["config"]
                assert not any(entry["use_pickle"] for entry in config.values())
                if "sample_inputs" in name:
                    assert content == b""
    first = path.read_bytes()
    save_program(net.model, path, images())
    assert path.read_bytes() == first


def test_exporting_leaves_the_model_as_it_was(net: Packed, programs) -> None:
    again = load_packed_(fp32(), net.path, kernels="torch").state_dict()
    now = net.model.state_dict()
    assert now.keys() == again.keys()
    assert all(torch.equal(now[key], again[key]) for key in again)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x.flatten(1))
        return x if x.sum() > 0 else -x


class FixedBatch(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + torch.arange(4.0)[:, None]


def test_what_cannot_be_followed_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(InputError, match=r"torch.export cannot follow Deciding: .+") as caught:
        save_program(Deciding(), path, images(4))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a fixed batch size may work") as caught:
        save_program(FixedBatch(), path, images(4))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    save_program(FixedBatch(), path, images(4), dynamic_batch=False)
    assert torch.export.load(path).module()(images(4)).shape == (4, 3)


def test_models_with_kernels_or_of_other_files_are_refused(net: Packed, tmp_path: Path) -> None:
    kernels = load_packed_(fp32(), net.path, kernels="packed")
    with pytest.raises(InputError, match="load it with kernels='torch'"):
        export_program(kernels, images())
    with pytest.raises(InputError, match=r"packed\.safetensors: expected the file that this Net"):
        export_program(kernels, images(), packed=net.path)
    save_packed(quantize(fp32(seed=4), BitVector(WEIGHT_BITS)), tmp_path / "other", {})
    with pytest.raises(InputError, match=r"other: expected the file .* has another weight"):
        export_program(net.model, images(), packed=tmp_path / "other")
    with pytest.raises(InputError, match=r"float16: an FP32 model is exported"):
        export_program(load_packed_(Net(), net.path, kernels="torch").half(), images())
