"""What this package asks of data: batches of inputs and targets, and a seeded random state."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]
"""(inputs, targets): inputs are a tensor, or a tuple of tensors for models that take several."""

Batches = Iterable[Batch]
"""Something that can be iterated again and again: a DataLoader, a list of batches."""


@dataclass(frozen=True)
class Prepared:
    """`batches` whose inputs `prepare` makes ready for the model, on whatever device they are.

    Training and evaluation bring a batch to the model's device first: what travels are bytes, say,
    and what makes them numbers around zero is computed there. Ranks load and prepare their share.
    """

    batches: Batches
    prepare: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self.batches:
            yield self.prepare(inputs), targets

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def loaded(batches: Batches) -> Batches:
    """The batches as they are loaded, for `ready` to prepare."""
    return batches.batches if isinstance(batches, Prepared) else batches


def ready(batch: Batch, batches: Batches, device: torch.device) -> Batch:
    """A batch of `loaded(batches)` as the model wants it, on its device."""
    inputs, targets = to_device(batch, device)
    return (batches.prepare(inputs) if isinstance(batches, Prepared) else inputs), targets


def forward(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value


def first_tensor(inputs: Any) -> Tensor:
    """The tensor whose first dimension is the batch."""
    tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a batch's inputs to be tensors, got {type(tensor).__name__}")
    return tensor


def batch_size(batch: Batch) -> int:
    return first_tensor(batch[0]).shape[0]


def count_batches(batches: Batches, seed: int) -> int:
    """The number of batches in a pass: by `len`, or by going through them once."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        with seeded(seed):
            return sum(1 for _ in batches)


def take_samples(batches: Batches, samples: int) -> list[Batch]:
    """The leading batches, until at least `samples` samples are there (the last one cut)."""
    taken: list[Batch] = []
    missing = samples
    for inputs, targets in batches:
        n = batch_size((inputs, targets))
        if n > missing:
            inputs, targets = part(inputs, 0, missing), part(targets, 0, missing)
        taken.append((inputs, targets))
        missing -= n
        if missing <= 0:
            break
    return taken


def micro_batches(batches: Batches, size: int) -> Iterator[Batch]:
    """The same samples in batches of at most `size`."""
    for inputs, targets in batches:
        for start in range(0, batch_size((inputs, targets)), size):
            yield part(inputs, start, start + size), part(targets, start, start + size)


def parts_of(batch: Batch, samples: int, parts: int) -> list[tuple[Batch, int]]:
    """The batch of so many samples in parts, and how many each has; sizes differ by one at most.

    An empty part gets the first sample, which does not count.
    """
    if parts == 1:
        return [(batch, samples)]
    bounds = [i * samples // parts for i in range(parts + 1)]
    found = []
    for start, stop in pairwise(bounds):
        cut = (start, stop) if stop > start else (0, 1)
        found.append(((part(batch[0], *cut), part(batch[1], *cut)), stop - start))
    return found


def resized(inputs: Any, samples: int) -> Any:
    """The same inputs cut or repeated to so many samples."""
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(samples) % len(inputs)]
    return type(inputs)(resized(part, samples) for part in inputs)


def part(value: Any, start: int, stop: int) -> Any:
    """Samples start..stop − 1 of every tensor in a batch, or in one half of it."""
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, tuple | list):
        return type(value)(part(v, start, stop) for v in value)
    if isinstance(value, dict):
        return {k: part(v, start, stop) for k, v in value.items()}
    return value


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the random states of torch, numpy and random set from `seed`; restore them after.

    A user's data pipeline may draw from any of the three.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        reseed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def reseed(seed: int) -> None:
    """Set the random states of torch, numpy and random from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """The random states that `seeded` sets, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


@contextmanager
def differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients reach `parameters`, frozen ones too, and restore who required them."""
    required = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_()
    try:
        yield
    finally:
        for p, before in zip(parameters, required, strict=True):
            p.requires_grad_(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with at most `count` threads inside torch's CPU operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each one back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
