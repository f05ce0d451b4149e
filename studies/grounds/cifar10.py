"""CIFAR-10 from a folder, and ResNet-20 with trained weights.

The folder holds the images, as `cifar-10-batches-py` (the published files; torchvision reads their
pickles once the checksums have proved to be the published ones) or as `train/CLASS/*.jpg` (5,000
images a class) and `test/CLASS/*.jpg` (1,000), 32x32 pixels; and `resnet20.safetensors`, a state
dict of `resnet20.ResNet20` trained on them. A tenth of the training images is set aside for
validation. The weights have seen these: compare models with each other there, and with the FP32
model on the test images.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from grounds.data import Data, Samples, mirrored
from grounds.resnet20 import ResNet20
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from torchvision.io import decode_image

from adq.quant.errors import InputError
from adq.quant.files import write_tensors

BUILD = Path(__file__).parent / "build"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4
PUBLISHED = "cifar-10-batches-py"


def load(folder: Path) -> Data:
    """45,000 training, 5,000 validation and 10,000 test samples, classes mixed.

    Decoded images are kept in `build`. Raises InputError for a folder without the images.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    kept = BUILD / f"cifar10-{place}.safetensors"
    if not kept.exists():
        read = _published if (folder / PUBLISHED).is_dir() else _decoded
        decoded = {**read(folder, "train"), **read(folder, "test")}
        BUILD.mkdir(exist_ok=True)
        write_tensors(kept, decoded, {})
    tensors = load_file(kept)
    parts: dict[str, Samples] = {}
    for split in ("train", "test"):
        images, labels = tensors[f"{split}.images"], tensors[f"{split}.labels"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        parts[split] = ((images[order] / 255 - mean) / std, labels[order])
    images, labels = parts["train"]
    cut = len(labels) // 10
    return Data((images[cut:], labels[cut:]), (images[:cut], labels[:cut]), parts["test"])


def _published(folder: Path, split: str) -> dict[str, Tensor]:
    try:
        found = CIFAR10(folder, train=split == "train", download=False)
    except RuntimeError as error:
        raise InputError(f"{folder / PUBLISHED}: not the files of CIFAR-10 ({error})") from None
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return {f"{split}.images": images, f"{split}.labels": torch.tensor(found.targets)}


def _decoded(folder: Path, split: str) -> dict[str, Tensor]:
    each = 5000 if split == "train" else 1000
    classes = sorted(path for path in (folder / split).glob("*") if path.is_dir())
    files = [sorted(path.glob("*.jpg")) for path in classes]
    if len(classes) != 10 or any(len(found) != each for found in files):
        raise InputError(
            f"{folder / split}: expected ten folders of {each} JPEG images, found "
            f"{[len(found) for found in files]}"
        )
    images = torch.stack([decode_image(str(file)) for found in files for file in found])
    labels = torch.arange(10).repeat_interleave(each)
    return {f"{split}.images": images, f"{split}.labels": labels}


def fp32(folder: Path) -> nn.Module:
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20.safetensors"))
    return model.eval()


def augmented(images: Tensor) -> Tensor:
    """Shifted by up to 4 pixels in both directions, zeros coming in, and mirrored."""
    side = images.shape[-1]
    padded = F.pad(images, (PADDING,) * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, len(images), 1))
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    index = torch.arange(len(images))[:, None, None]
    shifted = padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return mirrored(shifted)
