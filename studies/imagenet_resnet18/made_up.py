"""200 images that stand in for ImageNet, in folders and in shards, and weights to begin with.

    python made_up.py FOLDER

Each class has a colour and a direction of stripes of its own, under noise. `FOLDER/images` is an
ImageFolder (15 images a class to train on, 5 to test), `FOLDER/shards` holds the same as
WebDataset's tar files, and `FOLDER/resnet18.safetensors` a ResNet-18 that nobody has trained.
"""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

CLASSES, TRAIN, TEST = 10, 15, 5
SHARDS = {"train": 3, "val": 1}
HEIGHT, WIDTH = 48, 64


def image(label: int, number: int) -> bytes:
    """A JPEG of one class."""
    rng = np.random.default_rng([label, number])
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    angle = np.pi * label / CLASSES
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3 + rng.uniform(0, 2 * np.pi))
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / CLASSES + np.arange(3) / 3))
    pixels = 128 + 60 * stripes[:, :, None] * colour + rng.normal(0, 20, (HEIGHT, WIDTH, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
    return out.getvalue()


def write(folder: Path) -> None:
    """All of it; what is there already stays."""
    images, shards, weights = folder / "images", folder / "shards", folder / "resnet18.safetensors"
    if weights.exists():
        return
    shards.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + TEST))):
        made = [(label, n, image(label, n)) for n in numbers for label in range(CLASSES)]
        for label, n, content in made:
            place = images / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n:02d}.jpg").write_bytes(content)
        for shard in range(SHARDS[split]):
            with tarfile.open(shards / f"made-up-{split}-{shard:03d}.tar", "w") as tar:
                for label, n, content in made[shard :: SHARDS[split]]:
                    for kind, data in (("jpg", content), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{label}-{n:02d}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    torch.manual_seed(0)
    save_file(resnet18(num_classes=CLASSES).state_dict(), weights)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
