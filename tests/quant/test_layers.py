import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torchvision
from oracles import conv_macs
from torch import Tensor, nn

from adq.quant.apply import quantize
from adq.quant.errors import InputError
from adq.quant.export.packed import packed_tensors
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.scheme import Scheme


def by_name(model: nn.Module, inputs: Any) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in trace_layers(model, inputs)}


def padded(*layers: nn.Module) -> nn.Sequential:
    """The given layers and two more, since a search needs three."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layer", "image", "macs", "weight_shape"),
    [
        # 8 output channels of 10x10, each a sum over 3 channels of 3x3
        (nn.Conv2d(3, 8, 3, padding=1), (10, 10), 8 * 10 * 10 * 3 * 9, (8, 3, 3, 3)),
        (nn.Conv2d(3, 8, 3), (10, 10), 8 * 8 * 8 * 3 * 9, (8, 3, 3, 3)),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (10, 10), 8 * 5 * 5 * 3 * 9, (8, 3, 3, 3)),
        (nn.Conv2d(3, 8, (1, 3), stride=(2, 1)), (9, 7), 8 * 5 * 5 * 3 * 3, (8, 3, 1, 3)),
        (nn.Conv2d(3, 8, 3, dilation=2), (10, 10), 8 * 6 * 6 * 3 * 9, (8, 3, 3, 3)),
        (nn.Conv2d(6, 8, 3, groups=2), (10, 10), 8 * 8 * 8 * 3 * 9, (8, 3, 3, 3)),
        (nn.Conv2d(6, 6, 3, groups=6), (10, 10), 6 * 8 * 8 * 1 * 9, (6, 1, 3, 3)),
        (nn.Conv1d(3, 5, 4, stride=3), (19,), 5 * 6 * 3 * 4, (5, 3, 4)),
    ],
)
def test_convolutions_are_counted_by_hand(
    layer: nn.Module, image: tuple[int, ...], macs: int, weight_shape: tuple[int, ...]
) -> None:
    x = torch.zeros(4, layer.in_channels, *image)
    model = padded(layer)
    model(x)  # gives the lazy layer its size
    info = by_name(model, x)["0"]
    assert info.macs == macs == conv_macs(image, layer)[0]
    assert info.weight_shape == weight_shape
    assert info.input_shape == (layer.in_channels, *image)
    assert info.weight_numel == layer.weight.numel()
    assert info.out_channels == layer.out_channels
    assert info.kind == type(layer).__name__


def test_a_linear_layer_on_a_sequence_counts_every_position() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    one, many, grid = (by_name(model, torch.zeros(2, *s, 6)) for s in ((), (7,), (7, 3)))
    assert [layer.macs for layer in one.values()] == [30, 20, 12]
    assert [layer.macs for layer in many.values()] == [7 * 30, 7 * 20, 7 * 12]
    assert [layer.macs for layer in grid.values()] == [21 * 30, 21 * 20, 21 * 12]
    assert many["0"].input_shape == (7, 6)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_macs_are_per_sample(samples: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 4), nn.Linear(4, 2)
    )
    layers = trace_layers(model, torch.zeros(samples, 1, 5, 5))
    assert [layer.macs for layer in layers] == [2 * 9 * 9, 18 * 4, 8]


class OutOfOrder(nn.Module):
    """Runs its layers in another order than it registers them, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(4, 2)
        self.first = nn.Linear(3, 4)
        self.never = nn.Linear(3, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        return self.third(self.twice(x))


def test_layers_come_in_the_order_of_execution_and_a_repeated_one_once() -> None:
    layers = trace_layers(OutOfOrder(), torch.zeros(2, 3))
    assert [layer.name for layer in layers] == ["first", "twice", "third"]
    assert [layer.macs for layer in layers] == [12, 2 * 16, 8]


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.embed(tokens)))))


def test_tied_weights_are_left_out() -> None:
    layers = trace_layers(TiedEmbedding(), torch.zeros(2, 5, dtype=torch.int64))
    assert [layer.name for layer in layers] == ["a", "b", "c"]
    assert [layer.macs for layer in layers] == [5 * 16] * 3


def test_two_layers_with_one_weight_are_both_left_out() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model[1].weight = model[3].weight
    assert [layer.name for layer in trace_layers(model, torch.zeros(1, 4))] == ["0", "2", "4"]


def test_one_module_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 4))
    layers = trace_layers(model, torch.zeros(1, 4))
    assert [(layer.name, layer.macs) for layer in layers] == [("0", 16), ("1", 32), ("4", 16)]


def test_a_parametrized_weight_is_left_out() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    nn.utils.parametrizations.weight_norm(model[1])
    assert [layer.name for layer in trace_layers(model, torch.zeros(1, 4))] == ["0", "2", "3"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_layers_are_an_error(count: int) -> None:
    model = nn.Sequential(nn.ReLU(), *(nn.Linear(4, 4) for _ in range(count)))
    message = f"Sequential runs {count} convolutions or Linear layers; .* at least 3"
    with pytest.raises(InputError, match=message):
        trace_layers(model, torch.zeros(1, 4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(y))


def test_a_layer_that_is_called_by_keyword_is_named() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](input=self[0](x)))

    model = Net(*[nn.Linear(4, 4) for _ in range(3)])
    with pytest.raises(InputError, match=r"layer '1' is called with its input by keyword"):
        trace_layers(model, torch.randn(2, 4))


def test_a_model_may_take_several_inputs() -> None:
    layers = trace_layers(TwoInputs(), (torch.zeros(2, 3), torch.zeros(2, 5)))
    assert [layer.macs for layer in layers] == [12, 20, 8]


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.Linear(4, 4)
    ).train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    trace_layers(model, torch.ones(3, 4))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_and_modes_are_put_back_when_the_model_fails() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).train()
    with pytest.raises(RuntimeError):
        trace_layers(model, torch.ones(3, 5))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def resnet18_macs() -> int:
    """ResNet-18's convolutions and classifier at 224x224, from the table of its paper.

    He et al., arXiv 1512.03385, table 1: a 7x7 convolution to 112x112; four stages of two blocks
    of two 3x3 convolutions at 56, 28, 14 and 7, each later stage starting with stride 2 and a
    1x1 projection; a classifier of 512 to 1000.
    """
    total = 64 * 112**2 * 3 * 49
    channels = 64
    for width, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        total += side**2 * width * (channels + 3 * width) * 9
        if channels != width:
            total += side**2 * width * channels
        channels = width
    return total + 512 * 1000


def test_resnet18_has_the_macs_of_its_papers_table() -> None:
    model = torchvision.models.resnet18().to("meta")
    layers = trace_layers(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert resnet18_macs() == 1_814_073_344
    assert sum(layer.macs for layer in layers) == 1_814_073_344
    assert len(layers) == 21
    assert (layers[0].name, layers[-1].name) == ("conv1", "fc")
    # 11,689,512 parameters less 9,600 of BatchNorm and 1,000 biases
    assert sum(layer.weight_numel for layer in layers) == 11_678_912


def mobilenet_v2_macs() -> int:
    """MobileNetV2's convolutions and classifier at 224x224, from table 2 of its paper.

    Sandler et al., arXiv 1801.04381: rows of (expansion t, channels c, repeats n, stride s).
    """
    rows = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    side, channels = 112, 32
    total = side**2 * channels * 3 * 9
    for t, c, n, s in rows:
        for i in range(n):
            hidden = t * channels
            if t != 1:
                total += side**2 * channels * hidden
            side //= s if i == 0 else 1
            total += side**2 * hidden * 9 + side**2 * hidden * c
            channels = c
    return total + side**2 * channels * 1280 + 1280 * 1000


def test_mobilenet_v2_needs_no_code_of_its_own() -> None:
    model = torchvision.models.mobilenet_v2().to("meta")
    layers = trace_layers(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert sum(layer.macs for layer in layers) == mobilenet_v2_macs() == 300_774_272
    assert len(layers) == 53
    depthwise = [layer for layer in layers if layer.weight_shape[1] == 1]
    assert len(depthwise) == 17


Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d


def scattered(layer: Transposed, x: Tensor) -> tuple[Tensor, int]:
    """(output, multiplications) of a transposed convolution of one sample, one product at a time.

    Each value of the input is spread over the output; what falls on the padding is cut off.
    """
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    sides = [
        (n - 1) * s + d * (k - 1) + 1 + o
        for n, s, d, k, o in zip(
            x.shape[1:], stride, layer.dilation, kernel, layer.output_padding, strict=True
        )
    ]
    out = torch.zeros(layer.out_channels, *sides, dtype=torch.float64)
    per_group, products = layer.in_channels // layer.groups, 0
    outputs = layer.out_channels // layer.groups
    for i in range(layer.in_channels):
        for at in itertools.product(*(range(n) for n in x.shape[1:])):
            for j in range(outputs):
                for tap in itertools.product(*(range(k) for k in kernel)):
                    to = [
                        a * s + d * t
                        for a, s, d, t in zip(at, stride, layer.dilation, tap, strict=True)
                    ]
                    o = (i // per_group) * outputs + j
                    out[(o, *to)] += x[(i, *at)].item() * layer.weight[(i, j, *tap)].item()
                    products += 1
    kept = tuple(slice(p, side - p if p else None) for p, side in zip(padding, sides, strict=True))
    out = out[(slice(None), *kept)]
    if layer.bias is not None:
        out += layer.bias.detach().view(-1, *[1] * len(kernel))
    return out, products


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (nn.ConvTranspose1d(3, 4, 3), (5,)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, bias=False), (4,)),
        (nn.ConvTranspose1d(4, 4, 2, stride=3, output_padding=1, groups=4), (5,)),
        (nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1)), (3, 4)),
        (nn.ConvTranspose2d(4, 2, 3, padding=1, stride=2, output_padding=1, groups=2), (3, 2)),
        (nn.ConvTranspose2d(2, 3, 2, dilation=2), (3, 3)),
    ],
)
def test_transposed_convolutions_are_counted_product_by_product(
    layer: Transposed, image: tuple[int, ...]
) -> None:
    x = torch.randn(2, layer.in_channels, *image, generator=torch.Generator().manual_seed(0))
    expected, macs = scattered(layer, x[0])
    # the loop is this layer, and so its products are the layer's
    torch.testing.assert_close(layer(x)[0].detach().double(), expected, atol=1e-6, rtol=1e-5)
    model = padded(layer)
    model(x)
    info = by_name(model, x)["0"]
    assert info.macs == macs
    assert info.weight_shape == tuple(layer.weight.shape)
    assert info.input_shape == (layer.in_channels, *image)
    assert info.out_channels == layer.out_channels
    assert info.kind == type(layer).__name__


class Mixed(nn.Module):
    """Rows of 27, 9, 16, 24, 18 and 48 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.grouped = nn.ConvTranspose2d(6, 4, (2, 4), groups=2)
        self.line = nn.ConvTranspose1d(4, 4, 9, groups=2)
        self.wide = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.up(self.depthwise(self.first(x))))
        return self.wide(self.line(x.mean(dim=3)).flatten(1)[:, :48])


@pytest.mark.parametrize("group_size", [None, 2, 3, 8, 9, 16, 18, 48, 1000])
def test_the_number_of_scales_is_that_of_the_packed_tensors(group_size: int | None) -> None:
    model, x = Mixed(), torch.randn(2, 3, 6, 6)
    layers = trace_layers(model, x)
    assert len(layers) == 6
    packed = packed_tensors(
        quantize(model, {layer.name: 2 for layer in layers}, scheme=Scheme(group_size=group_size))
    )
    for layer in layers:
        assert layer.scales(group_size) == packed[f"{layer.name}.weight.scale"].numel()
        size = math.prod(layer.weight_shape) // layer.out_channels
        divides = group_size is not None and size % group_size == 0
        assert layer.scales(group_size) == layer.out_channels * (
            size // group_size if divides else 1
        )
