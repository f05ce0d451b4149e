"""Runs from a layer on against plain full passes, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from adq.proxies.replay import TOLERANCE, Recording, _same
from adq.quant.attention import expose_attention_
from adq.quant.layers import QUANTIZABLE


class Base(nn.Module):
    """Four layers to connect in some way, and a counter of the calls of layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.d = nn.Linear(4, 3)


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.c(torch.tanh(self.b(x)))
        return self.d(x)


class InPlaceAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out = self.b(x)
        out += x
        out += self.c(out)
        out[:, 0] *= 2
        return self.d(out)


class InPlaceReLU(Base):
    """The rectifier's result is used by the name that its input has."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        before = self.b(x)
        self.relu(x)
        y = self.c(x) + before
        z = self.block(y)
        return self.d(z + F.relu(y, inplace=True))


class Views(Base):
    """Modules that return their input, or a view of it, and writes through one of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.flat = nn.Identity(), nn.Flatten()
        self.outer = nn.Sequential(nn.Identity(), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        same, flat, outer = self.same(x), self.flat(x), self.outer(x)
        x += 1
        flat *= 2
        y = self.b(same)
        outer -= 1
        return self.d(self.c(y + x) + flat)


class Twice(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        x = self.b(self.c(torch.tanh(x)) + x)
        return self.d(self.c(x))


class Nested(Base):
    """Blocks with a layer that both share, one block called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(self.a, nn.Tanh(), nn.Sequential(self.b, nn.Tanh()))
        self.two = nn.Sequential(self.c, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.two(self.one(self.two(x))))


class Several(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, pair: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        x, named = pair
        return self.layer(x), {"chunks": list(self.layer(named["x"]).chunk(2)), "x": x, "n": 3}


class Structures(Base):
    """Tuples, dictionaries and lists in and out, a keyword argument, no single output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Several(self.a), Several(self.b)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        first, named = self.one((x, {"x": y}))
        z = torch.cat(named["chunks"]) * named["n"]
        second, others = self.two(pair=(first, {"x": z}))
        others["chunks"][0].add_(1)
        return {"y": self.d(self.c(second) + torch.cat(others["chunks"])), "x": others["x"]}


class Early(Base):
    """Reads a weight long before its layer is called, another one without calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.c.weight.t())
        x = self.b(torch.tanh(self.a(x)))
        x = F.linear(torch.tanh(x), self.d.weight)
        return self.c(F.pad(x, (0, 1)))


class Appends(Base):
    """Modules that change a list given to them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Appending(self.a), Appending(self.b)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        self.one(features)
        self.two(features)
        return self.d(self.c(sum(features)))  # type: ignore[arg-type]


class Appending(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: list[Tensor]) -> Tensor:
        features.append(torch.tanh(self.layer(features[-1])))
        return features[-1]


class Scales(Base):
    """Writes to the model's input."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return self.d(self.c(self.b(torch.tanh(self.a(x)))))


HAND_MADE = [
    Residual,
    InPlaceAdd,
    InPlaceReLU,
    Views,
    Twice,
    Nested,
    Structures,
    Early,
    Appends,
    Scales,
]


def data(samples: int = 6) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))


def equal(one: Any, other: Any) -> bool:
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def check(model: nn.Module, make_inputs: Callable[[], Any], every: int = 1) -> None:
    """Layers with another weight: the run from one on is a plain pass of a changed copy."""
    model.eval()
    twin = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, m in model.named_modules() if isinstance(m, QUANTIZABLE)]

    def plain() -> Any:
        with torch.no_grad():
            inputs = make_inputs()
            return twin(*inputs) if isinstance(inputs, tuple) else twin(inputs)

    differ = 0
    with Recording(model, make_inputs()) as recording:
        assert recording.exact
        assert equal(recording.outputs, plain())
        for name in [*names, *reversed(names)][::every]:
            weight, other = (m.get_parameter(f"{name}.weight").data for m in (model, twin))
            kept = weight.clone()
            weight.copy_(kept * -2)
            other.copy_(weight)
            found = recording.rerun(name)
            differ += not equal(found, recording.outputs)
            assert equal(found, plain()), name
            weight.copy_(kept)
            other.copy_(kept)
            assert equal(recording.rerun(name), recording.outputs)
        assert recording.exact
    assert differ > 0.8 * len(range(0, 2 * len(names), every))  # but for units dead or left out
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", HAND_MADE)
def test_a_run_from_a_layer_on_is_a_full_pass_bit_for_bit(kind: type[Base]) -> None:
    two = kind is Structures
    check(kind(), lambda: (data(), data(8)[:6] * 2) if two else data())


def small_vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(vit.heads.head.weight)
    return vit


IMAGES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=5, init_weights=False),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "vit": small_vit,
    "vit with attention exposed": lambda: expose_attention_(small_vit()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_torchvision_models_are_no_obstacle(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = IMAGES[name]()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check(model, lambda: images, every=5)


def test_fewer_calls_really_happen() -> None:
    model = Nested().eval()
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(model, name).forward

        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return original(x)

        return run

    for name in "abcd":
        getattr(model, name).forward = counted(name)
    with Recording(model, data()) as recording:
        assert "".join(calls) == "cbabcbd" + "d" + "cbabcbd"  # two more, to verify
        for name, expected in {"a": "abcbd", "b": "babcbd", "c": "cbabcbd", "d": "d"}.items():
            calls.clear()
            recording.rerun(name)
            assert "".join(calls) == expected
    # the model's own instance attribute is there again
    calls.clear()
    model(data())
    assert len(calls) == 7


def test_shares_are_those_of_multiply_accumulates() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    macs = [4 * 9 * 16, 128]  # of a sample; everything else counts one an operation
    with Recording(model, torch.randn(50, 1, 6, 6)) as recording:
        assert recording.share("0") == 1
        assert recording.share("3") == pytest.approx(macs[1] / sum(macs), rel=1e-3)
        before = recording.passes
        recording.rerun("3")
        assert recording.passes - before == pytest.approx(recording.share("3"))
    assert 2 < before < 2.5


def test_input_hooks_on_the_layer_run_and_the_model_is_in_eval_mode_meanwhile() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    x = data()
    with Recording(model, x) as recording:
        hook = model[3].register_forward_pre_hook(lambda _, args: (args[0].round(),))
        found = recording.rerun("3")
        hook.remove()
        assert torch.equal(found, model[3](model[1](model[0](x)).round()))
        assert not found.requires_grad
    assert all(m.training for m in model.modules())


class Remembers(nn.Module):
    """Leaves its result in an attribute, which others read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x)


class Stateful(Base):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Remembers()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.count = 0
        x = self.memory(self.a(x))
        return self.d(self.c(self.b(x)) * self.memory.count)


class Unwatched(Base):
    """Computes something else while its operations are watched."""

    def forward(self, x: Tensor) -> Tensor:
        watched = bool(_get_current_dispatch_mode_stack())
        return self.d(self.c(self.b(self.a(x + watched))))


class Unwatchable(Base):
    def forward(self, x: Tensor) -> Tensor:
        if _get_current_dispatch_mode_stack():
            raise NotImplementedError("cannot be watched")
        return self.d(self.c(self.b(self.a(x))))


class Moody(Base):
    """Takes another path in every pass."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.d((self.b if self.passes % 2 else self.c)(self.a(x)))


@pytest.mark.parametrize("kind", [Stateful, Moody, Unwatched, Unwatchable])
def test_a_model_that_cannot_be_replayed_is_run_in_full(kind: type[Base]) -> None:
    model = kind().eval()
    with Recording(model, data()) as recording:
        assert not recording.exact
        assert recording.share("d") == 1
        with torch.no_grad():
            possible = [model(data()), model(data())]
        assert any(torch.equal(recording.outputs, e) for e in possible)
        before = recording.passes
        for _ in range(2):
            found = recording.rerun("d")
            assert any(torch.equal(found, e) for e in possible)
        assert recording.passes == before + 2


class Spoils(Base):
    """Writes to an early output, but only where a late one is negative throughout."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        last = self.d(self.c(self.b(first)))
        if (last < 0).all():
            first.zero_()
        return last + first[:, :3]


def test_what_a_changed_layer_makes_others_write_to_is_noticed() -> None:
    model = Spoils().eval()
    x = data()
    with Recording(model, x) as recording, torch.no_grad():
        first = recording.outputs.clone()
        bias = model.d.bias.clone()
        model.d.bias.fill_(-1e3)
        spoiled = recording.rerun("d")
        assert torch.equal(spoiled, model.d(model.c(model.b(model.a(x)))))
        assert not recording.exact
        model.d.bias.copy_(bias)
        assert torch.equal(recording.rerun("d"), first)


def test_everything_is_taken_off_when_the_model_raises() -> None:
    class Broken(Base):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("stop") if self.a(x).shape[0] else None

    model = Broken().train()
    with pytest.raises(KeyError, match="stop"), Recording(model, data()):
        pass
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(m.training for m in model.modules())

    other = Residual().train()
    with pytest.raises(KeyError, match="later"), Recording(other, data()):
        raise KeyError("later")
    assert not any("forward" in vars(m) for m in other.modules())
    assert all(m.training for m in other.modules())


def test_a_layer_that_no_pass_reaches_needs_a_full_pass() -> None:
    model = Residual()
    model.extra = nn.Linear(4, 4)
    with Recording(model, data()) as recording:
        assert recording.share("extra") == 1
        assert torch.equal(recording.rerun("extra"), recording.outputs)


ONE = torch.tensor([1.0, -1000.0, 0.0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ONE, ONE + torch.tensor([0.0, 0.0, 500.0]) * TOLERANCE),  # of the largest, not of its own
        (torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 2.0 + TOLERANCE])),
        (torch.zeros(2, 0), torch.zeros(2, 0)),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        ({"a": (ONE, "text"), "b": None}, {"a": (ONE.clone(), "other"), "b": None}),
    ],
)
def test_outputs_that_differ_by_no_more_than_kernels_do_are_the_same(one: Any, other: Any) -> None:
    assert _same(one, other)
    assert _same(other, one)


def test_outputs_that_are_no_numbers_at_the_same_places_are_the_same() -> None:
    one, other = torch.tensor([torch.nan, 1.0]), torch.tensor([1.0, torch.nan])
    assert _same(one, one.clone())
    assert not _same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ONE, ONE + torch.tensor([0.0, 0.0, 2000.0]) * TOLERANCE),
        (ONE, ONE.double()),
        (ONE, ONE[:2]),
        (ONE, ONE[None]),
        (ONE, 1.0),
        (1, 1.0),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf])),
        (torch.tensor([torch.inf]), torch.tensor([torch.nan])),
        (torch.tensor([torch.inf]), torch.tensor([1.0])),
        ({"a": ONE}, {"b": ONE}),
        ((ONE, ONE), (ONE,)),
        ((ONE, ONE), (ONE, ONE + 1)),
    ],
)
def test_other_outputs_are_not_the_same(one: Any, other: Any) -> None:
    assert not _same(one, other)
    assert not _same(other, one)
