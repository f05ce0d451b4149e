"""ONNX files of packed models: onnxruntime's numbers, what the graph holds, and how large it is.

Sums of products are rounded in another order than torch's: 1e-5 of the largest output, some ten
layers of a relative 2^-24. Where inputs are quantized, a value within that distance of a threshold
may get the next level. One in about 10^5 values does, and moves the outputs by some thousandths of
their spread; a wrong code, scale or zero point everywhere moves them by as much as they spread.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_nets import ACT_BITS, WEIGHT_BITS, Packed, fp32, images, loaded, packed_net
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer, resnet18

from adq.quant.apply import quantize
from adq.quant.attention import expose_attention_
from adq.quant.errors import InputError
from adq.quant.export import onnx as exporter
from adq.quant.export.cells import cells_of
from adq.quant.export.loading import load_packed_, read_metadata
from adq.quant.export.onnx import run_onnx, save_onnx
from adq.quant.export.packed import save_packed
from adq.quant.layers import trace_layers
from adq.quant.packed import PackedInput
from adq.quant.packing import pack
from adq.quant.scheme import ACT_METHODS, Scheme
from adq.quant.spec import BitVector

FLIPS = 0.02  # of the spread of the outputs
DEEP_FLIPS = 0.15  # tens of random layers make more of a flip: torch's own layouts differ by 0.04


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def spread(y: Tensor) -> float:
    return (y - y.mean(dim=0)).square().mean().sqrt().item()


def check_outputs(path: Path, model: nn.Module, x: Tensor, flips: float) -> None:
    """The graph is valid, and gives what the model gives; `flips` is 0 for inputs in FP32."""
    onnx.checker.check_model(onnx.load(path), full_check=True)
    [found] = (torch.from_numpy(y) for y in run_onnx(path, x))
    compare(found, model(x), flips)


def compare(found: Tensor, expected: Tensor, flips: float) -> None:
    error = (found - expected).square().mean().sqrt().item()
    assert error <= flips * spread(expected) + 1e-5 * expected.abs().max().item()
    first, second = expected.topk(2).values.unbind(dim=1)
    clear = first - second > 5 * flips * spread(expected)
    assert clear.float().mean() > 0.3
    assert torch.equal(found.argmax(dim=1)[clear], expected.argmax(dim=1)[clear])


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Packed:
    return packed_net(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def file(net: Packed) -> Path:
    path = net.path.with_name("net.onnx")
    save_onnx(net.model, path, images(1), packed=net.path)
    return path


def test_any_layer_at_any_bits_gives_the_same_outputs_for_any_batch(net, file: Path) -> None:
    for samples in (1, 2, 24):
        check_outputs(file, net.model, images(samples), flips=0)


def test_weights_are_tensors_of_the_next_width_with_their_codebook(net: Packed, file: Path) -> None:
    held = initializers(file)
    types = {4: TensorProto.UINT4, 8: TensorProto.UINT8}
    for layer, bits in WEIGHT_BITS.items():
        weight = net.model.get_parameter(f"{layer}.weight")
        codes = held[f"{layer}.weight.codes"]
        width = {2: 2, 3: 4, 4: 4}.get(bits, 8)
        assert len(codes.raw_data) == -(-weight.numel() * width // 8)
        assert codes.data_type == types.get(width, TensorProto.UINT8)
        assert list(held[f"{layer}.weight.codebook"].dims) == [2**bits]
    large = {
        name for name, t in held.items() if t.data_type == TensorProto.FLOAT and len(t.dims) > 2
    }
    assert not large
    # no layer's FP32 weight is left, but the one that has no bits; the layer called twice is once
    assert "plain.weight" in held
    lookups = Counter(node.op_type for node in onnx.load(file).graph.node)["Gather"]
    assert lookups == len(WEIGHT_BITS)


def test_batchnorms_are_folded(file: Path) -> None:
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file).graph.node}


def test_two_bits_are_a_type_of_their_own_from_opset_25_on(net: Packed, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    save_onnx(net.model, path, images(2), packed=net.path, opset=25)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 25)]
    assert model.ir_version >= 13  # the first with UINT2
    codes = initializers(path)["line.weight.codes"]
    assert codes.data_type == TensorProto.UINT2
    assert len(codes.raw_data) == -(-7 * 10 * 2 // 4)
    check_outputs(path, net.model, images(), flips=0)


@pytest.mark.parametrize("act", ACT_METHODS)
def test_every_input_quantizer_is_a_pair_that_runtimes_know(tmp_path: Path, act) -> None:
    net = packed_net(tmp_path, ACT_BITS, Scheme(act=act))
    path = tmp_path / "net.onnx"
    save_onnx(net.model, path, images(2), packed=net.path)
    check_outputs(path, net.model, images(), FLIPS)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == len(ACT_BITS) + 1  # one twice
    assert (kinds["Less"] > 0) == (act == "n2uq")
    # onnxruntime has not rounded the weights to INT8 on its way
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert TensorProto.INT8 not in {
        t.data_type for t in initializers(tmp_path / "optimized.onnx").values()
    }
    held = initializers(path)
    for layer in ACT_BITS:
        quantizer = net.model.get_submodule(layer).input_quantizer
        assert held[f"{layer}.input.zero_point"].data_type == TensorProto.UINT8
        scale, zero_point = (
            onnx.numpy_helper.to_array(held[f"{layer}.input.{part}"]).item()
            for part in ("scale", "zero_point")
        )
        assert scale == quantizer.scale.item()
        assert zero_point == quantizer.zero_point.item()


def quantizer_graph(quantizer: PackedInput) -> bytes:
    """What the exporter makes of one input quantizer, as a model x -> output."""
    x = ir.Value(name="x", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="one")
    build = exporter._Builder(graph, 21, ir.tape.Tape())
    output = exporter._input("a", *exporter._grid("a", quantizer), build, x)
    output.shape, output.type, output.name = x.shape, x.type, "output"
    graph.extend(build.tape.nodes)
    graph.outputs.append(output)
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def outputs_of(content: bytes, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    both = (
        session.run(None, {"x": x.numpy()}),
        ReferenceEvaluator(content).run(None, {"x": x.numpy()}),
    )
    return [torch.from_numpy(np.asarray(y)) for [y] in both]


def widths(bits: int, unevenness: float) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return (unevenness * torch.randn(2**bits - 1, generator=generator)).exp().clamp(min=1e-2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("unevenness", [0.3, 1.0, 3.0])
def test_learned_thresholds_are_met_exactly(bits: int, unevenness: float) -> None:
    limits = (0.1 * widths(bits, unevenness)).cumsum(0, dtype=torch.float64).float() - 1
    quantizer = PackedInput(limits, torch.tensor([0.07]), torch.tensor([2.0**bits // 3]))
    around = [limits, limits.nextafter(limits - 1), limits.nextafter(limits + 1)]
    ends = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf])
    x = torch.cat([*around, ends, torch.linspace(-3, limits[-1].item() + 1, 999)])
    for y in outputs_of(quantizer_graph(quantizer), x):
        assert torch.equal(y, quantizer(x))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [0, 1, "last"])
def test_a_uniform_grid_is_the_pair_alone_and_exact_but_at_thresholds(
    bits: int, zero_point
) -> None:
    n = 2**bits - 1
    zero = n if zero_point == "last" else zero_point
    scale = torch.tensor([0.0371])
    limits = (scale * (torch.arange(1, n + 1).double() - 0.5 - zero)).float()
    quantizer = PackedInput(limits, scale, torch.tensor([float(zero)]))
    content = quantizer_graph(quantizer)
    kinds = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert kinds == ["Min", "QuantizeLinear", "DequantizeLinear"]
    x = torch.linspace(limits[0].item() - 1, limits[-1].item() + 1, 4999)
    near = 1e-5 * 0.0371 * n
    x = x[(x[:, None] - limits).abs().min(dim=1).values > near]
    for y in outputs_of(content, x):
        assert torch.equal(y, quantizer(x))


@pytest.mark.parametrize("thresholds", [[1.0] * 15, [0.0] * 7 + [1.0] * 8, [5.0, 5.0, 5.0]])
def test_thresholds_that_coincide_are_met_as_well(thresholds: list[float]) -> None:
    limits = torch.tensor(thresholds)
    quantizer = PackedInput(limits, torch.tensor([0.5]), torch.tensor([3.0]))
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 5.0, 6.0])
    for y in outputs_of(quantizer_graph(quantizer), x):
        assert torch.equal(y, quantizer(x))


@pytest.mark.parametrize("bits", range(3, 9))
def test_tables_are_small_where_thresholds_are_nearly_even(bits: int) -> None:
    cells = cells_of(widths(bits, 0.3).cumsum(0))
    assert len(cells.edges) == 1
    assert cells.count <= 4 * 2**bits


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (0.1, 2.5, r"a\.input: expected a whole zero point from 0 to 255, got 2.5"),
        (0.1, -1.0, "got -1"),
        (0.1, 256.0, "got 256"),
        (0.0, 1.0, r"a\.input: expected a positive scale, got 0"),
        (-1.0, 1.0, "got -1"),
    ],
)
def test_a_grid_that_the_pair_does_not_have_is_refused(scale, zero_point, message) -> None:
    limits = torch.arange(3.0)
    quantizer = PackedInput(limits, torch.tensor([scale]), torch.tensor([zero_point]))
    with pytest.raises(InputError, match=message):
        exporter._grid("a.input", quantizer)


def mobilenet() -> nn.Module:
    """MobileNetV2 with each of its stages, but no block repeated."""
    stages = [(1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1)]
    return MobileNetV2(10, inverted_residual_setting=[[t, c, 1, s] for t, c, s in stages])


def vit() -> nn.Module:
    model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    return expose_attention_(model)


def packed_vision(folder: Path, kind, x: Tensor, bits: tuple[int, int], scheme: Scheme) -> Packed:
    """Random weights; BatchNorms have seen the images."""
    model = fp32(kind)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    names = [layer.name for layer in trace_layers(model.eval(), x)]
    vector = BitVector(*(dict.fromkeys(names, b) for b in bits))
    save_packed(quantize(model, vector, [(x, x)], scheme), folder / "packed", {})
    return loaded(kind, folder / "packed")


def photos(size: int, samples: int = 16) -> Tensor:
    """Smooth, so that they differ by more than their noise."""
    coarse = torch.randn(samples, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def test_resnet18_at_four_bits(tmp_path: Path) -> None:
    x, path = photos(64), tmp_path / "m.onnx"
    net = packed_vision(
        tmp_path, lambda: resnet18(num_classes=10), x, (4, 8), Scheme(init="midpoint")
    )
    save_onnx(net.model, path, x[:2], packed=net.path)
    check_outputs(path, net.model, x, DEEP_FLIPS)
    fp32_bytes = sum(p.nbytes for p in net.model.parameters())
    assert path.stat().st_size < 1.02 * fp32_bytes / 8  # scales, biases, the graph
    weights = {name: t for name, t in initializers(path).items() if name.endswith(".codes")}
    assert len(weights) == 21
    assert all(tensor.data_type == TensorProto.UINT4 for tensor in weights.values())


def test_mobilenet_v2_at_eight_bits(tmp_path: Path) -> None:
    x, path = photos(64), tmp_path / "m.onnx"
    net = packed_vision(tmp_path, mobilenet, x, (8, 8), Scheme("minmax"))
    save_onnx(net.model, path, x[:2], packed=net.path, dynamic_batch=False)
    [batch] = [tensor.type.tensor_type.shape.dim[0] for tensor in onnx.load(path).graph.input]
    assert batch.dim_value == 2
    found = torch.cat([torch.from_numpy(run_onnx(path, part)[0]) for part in x.split(2)])
    compare(found, net.model(x), DEEP_FLIPS)


def test_a_vision_transformer_at_two_bits(tmp_path: Path) -> None:
    x, path = photos(32), tmp_path / "m.onnx"
    net = packed_vision(tmp_path, vit, x, (2, 3), Scheme())
    save_onnx(net.model, path, x[:2], packed=net.path)
    check_outputs(path, net.model, x, DEEP_FLIPS)
    codes = initializers(path)["encoder.layers.encoder_layer_0.self_attention.in_proj.weight.codes"]
    assert list(codes.dims) == [3 * 32 * 32 // 4, 1]


def test_an_unfolded_file_is_folded_on_the_way(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("adq.quant.export.packed.fold_batchnorm_", lambda model: {})
    net = packed_net(tmp_path)
    assert isinstance(net.model.norm, nn.BatchNorm2d)
    save_onnx(net.model, tmp_path / "m.onnx", images(2), packed=net.path)
    assert "BatchNormalization" not in {
        n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node
    }
    check_outputs(tmp_path / "m.onnx", net.model, images(), flips=0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Linear(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(self.grouped(x).relu() + y).relu()
        return x, self.head(x)


def test_two_inputs_two_outputs_and_groups_of_weights(tmp_path: Path) -> None:
    bits = BitVector({"grouped": 3, "body": 2, "head": 4})
    model = quantize(fp32(Pair), bits, scheme=Scheme(group_size=2))
    save_packed(model, tmp_path / "packed", {})
    net = loaded(Pair, tmp_path / "packed")
    inputs = torch.randn(5, 8), torch.randn(5, 4)
    save_onnx(net.model, tmp_path / "m.onnx", inputs, packed=net.path)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.output] == ["output_0", "output_1"]
    dims = [
        value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)
    ]
    assert dims == ["batch"] * 4
    for found, expected in zip(
        run_onnx(tmp_path / "m.onnx", inputs), net.model(*inputs), strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_the_codes_are_those_of_the_packed_file(net: Packed, file: Path) -> None:
    weight = exporter.read_packed(net.path).weights
    held = initializers(file)
    assert held["line.weight.codes"].raw_data == bytes(weight["line"].codes.tolist())
    # UINT4 has the first code in the low half, as the packed file has
    fitted = weight["depthwise"].fitted(net.model.depthwise)
    assert held["depthwise.weight.codes"].raw_data == bytes(pack(fitted.matrix(), 4).tolist())
    assert held["up.weight.codes"].raw_data == bytes(weight["up"].codes.tolist())


def test_the_file_tells_its_bits_and_nothing_of_this_machine(net, file, tmp_path) -> None:
    about = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(about["adq"]) == read_metadata(net.path)
    assert str(Path(__file__).parents[3]).encode() not in file.read_bytes()
    save_onnx(net.model, tmp_path / "again.onnx", images(1), packed=net.path)
    assert (tmp_path / "again.onnx").read_bytes() == file.read_bytes()


def refused(message: str, folder: Path, *args, **kwargs) -> None:
    """One line, and nothing is written."""
    before = sorted(folder.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        save_onnx(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "onnxscript"])
def test_a_missing_package_is_named(net: Packed, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    message = rf'ONNX needs the package {name} .*pip install "adq-search\[onnx\]"'
    refused(message, tmp_path, net.model, tmp_path / "m", images(2), packed=net.path)


@pytest.mark.parametrize("opset", [20, "21", 999])
def test_an_opset_that_cannot_be_written_is_refused(net: Packed, tmp_path: Path, opset) -> None:
    path = tmp_path / "m"
    refused("opset", tmp_path, net.model, path, images(2), packed=net.path, opset=opset)


def test_a_file_that_would_be_too_large_is_refused(
    net: Packed, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(exporter, "MOST_BYTES", 1000)
    message = "bytes of tensors, an ONNX file has 2 GiB at most"
    refused(message, tmp_path, net.model, tmp_path / "m", images(2), packed=net.path)


def test_a_model_that_was_not_loaded_from_the_file_is_refused(net: Packed, tmp_path: Path) -> None:
    message = r"packed\.safetensors: expected the file that this Net was loaded from"
    for model in (fp32(), load_packed_(fp32(), net.path)):
        refused(message, tmp_path, model, tmp_path / "m", images(2), packed=net.path)


class Untranslatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(self.head(x.flatten(1)))


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    save_packed(quantize(fp32(Untranslatable), {"head": 4}), tmp_path / "packed", {})
    net = loaded(Untranslatable, tmp_path / "packed")
    message = "torch.onnx cannot translate Untranslatable: .*airy_ai"
    refused(message, tmp_path, net.model, tmp_path / "m", images(2), packed=net.path)
