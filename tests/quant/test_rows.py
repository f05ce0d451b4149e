"""Rows against two other definitions of an output channel: an index loop and autograd."""

import itertools
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor, nn

from adq.quant import codebook
from adq.quant.apply import quantize, quantized_layers
from adq.quant.export.loading import load_packed_
from adq.quant.export.packed import packed_tensors, save_packed
from adq.quant.modules import original_weight, weight_quantizer
from adq.quant.rows import TRANSPOSED, Rows, rows_of
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(3, 4, (2, 3)),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed1d-grouped": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2),
    "transposed1d-three-groups": lambda: nn.ConvTranspose1d(6, 9, 2, groups=3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 3, (2, 3), stride=2),
    "transposed2d-grouped": lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
    "transposed2d-depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "transposed2d-depthwise-wide": lambda: nn.ConvTranspose2d(3, 6, 2, groups=3),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_group = pytest.mark.parametrize("group_size", [None, 2, 3, 4, 5, 6, 9, 1000])


def channels_by_index(layer: nn.Module) -> list[list[tuple[int, ...]]]:
    """Where the weights of each output channel are, one index after the other."""
    shape = layer.weight.shape
    kernel = list(itertools.product(*(range(n) for n in shape[2:])))
    if not isinstance(layer, TRANSPOSED):
        return [[(o, i, *k) for i in range(shape[1]) for k in kernel] for o in range(shape[0])]
    found = []
    for group in range(layer.groups):
        per_group = layer.in_channels // layer.groups
        inputs = range(group * per_group, (group + 1) * per_group)
        for j in range(layer.out_channels // layer.groups):
            found.append([(i, j, *k) for i in inputs for k in kernel])
    return found


@every_layer
def test_a_channels_row_is_that_of_the_index_loop(kind: str) -> None:
    layer = LAYERS[kind]()
    rows = rows_of(layer)
    numbers = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    expected = [[numbers[at].item() for at in row] for row in channels_by_index(layer)]
    assert rows.split(numbers).tolist() == expected
    assert rows.channels == rows.count == len(expected)
    assert rows.channels == (layer.out_features if kind == "linear" else layer.out_channels)
    assert rows.size == len(expected[0])


@every_layer
def test_a_channels_row_is_what_the_output_channel_depends_on(kind: str) -> None:
    layer = LAYERS[kind]()
    spatial = () if kind == "linear" else (5,) * (layer.weight.dim() - 2)
    inputs = layer.in_features if kind == "linear" else layer.in_channels
    out = layer(torch.rand(2, inputs, *spatial) + 0.5)  # positive: no gradient is zero by chance
    rows = rows_of(layer)
    for channel in range(rows.channels):
        [grad] = torch.autograd.grad(out[:, channel].sum(), layer.weight, retain_graph=True)
        reached = (rows.split(grad) != 0).all(dim=1)
        assert reached.nonzero().flatten().tolist() == [channel]
        assert (grad != 0).sum() == rows.size


@every_layer
@every_group
def test_split_and_join_undo_each_other(kind: str, group_size: int | None) -> None:
    layer = LAYERS[kind]()
    rows = rows_of(layer, group_size)
    split = rows.split(layer.weight)
    assert split.shape == (rows.count, rows.size)
    assert torch.equal(rows.join(split), layer.weight)
    other = torch.randn(rows.count, rows.size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows.split(rows.join(other)), other)
    assert rows.join(other).shape == layer.weight.shape


@every_layer
@every_group
def test_groups_are_neighbours_in_a_channel_and_channels_that_do_not_divide_stay_whole(
    kind: str, group_size: int | None
) -> None:
    layer = LAYERS[kind]()
    numbers = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    expected = []
    for row in channels_by_index(layer):
        values = [numbers[at].item() for at in row]
        step = group_size or len(values)
        if len(values) % step:
            step = len(values)
        expected += [values[i : i + step] for i in range(0, len(values), step)]
    rows = rows_of(layer, group_size)
    assert rows.split(numbers).tolist() == expected
    assert rows.channels == len(channels_by_index(layer))


def test_a_channels_last_weight_has_the_rows_of_a_plain_one() -> None:
    for kind in ("conv2d", "transposed2d-grouped"):
        layer = LAYERS[kind]()
        rows = rows_of(layer)
        plain = layer.weight.detach()
        turned = plain.to(memory_format=torch.channels_last)
        assert torch.equal(rows.split(turned), rows.split(plain))


def test_a_weight_has_its_rows_of_a_hand_written_example() -> None:
    # (in 4, out/groups 2), two groups: output 0 and 1 come from inputs 0 and 1
    weight = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    rows = Rows((4, 2), 2, groups=2)
    assert rows.split(weight).tolist() == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert torch.equal(rows.join(rows.split(weight)), weight)
    assert Rows((4, 2), 2).split(weight).tolist() == weight.tolist()


class Upsampler(nn.Module):
    """Transposed convolutions in one and two dimensions, plain, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ConvTranspose2d(2, 6, 3, stride=2)
        self.grouped = nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False)
        self.depthwise = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4)
        self.line = nn.ConvTranspose1d(4, 6, 4, stride=2, output_padding=1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.wide(x).relu()).relu())
        return self.head(self.line(x.mean(dim=3).relu()).mean(dim=2))


BITS = {"wide": 3, "grouped": 2, "depthwise": 4, "line": 2, "head": 5}


def upsampler(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Upsampler().eval()


def image() -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("group_size", [None, 2, 8])
def test_transposed_convolutions_are_quantized_row_by_row(group_size: int | None) -> None:
    model = quantize(upsampler(), BITS, scheme=Scheme(group_size=group_size))
    for name, layer in quantized_layers(model):
        quantizer = weight_quantizer(layer)
        weight, found = original_weight(layer).detach(), layer.weight.detach()
        levels = quantizer.levels.tolist()
        scale = quantizer.log_scale.exp().tolist()
        row = 0
        for channel in channels_by_index(layer):
            step = group_size if group_size and len(channel) % group_size == 0 else len(channel)
            for start in range(0, len(channel), step):
                part = channel[start : start + step]
                values = [found[at].item() for at in part]
                assert len(set(values)) <= 2 ** BITS[name]
                expected = [
                    levels[oracles.nearest_level(weight[at].item() / scale[row], levels)]
                    * scale[row]
                    for at in part
                ]
                # one single-precision product
                assert values == pytest.approx(expected, rel=1e-6)
                row += 1
        assert row == len(scale)


@pytest.mark.parametrize("group_size", [None, 2, 8])
def test_a_packed_model_with_transposed_convolutions_gives_the_same_outputs(
    tmp_path: Path, group_size: int | None
) -> None:
    x = image()
    bits = BitVector(BITS, {"grouped": 4, "line": 3})
    model = quantize(upsampler(), bits, [(x, None)], Scheme(group_size=group_size))
    save_packed(model, tmp_path / "m", {})
    loaded = load_packed_(upsampler(seed=5), tmp_path / "m", kernels="torch")
    assert torch.equal(loaded(x), model(x))
    for name, layer in quantized_layers(model):
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), layer.weight)


@pytest.mark.parametrize("name", ["wide", "grouped", "depthwise", "line"])
def test_the_scale_of_a_transposed_convolution_follows_its_output_channel(name: str) -> None:
    plain = upsampler()
    before = packed_tensors(quantize(plain, BITS))[f"{name}.weight.scale"]
    layer = plain.get_submodule(name)
    for channel, places in enumerate(channels_by_index(layer)):
        model = upsampler()
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            for at in places:
                weight[at] *= 4
        after = packed_tensors(quantize(model, BITS))[f"{name}.weight.scale"]
        expected = before.clone()
        expected[channel] *= 4
        torch.testing.assert_close(after, expected)
        # the root mean square of just these weights
        rms = (sum(weight[at].item() ** 2 for at in places) / len(places)) ** 0.5
        assert after[channel].item() == pytest.approx(rms, rel=1e-5)


def test_rows_of_a_group_get_scales_of_their_own() -> None:
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1, 2, -2, 4, -4, 8, -8], [3.0, 3] * 4]))
    rows = rows_of(layer, 2)
    scale = codebook.channel_scale(rows.split(layer.weight))
    assert scale.flatten().tolist() == [1, 2, 4, 8, 3, 3, 3, 3]
