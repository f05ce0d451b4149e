"""Layers over packed weights: the layer with the weight's values, in every way they can run."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adq.quant import onednn, packed_layers
from adq.quant.baselines import integers, power_levels
from adq.quant.onednn import Geometry
from adq.quant.packed import PackedInput, PackedWeight
from adq.quant.packed_layers import PackedConv2d, PackedLinear, multiples
from adq.quant.packing import pack
from adq.quant.rows import rows_of
from adq.quant.serving import serve

LAYERS = {
    "linear": (lambda: nn.Linear(19, 6), (3, 4, 19)),
    "linear, no bias": (lambda: nn.Linear(8, 5, bias=False), (2, 8)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, dilation=2, groups=8, bias=False), (2, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, (3, 1), padding="same", groups=2), (2, 6, 5, 7)),
    "one image": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 7)),
    "line": (lambda: nn.Conv1d(4, 6, 5, padding=2), (2, 4, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
}
PACKED = {"linear", "linear, no bias", "conv", "depthwise", "grouped", "one image"}


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these run by the kernels of large ones."""
    for limit in ("SMALL_MACS", "INTEGER_TERMS", "INTEGER_LINEAR_TERMS", "PREPACK_RATIO"):
        monkeypatch.setattr(packed_layers, limit, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval(), torch.randn(shape, generator=generator(seed))


def weight_of(layer: nn.Module, bits: int, codebook: Tensor | None = None) -> PackedWeight:
    """Any codes, with some negative scales, as folding makes them."""
    whole = rows_of(layer)
    codes = torch.randint(0, 2**bits, (whole.count * whole.size,), generator=generator(1))
    scale = torch.randn(whole.count, generator=generator(2)) + 0.1
    if codebook is None:
        codebook = torch.randn(2**bits, generator=generator(3)).sort().values
    return PackedWeight(pack(codes, bits), bits, codebook, scale).fitted(layer)


def input_of(bits: int, zero_point: int = 0, uneven: bool = True) -> PackedInput:
    n = 2**bits - 1
    widths = 0.5 + torch.rand(n, generator=generator(4)) if uneven else torch.ones(n)
    scale = torch.tensor([3.0 / n])
    thresholds = (widths.cumsum(0) - 0.5 - zero_point) * scale
    return PackedInput(thresholds, scale, torch.tensor([float(zero_point)]))


def expected(layer: nn.Module, weight: PackedWeight, quantizer: PackedInput | None, x: Tensor):
    """The layer in float64 over the values; and the sum of the magnitudes of what it adds up."""
    reference = copy.deepcopy(layer).double()
    x = x.double()
    if quantizer is not None:
        below = (quantizer.thresholds.double() <= x.float().double()[..., None]).sum(-1)
        x = quantizer.scale.double() * (below - quantizer.zero_point.double())
    with torch.no_grad():
        rows, whole = weight.matrix().long(), weight.rows
        assert whole is not None
        values = weight.scale.double()[:, None] * weight.codebook.double()[rows]
        reference.weight = nn.Parameter(whole.join(values))
        y = reference(x)
        reference.weight.abs_()
        if reference.bias is not None:
            reference.bias.abs_()
        return y, reference(x.abs())


def assert_close(got: Tensor, wanted: tuple[Tensor, Tensor], eps: float = 2.0**-23) -> None:
    """Sums of up to 76 products in another order: a few eps of the sum of their magnitudes."""
    y, magnitude = wanted
    assert got.shape == y.shape
    assert ((got.double() - y).abs() <= 8 * eps * magnitude + 1e-12).all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kernels", ["auto", "small", "packed", "torch"])
@pytest.mark.parametrize("act", [None, 4])
def test_a_served_layer_is_the_layer_with_the_weights_values(
    monkeypatch: pytest.MonkeyPatch, name: str, kernels: Any, act: int | None
) -> None:
    if kernels == "small":
        kernels = "auto"
        monkeypatch.setattr(packed_layers, "SMALL_MACS", 2**40)
        monkeypatch.setattr(packed_layers, "INTEGER_LINEAR_TERMS", 2**40)
    layer, x = made(name)
    before = copy.deepcopy(layer.state_dict())
    weight = weight_of(layer, 3)
    quantizer = None if act is None else input_of(act, zero_point=5)
    served = serve(layer, weight, quantizer, kernels=kernels)
    assert isinstance(served, PackedLinear | PackedConv2d) == (
        name in PACKED and kernels != "torch"
    )
    assert_close(served(x), expected(layer, weight, quantizer, x))
    assert not served.training
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kernels", ["auto", "packed"])
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize("kind", ["codebook", "integers", "half integers", "powers"])
def test_every_width_and_kind_of_level(bits: int, kernels, name: str, kind: str) -> None:
    layer, x = made(name)
    codebook = {
        "codebook": None,
        "integers": integers(bits, x),
        "half integers": torch.arange(2.0**bits) - (2**bits - 1) / 2,
        "powers": power_levels(bits).float(),
    }[kind]
    weight, quantizer = weight_of(layer, bits, codebook), input_of(bits, 2**bits // 3)
    served = serve(layer, weight, quantizer, kernels=kernels)
    assert_close(served(x), expected(layer, weight, quantizer, x))


def test_which_levels_are_multiples_of_one_number() -> None:
    for bits in range(2, 9):
        found = multiples(integers(bits, torch.ones(1)))
        if bits < 8:
            assert found is not None
            assert found[0] == 1
            assert found[1].tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    found = multiples(0.37 * (torch.arange(8) - 3.5))
    assert found is not None
    assert found[1].tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert found[0] == pytest.approx(0.185, rel=1e-6)
    assert multiples(torch.arange(256) - 127.5) is None
    assert [multiples(power_levels(b).float()) is not None for b in range(2, 9)] == [
        *[True] * 5, *[False] * 2,
    ]  # fmt: skip
    assert multiples(torch.randn(16, generator=generator()).sort().values) is None
    assert multiples(torch.zeros(4)) is None


def test_integer_levels_down_to_minus_128_are_multiples_too() -> None:
    found = multiples(integers(8, torch.ones(1)))
    assert found is not None
    assert (found[0], int(found[1][0]), int(found[1][-1])) == (1, -128, 127)


@pytest.mark.skipif(not onednn.has_integers(), reason="oneDNN's integer kernels are for x86")
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize(("bits", "act"), [(7, 8), (8, 7), (8, 8), (4, 4)])
def test_integers_do_not_saturate(name: str, bits: int, act: int) -> None:
    layer, x = made(name)
    levels = integers(bits, x)
    whole = rows_of(layer)
    largest = torch.full((whole.count * whole.size,), 2**bits - 1)
    lowest = torch.zeros(whole.count * whole.size)
    for codes in (largest, lowest):  # all at one end: the largest sums that there are
        weight = PackedWeight(pack(codes, bits), bits, levels, torch.ones(whole.count))
        weight = weight.fitted(layer)
        for zero_point in (0, 2**act - 1):
            quantizer = input_of(act, zero_point)
            served = serve(layer, weight, quantizer)
            for value in (-100.0, 100.0):
                x = torch.full_like(x, value)
                assert_close(served(x), expected(layer, weight, quantizer, x))


@pytest.mark.skipif(not onednn.has_integers(), reason="oneDNN's integer kernels are for x86")
def test_integers_run_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("conv")
    calls = []
    real = onednn.integer_conv
    monkeypatch.setattr(onednn, "integer_conv", lambda *a: calls.append(1) or real(*a))
    serve(layer, weight_of(layer, 4, integers(4, x)), input_of(8))(x)
    assert calls == [1]
    serve(layer, weight_of(layer, 4), input_of(8))(x)
    serve(layer, weight_of(layer, 4, integers(4, x)))(x)
    assert calls == [1]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    serve(layer, weight_of(layer, 8, integers(8, x)), input_of(8))(x)
    assert calls == [1]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert onednn.exact(127, 255, 1000)
    assert not onednn.exact(127, 255, 70_000)  # int32


@pytest.mark.parametrize("kernels", ["auto", "packed"])
@pytest.mark.parametrize("act", [None, 4])
def test_outputs_keep_the_memory_format_of_inputs(kernels, act) -> None:
    layer, x = made("conv")
    for codebook in (None, integers(4, x)):
        weight = weight_of(layer, 4, codebook)
        served = serve(layer, weight, None if act is None else input_of(act), kernels=kernels)
        assert served(x).is_contiguous()
        served(x).view(2, -1)  # as models do
        y = served(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, served(x))


@pytest.mark.parametrize("kernels", ["auto", "packed", "torch"])
@pytest.mark.parametrize("name", ["linear", "conv", "line"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_after_a_first_call(kernels, name: str, dtype: torch.dtype) -> None:
    layer, x = made(name)
    weight, quantizer = weight_of(layer, 4), input_of(4, 3)
    served = serve(layer, weight, quantizer, kernels=kernels)
    served(x)
    served = served.to(dtype)
    y = served(x.to(dtype))
    assert y.dtype == dtype
    eps = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    # weight, input, product and output are rounded
    assert_close(y, expected(layer, weight, quantizer, x.to(dtype)), eps=eps)
    inner = served.input_quantizer
    assert inner.thresholds.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_layer_is_copied_pickled_and_loaded_after_it_has_run(name: str) -> None:
    layer, x = made(name)
    weight, quantizer = weight_of(layer, 4), input_of(4, 3)
    served = serve(layer, weight, quantizer)
    y = served(x)
    assert torch.equal(copy.deepcopy(served)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(served))(x), y)  # as to another process
    other = serve(made(name, seed=1)[0], weight_of(layer, 4, torch.arange(16.0) ** 2), input_of(4))
    assert not torch.allclose(other(x), y)
    other.load_state_dict(served.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_code_that_reads_the_weight_finds_it(name: str) -> None:
    layer, x = made(name)
    weight = weight_of(layer, 5)
    for kernels in ("auto", "packed"):
        served = serve(layer, weight, kernels=kernels)
        assert torch.equal(served.weight, weight.values())
        served(x)
        assert torch.equal(served.weight, weight.values())
        assert served.weight.shape == layer.weight.shape


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for name in ("linear", "conv"):
        layer, x = made(name)
        for codebook in (None, integers(4, x)):
            weight, quantizer = weight_of(layer, 4, codebook), input_of(4)
            served = serve(layer, weight, quantizer)
            shape = layer(x[:0]).shape
            assert served(x[:0]).shape == shape
            assert_close(served(x), expected(layer, weight, quantizer, x))
            assert served(x[:0]).shape == shape


def test_another_size_and_dtype_than_at_the_first_call() -> None:
    layer, _ = made("conv")
    weight, quantizer = weight_of(layer, 4, integers(4, torch.ones(1))), input_of(4, 2)
    served, plain = serve(layer, weight, quantizer), serve(layer, weight)
    for shape in ((1, 3, 5, 5), (4, 3, 17, 9), (2, 3, 8, 8)):
        x = torch.randn(shape, generator=generator())
        assert_close(served(x), expected(layer, weight, quantizer, x))
        assert_close(plain(x), expected(layer, weight, None, x))


def test_a_layer_with_hooks_or_a_forward_of_its_own_stays_itself() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = made("linear")
    weight = weight_of(layer, 4)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert_close(serve(layer, weight)(x) - 1, expected(made("linear")[0], weight, None, x))
    scaled, plain = Scaled(19, 6), nn.Linear(19, 6)
    plain.load_state_dict(scaled.state_dict())
    assert_close(serve(scaled, weight)(x) / 2, expected(plain, weight, None, x))


def test_group_scales_of_a_linear_layer() -> None:
    layer, x = made("linear, no bias")
    codes = torch.randint(0, 16, (40,), generator=generator())
    scale, codebook = torch.rand(20, generator=generator()), torch.randn(16).sort().values
    weight = PackedWeight(pack(codes, 4), 4, codebook, scale).fitted(layer)
    for kernels in ("auto", "packed", "torch"):
        for quantizer in (None, input_of(4)):
            served = serve(layer, weight, quantizer, kernels=kernels)
            assert isinstance(served, PackedLinear) == (kernels != "torch")
            assert_close(served(x), expected(layer, weight, quantizer, x))


def test_a_convolution_with_group_scales_is_unpacked() -> None:
    layer = nn.Conv2d(4, 3, 3)
    codes = torch.randint(0, 4, (108,), generator=generator())
    weight = PackedWeight(pack(codes, 2), 2, torch.arange(4.0), torch.rand(12)).fitted(layer)
    served = serve(layer, weight)
    assert type(served) is nn.Conv2d
    x = torch.randn(2, 4, 5, 5)
    assert_close(served(x), expected(layer, weight, None, x))


def test_a_weight_of_another_layer_is_refused() -> None:
    weight = weight_of(nn.Linear(4, 6), 4)
    for layer in (nn.Linear(4, 5), nn.Linear(5, 6), nn.Conv2d(2, 6, 3)):
        with pytest.raises(ValueError, match="weight of shape"):
            serve(layer, weight)


@pytest.mark.parametrize("name", LAYERS)
def test_plain_layers_use_no_operators_of_ours(name: str) -> None:
    layer, x = made(name)
    weight, quantizer = weight_of(layer, 3), input_of(5, 2)
    served = serve(layer, weight, quantizer, kernels="torch")
    exported = torch.export.export(served, (x,))
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert not [name for name in names if "adq" in name or "bucketize" in name]
    assert torch.equal(exported.module()(x), served(x))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_search_of_exported_inputs_finds_the_same_codes(bits: int) -> None:
    quantizer = input_of(bits, 1)
    limits = quantizer.thresholds
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    x = torch.cat([limits, limits.nextafter(limits - 1), limits.nextafter(limits + 1), odd])
    exported = torch.export.export(quantizer, (x,)).module()
    assert torch.equal(exported(x), quantizer(x))
    count = torch.stack([(limits <= value).sum() for value in x])
    count[-2] = 2**bits - 1  # NaN is taken for the largest
    assert torch.equal(quantizer(x), quantizer.scale * (count - 1))


def test_packed_layers_are_traced_as_their_operators() -> None:
    for name in ("linear", "conv"):
        layer, x = made(name)
        weight, quantizer = weight_of(layer, 3), input_of(4, 2)
        served = serve(layer, weight, quantizer)
        exported = torch.export.export(served, (x,))
        names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert "adq.quantize_input.default" in names
        assert any(name.startswith("adq.packed_") for name in names)
        assert_close(exported.module()(x), expected(layer, weight, quantizer, x))


def test_inputs_that_need_gradients_are_served() -> None:
    layer, x = made("conv")
    weight = weight_of(layer, 3)
    served = serve(layer, weight, input_of(4))
    assert_close(
        served(x.requires_grad_()).detach(), expected(layer, weight, input_of(4), x.detach())
    )


def test_paddings_in_words() -> None:
    assert Geometry.of(nn.Conv2d(1, 1, (3, 5), padding="same", dilation=2)).padding == [2, 4]
    assert Geometry.of(nn.Conv2d(1, 1, 3, padding="valid")).padding == [0, 0]
    assert Geometry.of(nn.Conv2d(1, 1, 2, padding="same")) is None
    assert Geometry.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")) is None


def test_the_bytes_that_a_packed_layer_keeps() -> None:
    served = serve(nn.Linear(256, 64), weight_of(nn.Linear(256, 64), 2), kernels="packed")
    served(torch.ones(1, 256))
    kept = sum(t.nbytes for t in served.state_dict().values())
    assert kept == 64 * 256 * 2 // 8 + 4 * (4 + 64 + 64)
    assert F.linear(torch.ones(1, 256), served.weight).shape == (1, 64)


def test_what_runs_follows_from_the_shape_of_a_sample_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many products in an output: integers. Many weights for an output: oneDNN's layout. Neither:
    torch's own convolution. Whatever the batch of the first call."""
    monkeypatch.undo()
    seen: list[str] = []
    for name in ("_integer", "_float", "_plain"):
        method = getattr(PackedConv2d, name)

        def spy(self: Any, x: Tensor, name: str = name, method: Any = method) -> Any:
            seen.append(name)
            return method(self, x)

        monkeypatch.setattr(PackedConv2d, name, spy)
    cases = [
        (nn.Conv2d(64, 64, 3, padding=1), 16, "_integer"),
        (nn.Conv2d(200, 400, 1), 4, "_float"),
        (nn.Conv2d(16, 96, 1), 32, "_plain"),
        (nn.Conv2d(64, 64, 1), 4, "_plain"),  # small
    ]
    for layer, side, wanted in cases:
        weight, quantizer = weight_of(layer, 4, torch.arange(-8.0, 8)), input_of(4)
        for batch in (1, 9):
            seen.clear()
            serve(layer, weight, quantizer)(torch.randn(batch, layer.in_channels, side, side))
            assert seen[0] == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_layer_works_for_other_batches() -> None:
    layer, x = made("conv")
    served = serve(layer, weight_of(layer, 3), input_of(4), kernels="packed")
    traced = torch.jit.trace(served, x, check_trace=False)
    other = torch.cat([x, x * 0.5, -x])
    torch.testing.assert_close(traced(other), served(other))
