"""The studies of other kinds of models, at toy size, from their files to what is exported.

No kind of model has code of its own in the product: what is tested is that none needs any.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_models

from adq.cli import main
from adq.quant.evaluate import evaluate
from adq.quant.export.loading import load_packed_
from adq.search.config import read_toml
from adq.search.task import import_from_here

ROOT = Path(__file__).parents[2]
TOY = ("--bits", "4,8", "--budget-bits", "6", "--trials", "2", "--epochs", "1")
TOY += ("--final-epochs", "1", "--device", "cpu")
STUDIES = ROOT / "studies" / "models"

# name -> how many layers, the groups that share their bits, the proxies that score it
MODELS = {
    "vit": (10, [], {"kl", "gauss-newton-trace"}),
    "audio": (
        9,
        [("3.conv2", "3.shortcut"), ("4.conv2", "4.shortcut")],
        {"kl", "gauss-newton-trace"},
    ),
    "detector": (
        67,
        [
            *[(f"backbone.body.{i}.conv.2", f"backbone.body.{i + 1}.conv.2") for i in (2, 4, 7)],
            *[(f"backbone.body.{i}.conv.2", f"backbone.body.{i + 1}.conv.2") for i in (11, 14)],
            ("backbone.fpn.inner_blocks.2.0", "backbone.fpn.inner_blocks.1.0"),
        ],
        {"loss"},  # its outputs are two tensors
    ),
}

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, from the root: what it prints as JSON."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["adq-search", *arguments, "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert stopped.value.code == 0, printed.err
        return json.loads(printed.out)

    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_study_goes_from_its_file_to_an_exported_model(
    name: str, run: Run, tmp_path: Path
) -> None:
    layers, ties, proxies = MODELS[name]
    path = STUDIES / f"{name}.toml"
    assert import_from_here("task", read_toml(path)["task"]).__name__ == "make_task"
    toy = f"toy_models:{name}"
    front = run("--config", str(path), "--task", toy, *TOY, "--out", str(tmp_path))
    folder = tmp_path / name

    best = next(point for point in front["points"] if point["id"] == front["best"])
    assert len(best["weight_bits"]) == len(best["act_bits"]) == layers
    parameters = json.loads((folder / "seeds.json").read_text())["seeds"][0]
    grouped = {name for group in ties for name in group[1:]}
    assert grouped.isdisjoint(parameter.partition(":")[2] for parameter in parameters)
    for group in ties:
        assert len({best["weight_bits"][layer] for layer in group}) == 1
    # the first and the last layer have no choice; every other one that leads its group has
    assert len(parameters) == layers - len(grouped) - 2
    scores = json.loads((folder / "sensitivity.json").read_text())["proxies"]
    assert {score["proxy"] for score in scores} == proxies

    task = getattr(toy_models, name)()
    model = load_packed_(task.model(), folder / best["weights"])
    [again] = [r for r in _records(folder / "final") if r["id"] == front["best"]]
    found = evaluate(model, task.test, task.loss, task.metric)
    # rounding puts inputs that lie at a threshold on the next of 256 levels
    assert found.loss == pytest.approx(again["test"]["loss"], rel=1e-2)
    assert found.metric == pytest.approx(best["metric"], abs=0.05)

    for format in ("adq", "onnx", "torch"):
        file = str(tmp_path / f"exported.{format}")
        told = run("export", str(folder), "--format", format, "--out", file)
        compared = told["compared"]
        assert compared is not None, told["notes"]
        assert compared["max_difference"] < 0.05 * compared["largest_output"]
        assert compared["metric"] == pytest.approx(compared["packed_metric"], abs=0.1)
    assert told["budget_bytes"] == (folder / best["weights"]).stat().st_size


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]
