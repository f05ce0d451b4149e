"""The original nn.MultiheadAttention, deep-copied before exposure, is the oracle throughout.

Tolerances: float64 where nothing else is said, so that 1e-10 is far above rounding (a few hundred
terms of 1e-16) and far below any mistake.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from adq.quant.apply import quantize
from adq.quant.attention import Attention, expose_attention_
from adq.quant.errors import InputError
from adq.quant.layers import trace_layers
from adq.quant.spec import BitVector

E, H = 12, 3
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision with normal parameters: torch starts the biases at zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(**kwargs: Any) -> tuple[nn.MultiheadAttention, Attention]:
    """An original and its exposed copy."""
    original = randomized(nn.MultiheadAttention(E, H, **kwargs)).eval()
    exposed = expose_attention_(copy.deepcopy(original))
    assert isinstance(exposed, Attention)
    return original, exposed


def normal(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(kind: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) with N = 4, L = 5, S = 7; `kind` says which of them are one tensor."""
    query, key, value = (normal(4, n, E, seed=n + i) for i, n in enumerate((5, 7, 7)))
    if kind == "self":
        key = value = query
    elif kind == "memory":
        value = key
    elif kind == "value is query":
        query = value
    if layout == "batch first":
        return query, key, value
    if layout == "unbatched":
        turned = {id(x): x[0] for x in (query, key, value)}
    else:
        turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return turned[id(query)], turned[id(key)], turned[id(value)]


def sizes(query: Tensor, key: Tensor, layout: str) -> tuple[int, int, int]:
    """(N, L, S)"""
    if layout == "unbatched":
        return 1, query.shape[0], key.shape[0]
    dim = 1 if layout == "batch first" else 0
    return query.shape[1 - dim], query.shape[dim], key.shape[dim]


def masks(kind: str, n: int, queries: int, keys: int, batched: bool) -> dict[str, Tensor]:
    """Masks that leave every query at least its first key, since a row of −∞ has no softmax."""
    draw = normal(n * H, queries, keys, seed=9)
    forbidden = draw > 0.3
    forbidden[..., 0] = False
    padding = normal(n, keys, seed=10) > 0
    padding[:, 0] = False
    if not batched:
        padding = padding[0]
    float_padding = torch.where(padding, -1.5, 0.25).double()
    return {
        "none": {},
        "boolean": {"attn_mask": forbidden[0]},
        "float": {"attn_mask": draw[0]},
        "per head": {"attn_mask": forbidden},
        "float per head": {"attn_mask": draw},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": float_padding},
        "both": {"attn_mask": forbidden, "key_padding_mask": padding},
        "both float": {"attn_mask": draw[0], "key_padding_mask": float_padding},
    }[kind]


MASKS = [
    "none",
    "boolean",
    "float",
    "per head",
    "float per head",
    "padding",
    "float padding",
    "both",
    "both float",
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("kind", ["self", "memory", "all different", "value is query"])
def test_outputs_and_weights_are_the_originals(kind: str, layout: str, mask: str) -> None:
    original, exposed = pair(batch_first=layout == "batch first")
    query, key, value = inputs(kind, layout)
    n, queries, keys = sizes(query, key, layout)
    options = masks(mask, n, queries, keys, batched=layout != "unbatched")
    for need in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, expected_weights = original(query, key, value, **options, **need)
        found, weights = exposed(query, key, value, **options, **need)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(weights, expected_weights, **CLOSE)
        assert (weights is None) == (need == {"need_weights": False})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_torchs_fast_path_gives_the_same(bias: bool, heads: int) -> None:
    original = randomized(nn.MultiheadAttention(8, heads, bias=bias, batch_first=True)).float()
    exposed = expose_attention_(copy.deepcopy(original.eval()))
    x = normal(3, 6, 8).float()
    padding = torch.arange(6) >= torch.tensor([[6], [3], [1]])
    with torch.no_grad():
        for options in ({}, {"key_padding_mask": padding}):
            expected, expected_weights = original(x, x, x, **options)
            found, weights = exposed(x, x, x, **options)
            # single precision, sums of at most 8 products of order one
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5)


def test_one_head_by_hand() -> None:
    """softmax(q·kᵀ/√D)·v with loops over plain numbers."""
    exposed = expose_attention_(randomized(nn.MultiheadAttention(2, 1))).requires_grad_(False)
    x = normal(3, 2)
    q, k, v = (
        [[float(row @ p + b) for row, b in zip(w, bias, strict=True)] for p in x]
        for w, bias in zip(
            exposed.in_proj.weight.split(2), exposed.in_proj.bias.split(2), strict=True
        )
    )
    for i, query in enumerate(q):
        scores = [math.exp((query[0] * c[0] + query[1] * c[1]) / math.sqrt(2)) for c in k]
        mixed = [
            sum(s * c[j] for s, c in zip(scores, v, strict=True)) / sum(scores) for j in (0, 1)
        ]
        expected = exposed.out_proj(torch.tensor(mixed, dtype=torch.float64))
        torch.testing.assert_close(exposed(x, x, x)[0][i], expected, **CLOSE)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_training_draws_the_same_dropout(batch_first: bool, need_weights: bool) -> None:
    original, exposed = pair(dropout=0.4, batch_first=batch_first)
    x = normal(4, 5, E)
    still = exposed(x, x, x, need_weights=need_weights)[0]
    results = []
    for module in (original.train(), exposed.train()):
        torch.manual_seed(5)
        results.append(module(x, x, x, need_weights=need_weights))
    (expected, expected_weights), (found, weights) = results
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)
    assert not torch.allclose(found, still)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_causal_hint_goes_with_its_mask(need_weights: bool, padded: bool) -> None:
    original, exposed = pair(batch_first=True)
    x = normal(2, 5, E)
    options: dict[str, Any] = {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "is_causal": True,
        "need_weights": need_weights,
    }
    if padded:
        options["key_padding_mask"] = torch.arange(5) >= torch.tensor([[5], [2]])
    found = exposed(x, x, x, **options)[0]
    torch.testing.assert_close(found, original(x, x, x, **options)[0], **CLOSE)
    later = x.clone()
    later[:, 3:] += 1
    changed = exposed(later, later, later, **options)[0]
    torch.testing.assert_close(changed[:, :3], found[:, :3], **CLOSE)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["self", "memory", "all different"])
def test_gradients_are_the_originals(kind: str, need_weights: bool) -> None:
    original, exposed = pair(batch_first=True)
    leaves = [x.requires_grad_() for x in dict.fromkeys(inputs(kind, "batch first"))]
    query, key, value = inputs(kind, "batch first")
    query, key, value = leaves[0], leaves[min(1, len(leaves) - 1)], leaves[-1]
    gradients = []
    for module in (original, exposed):
        output, _ = module(query, key, value, need_weights=need_weights)
        loss = (output * normal(*output.shape)).sum()
        gradients.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_parameters_stay_the_same_objects_in_the_same_order() -> None:
    attention = nn.MultiheadAttention(E, H).to(torch.bfloat16).eval()
    attention.in_proj_bias.requires_grad_(False)
    before = list(attention.parameters())
    state = torch.get_rng_state()
    exposed = expose_attention_(attention)
    assert torch.equal(state, torch.get_rng_state())
    assert exposed is attention
    assert all(a is b for a, b in zip(exposed.parameters(), before, strict=True))
    assert list(exposed.state_dict()) == [
        "in_proj.weight",
        "in_proj.bias",
        "out_proj.weight",
        "out_proj.bias",
    ]
    assert not exposed.in_proj.bias.requires_grad
    assert exposed.in_proj.weight.requires_grad
    assert not any(m.training for m in exposed.modules())
    assert type(exposed.in_proj) is type(exposed.out_proj) is nn.Linear
    assert (exposed.in_proj.in_features, exposed.in_proj.out_features) == (E, 3 * E)
    assert exposed.in_proj_weight is before[0]
    assert exposed.in_proj_bias is before[1]


def test_an_attention_without_biases_has_layers_without_biases() -> None:
    original, exposed = pair(bias=False)
    assert exposed.in_proj.bias is exposed.in_proj_bias is exposed.out_proj.bias is None
    assert list(exposed.state_dict()) == ["in_proj.weight", "out_proj.weight"]
    x = normal(5, E)
    torch.testing.assert_close(exposed(x, x, x)[0], original(x, x, x)[0], **CLOSE)


def test_a_meta_model_stays_on_the_meta_device() -> None:
    exposed = expose_attention_(nn.MultiheadAttention(E, H, device="meta"))
    assert {p.device.type for p in exposed.parameters()} == {"meta"}


def vit() -> nn.Module:
    return randomized(
        VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=5,
        )
    ).eval()


BLOCK = "encoder.layers.encoder_layer_0.self_attention"


@pytest.mark.parametrize("gradients", [True, False])
def test_a_vision_transformer_computes_the_same(gradients: bool) -> None:
    original = vit()
    exposed = expose_attention_(copy.deepcopy(original))
    x = normal(3, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(exposed(x), original(x), **CLOSE)
        torch.testing.assert_close(exposed.train()(x), original.train()(x), **CLOSE)


def test_a_vision_transformers_projections_are_layers() -> None:
    model = vit().float()
    x = torch.zeros(2, 3, 32, 32)
    before = [layer.name for layer in trace_layers(model, x)]
    assert not any("self_attention" in name for name in before)
    layers = {layer.name: layer for layer in trace_layers(expose_attention_(model), x)}
    new = [name for name in layers if name not in before]
    assert new == [
        f"encoder.layers.encoder_layer_{i}.self_attention.{name}"
        for i in (0, 1)
        for name in ("in_proj", "out_proj")
    ]
    positions = 4 + 1  # patches and the class token
    assert layers[f"{BLOCK}.in_proj"].macs == positions * 16 * 48
    assert layers[f"{BLOCK}.out_proj"].macs == positions * 16 * 16
    assert layers[f"{BLOCK}.out_proj"].kind == "Linear"
    assert layers[f"{BLOCK}.in_proj"].input_shape == (positions, 16)


def test_hooks_of_the_projections_run_and_see_what_they_compute_on() -> None:
    model = expose_attention_(vit())
    seen: dict[str, Tensor] = {}
    for name in ("in_proj", "out_proj"):
        model.get_submodule(f"{BLOCK}.{name}").register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, args[0])
        )
        model.get_submodule(f"{BLOCK}.{name}").register_forward_hook(
            lambda _, args, output, name=name: seen.setdefault(f"{name} output", output)
        )
    with torch.no_grad():
        model(normal(3, 3, 32, 32))
    shapes = {name: tuple(tensor.shape) for name, tensor in seen.items()}
    assert shapes == {
        "in_proj": (3, 5, 16),
        "in_proj output": (3, 5, 48),
        "out_proj": (3, 5, 16),
        "out_proj output": (3, 5, 16),
    }


@pytest.mark.parametrize(
    ("kind", "calls"), [("self", 1), ("memory", 2), ("all different", 3), ("value is query", 3)]
)
def test_the_input_projection_is_called_once_for_each_tensor(kind: str, calls: int) -> None:
    _, exposed = pair(batch_first=True)
    seen: list[Tensor] = []
    exposed.in_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    exposed(*inputs(kind, "batch first"))
    assert len(seen) == calls


def test_a_quantized_projection_computes_with_its_levels_and_its_grid() -> None:
    model = expose_attention_(vit().float())
    x = normal(3, 3, 32, 32).float()
    names = [f"{BLOCK}.in_proj", f"{BLOCK}.out_proj"]
    bits = BitVector(dict.fromkeys(names, 2), dict.fromkeys(names, 3))
    quantized = quantize(model, bits, [(x, None)])
    seen: list[Tensor] = []
    for name in names:
        layer = quantized.get_submodule(name)
        layer.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        assert all(len(row.unique()) <= 4 for row in layer.weight)
    assert not torch.allclose(quantized(x), model(x))
    assert all(len(tensor.unique()) <= 8 for tensor in seen)
    assert len(seen) == 2


def test_an_old_state_dict_loads() -> None:
    trained, fresh = vit(), expose_attention_(vit())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1
    state = trained.state_dict()
    keys = list(state)
    assert f"{BLOCK}.in_proj_weight" in keys
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state) == keys  # the caller's dict is not touched
    x = normal(2, 3, 32, 32)
    torch.testing.assert_close(fresh(x), trained(x), **CLOSE)


def test_a_new_state_dict_loads_and_wrong_keys_are_still_refused() -> None:
    model = expose_attention_(vit())
    state = model.state_dict()
    assert f"{BLOCK}.in_proj.weight" in state
    expose_attention_(vit()).load_state_dict(state)
    del state[f"{BLOCK}.in_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*self_attention\.in_proj\.weight"):
        model.load_state_dict(state)
    state[f"{BLOCK}.in_proj_weights"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*self_attention\.in_proj_weights"):
        model.load_state_dict(state)


def test_an_optimizers_state_still_belongs_to_its_parameters() -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    model(normal(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    expose_attention_(model)
    again = torch.optim.AdamW(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        assert again.state[parameter]["exp_avg"].shape == parameter.shape
    before = model.get_parameter(f"{BLOCK}.in_proj.weight").detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.get_parameter(f"{BLOCK}.in_proj.weight"))


def test_a_second_call_changes_nothing() -> None:
    model = expose_attention_(vit())
    before = {name: id(module) for name, module in model.named_modules()}
    assert expose_attention_(model) is model
    assert before == {name: id(module) for name, module in model.named_modules()}


def test_a_shared_attention_stays_shared_and_keeps_its_hooks_and_mode() -> None:
    attention = nn.MultiheadAttention(E, H).eval()
    calls: list[str] = []
    attention.register_forward_hook(lambda *_: calls.append("hook"))
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])}).train()
    attention.eval()
    expose_attention_(model)
    assert model["a"] is model["b"][0] is attention
    assert type(attention) is Attention
    assert not attention.training
    assert not attention.in_proj.training
    x = torch.zeros(3, E)
    attention(x, x, x)
    assert calls == ["hook"]


def test_a_deep_copy_is_whole_and_apart() -> None:
    model = expose_attention_(vit())
    x = normal(2, 3, 32, 32)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.get_parameter(f"{BLOCK}.in_proj.weight").zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    twin.load_state_dict(vit().state_dict())
    assert torch.equal(twin(x), expected)


class Own(nn.MultiheadAttention):
    """A subclass may compute anything."""


@pytest.mark.parametrize(
    "attention",
    [
        nn.MultiheadAttention(E, H, kdim=4),
        nn.MultiheadAttention(E, H, vdim=4),
        nn.MultiheadAttention(E, H, add_bias_kv=True),
        nn.MultiheadAttention(E, H, add_zero_attn=True),
        Own(E, H),
        nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(E, H), "in_proj_weight"),
    ],
)
def test_what_is_not_supported_is_left_alone(attention: nn.Module) -> None:
    model = nn.ModuleList([attention, nn.MultiheadAttention(E, H)])
    before = type(attention), list(attention.state_dict())
    expose_attention_(model)
    assert (type(attention), list(attention.state_dict())) == before
    assert type(model[1]) is Attention


def encoder_layer(**kwargs: Any) -> nn.Module:
    return randomized(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, **kwargs)).eval()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_encoder_layer_computes_the_same(norm_first: bool, gradients: bool) -> None:
    original = encoder_layer(norm_first=norm_first)
    # outside the attention, what dropout draws depends on the strides of the attention's output
    original.dropout.p = original.dropout1.p = original.dropout2.p = 0.0
    exposed = expose_attention_(copy.deepcopy(original))
    x = normal(4, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [3], [2]])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    calls: list[int] = []
    with torch.set_grad_enabled(gradients):
        for options in (
            {},
            {"src_mask": causal},
            {"src_mask": causal, "is_causal": True},
            {"src_key_padding_mask": padding},
            {"src_mask": causal, "src_key_padding_mask": padding},
        ):
            torch.testing.assert_close(exposed(x, **options), original(x, **options), **CLOSE)
            results = []
            for module in (original, exposed):
                torch.manual_seed(0)
                results.append(module.train()(x, **options))
                module.eval()
            torch.testing.assert_close(results[1], results[0], **CLOSE)
        exposed.self_attn.out_proj.forward = lambda y: calls.append(1) or y
        exposed(x)
    assert calls == [1]  # the fast path, which calls no layer, was not taken


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_padded_batch_through_a_transformer_encoder_agrees_where_it_is_not_padded() -> None:
    original = nn.TransformerEncoder(encoder_layer(), 2).eval()
    exposed = expose_attention_(copy.deepcopy(original))
    x = normal(4, 5, E)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [3], [2]])
    slow = original(x, src_key_padding_mask=padding)
    torch.testing.assert_close(exposed(x, src_key_padding_mask=padding), slow, **CLOSE)
    with torch.no_grad():
        fast = original(x, src_key_padding_mask=padding)
        found = exposed(x, src_key_padding_mask=padding)
    assert not fast[padding].any()  # torch's nested tensors come back with zeros there
    torch.testing.assert_close(found[~padding], fast[~padding], **CLOSE)
    torch.testing.assert_close(found, slow, **CLOSE)


def test_a_decoder_layers_cross_attention_computes_the_same() -> None:
    original = randomized(nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0))
    exposed = expose_attention_(copy.deepcopy(original))
    target, memory = normal(5, 4, E), normal(7, 4, E, seed=2)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    expected = original(target, memory, **options)
    torch.testing.assert_close(exposed(target, memory, **options), expected, **CLOSE)
    assert type(exposed.multihead_attn) is Attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "give the attn_mask as well"),
        (
            {"attn_mask": torch.zeros(1, 5)},
            r"attn_mask of shape \(5, 5\) or \(12, 5, 5\), got \(1,",
        ),
        ({"attn_mask": torch.zeros(4, 5, 5)}, r"got \(4, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(5, 4)}, r"padding_mask of shape \(4, 5\), got \(5, 4\)"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "boolean or a float mask, got .*int"),
    ],
)
def test_masks_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    _, exposed = pair(batch_first=True)
    x = normal(4, 5, E)
    with pytest.raises(ValueError, match=message):
        exposed(x, x, x, **options)


def test_inputs_that_do_not_fit_are_refused() -> None:
    _, exposed = pair(batch_first=True)
    x = normal(4, 5, E)
    with pytest.raises(ValueError, match="query of 2 or 3 dimensions, got 4"):
        exposed(x[None], x[None], x[None])
    with pytest.raises(ValueError, match="a key and a value of one shape"):
        exposed(x, x, x[:, :4])
    with pytest.raises(ValueError, match="a key and a value of one shape"):
        exposed(x, x[0], x[0])
    nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
    with pytest.raises(InputError, match="takes no nested tensors"):
        exposed(nested, nested, nested)


def test_the_second_derivative_exists_through_the_math_backend() -> None:
    _, exposed = pair(batch_first=True)
    weight = exposed.in_proj.weight
    x = normal(2, 3, E)

    def loss(w: Tensor) -> Tensor:
        out = torch.func.functional_call(
            exposed, {"in_proj.weight": w}, (x, x, x), {"need_weights": False}
        )
        return out[0].square().sum()

    direction = normal(*weight.shape)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = torch.autograd.functional.hvp(loss, weight.detach(), direction)[1]
        step = 1e-5  # central differences: error of order step², times 1e-16/step of rounding
        ends = [
            torch.autograd.functional.vjp(loss, weight.detach() + s * step * direction)[1]
            for s in (1, -1)
        ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)
