"""Costs counted by hand for one small model, and budgets at their exact edge."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few_examples
from safetensors.torch import load_file
from torch import Tensor, nn

from adq.proxies.costs import COST_NAMES, CostModel
from adq.quant.apply import quantize
from adq.quant.export.packed import packed_tensors, save_packed
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

# The model: conv 2→3, 3x3 on 6x6 gives 4x4: 54 weights, 54·16 = 864 MACs; fc 48→5: 240 weights,
# 240 MACs. The rest in FP32: biases 3 + 5, BatchNorm 4·3 floats and a counter of 8 bytes.
CONV = LayerInfo("conv", "Conv2d", (3, 2, 3, 3), (2, 6, 6), 864, 3)
FC = LayerInfo("fc", "Linear", (5, 48), (48,), 240, 5)
REST_BYTES = 4 * (3 + 5 + 12) + 8


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


def test_every_cost_by_hand() -> None:
    costs = cost_model().costs(BitVector({"conv": 3, "fc": 8}, {"fc": 4}))
    assert costs.average_bits == (54 * 3 + 240 * 8) / 294
    assert costs.average_bits_searched == 3
    assert costs.average_act_bits == (864 * 32 + 240 * 4) / 1104
    assert costs.bops == 864 * 3 * 32 + 240 * 8 * 4
    conv = 21 + 4 * 8 + 4 * 3  # 162 bits are 21 bytes; 8 levels; 3 scales
    fc = 240 + 4 * 256 + 4 * 5
    thresholds = 4 * (15 + 1 + 1)
    assert costs.size_bytes == conv + fc + thresholds + REST_BYTES
    assert costs.latency_s is None


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
        "size_bytes": 21 + 32 + 12,
        "bops": 864 * 3 * 32,
    }
    assert model.layer_terms("fc", 2, 8) == {
        "average_bits": 480,
        "size_bytes": 60 + 16 + 20 + 4 * 257,
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
    stored = sum(t.nbytes for t in load_file(tmp_path / "m").values())
    assert cost_model().costs(bits).size_bytes == stored


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
    limits = model.limits({"average_bits": 2.8, "size_bytes": 1000, "bops": 12345.9})
    assert limits == {"average_bits": 823, "size_bytes": 1000 - REST_BYTES, "bops": 12345}
    assert all(type(limit) is int for limit in limits.values())
    assert model.limits({}) == {}


def test_a_size_below_the_fixed_bytes_is_a_negative_limit() -> None:
    limits = cost_model().limits({"size_bytes": REST_BYTES - 0.5})
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


@pytest.mark.parametrize("group_size", [None, 2, 3, 8, 9, 12, 24, 27, 1000])
def test_with_groups_the_size_is_that_of_the_packed_files_tensors(
    tmp_path: Path, group_size: int | None
) -> None:
    net, x = Groups(), torch.randn(2, 3, 6, 6)
    layers = trace_layers(net, x)
    names = [layer.name for layer in layers]
    bits = BitVector(dict(zip(names, (8, 3, 2, 5), strict=True)), {"up": 4, "head": 3})
    model = CostModel(net, layers, names, group_size)
    packed = quantize(net, bits, [(x, None)], Scheme(group_size=group_size))
    save_packed(packed, tmp_path / "m", {})
    assert model.costs(bits).size_bytes == sum(t.nbytes for t in load_file(tmp_path / "m").values())
    tensors = packed_tensors(packed)
    for name in names:
        own = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.weight."))
        own += sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.input."))
        terms = model.layer_terms(name, bits.weight[name], bits.act.get(name))
        assert terms["size_bytes"] == own


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
