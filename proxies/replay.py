"""Run a model again from one layer on: what came before it is not computed a second time.

`Recording` runs a model once and keeps what every call of a module gave, in the order of the
calls. When the model is run again after a change to one layer, all happens as before until that
layer is met: a call that had ended by then gives what it gave, without running. Outer modules are
asked before inner ones, so that whole blocks are skipped; code between modules runs again. No
graph is traced: any eager model will do.

A call is only skipped where nobody can tell: it wrote into none of its inputs, returned none of
them (nor a view of one, nor of a parameter), and takes and gives tensors and plain values alone.
All tensor operations of the recorded run are watched, so that
- an output that is written to later (`out += identity`, ReLU(inplace=True)) is copied just before,
  and given out as a copy;
- a parameter that is read outside its module's call counts from there on;
- the share of a run that is skipped is known in multiply-accumulates.
What stays unseen is state that a call leaves in its module, and what operations do differently for
being watched. A plain pass and two replays without any change, which cost next to nothing, must
therefore give the same outputs; a model that fails is run in full.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from math import inf
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from adq.quant.batches import evaluating, forward

TOLERANCE = 1e-5
"""Of the largest output: how far a run without any change may be off, by kernels whose sums have
no fixed order."""

PLAIN = (Tensor, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass
class _Call:
    """One call of a module. `begin` and `end` are ticks of one clock, `next` the number of the
    first call after all those inside this one, `cost` that of the operations in it."""

    module: nn.Module
    begin: int
    end: int = 0
    next: int = 0
    cost: int = 0
    kept: "_Kept | None" = None


@dataclass
class _Kept:
    """Values to give out again: all the tensors and plain values in a nested output."""

    leaves: list[Any]
    spec: TreeSpec
    written: bool = False

    def take(self, lent: list[tuple[Tensor, int]]) -> Any:
        """What was kept; copies if the recorded run wrote to it, else noted in `lent`."""
        out = list(self.leaves)
        for i, leaf in enumerate(out):
            if not isinstance(leaf, Tensor):
                continue
            if self.written or leaf.is_inference():
                out[i] = leaf.clone()
            else:
                lent.append((leaf, leaf._version))
        return tree_unflatten(out, self.spec)


class Recording:
    """A model's run on one batch, in eval mode and without gradients, to be run again in part.

        with Recording(model, inputs) as recording:
            recording.outputs
            with weight_at(layer, quantized):
                changed = recording.rerun("layer1.0.conv2")

    Only the named layer may differ from the recorded run: its weight, hooks on its input. While the
    context lasts, every module's `forward` is an attribute of the instance; all is taken off after.
    Keeps the outputs of all modules in memory.

    verify    leave out the plain pass for a model that is known to be `exact`
    exact     whether runs without a change gave the same outputs; if not, all runs are full
    passes    made so far, those at the start too; a part counts by its share
    """

    outputs: Any

    def __init__(self, model: nn.Module, inputs: Any, *, verify: bool = True) -> None:
        self.model, self.verify, self.exact, self.passes = model, verify, True, 0.0
        self._inputs = _Kept(*tree_flatten(inputs))
        self._calls: list[_Call] = []
        self._reads: dict[int, int] = {}
        self._cost = 1
        self._watch: _Watch | None = None
        self._replay: _Replay | None = None

    def __enter__(self) -> "Recording":
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self._installed())
            self._prepare()
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()
        self._calls = []

    def rerun(self, layer: str) -> Any:
        """The model's outputs, with whatever is on that layer now."""
        return self._run(_Replay(self._calls, self._start(layer)))

    def share(self, layer: str) -> float:
        """The share of a full pass that `rerun(layer)` computes, by multiply-accumulates."""
        return 1 - _Replay(self._calls, self._start(layer)).saved() / self._cost

    def _prepare(self) -> None:
        try:
            self.outputs = self._recorded()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of something that cannot be watched, unless a plain pass raises too
            self._forget()
        layers = [c for c in self._calls if any(True for _ in c.module.parameters(recurse=False))]
        last = layers[-1].begin if layers else 0
        for replay in (_Replay(self._calls, inf, leaves=True), _Replay(self._calls, last)):
            if self.exact and not _same(self._run(replay), self.outputs):
                self._forget()
        if self.verify or not self.exact:
            plain = self._run(_Replay((), 0))
            if not self.exact or not _same(plain, self.outputs):
                self._forget()
                self.outputs = plain

    def _recorded(self) -> Any:
        state = [*self.model.parameters(), *self.model.buffers()]
        self._watch = _Watch({_address(t) for t in state})
        self._watch.keep(self._inputs)
        self.passes += 1
        try:
            with torch.no_grad(), self._watch:
                outputs = forward(self.model, self._take_inputs())
            self._reads, self._cost = self._watch.reads, max(1, self._watch.cost)
        finally:
            self._watch = None
        return outputs

    def _forget(self) -> None:
        self.exact = False
        self._calls = []

    def _start(self, layer: str) -> int:
        """The tick at which the recorded run first met the layer, 0 if it never did."""
        module = self.model.get_submodule(layer)
        state = [*module.parameters(), *module.buffers()]
        met = [self._reads[a] for a in map(_address, state) if a in self._reads]
        met += [call.begin for call in self._calls if call.module is module][:1]
        return min(met, default=0)

    @torch.no_grad()
    def _run(self, replay: "_Replay") -> Any:
        self._replay = replay
        try:
            outputs = forward(self.model, self._take_inputs(replay.lent))
        except _OtherPathError:
            self._replay = None
            self._forget()
            self.passes += 1
            return forward(self.model, self._take_inputs())
        finally:
            self._replay = None
        self.passes += 1 - replay.skipped / self._cost
        if any(tensor._version != version for tensor, version in replay.lent):
            self._forget()  # this run was right, but what it wrote to is lost for the next
        return outputs

    def _take_inputs(self, lent: list[tuple[Tensor, int]] | None = None) -> Any:
        return self._inputs.take([] if lent is None else lent)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Something else in the place of every module's forward."""
        modules = [m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        before = [m.__dict__.get("forward") for m in modules]
        try:
            for module in modules:
                module.__dict__["forward"] = self._in_place_of(module)
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own

    def _in_place_of(self, module: nn.Module) -> Callable[..., Any]:
        run = module.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._watch is not None:
                call = _Call(module, self._watch.tick())
                self._calls.append(call)
                output = self._watch.call(call, run, args, kwargs)
                call.next = len(self._calls)
                return output
            if self._replay is not None and (kept := self._replay.ask(module)) is not None:
                return kept.take(self._replay.lent)
            return run(*args, **kwargs)

        return forward


@dataclass
class _Replay:
    """One run along the recorded calls, up to `start`. With `leaves`, only modules without
    submodules are skipped."""

    calls: Sequence[_Call]
    start: float
    leaves: bool = False
    position: int = 0
    skipped: int = 0
    lent: list[tuple[Tensor, int]] = field(default_factory=list)

    def ask(self, module: nn.Module | None = None) -> _Kept | None:
        """What the next call, of this module, gave, or None if it has to run."""
        if not self.ahead():
            return None
        call = self.calls[self.position]
        if module is not None and call.module is not module:
            raise _OtherPathError
        whole = not self.leaves or not any(True for _ in call.module.children())
        if call.end > self.start or call.kept is None or not whole:
            self.position += 1
            return None
        self.position = call.next
        self.skipped += call.cost
        return call.kept

    def ahead(self) -> bool:
        return self.position < len(self.calls) and self.calls[self.position].begin <= self.start

    def saved(self) -> int:
        """The cost of all that a run would skip."""
        while self.ahead():
            self.ask()
        return self.skipped


class _OtherPathError(RuntimeError):
    """A run without a change so far calls other modules than the recorded one."""


class _Watch(TorchDispatchMode):
    """Sees every operation on tensors while it is entered.

    reads    storage of a parameter or buffer -> the tick when it was first used
    cost     of all operations so far: their multiply-accumulates where torch knows them, at least 1
    """

    supports_higher_order_operators = True

    def __init__(self, state: set[int]) -> None:
        super().__init__()
        self.state, self.clock, self.cost = state, 0, 0
        self.reads: dict[int, int] = {}
        self._writes: dict[int, int] = {}
        self._kept: dict[int, list[_Kept]] = defaultdict(list)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def keep(self, kept: _Kept) -> None:
        """Copy what is kept before someone writes to it."""
        for tensor in _tensors(kept.leaves):
            self._kept[_address(tensor)].append(kept)

    def call(
        self, call: _Call, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run it and keep its output, where it can be skipped another time."""
        given, form = tree_flatten((args, kwargs))
        cost = self.cost
        output = run(*args, **kwargs)
        call.end, call.cost = self.tick(), self.cost - cost
        leaves, spec = tree_flatten(output)
        still, same_form = tree_flatten((args, kwargs))
        inputs = {_address(t) for t in _tensors(given)}
        outputs = [_address(t) for t in _tensors(leaves)]
        if (
            all(isinstance(leaf, PLAIN) for leaf in (*given, *leaves))
            and form == same_form
            and all(a is b for a, b in zip(given, still, strict=True))
            and not any(self._writes.get(a, 0) >= call.begin for a in inputs)
            and len(set(outputs)) == len(outputs)
            and not (inputs | self.state) & set(outputs)
            and 0 not in outputs
        ):
            call.kept = _Kept(leaves, spec)
            self.keep(call.kept)
        return output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors(tree_leaves((args, kwargs))):
            if (address := _address(tensor)) in self.state:
                self.reads.setdefault(address, self.clock)
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)}
            named |= kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors(tree_leaves(named.get(argument.name))):
                        self._before_write(_address(tensor))
        output = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        self.cost += 1 if count is None else max(1, count(*args, **kwargs, out_val=output))
        return output

    def _before_write(self, address: int) -> None:
        self._writes[address] = self.clock
        copies: dict[int, Tensor] = {}
        for kept in self._kept.pop(address, ()):
            kept.written = True
            for i, leaf in enumerate(kept.leaves):
                if isinstance(leaf, Tensor) and _address(leaf) == address:
                    if id(leaf) not in copies:
                        copies[id(leaf)] = leaf.clone()
                    kept.leaves[i] = copies[id(leaf)]


def _tensors(leaves: Sequence[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    """The storage of a tensor; 0 for one that has none or is empty."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _same(one: Any, other: Any) -> bool:
    a, form = tree_flatten(one)
    b, same_form = tree_flatten(other)
    return form == same_form and all(map(_close, a, b))


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.numel():
        return True
    if not a.is_floating_point():
        return False
    largest = b.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)
