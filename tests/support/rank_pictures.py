"""A training on images from disk that ranks can be asked for, see `ranks`."""

from typing import Any

from torch import nn
from torch.nn import functional as F

from adq.quant.batches import Batches, Prepared, seeded
from adq.quant.evaluate import accuracy, evaluate
from adq.quant.qat import TrainingConfig, train_
from adq.search.task import load_task


def in_double(batches: Batches) -> Prepared:
    """In double precision, where sums over ranks round to 1e-16."""
    assert isinstance(batches, Prepared)
    return Prepared(batches.batches, lambda x: batches.prepare(x).double())


def trained(spec: str, *, parallel: bool = True) -> tuple[float, float, list[Any], int]:
    """The loss of the second epoch, the test loss, the weights, and how many images were decoded
    for training."""
    task = load_task(spec)
    assert isinstance(task.train, Prepared)
    pictures = task.train.batches.dataset.pictures  # type: ignore[attr-defined]
    read, seen = pictures.content, []

    def content(index: int) -> bytes:
        seen.append(index)
        return read(index)  # type: ignore[no-any-return]

    pictures.content = content
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        )
    model.double()
    config = TrainingConfig(2, lr=1e-2)
    log = train_(model, in_double(task.train), F.cross_entropy, config, 0, parallel=parallel)
    count = len(seen)
    found = evaluate(model, in_double(task.test), F.cross_entropy, accuracy, parallel=parallel)
    return log[-1].loss, found.loss, [p.detach().numpy() for p in model.parameters()], count
