"""The default task: scikit-learn's 1797 handwritten digits, 8x8 pixels, and a small ResNet."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

from adq.search.task import Task
from adq.search.tasks.resnet import ResNet

SPLIT_SEED = 0  # the split is part of the task: it does not follow the study's seed


def digits() -> Task:
    """897 training, 450 validation and 450 test images, stratified, and a ResNet of 10 layers."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(data.target).long()
    rest, test = train_test_split(
        range(len(labels)), test_size=450, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=450, stratify=labels[rest], random_state=SPLIT_SEED
    )

    def loader(
        indices: list[int], batch: int, training: bool = False
    ) -> DataLoader[tuple[torch.Tensor, ...]]:
        # 897 = 14 · 64 + 1: a last batch of one image would ruin BatchNorm's running statistics
        part = TensorDataset(images[indices], labels[indices])
        return DataLoader(part, batch, shuffle=training, drop_last=training)

    return Task(
        model=lambda: ResNet(1, 10, widths=(8, 16, 32), blocks=1),
        loss=F.cross_entropy,
        train=loader(train, 64, training=True),
        validation=loader(validation, 450),
        test=loader(test, 450),
        fp32_epochs=30,
        fp32_lr=1e-2,
    )
