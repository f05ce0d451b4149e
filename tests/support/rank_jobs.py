"""What the ranks of `ranks` are asked to do: importable, as processes that are started anew need.

Each job also runs in a process by itself with `parallel=False`, which is what it is compared with.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from adq.quant.apply import quantize
from adq.quant.batches import device_of, seeded
from adq.quant.batchnorm import BatchNormOverRanks
from adq.quant.evaluate import accuracy, evaluate
from adq.quant.parallel import group_of
from adq.quant.progressive import train_progressively_
from adq.quant.qat import TrainingConfig, train_
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

BITS = BitVector({"0": 4, "3": 2, "8": 3}, {"3": 4, "8": 3})
SIZES = (7, 7, 9, 6, 1)  # of the batches: odd ones, and one smaller than two ranks


def samples(count: int = 30, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    y = (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0).long()
    return TensorDataset(x.to(dtype), y)


def batches_of(dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Any]:
    x, y = samples(sum(sizes), dtype).tensors
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def network(dropout: float = 0.0) -> nn.Module:
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, bias=False),  # its gradient would be rounding, which Adam blows up
            nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(128, 3),
        ).eval()


def without_norms() -> nn.Module:
    model = network()
    model[1] = model[4] = nn.Identity()
    return model


def quantized(make: Callable[[], nn.Module] = network, dtype: torch.dtype = torch.float32) -> Any:
    model = quantize(make().to(dtype), BITS, batches_of(dtype)[:3], Scheme(split_dead=False))
    return model.to(dtype)


def state(model: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


def trained(
    options: dict[str, Any],
    *,
    parallel: bool = True,
    dtype: torch.dtype = torch.float32,
    norms: bool = True,
    taught: bool = False,
    loader: bool = False,
    compiled: bool = False,
) -> Any:
    make = network if norms else without_norms
    model = quantized(make, dtype)
    data: Any = batches_of(dtype)
    if loader:
        data = DataLoader(samples(dtype=dtype), batch_size=7, shuffle=True)
    config = TrainingConfig(**{"epochs": 2, "lr": 1e-2, "weights_per_level": 0, **options})
    teacher = network().to(dtype) if taught else None
    kinds = [type(m) for m in model.modules()]
    torch.manual_seed(torch.seed())  # what is outside must not matter
    student = torch.compile(model, backend="aot_eager") if compiled else model
    log = train_(student, data, F.cross_entropy, config, 3, teacher=teacher, parallel=parallel)
    assert [type(m) for m in model.modules()] == kinds
    return log, state(model)


def progressively(*, parallel: bool = True) -> Any:
    model, data = network(), batches_of()
    log = train_progressively_(
        model,
        BITS,
        data,
        F.cross_entropy,
        TrainingConfig(3, lr=1e-2),
        3,
        calibration=data[:3],
        parallel=parallel,
    )
    return log, state(model)


# --- BatchNorm ---

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "sequence": (lambda: nn.BatchNorm1d(3, momentum=0.3), (3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3, eps=1e-2), (3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 2, 2)),
    "plain": (lambda: nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    "untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2)),
    "untracked eval": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), (3, 2, 2)),
    "eval": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 2)),
}


def normalized(name: str, sizes: list[int], *, parallel: bool = True) -> list[Any]:
    """What `_normalized` gives in double and in single precision."""
    return [_normalized(name, sizes, t, parallel) for t in (torch.float64, torch.float32)]


def _normalized(
    name: str, sizes: list[int], dtype: torch.dtype, parallel: bool
) -> dict[str, np.ndarray]:
    """Two steps of a BatchNorm whose ranks have so many samples: outputs, gradients, statistics."""
    make, shape = NORMS[name]
    norm = make().to(dtype)
    generator = torch.Generator().manual_seed(0)
    group = group_of(parallel, device_of(nn.Linear(1, 1)))
    found: dict[str, Any] = {}
    for step in range(2):
        x = 3 + 2 * torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)
        g = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64)
        x, g = x.to(dtype), g.to(dtype)
        if parallel:
            start, mine = sum(sizes[: group.rank]), sizes[group.rank]
            x, g = x[start:][: max(1, mine)], g[start:][: max(1, mine)] * (mine > 0)
            if len(x) == 0:
                x, g = 7 + torch.zeros(1, *shape, dtype=dtype), torch.zeros(1, *shape, dtype=dtype)
            x.requires_grad_()
            mode = BatchNormOverRanks(group)
            mode.counts = mine > 0
            with mode:
                y = norm(x)
                y.backward(g)
            y, grad = y[:mine], x.grad[:mine]
        else:
            y = norm(x.requires_grad_())
            y.backward(g)
            grad = x.grad
        found |= {f"y{step}": y.detach().numpy(), f"x{step}": grad.numpy()}
    for key, p in norm.named_parameters():
        found[key] = group.sum_(p.grad).numpy()
    return found | {f"state {k}": v.numpy() for k, v in norm.named_buffers()}


# --- data ---


class Recorded(Dataset[tuple[Tensor, Tensor]]):
    """Notes what is loaded, and draws a different number of times for each sample."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.drawn: list[float] = []
        self.data = samples()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loaded.append(index)
        self.drawn += [torch.rand(()).item(), random.random(), np.random.rand()]
        for _ in range(index % 3):
            torch.rand(())
            random.random()
        x, y = self.data[index]
        return x + 0.05 * sum(self.drawn[-3:]), y


class Lazy:
    """A batch sampler that draws each batch as it is asked for it, from all random states."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            first = [int(torch.randint(30, ())), random.randrange(30), np.random.randint(30)]
            yield first + [int(i) for i in torch.randperm(30)[:2]]


def loaded(kind: str, workers: int = 0, *, parallel: bool = True) -> Any:
    """What a pass over a DataLoader loads, what augmentation draws, and the counts."""
    dataset = Recorded()
    group = group_of(parallel, torch.device("cpu"))
    loader: Any = {
        "shuffle": lambda: DataLoader(dataset, 8, shuffle=True, num_workers=workers),
        "lazy": lambda: DataLoader(dataset, batch_sampler=Lazy(), num_workers=workers),
    }[kind]()
    with seeded(5):
        counts = [counts for _, counts in group.shares(loader)]
    return dataset.loaded, dataset.drawn, counts


class Noise(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return torch.rand(1), random.random() + np.random.rand()


def noise_of_workers() -> list[float]:
    loader = DataLoader(Noise(), 4, num_workers=1)
    with seeded(5):
        found = list(group_of(True, torch.device("cpu")).shares(loader))
    return [float(v) for (x, y), _ in found for v in (*x, *y)]


# --- what must not go wrong ---


class KilledError(Exception):
    pass


def resumed(folder: Path, at: int, every: int) -> Any:
    """A run with dropout and random augmentation, whole, and one that is killed and goes on."""
    size = dist.get_world_size()
    loader = DataLoader(Recorded(), batch_size=7, shuffle=True)
    config = TrainingConfig(
        2,
        lr=1e-2,
        weights_per_level=0,
        checkpoint_every=every,
        freeze_above=0.005,
        dampening=0.01,
        weights_average=0.9,
    )
    runs = []
    path = folder / f"{size}-{at}-{every}"
    for kill, checkpoint in ((0, None), (at, path), (0, path)):
        count = iter(range(1, 1000))

        def loss(outputs: Tensor, targets: Tensor, kill: int = kill, count: Any = count) -> Tensor:
            if next(count) == kill:
                raise KilledError
            return F.cross_entropy(outputs, targets)

        model = quantized(lambda: network(0.2))
        try:
            log = train_(model, loader, loss, config, 3, checkpoint=checkpoint, parallel=True)
        except KilledError:
            dist.barrier()
            continue
        runs.append((log, state(model)))
    return runs


def trained_from(path: Path, config: dict[str, Any], *, parallel: bool = True) -> Any:
    model = quantized()
    log = train_(
        model,
        batches_of(),
        F.cross_entropy,
        TrainingConfig(**config),
        3,
        checkpoint=path,
        parallel=parallel,
    )
    return log, state(model)


def first_has_the_file(folder: Path, config: dict[str, Any]) -> Any:
    """As on machines that share no folder: each rank has its own."""
    own = folder / str(dist.get_rank())
    own.mkdir(exist_ok=True)
    return trained_from(own / "c", config), sorted(p.name for p in own.iterdir())


def drifting() -> Any:
    """Ranks whose models differ at the start, and whose codebooks err at each step."""
    model, rank = quantized(), dist.get_rank()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * rank)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        for key, value in model.state_dict().items():
            if key.endswith(("counts", "sums", "running_mean")):
                value.add_(0.01 * rank)
        return F.cross_entropy(outputs, targets)

    config = TrainingConfig(2, lr=1e-2, weights_per_level=0)
    return train_(model, batches_of(), loss, config, 3, parallel=True), state(model)


def overflowing(*, parallel: bool = True) -> Any:
    """fp16 whose scaled gradient overflows by one sample of the second of four steps."""
    x, y = torch.ones(6, 2), torch.tensor([0.0, 1, 0, 1, 0, 1])
    batches = [(x, y), (x, torch.tensor([0.0, 1, 0, 1, 0, 1e37])), (x, y), (x, y)]
    with seeded(0):
        model = nn.Linear(2, 1)
    weights: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        weights.append(model.weight.detach().numpy().copy())
        return (outputs.flatten().float() * targets).mean()

    config = TrainingConfig(1, amp="fp16", lr=0.1)
    train_(model, batches, loss, config, 0, parallel=parallel)
    return [*weights, model.weight.detach().numpy()]


def failing(kind: str) -> Any:
    """What goes wrong on one rank alone."""
    rank, data = dist.get_rank(), batches_of()
    model, config = without_norms(), TrainingConfig(2, lr=1e-2)
    if kind == "nan":
        data[1][0][6] = torch.nan  # it is the last rank's alone
    if kind == "fewer" and rank == 1:
        data = data[:-1]
    if kind == "metric":
        metric = accuracy if rank == 0 else lambda o, t: accuracy(o, t).mean()
        return evaluate(model, data, F.cross_entropy, metric, parallel=True)
    if kind == "evaluated fewer":
        data = data[: 2 if rank == 0 else 5]
        return evaluate(model, data, F.cross_entropy, accuracy, parallel=True)
    return train_(model, data, F.cross_entropy, config, 0, parallel=True)


def evaluated(count: int, loader: bool, *, parallel: bool = True) -> Any:
    model = quantized(lambda: network(0.5))
    dataset = samples(count)
    data: Any = DataLoader(dataset, batch_size=4, shuffle=True)
    if not loader:
        x, y = dataset.tensors
        data = list(zip(x.split(4), y.split(4), strict=True))
    with seeded(2):
        return evaluate(model, data, F.cross_entropy, accuracy, parallel=parallel)


class Unused(nn.Module):
    """A part that only some samples need, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.some, self.never = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, large = self.always(x), x[:, 0] > 2
        return y.index_put((large,), self.some(x[large]), accumulate=True) if large.any() else y


def partly_used(*, parallel: bool = True) -> Any:
    with seeded(0):
        model = Unused()
        x = torch.rand(6, 2)
    x[5] = 3.0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs.flatten() - targets) ** 2).mean()

    config = TrainingConfig(2, lr=0.1, weight_decay=0.5)
    train_(model, [(x, torch.ones(6))], loss, config, 0, parallel=parallel)
    return state(model)


def masks() -> Any:
    """What dropout draws on this rank."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    seen: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs == 0).numpy().copy())
        return outputs.mean()

    batches = [(torch.ones(6, 4), torch.ones(6))] * 3
    train_(model, batches, loss, TrainingConfig(2), 0, parallel=True)
    return seen


def stopped(path: Path, config: dict[str, Any]) -> None:
    """A run that is killed in its second epoch."""
    count = iter(range(1, 1000))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(count) > len(SIZES):
            raise KilledError
        return F.cross_entropy(outputs, targets)

    try:
        training = TrainingConfig(**config)
        train_(quantized(), batches_of(), loss, training, 3, checkpoint=path, parallel=True)
    except KilledError:
        dist.barrier()
