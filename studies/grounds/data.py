"""Image data in memory, and batches of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Samples = tuple[Tensor, Tensor]
"""Images (n, channels, height, width) float32, normalised; labels (n,) int64."""


@dataclass(frozen=True)
class Data:
    """What is trained on, what choices are made on, and what is reported."""

    train: Samples
    validation: Samples
    test: Samples


Augmentation = Callable[[Tensor], Tensor]


def mirrored(images: Tensor) -> Tensor:
    """Each image mirrored with probability 1/2."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


class Batches:
    """Shuffled batches, augmented; the last one may be short.

    Order and augmentation come from torch's global random state, which the training loop seeds for
    each epoch. With `steps`, a pass ends after that many batches: a fresh random part each time.
    """

    def __init__(
        self,
        samples: Samples,
        size: int = 128,
        steps: int | None = None,
        augment: Augmentation = mirrored,
    ) -> None:
        self.images, self.labels = samples
        self.size, self.augment = size, augment
        full = -(-len(self.labels) // size)
        self.steps = full if steps is None else min(steps, full)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Samples]:
        order = torch.randperm(len(self.labels))
        for index in order.split(self.size)[: self.steps]:
            yield self.augment(self.images[index]), self.labels[index]


def in_order(samples: Samples, size: int = 1000) -> list[Samples]:
    """Batches for evaluation."""
    return list(zip(samples[0].split(size), samples[1].split(size), strict=True))
