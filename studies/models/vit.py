"""A vision transformer: torchvision's, small, on scikit-learn's handwritten digits.

1797 images of 8x8 pixels, cut into 16 patches of 2x2 pixels each.
"""

from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

import adq

SPLIT_SEED = 0  # the split is part of the task: it does not follow the study's seed
TRAIN, HELD_OUT = 897, 450


class GreyTransformer(VisionTransformer):
    """torchvision's, which wants three channels, on images that have one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def make_task(
    width: int = 48, blocks: int = 4, train_size: int = TRAIN, epochs: int = 40
) -> adq.Task:
    """897 training, 450 validation and 450 test images, and a transformer of `blocks` blocks."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation, test = (
        TensorDataset(images[part], labels[part])
        for part in order.split([TRAIN, HELD_OUT, HELD_OUT])
    )
    train = TensorDataset(*train[:train_size])
    return adq.Task(
        model=partial(GreyTransformer, 8, 2, blocks, 4, width, 2 * width, num_classes=10),
        loss=F.cross_entropy,
        train=DataLoader(train, 64, shuffle=True),
        validation=DataLoader(validation, HELD_OUT),
        test=DataLoader(test, HELD_OUT),
        fp32_epochs=epochs,
        fp32_lr=3e-3,
    )
