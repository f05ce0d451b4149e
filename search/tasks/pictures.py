"""Any number of images on disk, in folders or in tar shards, as batches for training.

A data set keeps where its images are, not the images: some tens of bytes for each, in arrays that
the processes of a DataLoader share. Images are decoded, cropped and resized in those processes and
leave them as bytes; what makes them numbers around zero runs on the model's device (`Prepared`).

How an image is augmented follows from a seed that goes with its index. It depends neither on how
many processes load images nor on how many ranks share the batches. (torchvision's flips and crops
of a batch on a GPU would draw once for the whole batch.)
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as vision

from adq.quant.errors import InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".pgm", ".tif", ".tiff")
LABEL = ".cls"

Key = int | tuple[int, int]
"""The index of an image, or (index, seed) of one to augment."""


class Pictures:
    """Encoded images and their classes. `labels` (n,), int64."""

    labels: "np.ndarray[Any, np.dtype[np.int64]]"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Which one it is, for an error."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        raise NotImplementedError


class Files(Pictures):
    """One file an image."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]]) -> None:
        """`files` under `root`, and their classes."""
        self.root = os.fsencode(root)
        self.names = np.array([os.fsencode(os.path.relpath(name, root)) for name, _ in files])
        self.labels = np.array([label for _, label in files], dtype=np.int64)

    def name(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.names[index].item()))

    def content(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()


class Shards(Pictures):
    """WebDataset's tar files: for each key an image and its class, KEY.jpg and KEY.cls.

    They are read once to find where the images lie, and then at these places, in any order.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        """Raises InputError for a shard that cannot be read, or has an image without its class."""
        self.shards = [str(shard) for shard in shards]
        found = [
            (shard, *entry) for shard, path in enumerate(self.shards) for entry in _entries(path)
        ]
        table = np.array(found, dtype=np.int64).reshape(-1, 4)
        self.where, self.labels = table[:, :3].copy(), table[:, 3].copy()

    def name(self, index: int) -> str:
        shard, offset, _ = self.where[index].tolist()
        return f"{self.shards[shard]}, byte {offset}"

    def content(self, index: int) -> bytes:
        shard, offset, size = self.where[index].tolist()
        with open(self.shards[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def _entries(shard: str) -> list[tuple[int, int, int]]:
    """(offset, bytes, class) of each image of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                # WebDataset's rule: the key is all before the first point of the file's name
                path = PurePosixPath(member.name)
                stem, _, kind = path.name.partition(".")
                if not stem or not member.isfile():
                    continue  # folders, "." among them, and hidden files such as .DS_Store
                key, kind = str(path.with_name(stem)), f".{kind.lower()}"
                if kind in IMAGES:
                    images[key] = member.offset_data, member.size
                elif kind == LABEL:
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = int(np.int64(int(content.read())))
            _check_end(tar)
    except (OSError, OverflowError, tarfile.TarError, ValueError) as error:
        raise InputError(f"shard {shard}: not a tar file of images ({error})") from None
    if missing := next((key for key in images if key not in labels), None):
        raise InputError(f"shard {shard}: expected the class of {missing} in {missing}{LABEL}")
    return [(*place, labels[key]) for key, place in images.items()]


def _check_end(tar: tarfile.TarFile) -> None:
    """ReadError where what follows the last member is no end: tarfile takes a damaged or cut header
    for one, and all that comes after it would be lost without a word."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def decoded(content: bytes) -> Tensor:
    """An image as (3, height, width) uint8; grey and CMYK ones become RGB.

    By Pillow: torchvision's own decoders are deprecated since 0.29.
    """
    with Image.open(io.BytesIO(content)) as image:
        return vision.pil_to_tensor(image.convert("RGB"))


class View(Dataset[tuple[Tensor, int]]):
    """Some of the pictures, each through `transform` from uint8 image to uint8 image."""

    def __init__(
        self,
        pictures: Pictures,
        transform: Callable[[Tensor], Tensor],
        indices: "np.ndarray[Any, np.dtype[np.int64]] | None" = None,
    ) -> None:
        self.pictures, self.transform = pictures, transform
        self.indices = np.arange(len(pictures)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        index = int(self.indices[index])
        try:
            image = decoded(self.pictures.content(index))
        except UnidentifiedImageError:  # it says only where in memory the bytes are
            raise ValueError(f"{self.pictures.name(index)} cannot be read: not an image") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.pictures.name(index)} cannot be read: {error}") from None
        label = int(self.pictures.labels[index])
        if seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class Seeded(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (index, seed); a short last one is left out, as it would count as much
    as a full one in BatchNorm's running statistics, unless it is the only one."""

    def __init__(self, samples: int, batch: int) -> None:
        self.samples, self.batch = samples, batch

    def __len__(self) -> int:
        return max(1, self.samples // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.samples).tolist()
        seeds = torch.randint(2**63 - 1, (self.samples,)).tolist()
        for start in range(0, len(self) * self.batch, self.batch):
            stop = start + self.batch
            yield list(zip(order[start:stop], seeds[start:stop], strict=True))


def loader(view: View, batch: int, workers: int, *, augmented: bool = False) -> DataLoader[Any]:
    """Batches of uint8 images and classes, loaded by so many processes; in order, or shuffled and
    augmented."""
    if augmented:
        return DataLoader(view, batch_sampler=Seeded(len(view), batch), num_workers=workers)
    return DataLoader(view, batch, num_workers=workers)
