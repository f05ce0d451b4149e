"""Ranks that work on one model together: what each gets of the data, and what they agree on.

The ranks are those of torch.distributed's default process group, which the caller has started (gloo
on CPUs, nccl on GPUs). Only sums over ranks and broadcasts from rank 0 are used, which all backends
have for all devices. An error on one rank alone leaves the others waiting for it: whoever started
the ranks must end them all, as torchrun and Ray Train do.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from adq.quant.batches import (
    Batch,
    Batches,
    batch_size,
    part,
    random_state,
    reseed,
    seeded,
    set_random_state,
)
from adq.quant.errors import InputError

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Group:
    """This process among those that work together, rank `rank` of `size`.

    Where `distributed` is False it works by itself, and whatever ranks would do does nothing.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    distributed: bool = False

    def sum_(self, tensor: Tensor) -> Tensor:
        """Each element's sum over ranks, in place; the same bits on all of them."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def rows(self, row: Tensor) -> Tensor:
        """Every rank's `row` (n,), exactly; (size, n)."""
        table = row.new_zeros(self.size, len(row))
        table[self.rank] = row
        return self.sum_(table)

    def first(self, compute: Callable[[], T]) -> T:
        """What `compute` gives on rank 0, or the InputError it raises there, on all ranks."""
        if not self.distributed:
            return compute()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = compute()
            except InputError as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """What `compute` gives on each rank; the first InputError that it raises on any, on all."""
        if not self.distributed:
            return [compute()]
        mine: list[Any] = [None, None]
        try:
            mine[0] = compute()
        except InputError as error:
            mine[1] = error
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        for _, failure in everyone:
            if failure is not None:
                raise failure
        return [value for value, _ in everyone]

    def counts(self, mine: int) -> list[int]:
        """Every rank's number."""
        if not self.distributed:
            return [mine]
        row = torch.tensor([mine], device=self.device)
        return [int(n) for n in self.rows(row).flatten().tolist()]

    @torch.no_grad()
    def sum_gradients_(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over ranks, in one call; returns the sum of `loss`, a scalar.

        A parameter that no rank has a gradient for keeps none.
        """
        if not self.distributed:
            return loss
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        own = torch.tensor([p.grad is not None for p in parameters], device=self.device)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        tensors = [*gradients, own, loss]
        flat = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
        *sums, owners, total = self.sum_(flat).split([t.numel() for t in tensors])
        torch._foreach_copy_(
            gradients, [s.view(g.shape) for s, g in zip(sums, gradients, strict=True)]
        )
        for p, known in zip(parameters, owners.tolist(), strict=True):
            if not known:
                p.grad = None
        return total.squeeze(0)

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Set the tensors, of any types, to those of rank 0, bit for bit and in one call."""
        tensors = [t for t in tensors if t.numel()]
        if not self.distributed or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors])
        dist.broadcast(flat, 0)
        if self.rank != 0:
            pieces = flat.split([t.nbytes for t in tensors])
            for tensor, piece in zip(tensors, pieces, strict=True):
                # a piece need not begin where its type may: a copy does
                tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))

    def stream(self, *numbers: int) -> AbstractContextManager[None]:
        """Random states of this rank's own, from the numbers; what draws the data is kept apart."""
        if not self.distributed:
            return nullcontext()
        return seeded(_mixed(*numbers, self.rank))

    def shares(self, batches: Batches) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's share of each batch, and how many samples every rank has of it.

        Shares lie one after the other in the batch and differ by one sample at most. A rank whose
        share is empty gets the batch's first sample, which does not count: models need not take
        batches of none, and the rank must still meet the others wherever they wait for it.

        Of a DataLoader over a map-style dataset only the share is loaded. All ranks draw the same
        order from the same random state, and what augments the samples differs by rank; it is
        therefore not what one process would draw. Anything else is iterated whole on each rank,
        which must give the same batches on all of them, and cut.

        Raises InputError where ranks have different numbers of batches.
        """
        if not self.distributed:
            for batch in batches:
                yield batch, [batch_size(batch)]
            return
        mine = self._sharded(batches) if _shards(batches) else self._sliced(batches)
        while True:
            share = next(mine, None)
            counts = self.counts(-1 if share is None else share[1])
            if share is None and max(counts) < 0:
                return
            if share is None or min(counts) < 0:
                raise InputError("the ranks have different numbers of batches: give all the same")
            yield share[0], counts

    def _sliced(self, batches: Batches) -> Iterator[tuple[Batch, int]]:
        for inputs, targets in batches:
            start, stop = self._bounds(batch_size((inputs, targets)))
            live = stop > start
            cut = (start, stop) if live else (0, 1)
            yield (part(inputs, *cut), part(targets, *cut)), stop - start

    def _sharded(self, loader: DataLoader[Any]) -> Iterator[tuple[Batch, int]]:
        shares: deque[bool] = deque()

        def choose(number: int, samples: list[Any]) -> list[Any]:
            start, stop = self._bounds(len(samples))
            shares.append(stop > start)
            return samples[start:stop] or samples[:1]

        for batch in _choosing(loader, choose, self.rank):
            yield batch, batch_size(batch) if shares.popleft() else 0

    def _bounds(self, samples: int) -> tuple[int, int]:
        """Where this rank's share of so many samples starts and stops; the first are the longer."""
        each, more = divmod(samples, self.size)
        start = self.rank * each + min(self.rank, more)
        return start, start + each + (self.rank < more)

    def deal(self, batches: Batches) -> Iterator[tuple[int, Batch]]:
        """Every `size`-th batch, and its number among all; the others are loaded as in `shares`."""
        if not self.distributed or not _shards(batches):
            for number, batch in enumerate(batches):
                if number % self.size == self.rank:
                    yield number, batch
            return

        def choose(number: int, samples: list[Any]) -> list[Any] | None:
            return samples if number % self.size == self.rank else None

        yield from zip(
            count(self.rank, self.size), _choosing(batches, choose, self.rank), strict=False
        )


ALONE = Group()


def group_of(parallel: bool, device: torch.device) -> Group:
    """The ranks of the default process group, or this process by itself.

    Raises InputError where there is no process group.
    """
    if not parallel:
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "parallel: expected the ranks of a process group, got a single process: call "
            "torch.distributed.init_process_group, or start it with torchrun or Ray Train"
        )
    return Group(dist.get_rank(), dist.get_world_size(), device, distributed=True)


def _mixed(*numbers: int) -> int:
    """A seed from several numbers."""
    words = [n % 2**64 for n in numbers]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


Choose = Callable[[int, list[Any]], list[Any] | None]
"""(number of the batch, its samples) -> those to load, or None for none."""


def _shards(batches: Batches) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a DataLoader whose batches can be chosen before they are loaded."""
    return (
        isinstance(batches, DataLoader)
        and type(batches).__iter__ is DataLoader.__iter__
        and batches.batch_sampler is not None
        and not isinstance(batches.dataset, IterableDataset)
    )


def _choosing(loader: DataLoader[Any], choose: Choose, rank: int) -> Iterator[Any]:
    """The loader's batches of the chosen samples."""
    assert loader.batch_sampler is not None
    return iter(
        DataLoader(
            loader.dataset,
            batch_sampler=_Chosen(loader.batch_sampler, choose, rank),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=partial(_seed_worker, rank, loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
        )
    )


class _Chosen(Sampler[list[Any]]):
    """The batches of a batch sampler as `choose` leaves them.

    What the sampler draws at random it draws from a stream of its own, so that it is the same on
    all ranks, however much each draws for its samples. Ranks but the first then go on with random
    states of their own.
    """

    def __init__(self, batches: Any, choose: Choose, rank: int) -> None:
        self.batches, self.choose, self.rank = batches, choose, rank

    def __iter__(self) -> Iterator[list[Any]]:
        samples = iter(self.batches)
        drawing: dict[str, Any] | None = None
        for number in count():
            outside = random_state()
            if drawing is not None:
                set_random_state(drawing)
            drawn = next(samples, None)
            drawing = random_state()
            if number > 0:
                set_random_state(outside)
            elif self.rank > 0:
                reseed(_mixed(int(torch.empty((), dtype=torch.int64).random_()), self.rank))
            if drawn is None:
                return
            if (chosen := self.choose(number, list(drawn))) is not None:
                yield chosen


def _seed_worker(rank: int, init: Callable[[int], None] | None, worker: int) -> None:
    """Workers of different ranks draw different numbers."""
    if rank > 0:
        reseed(_mixed(torch.initial_seed(), rank))
    if init is not None:
        init(worker)
