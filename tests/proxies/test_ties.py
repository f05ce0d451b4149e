"""Ties: one small net for each rule, and known architectures with groups written down by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection

from adq.proxies.ties import trace_ties
from adq.quant.attention import expose_attention_
from adq.quant.layers import trace_layers

Groups = tuple[tuple[str, ...], ...]


class Net(nn.Module):
    """Convolutions a to e of 4 channels, with a norm, between a stem and a head."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("position", torch.ones(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        # all run once, so that each is a layer; max-pooling ends the stem's trail
        for layer in (self.a, self.b, self.c, self.d, self.e):
            layer(torch.ones(len(x), 4, 6, 6))
        return self.head(self.between(self, F.max_pool2d(self.stem(x), 2)).mean((2, 3)))


def ties(model: nn.Module, *inputs: Tensor) -> Groups:
    return trace_ties(model, inputs, trace_layers(model, inputs))


def tied(between: Callable[[Net, Tensor], Tensor]) -> Groups:
    return ties(Net(between), torch.randn(2, 3, 12, 12))


AB = (("a", "b"),)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        # a shortcut with a layer of its own, and without
        (lambda n, x: F.relu(n.bn(n.b(F.relu(n.a(x)))) + n.bn(n.c(x))), (("b", "c"),)),
        (lambda n, x: F.relu(n.b(F.relu(n.a(x))) + x), ()),
        (lambda n, x: n.a(x) - n.bn(n.b(x)), AB),
        (lambda n, x: torch.add(n.b(x), n.a(x), alpha=2), AB),
        # before activation: the input of a block is itself a layer's output
        (lambda n, x: (y := n.a(x)) + n.b(F.relu(n.bn(y))), AB),
        # the next block adds to a sum, which comes from no single layer
        (lambda n, x: (y := n.a(x) + n.b(x)) + n.c(F.relu(y)), AB),
        (lambda n, x: (y := n.a(x) + n.b(x)) + n.c(y) + n.d(y), AB),
        # constants that are added or multiplied
        (lambda n, x: n.gamma * n.a(x) + (n.b(x) + n.position) / 2, AB),
        (lambda n, x: n.a(x) * 0.5 + (1 - n.b(x)), AB),
        (lambda n, x: n.a(x) + n.position, ()),
        (lambda n, x: n.a(x) * x.new_ones(4, 1, 1) + (n.b(x) - torch.zeros_like(x)), AB),
        (lambda n, x: n.a(x).add_(n.gamma) + n.b(x).mul_(n.gamma), AB),
        # other shapes, the same numbers
        (
            lambda n, x: (
                n.a(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
                + F.layer_norm(n.b(x).flatten(2).transpose(1, 2).contiguous(), (4,))
            ).reshape(len(x), 4, 6, 6),
            AB,
        ),
        (lambda n, x: F.pad(n.a(x), (1, 1, 1, 1)) + F.pad(n.b(x), (1, 1, 1, 1)).clone(), AB),
        (lambda n, x: F.dropout(n.a(x), training=False) + F.group_norm(n.b(x), 2), AB),
        (lambda n, x: F.dropout(n.a(x), training=True) + n.b(x).roll(1, 3).flip(3), AB),
        (lambda n, x: n.a(x).chunk(2, 1)[0] + n.b(x)[:, 2:], AB),
        (lambda n, x: F.interpolate(n.a(x), scale_factor=2) + n.b(F.pad(x, (3, 3, 3, 3))), AB),
        (lambda n, x: F.interpolate(n.a(x), (6, 6), mode="nearest-exact") + n.b(x), AB),
        (lambda n, x: n.a(x).repeat(1, 2, 1, 1) + n.b(x).repeat_interleave(2, 1), AB),
        # what ends the trail
        (lambda n, x: F.relu(n.a(x)) + n.b(x), ()),
        (lambda n, x: F.avg_pool2d(n.a(x), 2) + F.avg_pool2d(n.b(x), 2), ()),
        (lambda n, x: F.interpolate(n.a(x), (6, 6), mode="bilinear") + n.b(x), ()),
        (lambda n, x: n.a(x).softmax(1) + n.b(x), ()),
        (lambda n, x: n.a(x) @ n.b(x) + n.c(x), ()),
        (lambda n, x: n.a(x) + n.a(x), ()),
        # gates
        (lambda n, x: n.a(x) * n.b(x).mean((2, 3), keepdim=True).sigmoid(), ()),
        (lambda n, x: n.a(x) * n.b(x) + n.c(x), ()),
        (lambda n, x: n.a(x).mul_(n.b(x)) + n.c(x), ()),
        # concatenations, through activation functions too
        (lambda n, x: torch.cat([n.a(x), n.b(x)], 1), AB),
        (lambda n, x: torch.cat([F.relu(n.bn(n.a(x))), n.b(x)], -3), AB),
        (lambda n, x: torch.cat([F.gelu(n.a(x)), x, F.hardswish(n.b(x)).relu_()], 1), AB),
        (lambda n, x: torch.stack([F.silu(n.a(x)), F.relu6(n.b(x))], 2).flatten(2, 3), AB),
        (lambda n, x: torch.cat([n.a(x), x], 1), ()),
        (lambda n, x: torch.cat([n.a(x), n.b(x)], 0), ()),
        (lambda n, x: torch.stack([n.a(x), n.b(x)]).sum(0), ()),
        (lambda n, x: torch.cat([n.a(x).sigmoid(), F.max_pool2d(n.b(x), 1)], 1), ()),
        (lambda n, x: torch.cat([n.a(x), n.b(x)], 1)[:, :4] + n.c(x), AB),
        # in place
        (lambda n, x: n.a(x).add_(n.b(x)), AB),
        (lambda n, x: n.a(x).add_(n.b(x)) + n.c(x), AB),
        (lambda n, x: n.a(x).relu_() + n.b(x), ()),
        (lambda n, x: torch.cat([n.a(x).relu_(), n.b(x)], 1), AB),
        (lambda n, x: n.bn(n.a(x)).sub_(n.b(x)), AB),
        # convolutions that read one tensor
        (lambda n, x: n.a(x).relu() * n.b(x).relu(), ()),
        # a layer that is called twice, and groups that meet in one
        (lambda n, x: n.a(n.a(x).relu()) + n.b(x), AB),
        (lambda n, x: (n.c(n.a(x)) + n.b(x)) * (n.a(x) + n.c(x)), (("a", "b", "c"),)),
        (lambda n, x: (n.a(x) + n.b(x)) * (n.d(x) - n.c(x)), (("a", "b"), ("c", "d"))),
        (
            lambda n, x: (n.a(x) + n.b(x)) * (n.c(x) + n.d(x)) * (n.d(x) + n.b(x)) + n.e(x),
            (("a", "b", "c", "d"),),
        ),
    ],
)
def test_each_rule_on_a_small_net(
    between: Callable[[Net, Tensor], Tensor], expected: Groups
) -> None:
    def four(n: Net, x: Tensor) -> Tensor:
        out = between(n, x)
        return out[:, :4] if out.shape[1] >= 4 else out.repeat(1, 2, 1, 1)

    assert tied(four) == expected


def test_a_tensor_that_was_written_in_parts_comes_from_no_layer() -> None:
    def between(n: Net, x: Tensor) -> Tensor:
        joined = torch.zeros(len(x), 4, 6, 6)
        joined[:, :2] = n.a(x)[:, :2]
        joined[:, 2:] = n.b(x)[:, 2:]
        return (joined + n.c(x)) + n.d(x)  # were it a constant, the sum would come from c

    assert tied(between) == ()


def test_groups_are_in_the_order_in_which_layers_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d, self.c, self.b, self.a = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x * 2)
            c, d = self.c(a.relu()), self.d(b.relu())
            return (d + b) * (c + a)

    assert ties(Backwards(), torch.randn(2, 4)) == (("a", "c"), ("b", "d"))


class Reader(nn.Module):
    """Attention and a gated unit written out, each with inputs of its own choice."""

    def __init__(self, read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.read = read
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "up", "down")})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(x)
        x = self.out(F.scaled_dot_product_attention(self.q(q), self.k(k), self.v(v))) + x
        x = F.layer_norm(x, (8,))
        return self.mlp["down"](F.silu(self.mlp["gate"](x)) * self.mlp["up"](x))


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: (x, x, x), (("q", "k", "v"),)),
        (lambda x: (x, y := x + 1, y), (("k", "v"),)),
        (lambda x: (x, x + 1, x), (("q", "v"),)),
        (lambda x: (x, x + 1, x + 1), ()),  # equal, but not the same
        (lambda x: (x, x.view(x.shape), x[:]), (("q", "k", "v"),)),
        (lambda x: (x, x.view(len(x), 5, 8), x.flip(1)), (("q", "k"),)),
        (lambda x: (x, x[:, :2], x[:, :2]), (("k", "v"),)),
        (lambda x: (x, x[:, :2], x[:, 2:4]), ()),
        (lambda x: (x, x[:, :2], x[:, :2].transpose(0, 1)), ()),
        (lambda x: (x, x.clone(), x.transpose(0, 1).contiguous().transpose(0, 1)), ()),
    ],
)
def test_linear_layers_that_read_one_tensor_are_tied(
    read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], expected: Groups
) -> None:
    assert ties(Reader(read), torch.randn(2, 5, 8)) == (*expected, ("mlp.gate", "mlp.up"))


class Written(nn.Module):
    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        a = self.a(x)
        if self.write:
            x.relu_()
        return self.c(a * self.b(x))


def test_a_tensor_that_changed_between_two_reads_is_another() -> None:
    assert ties(Written(False), torch.randn(2, 4)) == (("a", "b"),)
    assert ties(Written(True), torch.randn(2, 4)) == ()


def test_readers_of_one_tensor_in_different_blocks_are_not_tied() -> None:
    """Each decoder block projects the encoder's output to keys and values of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(memory), self.v(memory)
            return F.scaled_dot_product_attention(q, k, v)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x, memory)
            return x

    found = ties(Decoder(), torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert found == (("blocks.0.k", "blocks.0.v"), ("blocks.1.k", "blocks.1.v"))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformers_blocks_add_to_sums_and_are_not_tied(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = ties(expose_attention_(model), torch.randn(2, 5, 8))
    assert found == ()


def test_layers_that_stay_in_fp32_tie_nothing() -> None:
    model = Net(lambda n, x: n.a(x) + n.b(x))
    x = torch.randn(2, 3, 12, 12)
    layers = [layer for layer in trace_layers(model, x) if layer.name != "b"]
    assert trace_ties(model, x, layers) == ()


def test_the_model_is_left_as_it_was() -> None:
    model = Net(lambda n, x: n.bn(n.a(x)) + n.b(x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert ties(model, torch.randn(2, 3, 12, 12)) == AB
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [(f"layer{i}.0.conv2", f"layer{i}.0.downsample.0") for i in (2, 3, 4)]),
        ("resnet50", [(f"layer{i}.0.conv3", f"layer{i}.0.downsample.0") for i in (1, 2, 3, 4)]),
        (
            "mobilenet_v2",  # the first two blocks of each stage that repeats
            [(f"features.{i}.conv.2", f"features.{i + 1}.conv.2") for i in (2, 4, 7, 11, 14)],
        ),
        (
            "squeezenet1_1",
            [
                (f"features.{i}.expand1x1", f"features.{i}.expand3x3")
                for i in (3, 4, 6, 7, 9, 10, 11, 12)
            ],
        ),
        (
            "densenet121",
            [
                tuple(f"features.denseblock{i}.denselayer{j}.conv2" for j in range(1, n + 1))
                for i, n in enumerate((6, 12, 24, 16), 1)
            ],
        ),
        (
            "convnext_tiny",  # the stem or the downsampling, and the first block behind it
            [("features.0.0", "features.1.0.block.5")]
            + [(f"features.{i}.1", f"features.{i + 1}.0.block.5") for i in (2, 4, 6)],
        ),
    ],
)
def test_known_networks(name: str, expected: list[tuple[str, ...]]) -> None:
    model = getattr(torchvision.models, name)(weights=None)
    assert ties(model, torch.randn(2, 3, 64, 64)) == tuple(expected)


def test_the_top_two_laterals_of_a_feature_pyramid_are_tied() -> None:
    """The third one is added to a sum, which comes from no single layer."""
    body = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()) for _ in range(3)])
    levels = {str(i): str(i) for i in range(3)}
    model = detection.backbone_utils.BackboneWithFPN(body, levels, [3, 3, 3], 8)
    found = ties(model, torch.randn(2, 3, 32, 32))
    assert found == (("fpn.inner_blocks.2.0", "fpn.inner_blocks.1.0"),)


def test_a_vision_transformer_has_no_ties() -> None:
    model: Any = torchvision.models.vit_b_16(weights=None, image_size=32)
    model = expose_attention_(model)
    assert len(trace_layers(model, torch.randn(2, 3, 32, 32))) == 50
    assert ties(model, torch.randn(2, 3, 32, 32)) == ()
