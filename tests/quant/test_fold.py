"""Folded models against their originals in eval mode.

Folding is exact algebra: in float64 (rounding 1e-16 per operation, some dozens of layers) outputs
agree to 1e-9 of the largest one, and nothing but rounding is left for float32.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrize

from adq.quant.apply import dequantize_, quantize, quantized_layers
from adq.quant.attention import expose_attention_
from adq.quant.fold import (
    ChannelFactor,
    batchnorm_pairs,
    channel_factor,
    fold_batchnorm_,
    fold_factors,
)
from adq.quant.spec import BitVector

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision and eval mode; BatchNorms get random statistics, γ of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, NORMS):
            if module.running_mean is not None:
                module.running_mean.copy_(draw(module.running_mean, -1, 1))
                module.running_var.copy_(draw(module.running_var, 0.3, 2))
            if module.affine:
                module.weight.data.copy_(draw(module.weight, -1.5, 1.5))
                module.bias.data.copy_(draw(module.bias, -1, 1))
    return model.double().eval()


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same_outputs(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < tolerance


def count(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def names(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=7),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvisions_models_fold_whole_and_compute_the_same(name: str) -> None:
    original = randomized(MODELS[name]())
    folded = copy.deepcopy(original)
    pairs = fold_batchnorm_(folded)
    assert list(pairs) == names(original, NORMS)
    assert not count(folded, NORMS)
    assert count(folded, nn.Identity) == len(pairs) + count(original, nn.Identity)
    assert len(list(folded.modules())) == len(list(original.modules()))
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        expected = original(x)
        assert_same_outputs(folded(x), expected)
        assert_same_outputs(folded.float()(x.float()), expected, 1e-4)  # rounding: 6e-8 a step


def test_the_pairs_of_a_resnet_are_written_in_its_code() -> None:
    pairs = batchnorm_pairs(torchvision.models.resnet18())
    assert len(pairs) == 20
    assert pairs["bn1"] == "conv1"
    assert pairs["layer1.0.bn2"] == "layer1.0.conv2"
    assert pairs["layer2.0.downsample.1"] == "layer2.0.downsample.0"


def test_a_densenet_keeps_the_norms_that_come_before_their_convolution() -> None:
    model = torchvision.models.DenseNet(4, (2, 2), 8, 2, num_classes=5)
    assert set(batchnorm_pairs(model)) == {
        "features.norm0",
        *(f"features.denseblock{i}.denselayer{j}.norm2" for i in (1, 2) for j in (1, 2)),
    }
    original = randomized(model)
    folded = copy.deepcopy(original)
    fold_batchnorm_(folded)
    x = normal(2, 3, 32, 32)
    assert_same_outputs(folded(x), original(x))


LAYERS: list[tuple[nn.Module, nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (4, 5, 7)),
    (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.3), (4, 5, 7)),
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 9)),
    (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 7)),
    (nn.ConvTranspose2d(6, 4, 2, groups=2), nn.BatchNorm2d(4), (6, 5, 7)),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (4, 5, 7)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (4,)),
    (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), (4,)),
]


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_every_kind_of_layer_computes_the_same_folded(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], parametrized: bool
) -> None:
    original = randomized(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    if parametrized:
        parametrize.register_parametrization(original[0], "weight", nn.Tanh())
    folded = copy.deepcopy(original)
    assert fold_batchnorm_(folded) == {"1": "0"}
    x = normal(3, *shape)
    assert_same_outputs(folded(x), original(x), 1e-13)  # two layers deep
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(folded[0].bias, nn.Parameter)
    assert (channel_factor(folded[0]) is not None) == parametrized


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_torchs_own_fusion_gives_the_same_layer(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = randomized(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    if isinstance(layer, nn.Linear):
        if not norm.affine:
            pytest.skip("torch's fusion of Linear wants affine parameters")
        expected = fusion.fuse_linear_bn_eval(*model)
    elif isinstance(layer, nn.ConvTranspose2d):
        if layer.groups > 1:
            pytest.skip("torch's fusion takes no grouped transposed convolutions")
        expected = fusion.fuse_conv_bn_eval(*model, transpose=True)
    else:
        expected = fusion.fuse_conv_bn_eval(*model)
    fold_batchnorm_(model)
    torch.testing.assert_close(model[0].weight, expected.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model[0].bias, expected.bias, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("affine", [True, False])
def test_the_factors_are_the_closed_form(affine: bool) -> None:
    norm = nn.BatchNorm1d(2, eps=0.25, affine=affine)
    norm.running_mean.copy_(torch.tensor([3.0, -1.0]))
    norm.running_var.copy_(torch.tensor([2.0, 0.75]))  # with eps 9/4 and 1
    if affine:
        norm.weight.data = torch.tensor([-3.0, 2.0])
        norm.bias.data = torch.tensor([0.5, 0.25])
    factor, shift = fold_factors(norm)
    assert factor.tolist() == pytest.approx([-2.0, 2.0] if affine else [2 / 3, 1.0])
    assert shift.tolist() == pytest.approx([6.5, 2.25] if affine else [-2.0, 1.0])
    assert factor.dtype == shift.dtype == torch.float32
    assert not factor.requires_grad
    assert not shift.requires_grad


def test_the_factors_are_rounded_once() -> None:
    norm = randomized(nn.BatchNorm1d(50)).float()
    factor, shift = fold_factors(norm)
    exact, exact_shift = fold_factors(copy.deepcopy(norm).double())
    assert torch.equal(factor, exact.float())
    assert torch.equal(shift, exact_shift.float())
    half = copy.deepcopy(norm).half()
    assert {t.dtype for t in fold_factors(half)} == {torch.float16}


def test_a_norm_without_statistics_has_no_factors_and_is_left_alone() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match=r"with running statistics, got .*_stats=False"):
        fold_factors(norm)
    assert fold_batchnorm_(nn.Sequential(nn.Conv2d(1, 3, 1), norm)) == {}


class Net(nn.Module):
    """conv–bn, and whatever `forward_` does with them."""

    def __init__(self, forward_: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.other = nn.Conv2d(2, 2, 1)
        self.other_bn = nn.BatchNorm2d(2)
        self.forward_ = forward_

    def forward(self, x: Tensor) -> Tensor:
        return self.other_bn(self.other(self.forward_(self, x)))


def twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + y


def conv_called_twice(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(net.conv(x)))


def norm_called_twice(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.bn(net.conv(x)))


def norm_on_another(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn(x)


def between(net: Net, x: Tensor) -> Tensor:
    return net.bn(F.relu(net.conv(x)))


def norm_first(net: Net, x: Tensor) -> Tensor:
    return net.conv(net.bn(x))


def weight_used(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + F.conv2d(x, net.conv.weight)


def norm_weight_used(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) * net.bn.weight.sum()


@pytest.mark.parametrize(
    "forward_",
    [
        twice,
        conv_called_twice,
        norm_called_twice,
        norm_on_another,
        between,
        norm_first,
        weight_used,
        norm_weight_used,
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_pair_that_is_used_elsewhere_too_is_left_alone(
    forward_: Callable[[Net, Tensor], Tensor], quantized: bool
) -> None:
    original = randomized(Net(forward_))
    if quantized:
        original = quantize(original, {"conv": 3, "other": 2})
    folded = copy.deepcopy(original)
    assert fold_batchnorm_(folded) == {"other_bn": "other"}
    x = normal(2, 2, 3, 3)
    assert_same_outputs(folded(x), original(x))
    assert isinstance(folded.bn, nn.BatchNorm2d)


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


def tie_weights(net: Net) -> None:
    net.other.weight = net.conv.weight


def tie_biases(net: Net) -> None:
    net.other.bias = net.conv.bias


def watch_layer(net: Net) -> None:
    net.conv.register_forward_hook(lambda _, args, output: None)


def watch_norm(net: Net) -> None:
    net.bn.register_forward_pre_hook(lambda _, args: None)


def other_norm(net: Net) -> None:
    net.bn = Scaled(2)


def other_layer(net: Net) -> None:
    net.conv = Standardized(2, 2, 1)


def parametrized_bias(net: Net) -> None:
    parametrize.register_parametrization(net.conv, "bias", nn.Tanh())


def computed_weight(net: Net) -> None:
    nn.utils.weight_norm(net.conv)  # the old one, whose hook overwrites the weight


def patched_layer(net: Net) -> None:
    net.conv.forward = lambda x: 2 * x


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        tie_weights,
        tie_biases,
        watch_layer,
        watch_norm,
        other_norm,
        other_layer,
        parametrized_bias,
        computed_weight,
        patched_layer,
    ],
)
def test_layers_that_are_not_plainly_their_own_are_left_alone(
    change: Callable[[Net], None],
) -> None:
    original = Net(lambda net, x: net.bn(net.conv(x)))
    change(original)
    randomized(original)
    before = original.bn
    x = normal(2, 2, 3, 3)
    expected = original(x)
    assert "bn" not in fold_batchnorm_(original)
    assert original.bn is before
    assert_same_outputs(original(x), expected)


def test_norms_over_other_channels_than_the_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))
    randomized(model)(normal(2, 5, 4))  # channels 5, features 6
    assert batchnorm_pairs(model) == {}


class Wild(nn.Module):
    def __init__(self, forward_: Callable[["Wild", Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.forward_ = forward_

    def forward(self, x: Tensor) -> Any:
        return self.forward_(self, x)


def branches(model: Wild, x: Tensor) -> Tensor:
    return model.body(x) if x.sum() > 0 else x


def raises(model: Wild, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise KeyError("a tensor, please")
    return model.body(x)


@pytest.mark.parametrize("forward_", [branches, raises])
def test_a_model_that_cannot_be_traced_is_left_alone(
    forward_: Callable[[Wild, Tensor], Tensor],
) -> None:
    model = randomized(Wild(forward_)).train()
    before = copy.deepcopy(model.state_dict())
    assert batchnorm_pairs(model) == {}
    assert fold_batchnorm_(model) == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_replaced_forward_is_not_mistaken_for_the_classs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model.forward = lambda x: model[0](x)
    assert batchnorm_pairs(model) == {}


class Optional(nn.Module):
    """Optional arguments of several kinds, and a part that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.auxiliary = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, sizes: Any = (1, 2), *, features: bool = False
    ) -> Any:
        if mask is not None:
            x = x * mask
        y = self.body[0](x)
        if features:
            return y
        y = self.body[1](y)
        return (y, self.auxiliary(y)) if self.training else y


def test_tracing_takes_the_defaults_and_eval_mode_and_puts_the_mode_back() -> None:
    model = Optional().train()
    model.body[0].eval()
    modes = [module.training for module in model.modules()]
    assert batchnorm_pairs(model) == {"body.1": "body.0"}
    assert [module.training for module in model.modules()] == modes


def test_a_norm_under_two_names_is_replaced_under_both() -> None:
    model = Net(lambda net, x: net.bn(net.conv(x)))
    model.names = nn.ModuleDict({"norm": model.bn})
    assert len(fold_batchnorm_(model)) == 2
    assert not count(model, NORMS)
    assert model.names["norm"] is model.bn


def test_a_second_fold_finds_nothing() -> None:
    model = randomized(torchvision.models.resnet18())
    assert len(fold_batchnorm_(model)) == 20
    assert fold_batchnorm_(model) == {}


def test_exposed_attention_does_not_stop_the_trace() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).transpose(1, 2)
            return self.attention(x, x, x, need_weights=False)[0]

    original = expose_attention_(randomized(Hybrid()))
    folded = copy.deepcopy(original)
    assert fold_batchnorm_(folded) == {"stem.1": "stem.0"}
    x = normal(2, 3, 5)
    assert_same_outputs(folded(x), original(x))


def test_gradients_still_reach_the_folded_parameters() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)))
    weight = model[0].weight
    fold_batchnorm_(model)
    assert model[0].weight is weight
    model(normal(2, 1, 3, 3)).sum().backward()
    assert weight.grad is not None
    assert model[0].bias.grad is not None


@pytest.fixture
def resnet() -> tuple[nn.Module, dict[str, int]]:
    """A resnet18 and 3 bits for every convolution and the classifier, in float32."""
    model = randomized(torchvision.models.resnet18(num_classes=7)).float()
    return model, dict.fromkeys(names(model, (nn.Conv2d, nn.Linear)), 3)


def test_a_quantized_model_folds_behind_its_quantizers(resnet) -> None:
    model, bits = resnet
    quantized = quantize(model, bits)
    folded = copy.deepcopy(quantized)
    pairs = fold_batchnorm_(folded)
    assert len(pairs) == 20
    x = normal(2, 3, 32, 32).float()
    with torch.no_grad():
        assert_same_outputs(folded(x), quantized(x), 1e-4)  # float32
    before, after = dict(quantized_layers(quantized)), dict(quantized_layers(folded))
    assert before.keys() == after.keys() == bits.keys()
    norms = {layer: quantized.get_submodule(norm) for norm, layer in pairs.items()}
    for name, layer in after.items():
        assert all(len(channel.unique()) <= 2**3 for channel in layer.weight)
        old = before[name].parametrizations.weight.state_dict()
        new = layer.parametrizations.weight.state_dict()
        assert all(torch.equal(new[key], value) for key, value in old.items())
        factor = channel_factor(layer)
        if name not in norms:
            assert name == "fc"
            assert factor is None
        else:
            assert isinstance(layer.parametrizations.weight[1], ChannelFactor)
            assert factor.shape == (layer.out_channels, 1, 1, 1)
            assert torch.equal(factor.flatten(), fold_factors(norms[name])[0])
            assert torch.equal(layer.weight, factor * before[name].weight)


def test_a_folded_quantized_model_keeps_its_inputs_grids() -> None:
    model = randomized(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
        )
    ).float()
    x = normal(4, 2, 8, 8).float()
    quantized = quantize(model, BitVector({"0": 3, "3": 2}, {"0": 8, "3": 8}), [(x, None)])
    folded = copy.deepcopy(quantized)
    assert fold_batchnorm_(folded) == {"1": "0", "4": "3"}
    seen: list[Tensor] = []
    folded[3].register_forward_hook(lambda _, args, output: seen.append(args[0]))
    found, expected = folded(x), quantized(x)
    assert len(seen[0].unique()) <= 2**8
    # an input within rounding of a threshold may take the next step of its 8-bit grid
    step = quantized[3].input_quantizer.output_scale.item()
    reach = quantized[3].weight.abs().amax().item() * step
    factors = fold_factors(quantized[4])[0].abs().max().item()
    assert (found - expected).abs().max() <= 3 * reach * factors
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.01


def test_a_folded_quantized_model_loads_its_state_and_can_be_made_plain(resnet) -> None:
    model, bits = resnet
    folded = quantize(model, bits)
    fold_batchnorm_(folded)
    fresh = quantize(randomized(torchvision.models.resnet18(num_classes=7), 5).float(), bits)
    fold_batchnorm_(fresh)
    x = normal(2, 3, 32, 32).float()
    with torch.no_grad():
        expected = folded(x)
        assert not torch.equal(fresh(x), expected)
        fresh.load_state_dict(folded.state_dict())
        assert torch.equal(fresh(x), expected)
        plain = dequantize_(fresh, keep_quantized_weights=True)
        assert not any(parametrize.is_parametrized(module) for module in plain.modules())
        assert torch.equal(plain(x), expected)
        assert torch.equal(folded(x), expected)  # whose class the copy shares


def test_a_dequantized_model_folds_like_one_that_never_was_quantized(resnet) -> None:
    model, bits = resnet
    restored = dequantize_(quantize(model, bits))
    fold_batchnorm_(restored)
    fold_batchnorm_(model)
    expected = model.state_dict()
    assert restored.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in restored.state_dict().items())


def test_weight_normed_layers_fold() -> None:
    original = randomized(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    nn.utils.parametrizations.weight_norm(original[0])
    folded = copy.deepcopy(original)
    assert fold_batchnorm_(folded) == {"1": "0"}
    x = normal(2, 4, 3, 3)
    assert_same_outputs(folded(x), original(x))
