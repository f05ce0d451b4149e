"""The ImageNet recipe: its files are valid, its commands are the ones it says, its data fit."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adq
from adq.quant.batches import Prepared
from adq.quant.files import read_json, write_json
from adq.quant.spec import BitVector
from adq.search.config import make_config, read_toml
from adq.search.task import load_task

HERE = Path(__file__).parents[2] / "studies" / "imagenet_resnet18"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    yield
    sys.path[:] = before
    for name in ("made_up", "prove", "run"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, importable: None) -> Path:
    import made_up

    folder = tmp_path_factory.mktemp("made_up")
    made_up.write(folder)
    return folder


def test_folders_and_shards_hold_the_same_200_images(data: Path) -> None:
    found = []
    for kind, name in (("imagefolder", "images"), ("webdataset", "shards")):
        task = load_task(f"{kind}:{data / name},size=32", "squeezenet1_1")
        assert isinstance(task.train, Prepared)
        assert isinstance(task.test, Prepared)
        splits = [split.batches.dataset.pictures for split in (task.train, task.test)]  # type: ignore[attr-defined]
        found.append(
            [sorted((p.content(i), int(p.labels[i])) for i in range(len(p))) for p in splits]
        )
    assert [len(split) for split in found[0]] == [150, 50]
    assert found[0] == found[1]


def words_of(monkeypatch: pytest.MonkeyPatch, *more: str) -> list[list[str]]:
    """What run.py asks of adq-search."""
    import run

    asked: list[list[str]] = []
    monkeypatch.setattr(run, "adq", lambda *words: asked.append(list(words)))
    monkeypatch.setattr(sys, "argv", ["run.py", *more])
    run.main()
    return asked


def config_of(words: list[str]) -> Any:
    """The configuration of a study that these words begin."""
    given = {w[2:].replace("-", "_"): v for w, v in zip(words[::2], words[1::2], strict=True)}
    file = given.pop("config")
    numbers = {"cpus_per_trial": int, "gpus_per_trial": float}
    given = {name: numbers.get(name, str)(value) for name, value in given.items()}
    return make_config(read_toml(file), given)


def searched(out: Path) -> list[str]:
    """A search that has found its bits, and the options that go on from there."""
    bits = BitVector({"conv1": 8, "fc": 3}, {"conv1": 8, "fc": 4})
    (out / "imagenet-search").mkdir()
    write_json(out / "imagenet-search" / "best.bits.json", bits.to_json())
    return ["--weights", "w.pth", "--out", str(out)]


def test_one_command_starts_both_studies_and_exports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--data", "imagefolder:/data", *searched(tmp_path)]
    search, final, packed, onnx = words_of(monkeypatch, *options)
    first, second = config_of(search), config_of(final)
    assert (first.study, second.study) == ("imagenet-search", "imagenet-final")
    assert first.budget == second.budget
    assert first.budget_bits == 2.81
    assert first.task == second.task == "imagefolder:/data,batch=256,workers=8"
    assert second.layers == "conv1=8/8,fc=3/4"
    assert second.training(1, "cuda").weights_average == 0.9999
    assert packed == ["export", "imagenet-final", "--out", str(tmp_path)]
    assert onnx == [*packed, "--format", "onnx"]


def test_many_gpus_train_candidates_side_by_side_and_the_final_model_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--data", "webdataset:/data", *searched(tmp_path)]
    options += ["--address", "auto", "--gpus", "64", "--decoders", "3"]
    search, final, *_ = words_of(monkeypatch, *options)
    first, second = config_of(search), config_of(final)
    assert first.address == second.address == "auto"
    assert (first.cpus_per_trial, first.gpus_per_trial) == (4, None)
    assert (second.cpus_per_trial, second.gpus_per_trial) == (256, 64)
    assert second.task == "webdataset:/data,batch=2048,workers=3"
    (tmp_path / "imagenet-search" / "study.toml").touch()
    again = words_of(monkeypatch, *options)
    assert again[0] == ["resume", "imagenet-search", "--out", str(tmp_path)]


def test_the_last_stage_runs_on_shards_with_averaged_weights(data: Path, tmp_path: Path) -> None:
    """A smaller network than ResNet-18, on this process alone: prove.py runs the whole recipe."""
    front = adq.search(
        f"webdataset:{data / 'shards'},size=32,batch=32,workers=1",
        adq.Budget(bits=4.5),
        model="squeezenet1_1",
        layers="*=4/4",
        trials=1,
        epochs=0,
        final_epochs=2,
        fp32_epochs=0,
        proxies="gauss-newton-trace",
        weights_average=0.9,
        device="cpu",
        out=str(tmp_path),
    )
    (point,) = front.points
    assert set(point.weight_bits.values()) == {4}
    model = adq.load(front.folder)
    task = load_task(f"webdataset:{data / 'shards'},size=32", "squeezenet1_1")
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.test)
    assert right == round(point.metric * 50)


def test_the_summary_and_the_table_are_those_of_the_results() -> None:
    import prove

    results = read_json(HERE / "results.json")
    assert read_json(HERE / "summary.json") == prove.summary_of(results)
    assert prove.table_of(results) in (HERE / "README.md").read_text()
