"""Image classification from data on disk, with torchvision's models by name.

- `imagefolder:PATH`: `PATH/train/CLASS/*.jpg` and one or both of `PATH/val` and `PATH/test` with
  the same classes.
- `webdataset:PATH`: the same splits as tar files, each image KEY.jpg with its class, a number, in
  KEY.cls. A shard belongs to the split whose name, `train`, `val` or `test`, is in its own, or else
  in its folders'.
- `cifar10:PATH`: the folder that holds `cifar-10-batches-py`; its files are pickles, which
  torchvision reads only after their checksums have proved to be the published ones.

Where only one of `val` and `test` is there it is the test split, and a tenth of `train`, 10,000
images at most, is set aside for validation. Inputs are scaled by ImageNet's mean and deviation,
CIFAR-10's by its own.

Options follow the path, like `imagefolder:photos,size=160,batch=256,workers=8`: the side of an
image (224; not for CIFAR-10), images of a batch (128), processes that load and decode (0: the
training's own). How many load has no influence on results.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from adq.quant.batches import Batches, Prepared
from adq.quant.errors import InputError
from adq.search.task import Task
from adq.search.tasks.pictures import IMAGES, Files, Pictures, Shards, View, loader
from adq.search.tasks.place import split_options
from adq.search.tasks.resnet import ResNet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
VALIDATION_SHARE = 0.1
VALIDATION_MOST = 10_000  # one standard error is then half a point at most
BATCH = 128
IMAGE_SIZE = 224
SPLITS = ("train", "val", "test")


def image_folder(place: str, model: str | None = None) -> Task:
    """The task on a folder of folders; without a model's name, torchvision's resnet18."""
    path, options = _place("imagefolder", place)
    if not (path / "train").is_dir():
        raise InputError(f"imagefolder {path}: expected a folder 'train' with one folder a class")
    splits = [split for split in SPLITS if (path / split).is_dir()]
    if splits == ["train"]:
        raise InputError(f"imagefolder {path}: expected a folder 'val' or 'test' beside 'train'")
    found, classes = {}, {}
    for split in splits:
        found[split], classes[split] = _folder(path, split)
        if classes[split] != classes["train"]:
            raise InputError(f"imagefolder {path}: '{split}' and 'train' have different classes")
    files = (p for p in path.rglob("*") if p.is_file())
    return _task(found, len(classes["train"]), options, _files_key(path, files), model)


def web_dataset(place: str, model: str | None = None) -> Task:
    """The task on a folder of tar shards; without a model's name, torchvision's resnet18."""
    path, options = _place("webdataset", place)
    tars = sorted(path.rglob("*.tar"))
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for tar in tars:
        for split in _splits_of(tar.relative_to(path)):
            shards[split].append(tar)
    if not shards["train"] or not (shards["val"] or shards["test"]):
        raise InputError(
            f"webdataset {path}: expected tar files with 'train' in their names or their folders', "
            f"and others with 'val' or 'test'; there are {len(tars)} tar files"
        )
    found: dict[str, Pictures] = {split: Shards(tars) for split, tars in shards.items() if tars}
    if empty := [split for split, pictures in found.items() if not len(pictures)]:
        raise InputError(f"webdataset {path}: no image in the shards of '{empty[0]}'")
    classes = int(found["train"].labels.max()) + 1
    if classes > len(found["train"]):
        raise InputError(
            f"webdataset {path}: expected classes numbered from 0, with an image of each in "
            f"'train', got class {classes - 1} in {len(found['train'])} images"
        )
    for split, pictures in found.items():
        low, high = int(pictures.labels.min()), int(pictures.labels.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"webdataset {path}: expected classes 0 to {classes - 1}, which 'train' has, in "
                f"'{split}', got {low if low < 0 else high}"
            )
    return _task(found, classes, options, _files_key(path, tars), model)


def _splits_of(shard: Path) -> list[str]:
    """The one split that a shard is of, or none; InputError for a name with several, as images that
    are trained on must not be tested on."""
    names = (shard.name, str(shard.parent))
    found = next((s for name in names if (s := [x for x in SPLITS if x in name])), [])
    if len(found) > 1:
        raise InputError(
            f"webdataset: expected one of {', '.join(SPLITS)} in the name of shard {shard}, got "
            f"{' and '.join(found)}: rename it"
        )
    return found


def cifar10(place: str, model: str | None = None) -> Task:
    """CIFAR-10 from disk; without a model's name, the ResNet-20 layout of He et al."""
    from torchvision import datasets

    path, options = _place("cifar10", place, ("batch", "workers"))
    augmented, plain = _cifar_transforms()

    def read(train: bool, transform: Any) -> Dataset[tuple[Tensor, int]]:
        try:
            return datasets.CIFAR10(path, train=train, transform=transform, download=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cifar10 {path}: expected the folder cifar-10-batches-py there ({error})"
            ) from None

    def load(dataset: Any, training: bool = False) -> DataLoader[Any]:
        batch, workers = options.get("batch", BATCH), options.get("workers", 0)
        # a short last batch would count as much as a full one in BatchNorm's running statistics
        drop_last = training and len(dataset) > batch
        return DataLoader(
            dataset, batch, shuffle=training, drop_last=drop_last, num_workers=workers
        )

    train, validation = read(True, augmented), read(True, plain)
    kept, aside = _split(len(validation))  # type: ignore[arg-type]
    make: Callable[[], nn.Module] = lambda: ResNet(3, 10, widths=(16, 32, 64), blocks=3)  # noqa: E731
    return Task(
        model=make if model is None else _torchvision_model(model, 10),
        loss=F.cross_entropy,
        train=load(Subset(train, kept.tolist()), training=True),
        validation=load(Subset(validation, aside.tolist())),
        test=load(read(False, plain)),
        data_key=_files_key(path, (p for p in path.rglob("*") if p.is_file())),
        fp32_epochs=30,
    )


def _place(
    name: str, text: str, known: tuple[str, ...] = ("size", "batch", "workers")
) -> tuple[Path, dict[str, int]]:
    """The path and the options of a task; InputError for options that are none."""
    path, given = split_options(text)
    least = {"size": 8, "batch": 2, "workers": 0}
    for key, value in given.items():
        if key not in known:
            raise InputError(f"task {name}: {key} is no option of it, which has {', '.join(known)}")
        if not value.isdecimal() or int(value) < least[key]:
            raise InputError(
                f"task {name}: {key}: expected a whole number of at least {least[key]}, got "
                f"{value!r}"
            )
    return Path(path), {key: int(value) for key, value in given.items()}


def _folder(path: Path, split: str) -> tuple[Pictures, list[str]]:
    """The images of one split, and their classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import find_classes

    try:
        classes, numbers = find_classes(path / split)
        files = ImageFolder.make_dataset(path / split, numbers, IMAGES)
    except (OSError, ValueError) as error:
        raise InputError(
            f"imagefolder {path}: expected {split}/CLASS/IMAGE files ({error})"
        ) from None
    return Files(path / split, files), classes


def _task(
    found: Mapping[str, Pictures],
    classes: int,
    options: Mapping[str, int],
    data_key: str,
    model: str | None,
) -> Task:
    """The task on the splits that were found."""
    from torchvision.transforms import v2

    size = options.get("size", IMAGE_SIZE)
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    plain = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])
    scaled = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])

    def load(view: View, augmented: bool = False) -> Batches:
        batch, workers = options.get("batch", BATCH), options.get("workers", 0)
        return Prepared(loader(view, batch, workers, augmented=augmented), scaled)

    train = found["train"]
    if "val" in found and "test" in found:
        kept, validation = None, View(found["val"], plain)
    else:
        kept, aside = _split(len(train))
        validation = View(train, plain, aside)
    return Task(
        model=_torchvision_model(model or "resnet18", classes),
        loss=F.cross_entropy,
        train=load(View(train, augmented, kept), augmented=True),
        validation=load(validation),
        test=load(View(found["test" if "test" in found else "val"], plain)),
        data_key=data_key,
        fp32_epochs=30,
        fp32_lr=1e-3,
    )


def _cifar_transforms() -> Any:
    """(augmented, plain) transforms from an image to a normalised tensor."""
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*CIFAR10)]
    augmented = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    return v2.Compose([*augmented, *to_tensor]), v2.Compose(to_tensor)


def _split(samples: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Training images that are kept, and those set aside for validation: fixed random ones."""
    if samples < 2:
        raise InputError(
            f"expected 2 images or more in 'train', a tenth for validation; got {samples}"
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).numpy()
    cut = min(VALIDATION_MOST, max(1, round(samples * VALIDATION_SHARE)))
    return order[cut:], order[:cut]


def _torchvision_model(name: str, classes: int) -> Callable[[], nn.Module]:
    from torchvision import models

    if name not in models.list_models(models):
        raise InputError(
            f"unknown model {name!r}; torchvision's classifiers are "
            f"{', '.join(models.list_models(models))}"
        )
    return lambda: models.get_model(name, weights=None, num_classes=classes)


def _files_key(path: Path, files: Iterable[Path]) -> str:
    """A hash of every file's name, size and time of change."""
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
