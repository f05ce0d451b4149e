"""Image classification from folders on disk, with torchvision's models by name.

`imagefolder:PATH` wants `PATH/train/CLASS/*.jpg` and one or both of `PATH/val` and `PATH/test`
with the same classes; where only one of them is there it is the test split, and a tenth of
`train` is set aside for validation. `cifar10:PATH` wants the folder that holds
`cifar-10-batches-py`; its files are pickles, which torchvision reads only after their checksums
have proved to be the published ones. Inputs are scaled by ImageNet's mean and deviation,
CIFAR-10's by its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from adq.quant.errors import InputError
from adq.search.task import Task
from adq.search.tasks.resnet import ResNet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
VALIDATION_SHARE = 0.1
BATCH = 128
IMAGE_SIZE = 224


def image_folder(path: Path, model: str | None = None) -> Task:
    """The task on `path`; without a model's name, torchvision's resnet18."""
    from torchvision.datasets import ImageFolder

    def read(split: str, transform: Any) -> ImageFolder:
        try:
            return ImageFolder(path / split, transform)
        except (OSError, ValueError) as error:
            raise InputError(
                f"imagefolder {path}: expected {split}/CLASS/IMAGE files ({error})"
            ) from None

    if not (path / "train").is_dir():
        raise InputError(f"imagefolder {path}: expected a folder 'train' with one folder a class")
    augmented, plain = _transforms(IMAGE_SIZE, IMAGENET)
    train, train_plain = read("train", augmented), read("train", plain)
    held_out = {split: read(split, plain) for split in ("val", "test") if (path / split).is_dir()}
    if not held_out:
        raise InputError(f"imagefolder {path}: expected a folder 'val' or 'test' beside 'train'")
    for split, data in held_out.items():
        if data.classes != train.classes:
            raise InputError(f"imagefolder {path}: '{split}' and 'train' have different classes")
    training: Dataset[Any] = train
    validation: Dataset[Any]
    if len(held_out) == 2:
        validation = held_out["val"]
    else:
        training, validation = _split(train, train_plain)
    return Task(
        model=_torchvision_model(model or "resnet18", len(train.classes)),
        loss=F.cross_entropy,
        train=_loader(training, training=True),
        validation=_loader(validation),
        test=_loader(held_out["test" if "test" in held_out else "val"]),
        data_key=_files_key(path),
        fp32_epochs=30,
        fp32_lr=1e-3,
    )


def cifar10(path: Path, model: str | None = None) -> Task:
    """CIFAR-10 from disk; without a model's name, the ResNet-20 layout of He et al."""
    from torchvision import datasets

    augmented, plain = _transforms(32, CIFAR10)

    def read(train: bool, transform: Any) -> Dataset[tuple[Tensor, int]]:
        try:
            return datasets.CIFAR10(path, train=train, transform=transform, download=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cifar10 {path}: expected the folder cifar-10-batches-py there ({error})"
            ) from None

    train, validation = _split(read(True, augmented), read(True, plain))
    make: Callable[[], nn.Module] = lambda: ResNet(3, 10, widths=(16, 32, 64), blocks=3)  # noqa: E731
    return Task(
        model=make if model is None else _torchvision_model(model, 10),
        loss=F.cross_entropy,
        train=_loader(train, training=True),
        validation=_loader(validation),
        test=_loader(read(False, plain)),
        data_key=_files_key(path),
        fp32_epochs=30,
    )


def _transforms(size: int, normalization: tuple[Sequence[float], Sequence[float]]) -> Any:
    """(augmented, plain) transforms from an image to a normalised tensor."""
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalization)]
    if size <= 32:
        augmented = [v2.RandomCrop(size, padding=4)]
        plain = [v2.Resize((size, size))]
    else:
        augmented = [v2.RandomResizedCrop(size)]
        plain = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    return (
        v2.Compose([*augmented, v2.RandomHorizontalFlip(), *to_tensor]),
        v2.Compose([*plain, *to_tensor]),
    )


def _split(train: Any, plain: Any) -> tuple[Dataset[Any], Dataset[Any]]:
    """A fixed random tenth of the training images, without augmentation, for validation."""
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
    cut = max(1, round(len(order) * VALIDATION_SHARE))
    return Subset(train, order[cut:]), Subset(plain, order[:cut])


def _loader(dataset: Any, training: bool = False) -> DataLoader[Any]:
    # a short last batch would count as much as a full one in BatchNorm's running statistics
    drop_last = training and len(dataset) > BATCH
    return DataLoader(dataset, BATCH, shuffle=training, drop_last=drop_last)


def _torchvision_model(name: str, classes: int) -> Callable[[], nn.Module]:
    from torchvision import models

    if name not in models.list_models(models):
        raise InputError(
            f"unknown model {name!r}; torchvision's classifiers are "
            f"{', '.join(models.list_models(models))}"
        )
    return lambda: models.get_model(name, weights=None, num_classes=classes)


def _files_key(path: Path) -> str:
    """A hash of every file's name, size and time of change."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
