"""Costs counted by hand for one small model, and budgets at their exact edge."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples, header_bytes
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18
from torchvision.models.vision_transformer import VisionTransformer

from adq.proxies.costs import COST_NAMES, CostModel
from adq.quant.apply import quantize, quantize_
from adq.quant.attention import expose_attention_
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_
from adq.quant.export.packed import METADATA_BYTES, packed_tensors, save_packed
from adq.quant.fold import fold_batchnorm_
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

# The model: conv 2→3, 3x3 on 6x6 gives 4x4: 54 weights, 54·16 = 864 MACs; fc 48→5: 240 weights,
# 240 MACs. The rest in FP32: biases 3 + 5, BatchNorm 4·3 floats and a counter of 8 bytes.
CONV = LayerInfo("conv", "Conv2d", (3, 2, 3, 3), (2, 6, 6), 864, 3)
FC = LayerInfo("fc", "Linear", (5, 48), (48,), 240, 5)
REST_BYTES = 4 * (3 + 5)  # two biases: the BatchNorm is folded
# No file is above 4518 bytes of tensors (8 bits everywhere), so that offsets have four digits.
DIGITS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))


def cost_model() -> CostModel:
    return CostModel(Net(), (CONV, FC), ["conv"])


def fixed_by_hand() -> int:
    """What is in every file, written out: the length of the header, the metadata without bits and
    its room, the entries of the FP32 tensors, and their bytes."""
    metadata = (
        r'{"__metadata__":{"adq":"{\"schema\":\"adq-model/1\",\"bits\":{\"schema\":\"adq-bits/1\",'
        r'\"weight_bits\":{},\"act_bits\":{}},\"folded\":{\"norm\":\"conv\"}}",'
    )
    digest = f'"sha256":"{"0" * 64}"}}}}'
    at = f'"data_offsets":[{"9" * DIGITS},{"9" * DIGITS}]'
    shapes = {"conv.bias": 3, "fc.bias": 5}
    entries = [f'"{key}":{{"dtype":"F32","shape":[{n}],{at}}},' for key, n in shapes.items()]
    header = len(metadata + digest + "".join(entries)) + 256
    return 8 + 8 * math.ceil(header / 8) + REST_BYTES


def test_every_cost_by_hand() -> None:
    costs = cost_model().costs(BitVector({"conv": 3, "fc": 8}, {"fc": 4}))
    assert costs.average_bits == (54 * 3 + 240 * 8) / 294
    assert costs.average_bits_searched == 3
    assert costs.average_act_bits == (864 * 32 + 240 * 4) / 1104
    assert costs.bops == 864 * 3 * 32 + 240 * 8 * 4
    conv = 21 + 4 * 8 + 4 * 3  # 162 bits are 21 bytes; 8 levels; 3 scales
    fc = 240 + 4 * 256 + 4 * 5
    thresholds = 4 * (15 + 1 + 1)
    headers = header_bytes("conv", 54, 3, DIGITS, act=False)
    headers += header_bytes("fc", 240, 5, DIGITS, act=True)
    assert costs.size_bytes == conv + fc + thresholds + headers + fixed_by_hand()
    assert costs.latency_s is None
    assert cost_model().macs == 864 + 240


def test_the_two_averages_differ_by_the_pinned_layers() -> None:
    bits = BitVector({"conv": 2, "fc": 8})
    both = CostModel(Net(), (CONV, FC), ["conv", "fc"]).costs(bits)
    assert both.average_bits == both.average_bits_searched == (54 * 2 + 240 * 8) / 294
    one = CostModel(Net(), (CONV, FC), ["fc"]).costs(bits)
    assert one.average_bits == both.average_bits
    assert one.average_bits_searched == 8


def test_all_inputs_in_fp32_count_thirty_two_bits() -> None:
    costs = cost_model().costs(BitVector({"conv": 4, "fc": 4}))
    assert costs.average_act_bits == 32
    assert costs.bops == 1104 * 4 * 32


def test_terms_by_hand() -> None:
    model = cost_model()
    assert model.layer_terms("conv", 3, None) == {
        "average_bits": 162,
        "size_bytes": 21 + 32 + 12 + header_bytes("conv", 54, 3, DIGITS, act=False),
        "bops": 864 * 3 * 32,
    }
    assert model.layer_terms("fc", 2, 8) == {
        "average_bits": 480,
        "size_bytes": 60 + 16 + 20 + 4 * 257 + header_bytes("fc", 240, 5, DIGITS, act=True),
        "bops": 240 * 2 * 8,
    }
    assert tuple(model.layer_terms("fc", 2, 8)) == COST_NAMES


def test_totals_are_the_sums_of_the_terms_and_whole_numbers() -> None:
    model = cost_model()
    totals = model.totals(BitVector({"conv": 3, "fc": 2}, {"fc": 8}))
    for cost in COST_NAMES:
        terms = (model.layer_terms("conv", 3, None)[cost], model.layer_terms("fc", 2, 8)[cost])
        assert totals[cost] == sum(terms)
        assert type(totals[cost]) is int


def test_the_layers_are_those_of_a_traced_model(tmp_path: Path) -> None:
    net = Net()
    x = torch.randn(4, 2, 6, 6)
    layers = trace_layers(nn.Sequential(net, nn.Linear(5, 5)), x)
    assert [(layer.macs, layer.weight_shape) for layer in layers[:2]] == [
        (CONV.macs, CONV.weight_shape),
        (FC.macs, FC.weight_shape),
    ]
    bits = BitVector({"conv": 3, "fc": 5}, {"conv": 2, "fc": 6})
    save_packed(quantize(net, bits, [(x, None)]), tmp_path / "m", {})
    assert cost_model().costs(bits).size_bytes == (tmp_path / "m").stat().st_size


def thousand() -> CostModel:
    """1000 weights in two layers of 10 and 20 output channels, and nothing else."""
    layers = (
        LayerInfo("a", "Linear", (10, 30), (30,), 300, 10),
        LayerInfo("b", "Linear", (20, 35), (35,), 700, 20),
    )
    return CostModel(nn.Sequential(), layers, ["a", "b"])


@pytest.mark.parametrize("hundredths", [280, 200, 800, 201, 203, 402, 406])
def test_a_budget_of_average_bits_is_exact_in_binary_too(hundredths: int) -> None:
    # 2.01, 2.03, 4.02 and 4.06 times 1000 fall short of their whole numbers in double precision
    limits = thousand().limits({"average_bits": hundredths / 100})
    assert limits == {"average_bits": 10 * hundredths}


@pytest.mark.parametrize("bits", [2.7999, 2.79999999])
def test_a_budget_just_below_is_below(bits: float) -> None:
    assert thousand().limits({"average_bits": bits})["average_bits"] == 2799


def test_limits_by_hand() -> None:
    model = cost_model()
    limits = model.limits({"average_bits": 2.8, "size_bytes": 8000, "bops": 12345.9})
    assert limits == {"average_bits": 823, "size_bytes": 8000 - fixed_by_hand(), "bops": 12345}
    assert all(type(limit) is int for limit in limits.values())
    assert model.limits({}) == {}


def test_a_size_below_the_fixed_bytes_is_a_negative_limit() -> None:
    limits = cost_model().limits({"size_bytes": fixed_by_hand() - 0.5})
    assert limits["size_bytes"] == -1


def meets(model: CostModel, bits: BitVector, cost: str, budget: float) -> bool:
    return model.totals(bits)[cost] <= model.limits({cost: budget})[cost]


@few_examples
@given(
    st.integers(2, 8),
    st.integers(2, 8),
    st.one_of(st.floats(1.5, 9), st.integers(150, 900).map(lambda i: i / 100)),
)
def test_the_limit_is_met_exactly_when_the_average_is(a: int, b: int, budget: float) -> None:
    model = thousand()
    bits = BitVector({"a": a, "b": b})
    within = model.costs(bits).average_bits <= budget * (1 + 1e-9)
    assert meets(model, bits, "average_bits", budget) == within


@few_examples
@given(st.integers(2, 8), st.integers(2, 8), st.integers(-3, 3))
def test_a_budget_at_the_cost_itself_is_met_and_one_below_is_not(a: int, b: int, off: int) -> None:
    model = cost_model()
    bits = BitVector({"conv": a, "fc": b}, {"fc": a})
    costs = model.costs(bits)
    assert meets(model, bits, "size_bytes", costs.size_bytes + off) == (off >= 0)
    assert meets(model, bits, "bops", costs.bops + off) == (off >= 0)
    assert meets(model, bits, "average_bits", costs.average_bits + off / 294) == (off >= 0)


class Groups(nn.Module):
    """Rows of 27, 9, 16 and 24 weights: few group sizes divide them all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.depthwise(self.first(x))).flatten(1)[:, :24])


@pytest.mark.parametrize("group_size", [None, 2, 3, 8, 9, 12, 24, 27])
def test_with_groups_the_size_is_that_of_the_packed_file(
    tmp_path: Path, group_size: int | None
) -> None:
    net, x = Groups(), torch.randn(2, 3, 6, 6)
    layers = trace_layers(net, x)
    names = [layer.name for layer in layers]
    bits = BitVector(dict(zip(names, (8, 3, 2, 5), strict=True)), {"up": 4, "head": 3})
    model = CostModel(net, layers, names, group_size)
    packed = quantize(net, bits, [(x, None)], Scheme(group_size=group_size))
    save_packed(packed, tmp_path / "m", {})
    assert model.costs(bits).size_bytes == (tmp_path / "m").stat().st_size
    tensors = packed_tensors(packed)
    for name in names:
        own = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.weight."))
        own += sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.input."))
        own += header_bytes(
            name,
            tensors[f"{name}.weight.codes"].numel() * 8 // bits.weight[name],
            tensors[f"{name}.weight.scale"].numel(),
            4,  # every file of Groups has from 1000 to 9999 bytes of tensors at 8 bits
            name in bits.act,
        )
        terms = model.layer_terms(name, bits.weight[name], bits.act.get(name))
        assert terms["size_bytes"] == own


def test_a_group_size_that_divides_no_row_is_refused() -> None:
    layers = trace_layers(Groups(), torch.randn(2, 3, 6, 6))
    with pytest.raises(InputError) as caught:
        CostModel(Groups(), layers, ["up"], group_size=10)
    assert str(caught.value) == (
        "group-size 10 divides no layer's rows, which have 9, 16, 24, 27 weights: "
        "give a divisor of one of them"
    )


def test_groups_cost_bytes_and_nothing_else() -> None:
    bits = BitVector({"conv": 3, "fc": 8}, {"fc": 4})
    plain = cost_model().costs(bits)
    grouped = CostModel(Net(), (CONV, FC), ["conv"], group_size=6).costs(bits)
    # conv: 3 channels of 18 are 9 groups; fc: 5 of 48 are 40
    assert grouped.size_bytes == plain.size_bytes + 4 * (9 - 3) + 4 * (40 - 5)
    assert (grouped.bops, grouped.average_bits, grouped.average_bits_searched) == (
        plain.bops,
        plain.average_bits,
        plain.average_bits_searched,
    )


def assert_exact(
    tmp_path: Path,
    fp32: nn.Module,
    x: Tensor,
    vectors: list[BitVector],
    scheme: Scheme = Scheme("minmax", "minmax"),  # noqa: B008 (it is frozen)
) -> None:
    """The file of every bit vector has the bytes that were told before, and can be read."""
    layers = trace_layers(fp32, x[:1])
    costs = CostModel(fp32, layers, [layer.name for layer in layers], scheme.group_size)
    path = tmp_path / "m.safetensors"
    for bits in vectors:
        model = copy.deepcopy(fp32)
        wanted = {name: (b,) for name, b in bits.act.items()}
        quantize_(model, bits, input_ranges(model, wanted, [(x, None)], scheme.act), scheme)
        save_packed(model.eval(), path, {"task": "imagefolder:photos", "point": "uniform-4"})
        assert path.stat().st_size == costs.costs(bits).size_bytes
        fold_batchnorm_(model)
        packed = load_packed_(copy.deepcopy(fp32), path, kernels="torch")
        assert_layers_agree(model, packed, [layer.name for layer in layers], x)


def assert_layers_agree(model: nn.Module, packed: nn.Module, names: list[str], x: Tensor) -> None:
    """Each layer by itself, on what it gets in `model`: the outputs of a chain of them would hang
    on inputs that lie within rounding of a threshold."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}

    def keep_inputs(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer_names[layer]] = [arg.clone() for arg in args]

    def keep_output(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[layer_names[layer]] = output.clone()  # a ReLU may work in its place

    layer_names = {model.get_submodule(name): name for name in names}
    for layer in layer_names:
        layer.register_forward_pre_hook(keep_inputs, prepend=True)  # before the input's quantizer
        layer.register_forward_hook(keep_output)
    model(x)
    assert set(inputs) == set(names)
    for name in names:
        found = packed.get_submodule(name)(*inputs[name])
        assert (found - outputs[name]).norm() <= 1e-5 * outputs[name].norm(), name


def mixed(names: list[str], seed: int) -> BitVector:
    """Any widths, every third input in FP32."""
    generator = torch.Generator().manual_seed(seed)
    weight, act = torch.randint(2, 9, (2, len(names)), generator=generator).tolist()
    inputs = {name: b for i, (name, b) in enumerate(zip(names, act, strict=True)) if (i + seed) % 3}
    return BitVector(dict(zip(names, weight, strict=True)), inputs)


def vectors(names: list[str]) -> list[BitVector]:
    """The two ends, each with and without bits for inputs, and three in between."""
    every = [dict.fromkeys(names, b) for b in (2, 8)]
    ends = [BitVector(bits, act) for bits in every for act in ({}, *every)]
    return ends + [mixed(names, seed) for seed in range(3)]


@pytest.mark.parametrize("group_size", [None, 3, 8])
@pytest.mark.parametrize("method", ["adq", "minmax"])
def test_the_size_told_before_training_is_the_files(
    tmp_path: Path, method: str, group_size: int | None
) -> None:
    scheme = Scheme(method, "n2uq" if method == "adq" else "minmax", group_size=group_size)
    names = ["first", "depthwise", "up", "head"]
    assert_exact(tmp_path, Groups().eval(), torch.randn(2, 3, 6, 6), vectors(names), scheme)


@pytest.mark.parametrize("width", [1, 2, 9, 10, 11, 26, 27, 50, 99, 100, 101])
def test_the_size_is_exact_where_numbers_gain_a_digit(tmp_path: Path, width: int) -> None:
    """Shapes and offsets: from hundreds of bytes at 2 bits to tens of thousands at 8."""
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)).eval()
    assert_exact(tmp_path, model, torch.randn(2, 3), vectors(["0", "1", "2"]))


def test_the_size_is_exact_for_names_that_json_escapes_and_for_other_dtypes(tmp_path: Path) -> None:
    names = ['quote"', "back\\slash", "tab\tnewline\n", "bell\x07\x7f", "größe/層"]
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8):
        model.register_buffer(f"as {dtype}".replace(".", " "), torch.ones(3).to(dtype))
    assert_exact(tmp_path, model.eval(), torch.randn(2, 4), vectors(names))


def test_the_size_of_an_attentions_file_is_exact(tmp_path: Path) -> None:
    model = expose_attention_(VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3)).eval()
    x = torch.randn(2, 3, 16, 16)
    names = [layer.name for layer in trace_layers(model, x)]
    assert any("in_proj" in name for name in names)
    assert_exact(tmp_path, model, x, vectors(names))


def test_the_size_of_resnet18s_file_is_exact(tmp_path: Path) -> None:
    model, x = resnet18().eval(), torch.randn(1, 3, 64, 64)
    names = [layer.name for layer in trace_layers(model, x)]
    every = [BitVector(dict.fromkeys(names, 2)), mixed(names, 1)]
    assert_exact(tmp_path, model, x, every)
    assert_exact(tmp_path, model, x, [mixed(names, 2)], Scheme("minmax", "minmax", group_size=64))


def test_metadata_above_its_room_makes_the_file_larger_by_no_more_than_the_excess(
    tmp_path: Path,
) -> None:
    bits = BitVector({"conv": 3, "fc": 5}, {"fc": 6})
    model, told = quantize(Net(), bits, [(torch.randn(4, 2, 6, 6), None)]), cost_model().costs(bits)
    sizes = []
    for length in (0, METADATA_BYTES - 15, METADATA_BYTES, METADATA_BYTES + 1000):
        save_packed(model, tmp_path / "m", {"task": "x" * length})  # 15 more with `,\"task\":\"\"`
        sizes.append((tmp_path / "m").stat().st_size)
    assert sizes[:2] == [told.size_bytes] * 2
    assert told.size_bytes <= sizes[2] <= told.size_bytes + 15 + 7
    assert told.size_bytes + 800 < sizes[3] <= told.size_bytes + 1015 + 7


def resnet18_by_hand() -> dict[str, int]:
    """MACs of each layer at 224x224: outputs · positions · inputs · kernel (He et al. 2015,
    table 1; a shortcut that halves the image is a 1x1 convolution)."""
    macs = {"conv1": 64 * 112**2 * 3 * 7**2}
    inputs = 64
    for stage, (channels, side) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), 1):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            macs[f"{at}.conv1"] = channels * side**2 * inputs * 3**2
            macs[f"{at}.conv2"] = channels * side**2 * channels * 3**2
            if inputs != channels:
                macs[f"{at}.downsample.0"] = channels * side**2 * inputs
            inputs = channels
    return macs | {"fc": 512 * 1000}


def mobilenet_v2_by_hand() -> list[int]:
    """The same of MobileNetV2, in order (Sandler et al. 2018, table 2): t, c, n, s, and the side of
    a stage's images."""
    macs, inputs, side = [32 * 112**2 * 3 * 3**2], 32, 112
    for t, c, n, s in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(n):
            wide = t * inputs
            if t != 1:
                macs.append(wide * side**2 * inputs)
            side //= s if i == 0 else 1
            macs.append(wide * side**2 * 3**2)  # depthwise
            macs.append(c * side**2 * wide)
            inputs = c
    return [*macs, 1280 * side**2 * inputs, 1280 * 1000]


def costs_at_224(model: nn.Module) -> tuple[CostModel, list[str]]:
    layers = trace_layers(model, torch.zeros(1, 3, 224, 224))
    names = [layer.name for layer in layers]
    return CostModel(model, layers, names[1:-1]), names


def test_macs_and_bops_of_resnet18_by_hand() -> None:
    costs, names = costs_at_224(resnet18())
    macs = resnet18_by_hand()
    assert {name: layer.macs for name, layer in costs.layers.items()} == macs
    # 118,013,952 + 4·115,605,504 + 3·(57,802,752 + 6,422,528 + 3·115,605,504) + 512,000
    assert costs.macs == sum(macs.values()) == 1_814_073_344
    eight = dict.fromkeys(names, 8)
    assert costs.costs(BitVector(eight, eight)).bops == 1_814_073_344 * 64
    assert costs.costs(BitVector(eight)).bops == 1_814_073_344 * 8 * 32
    ends = macs["conv1"] + macs["fc"]
    inside = 1_814_073_344 - ends
    four = eight | dict.fromkeys(names[1:-1], 4)
    assert costs.costs(BitVector(four, four)).bops == ends * 64 + inside * 16
    assert costs.costs(BitVector(four, eight)).bops == ends * 64 + inside * 32
    inputs = {name: 8 for name in names if name != "conv1"}
    found = costs.costs(BitVector(four, inputs))
    assert found.bops == macs["conv1"] * 8 * 32 + macs["fc"] * 64 + inside * 32
    assert found.average_act_bits == (macs["conv1"] * 32 + (costs.macs - macs["conv1"]) * 8) / (
        costs.macs
    )


def test_macs_and_bops_of_mobilenet_v2_by_hand() -> None:
    costs, names = costs_at_224(mobilenet_v2())
    macs = mobilenet_v2_by_hand()
    assert [layer.macs for layer in costs.layers.values()] == macs
    assert costs.macs == sum(macs) == 300_774_272
    eight = dict.fromkeys(names, 8)
    assert costs.costs(BitVector(eight, eight)).bops == 300_774_272 * 64
    assert costs.costs(BitVector(eight)).bops == 300_774_272 * 8 * 32
    four = {name: 4 if i % 2 else 8 for i, name in enumerate(names)}
    assert costs.costs(BitVector(four, eight)).bops == sum(
        m * (4 if i % 2 else 8) * 8 for i, m in enumerate(macs)
    )
