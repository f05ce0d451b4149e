import copy
import json
from collections.abc import Iterator
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset

from adq.quant import codebook
from adq.quant.activation import fit_range
from adq.quant.apply import bits_of, dequantize_, quantize, quantize_, quantized_layers
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.flat import update_codebooks
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector


class Net(nn.Module):
    """One layer of each kind: plain, grouped and depthwise Conv2d, Conv1d, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.line = nn.Conv1d(8, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.norm(self.conv(x))))
        x = self.line(F.relu(self.depthwise(F.relu(x))).mean(dim=3))
        return self.head(F.relu(x).mean(dim=2))


BITS = BitVector(
    {"conv": 8, "grouped": 3, "depthwise": 2, "line": 4, "head": 5},
    {"grouped": 4, "line": 3, "head": 8},
)


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 2, 8, 8, generator=generator)
    y = torch.randint(0, 3, (20,), generator=generator)
    return [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_quantize_leaves_the_original_untouched(net, batches) -> None:
    before, x = snapshot(net), batches[0][0]
    expected = net(x)
    quantized = quantize(net, BITS, batches)
    update_codebooks(quantized, 0.5, 0)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter += 1
    assert same(before, snapshot(net))
    assert torch.equal(net(x), expected)
    assert not list(quantized_layers(net))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_the_weights_are_the_fake_quantized_ones_of_each_layer(net) -> None:
    quantized = quantize(net, BITS.weight)
    for name, bits in BITS.weight.items():
        weight = net.get_parameter(f"{name}.weight").detach()
        scale = codebook.channel_scale(weight)
        levels = codebook.initial_levels(weight / scale, bits)
        layer = quantized.get_submodule(name)
        expected = scale * levels[codebook.assign(weight / scale, levels)]
        torch.testing.assert_close(layer.weight, expected)  # the module keeps the scale's logarithm
        assert all(len(channel.unique()) <= 2**bits for channel in layer.weight)
        assert torch.equal(original_weight(layer), weight)
        assert isinstance(layer, type(net.get_submodule(name)))


@pytest.mark.parametrize("init", codebook.INITIALISATIONS)
def test_the_start_of_the_codebook_can_be_chosen(net, init) -> None:
    layer = quantize(net, {"line": 3}, scheme=Scheme(init=init)).line
    weight = net.line.weight.detach()
    expected = codebook.initial_levels(weight / codebook.channel_scale(weight), 3, init)
    assert torch.equal(weight_quantizer(layer).levels, expected)


def test_the_inputs_are_the_grid_points_of_the_calibrated_range(net, batches) -> None:
    quantized = quantize(net, BITS, batches)
    seen: dict[str, Tensor] = {}
    plain = copy.deepcopy(net)
    for name in BITS.act:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, args[0])
        )
    x = batches[0][0]
    plain(x)
    # the first quantized input depends on no earlier quantized layer's input, but on its weights:
    # compare the input quantizers alone
    for name, bits in BITS.act.items():
        quantizer = quantized.get_submodule(name).input_quantizer
        values = []
        for inputs, _ in batches:
            seen.clear()
            plain(inputs)
            values.append(seen[name].flatten())
        step, zero_point = fit_range(torch.cat(values), bits)
        # the calibration repeats each batch's extremes: almost the same least error
        assert quantizer.output_scale.item() == pytest.approx(step, rel=0.15)
        assert quantizer.zero_point.item() == pytest.approx(zero_point, abs=1)
        step, zero_point = quantizer.output_scale.item(), int(quantizer.zero_point.item())
        place = values[0] / step - 0.5
        away = values[0][(place - place.round()).abs() > 1e-3]  # from the thresholds
        expected = [oracles.affine_grid(v, step, zero_point, bits) for v in away.tolist()]
        assert quantizer(away).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_layer_computes_with_its_quantized_input(net, batches) -> None:
    quantized = quantize(net, {"grouped": 4}, batches)
    both = quantize(net, BitVector({"grouped": 4}, {"grouped": 2}), batches)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).relu()
    quantizer = both.grouped.input_quantizer
    assert torch.equal(both.grouped(x), quantized.grouped(quantizer(x)))
    assert not torch.equal(both.grouped(x), quantized.grouped(x))
    assert len(quantizer(x).unique()) <= 4


def test_rectified_inputs_get_unsigned_grids_and_others_signed_ones(net, batches) -> None:
    quantized = quantize(net, BitVector({"conv": 4, "head": 4}, {"conv": 4, "head": 4}), batches)
    assert quantized.head.input_quantizer.zero_point == 0
    assert 0 < quantized.conv.input_quantizer.zero_point < 15


def test_dequantize_restores_weights_outputs_keys_and_hooks(net, batches) -> None:
    before, x = snapshot(net), batches[0][0]
    expected = net(x)
    restored = dequantize_(quantize(net, BITS, batches))
    assert same(before, snapshot(restored))
    assert torch.equal(restored(x), expected)
    assert not any(m._forward_pre_hooks for m in restored.modules())
    assert {type(m) for m in restored.modules()} == {type(m) for m in net.modules()}
    assert not any("_adq" in key for m in restored.modules() for key in vars(m))


def test_dequantize_can_keep_the_quantized_weights(net, batches) -> None:
    quantized = quantize(net, BITS.weight)
    x = batches[0][0]
    expected = quantized(x)
    weights = {name: layer.weight.detach().clone() for name, layer in quantized_layers(quantized)}
    plain = dequantize_(quantized, keep_quantized_weights=True)
    assert snapshot(plain).keys() == snapshot(net).keys()
    assert torch.equal(plain(x), expected)
    for name, weight in weights.items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), weight)
    assert not list(quantized_layers(plain))


def test_a_dequantized_model_can_be_quantized_again(net, batches) -> None:
    once = quantize(net, BITS, batches)
    again = quantize(dequantize_(copy.deepcopy(once)), BITS, batches)
    assert same(snapshot(once), snapshot(again))


def test_a_state_dict_carries_everything_into_a_fresh_quantized_model(net, batches) -> None:
    trained = quantize(net, BITS, batches)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    update_codebooks(trained, 0.5, 0)
    torch.manual_seed(3)
    fresh = quantize(Net().eval(), BITS, [(0.5 * x, y) for x, y in batches])
    x = batches[0][0]
    assert not torch.equal(fresh(x), trained(x))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
    update_codebooks(fresh, 0.5, 0)
    update_codebooks(trained, 0.5, 0)
    assert same(snapshot(fresh), snapshot(trained))


def test_a_deep_copy_is_whole_and_apart(net, batches) -> None:
    quantized = quantize(net, BITS, batches)
    x = batches[0][0]
    expected, before = quantized(x), snapshot(quantized)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(x), expected)
    assert bits_of(twin) == BITS
    with torch.no_grad():
        twin.head.input_quantizer.log_output_scale += 1
    assert not torch.equal(twin(x), expected)
    dequantize_(twin)
    assert torch.equal(twin(x), net(x))
    assert same(before, snapshot(quantized))
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("bits", [BITS, BitVector({"head": 2}), BitVector({})])
def test_bits_of_reads_the_bit_vector_back(net, batches, bits: BitVector) -> None:
    assert bits_of(quantize(net, bits, batches)) == bits
    assert bits_of(net) == BitVector({})


def test_bits_come_as_a_mapping_or_as_the_path_of_a_file(net, tmp_path: Path, batches) -> None:
    assert bits_of(quantize(net, {"head": 3})) == BitVector({"head": 3})
    path = tmp_path / "bits.json"
    path.write_text(json.dumps(BITS.to_json()))
    assert bits_of(quantize(net, path, batches)) == BITS
    assert bits_of(quantize(net, str(path), batches)) == BITS


class Functional(nn.Module):
    """Reads its layer's weight and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


def test_a_model_that_reads_the_weight_itself_sees_the_quantized_one() -> None:
    torch.manual_seed(0)
    model = Functional()
    quantized = quantize(model, {"inner": 2})
    x = torch.randn(5, 4)
    expected = F.linear(x, quantized.inner.weight, model.inner.bias)
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(quantized(x), model(x))
    assert all(len(row.unique()) <= 4 for row in quantized.inner.weight)


def test_forward_and_backward_never_change_the_state(net, batches) -> None:
    quantized = quantize(net, BITS, batches).train()
    quantized.norm.eval()  # BatchNorm's own statistics are not ours
    before = snapshot(quantized)
    for x, y in batches:
        F.cross_entropy(quantized(x), y).backward()
    assert same(before, snapshot(quantized))


def test_update_codebooks_moves_every_codebook_and_nothing_else(net, batches) -> None:
    quantized = quantize(net, BITS, batches)
    with torch.no_grad():
        for _, layer in quantized_layers(quantized):
            original_weight(layer).mul_(1.3)
    before = snapshot(quantized)
    expected = {}
    for name, layer in quantized_layers(quantized):
        q = weight_quantizer(layer)
        state = codebook.Codebook(q.levels.clone(), q.counts.clone(), q.sums.clone())
        expected[name] = codebook.ema_step(
            state, original_weight(layer).flatten(1) / q.log_scale.exp()[:, None], 0.9
        )
    update_codebooks(quantized, 0.9, 0)
    after = snapshot(quantized)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"levels", "counts", "sums"}
    for name, layer in quantized_layers(quantized):
        assert f"{name}.parametrizations.weight.0.levels" in changed
        assert torch.equal(weight_quantizer(layer).levels, expected[name].levels.detach())


def test_gradients_reach_weights_scales_and_input_quantizers(net, batches) -> None:
    quantized = quantize(net, BITS, batches)
    x, y = batches[0]
    F.cross_entropy(quantized(x), y).backward()
    for name, parameter in quantized.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    # straight through: the weight's gradient is the one at the quantized weight
    plain = dequantize_(quantize(net, BITS.weight), keep_quantized_weights=True)
    weights_only = quantize(net, BITS.weight)
    F.cross_entropy(weights_only(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    for name, layer in quantized_layers(weights_only):
        expected = plain.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(original_weight(layer).grad, expected)


def test_channels_last_models_are_quantized_alike(net) -> None:
    plain = quantize(net, BITS.weight)
    turned = quantize(copy.deepcopy(net).to(memory_format=torch.channels_last), BITS.weight)
    for (name, one), (_, other) in zip(
        quantized_layers(plain), quantized_layers(turned), strict=True
    ):
        torch.testing.assert_close(one.weight, other.weight, msg=name)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"nowhere": 4}, "names layer 'nowhere', which Net does not have"),
        ({"conv.nowhere": 4}, r"names layer 'conv\.nowhere', which Net does not have"),
        ({"norm": 4}, "layer 'norm' is a BatchNorm2d; quantizable are Conv1d, Conv2d, Linear"),
        ({"conv": 9}, "weight bits of layer 'conv'"),
        (BitVector({"conv": 4}, {"conv": 4}), "activation bits need batches"),
    ],
)
def test_bits_that_do_not_fit_the_model_are_refused(net, bits, message: str) -> None:
    before = snapshot(net)
    with pytest.raises(InputError, match=message):
        quantize(net, bits)
    assert same(before, snapshot(net))


def test_quantizing_twice_is_refused(net) -> None:
    quantized = quantize(net, {"head": 4})
    with pytest.raises(InputError, match=r"layer 'head' is quantized or parametrized already"):
        quantize(quantized, {"head": 3})
    nn.utils.parametrizations.weight_norm(net.line)
    with pytest.raises(InputError, match=r"layer 'line' is quantized or parametrized already"):
        quantize(net, {"line": 3})


def test_act_bits_with_empty_batches_are_refused(net) -> None:
    with pytest.raises(InputError, match="no calibration input reached head"):
        quantize(net, BitVector({"head": 4}, {"head": 4}), [])


def test_quantizing_in_place_with_measured_ranges_is_the_same(net, batches) -> None:
    expected = quantize(net, BITS, batches)
    ranges = input_ranges(net, {name: (2, bits) for name, bits in BITS.act.items()}, batches)
    found = quantize_(net, BITS, ranges)
    assert found is net
    assert same(snapshot(found), snapshot(expected))


@pytest.mark.parametrize(
    ("bits", "error"),
    [
        (BitVector({"conv": 4, "norm": 4}), InputError),
        (BitVector({"conv": 4, "head": 4}, {"head": 4}), KeyError),
    ],
)
def test_a_model_that_cannot_be_quantized_in_place_is_left_as_it_was(net, bits, error) -> None:
    before = snapshot(net)
    with pytest.raises(error):
        quantize_(net, bits, {})
    assert same(before, snapshot(net))
    assert not any(parametrize.is_parametrized(m) for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        generator = torch.Generator().manual_seed(0)
        return iter([(torch.randn(2, 8, 8, generator=generator), 0) for _ in range(6)])


def test_a_data_loader_without_a_length_calibrates(net) -> None:
    quantized = quantize(net, BitVector({"head": 4}, {"head": 4}), DataLoader(Stream(), 3))
    assert bits_of(quantized).act == {"head": 4}


def test_zero_channels_stay_finite_through_quantization_and_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight.zero_()
    x = torch.randn(4, 3, 4, 4)
    quantized = quantize(model, BitVector({"0": 2, "2": 3}, {"0": 4, "2": 4}), [(x, None)])
    quantized(x).square().sum().backward()
    update_codebooks(quantized, 0.99, 0)
    assert torch.isfinite(quantized(x)).all()
    assert all(torch.isfinite(p.grad).all() for p in quantized.parameters())


def test_a_layer_under_two_names_gets_its_bits_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model.append(model[0])
    with pytest.raises(InputError, match="names one layer twice, as '0' and '3'"):
        quantize(model, {"0": 4, "2": 4, "3": 4})
    assert bits_of(quantize(model, {"3": 4})).weight == {"0": 4}
