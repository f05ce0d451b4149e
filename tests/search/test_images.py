"""Image tasks on made-up folders: which file ends up in which split, and what is refused."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

from adq.quant.batches import Batches, Prepared
from adq.quant.errors import InputError
from adq.search.task import Task, load_task
from adq.search.tasks import images
from adq.search.tasks.pictures import View

CLASSES = ("cat", "dog", "owl")


def write_images(folder: Path, per_class: int, classes: tuple[str, ...] = CLASSES) -> None:
    """Grey images, PNG and JPEG by turns and of several sizes, the class in the red channel."""
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.full((20 + i, 24, 3), 128, dtype=np.uint8)
            pixels[:, :, 0] = 60 * index + 40
            suffix = "png" if i % 2 else "jpg"
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}", quality=95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12, 2 and 3 images a class in train, val and test."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 2), ("test", 3)):
        write_images(root / split, count)
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 40 pixels a side instead of 224: the same code, a fraction of the time."""
    monkeypatch.setattr(images, "IMAGE_SIZE", 40)


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    parts = list(batches)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def view(batches: Batches) -> View:
    assert isinstance(batches, Prepared)
    return batches.batches.dataset  # type: ignore[attr-defined, no-any-return]


def sizes(task: Task) -> list[int]:
    return [len(whole(split)[1]) for split in (task.train, task.validation, task.test)]


def refused(spec: str, model: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        load_task(spec, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_three_folders_are_the_three_splits(folder: Path) -> None:
    task = load_task(f"imagefolder:{folder}")
    assert sizes(task) == [36, 6, 9]
    for split in (task.train, task.validation, task.test):
        x, y = whole(split)
        assert x.shape[1:] == (3, 40, 40)
        red = x[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485  # ImageNet's deviation and mean, undone
        np.testing.assert_allclose(red, (60 * y + 40) / 255, atol=0.02)  # JPEG's loss, bytes


def test_classes_are_in_equal_shares_and_named_by_their_folders(folder: Path) -> None:
    task = load_task(f"imagefolder:{folder}")
    assert torch.bincount(whole(task.test)[1]).tolist() == [3, 3, 3]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_single_held_out_folder_is_the_test_split(tmp_path: Path, split: str) -> None:
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / split, 2)
    task = load_task(f"imagefolder:{tmp_path}")
    assert sizes(task) == [27, 3, 6]
    train, validation = view(task.train), view(task.validation)
    assert sorted([*train.indices, *validation.indices]) == list(range(30))
    again = view(load_task(f"imagefolder:{tmp_path}").validation)
    assert again.indices.tolist() == validation.indices.tolist()


def test_no_more_is_set_aside_than_measures_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "VALIDATION_MOST", 2)
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 1)
    assert sizes(load_task(f"imagefolder:{tmp_path}")) == [28, 2, 3]


def test_held_out_images_are_never_augmented(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 10)
    write_images(tmp_path / "test", 2)
    rng = np.random.default_rng(0)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)
    task = load_task(f"imagefolder:{tmp_path}")
    for split in (task.validation, task.test):
        assert torch.equal(whole(split)[0], whole(split)[0])
    train = view(task.train)
    noisy = next(i for i in range(27) if train[i][0].float().std() > 40)
    assert not torch.equal(train[noisy, 1][0], train[noisy, 2][0])


def test_without_a_name_the_model_is_resnet18_for_the_folders_classes(folder: Path) -> None:
    model = load_task(f"imagefolder:{folder}").model()
    assert type(model).__name__ == "ResNet"
    assert model.fc.out_features == 3
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20


def test_a_named_model_gets_the_folders_classes(folder: Path) -> None:
    model = load_task(f"imagefolder:{folder}", "squeezenet1_1").model()
    assert type(model).__name__ == "SqueezeNet"
    assert model(torch.zeros(2, 3, 40, 40)).shape == (2, 3)


def test_an_unknown_model_is_answered_with_the_known_ones(folder: Path) -> None:
    text = refused(f"imagefolder:{folder}", "resnet17")
    assert text.startswith("unknown model 'resnet17'; torchvision's classifiers are ")
    assert " resnet18," in text
    assert "raft" not in text  # torchvision has other models, for other tasks


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(f"imagefolder:{nowhere}").startswith(f"imagefolder {nowhere}: expected a folder")
    write_images(tmp_path / "train", 2)
    assert refused(f"imagefolder:{tmp_path}").endswith("a folder 'val' or 'test' beside 'train'")
    write_images(tmp_path / "test", 1, ("cat", "dog", "wolf"))
    assert "'test' and 'train' have different classes" in refused(f"imagefolder:{tmp_path}")


def test_a_class_without_an_image_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 1)
    (tmp_path / "test").mkdir()
    assert "expected test/CLASS/IMAGE files" in refused(f"imagefolder:{tmp_path}")
    (tmp_path / "test" / "cat").mkdir()
    assert "expected test/CLASS/IMAGE files" in refused(f"imagefolder:{tmp_path}")


def test_the_data_key_follows_the_files(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "test", 1)

    def key() -> str:
        return load_task(f"imagefolder:{tmp_path}").data_key

    first = key()
    assert key() == first
    picture = tmp_path / "train" / "cat" / "0.jpg"
    os.utime(picture, ns=(0, 1))
    touched = key()
    picture.rename(picture.with_name("9.jpg"))
    renamed = key()
    picture.with_name("9.jpg").write_bytes(b"longer than before" * 100)
    assert len({first, touched, renamed, key()}) == 4


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's own layout with 8 images a file; torchvision is told these files' checksums."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batch(name: str) -> list[str]:
        pixels = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        np.save(tmp_path / f"{name}.npy", pixels)  # for the test to compare with
        return [name, write(name, {"data": pixels, "labels": list(range(8))})]

    names = [str(i) for i in range(10)]
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch")])
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10_from_its_own_files(batches: Path) -> None:
    task = load_task(f"cifar10:{batches}")
    assert sizes(task) == [36, 4, 8]
    x, y = whole(task.test)
    assert y.tolist() == list(range(8))
    raw = np.load(batches / "test_batch.npy").reshape(8, 3, 32, 32) / 255
    mean, deviation = np.array(images.CIFAR10)[:, :, None, None]
    np.testing.assert_allclose(x, (raw - mean) / deviation, atol=1e-5)
    train = task.train.dataset  # type: ignore[attr-defined]
    assert train[0][0].shape == (3, 32, 32)
    assert not torch.equal(train[0][0], train[0][0])  # cropped and flipped
    assert torch.equal(whole(task.validation)[0], whole(task.validation)[0])


def test_cifar10_has_a_resnet20_or_the_model_named(batches: Path) -> None:
    model = load_task(f"cifar10:{batches}").model()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    convolutions = [
        m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3
    ]
    assert len(convolutions) == 19  # with the linear layer, twenty; shortcuts do not count
    named = load_task(f"cifar10:{batches}", "squeezenet1_1").model()
    assert named(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert "unknown model" in refused(f"cifar10:{batches}", "nosuch")


def test_cifar10_that_is_missing_or_damaged_is_refused(batches: Path, tmp_path: Path) -> None:
    assert "expected the folder cifar-10-batches-py there" in refused(f"cifar10:{tmp_path}/nowhere")
    (batches / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    assert refused(f"cifar10:{batches}").startswith(f"cifar10 {batches}: expected the folder")
