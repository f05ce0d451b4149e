"""Images on disk as batches: against PIL, against one process, and against folders."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rank_pictures import trained
from ranks import started
from torch import Tensor
from torchvision.transforms import v2

from adq.quant.batches import Batches, Prepared, seeded
from adq.quant.errors import InputError
from adq.quant.parallel import group_of
from adq.search.task import load_task
from adq.search.tasks.pictures import Shards, decoded
from adq.search.tasks.place import split_options

COUNT, CLASSES = 14, 3


def picture(seed: int, suffix: str = "png", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "jpeg" if suffix == "jpg" else suffix)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same images in folders and in shards, two of them for training; class by turns."""
    folders, shards = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("shards")
    for split, first in (("train", 0), ("val", 100)):
        for i in range(COUNT):
            content = picture(first + i)
            place = folders / split / f"c{i % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:02d}.png").write_bytes(content)
            name = "x-train-0" + str(i // 8) if split == "train" else "x-validation-00"
            with tarfile.open(shards / f"{name}.tar", "a") as tar:
                add(tar, f"a/{i:02d}.cls", str(i % CLASSES).encode())
                add(tar, f"a/{i:02d}.json", b"{}")
                add(tar, f"a/{i:02d}.png", content)
    return folders, shards


def spec(data: tuple[Path, Path], kind: str = "imagefolder", more: str = "") -> str:
    return f"{kind}:{data[kind == 'webdataset']},size=16,batch=4{more}"


def passes(batches: Batches, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    with seeded(0):
        return [batch for _ in range(count) for batch in batches]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in pairs)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_images_of_all_kinds_become_rgb_bytes(mode: str) -> None:
    image = decoded(picture(0, "tiff", mode))
    assert image.shape == (3, 20, 24)
    assert image.dtype == torch.uint8
    if mode in ("RGB", "RGBA"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        assert np.array_equal(image.permute(1, 2, 0), pixels)


def test_shards_hold_what_the_folders_hold(data: tuple[Path, Path]) -> None:
    for split, test in (("train", False), ("test", True)):
        found, expected = (
            {
                x.numpy().tobytes(): int(y)
                for x, y in (
                    view[i]
                    for view in [getattr(load_task(spec(data, kind)), split).batches.dataset]
                    for i in range(len(view))
                )
            }
            for kind in ("webdataset", "imagefolder")
        )
        if test:
            assert found == expected
            assert len(found) == COUNT
        else:  # of each the same number is set aside, but not the same ones
            assert len(found) == len(expected) == COUNT - 1


def test_a_batch_on_the_device_is_what_transforms_of_floats_give(data: tuple[Path, Path]) -> None:
    task = load_task(spec(data))
    images = [Image.open(path).convert("RGB") for path in sorted((data[0] / "val").glob("*/*.png"))]
    plain = v2.Compose([v2.ToImage(), v2.Resize(18), v2.CenterCrop(16)])
    expected = torch.stack([plain(image) for image in images]).double() / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    expected = (expected - mean[:, None, None]) / deviation[:, None, None]
    found = torch.cat([x for x, _ in task.test])
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert isinstance(task.test, Prepared)
    raw, _ = next(iter(task.test.batches))
    assert raw.dtype == torch.uint8  # what travels to the device


def test_how_many_processes_load_changes_nothing(data: tuple[Path, Path]) -> None:
    one = passes(load_task(spec(data, "webdataset")).train)
    assert same(one, passes(load_task(spec(data, "webdataset", ",workers=2")).train))
    assert len(one) == 6  # 13 images: the last one is left out
    assert not same(one[:3], one[3:])  # other crops in another pass
    first = {y.item() for _, ys in one[:3] for y in ys}
    assert first == {0, 1, 2}


def test_ranks_train_on_the_same_crops_as_one_process_and_decode_their_share(
    data: tuple[Path, Path],
) -> None:
    text = spec(data)
    loss, test, weights, count = trained(text, parallel=False)
    assert count == 2 * 12
    with started(2) as ranks:
        for found in ranks.run(2, trained, text):
            assert not isinstance(found, Exception), found
            assert found[0] == pytest.approx(loss, rel=1e-9)
            assert found[1] == pytest.approx(test, rel=1e-9)
            assert all(np.allclose(a, b, atol=1e-9) for a, b in zip(found[2], weights, strict=True))
            assert found[3] == 2 * 6


def test_a_process_by_itself_gets_all_of_a_batch(data: tuple[Path, Path]) -> None:
    task = load_task(spec(data))
    assert isinstance(task.train, Prepared)
    with seeded(0):
        counts = [n for _, n in group_of(False, torch.device("cpu")).shares(task.train.batches)]
    assert counts == [[4], [4], [4]]


@pytest.mark.parametrize(
    ("text", "path", "options"),
    [
        ("a/b", "a/b", {}),
        ("a,b", "a,b", {}),
        ("a,size=4,batch=2", "a", {"size": "4", "batch": "2"}),
        ("a,colour=4,workers=2", "a,colour=4", {"workers": "2"}),
        ("a,size=1,size=2", "a,size=1", {"size": "2"}),
    ],
)
def test_options_stand_behind_the_path(text: str, path: str, options: dict[str, str]) -> None:
    assert split_options(text) == (path, options)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("imagefolder", "size=4", "size: expected a whole number of at least 8, got '4'"),
        ("imagefolder", "batch=x", "batch: expected a whole number of at least 2, got 'x'"),
        ("webdataset", "workers=-1", "workers: expected a whole number of at least 0, got '-1'"),
        ("cifar10", "size=32", "size is no option of it, which has batch, workers"),
    ],
)
def test_options_that_are_none_are_refused(name: str, more: str, said: str) -> None:
    with pytest.raises(InputError, match=f"task {name}: .*{said}"):
        load_task(f"{name}:somewhere,{more}")


def test_shards_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="others with 'val' or 'test'; there are 0 tar files"):
        load_task(f"webdataset:{tmp_path}")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"broken\.tar: not a tar file of images"):
        Shards([tmp_path / "broken.tar"])
    with tarfile.open(tmp_path / "unlabelled.tar", "w") as tar:
        add(tar, "7.png", picture(0))
    with pytest.raises(InputError, match=r"expected the class of 7 in 7\.cls"):
        Shards([tmp_path / "unlabelled.tar"])
    for split, label in (("train", b"0"), ("val", b"2")):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            add(tar, "7.png", picture(0))
            add(tar, "7.cls", label)
    with pytest.raises(InputError, match="classes 0 to 0, which 'train' has, in 'val', got 2"):
        load_task(f"webdataset:{tmp_path}")


def test_folders_and_hidden_files_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        root = tarfile.TarInfo(".")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        add(tar, "./.DS_Store", b"desktop")
        add(tar, "./._7.png", b"finder")
        add(tar, "./7.png", picture(0))
        add(tar, "./7.cls", b"2")
    shards = Shards([tmp_path / "all.tar"])
    assert (shards.labels.tolist(), shards.content(0)) == ([2], picture(0))


@pytest.mark.parametrize("cut", [False, True])
def test_a_shard_that_is_damaged_in_its_middle_is_not_taken_for_a_short_one(
    tmp_path: Path, cut: bool
) -> None:
    shard = tmp_path / "train.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(3):
            add(tar, f"{i}.png", picture(i))
            add(tar, f"{i}.cls", b"0")
    with tarfile.open(shard) as tar:
        at = tar.getmembers()[2].offset
    content = shard.read_bytes()
    shard.write_bytes(content[: at + 300] if cut else content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(InputError, match=rf"train\.tar.*damaged at byte {at}"):
        Shards([shard])


def test_a_class_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "7.png", picture(0))
        add(tar, "7.cls", b"1" + b"0" * 30)
    with pytest.raises(InputError, match=r"train\.tar: not a tar file of images"):
        Shards([tmp_path / "train.tar"])


def test_more_classes_than_images_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            add(tar, "0.png", picture(0))
            add(tar, "0.cls", b"1000000000000")
    with pytest.raises(
        InputError, match=r"numbered from 0, .* got class 1000000000000 in 1 images"
    ):
        load_task(f"webdataset:{tmp_path}")


def test_a_shard_is_of_one_split(tmp_path: Path) -> None:
    for place, count in (("latest/train-0.tar", 4), ("latest/val-0.tar", 1), ("test/0.tar", 2)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / place, "w") as tar:
            for i in range(count):
                add(tar, f"{i}.png", picture(i))
                add(tar, f"{i}.cls", b"0")
    task = load_task(f"webdataset:{tmp_path},size=16")
    found = [
        sum(len(y) for _, y in batches) for batches in (task.train, task.validation, task.test)
    ]
    assert found == [4, 1, 2], "'latest' holds the word test"
    (tmp_path / "latest/train-0.tar").rename(tmp_path / "latest/trainval-0.tar")
    with pytest.raises(InputError, match=r"shard latest/trainval-0\.tar, got train and val"):
        load_task(f"webdataset:{tmp_path}")


def test_one_image_is_too_few_to_set_some_aside(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "c").mkdir(parents=True)
        (tmp_path / split / "c" / "0.jpg").write_bytes(picture(0, "jpg"))
    with pytest.raises(InputError, match=r"expected 2 images or more in 'train'.*got 1"):
        load_task(f"imagefolder:{tmp_path}")


def test_an_image_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "c").mkdir(parents=True)
        for i in range(2):
            (tmp_path / split / "c" / f"{i}.jpg").write_bytes(picture(0, "jpg")[:200])
    task = load_task(f"imagefolder:{tmp_path},size=16")
    with pytest.raises(ValueError, match=r"val/c/0\.jpg cannot be read"):
        next(iter(task.test))
    (tmp_path / "val" / "c" / "0.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"val/c/0\.jpg cannot be read: not an image$"):
        next(iter(task.test))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "val" / "c" / "0.jpg").write_bytes(picture(0, "jpg"))
    with pytest.raises(ValueError, match=r"val/c/0\.jpg cannot be read: .* could be decompression"):
        next(iter(task.test))
