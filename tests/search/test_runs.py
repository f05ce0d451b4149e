"""What a study keeps of itself: who worked on it, and what each of its layers costs."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny_task
import torch
from tiny_studies import QUICK, Study, study_in

from adq.quant.errors import InputError
from adq.quant.files import write_text
from adq.search.breakdown import read_breakdown
from adq.search.run import resume
from adq.search.runs import read_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_in(tmp_path_factory.mktemp("runs"), **QUICK, act_bits=(3, 8), first_last_bits=0)


def test_the_costs_of_layers_add_up_to_those_of_every_model(study: Study) -> None:
    known = read_breakdown(study.folder)
    assert known is not None
    model = tiny_task.make_task().model()
    numel = {name.removesuffix(".weight"): p.numel() for name, p in model.named_parameters()}
    for layer in known.layers:
        assert layer.weights == numel[layer.name]
        assert layer.fp32.size_bytes == 4 * layer.weights
        for (weight, act), cost in layer.costs.items():
            assert cost.bops == layer.macs * weight * (act or 32)
    for point in (*study.front.points, *study.front.uniform):
        assert set(point.weight_bits) == {layer.name for layer in known.layers}
        costs = [
            layer.costs[point.weight_bits[layer.name], point.act_bits.get(layer.name)]
            for layer in known.layers
        ]
        assert sum(cost.size_bytes for cost in costs) + known.rest.size_bytes == point.size_bytes
        assert sum(cost.bops for cost in costs) == point.bops


def test_a_latency_is_kept_in_seconds(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK, latency="nvidia-t4")
    known = read_breakdown(found.folder)
    assert known is not None
    best = found.front.best
    total = known.rest.latency_s or 0.0
    for layer in known.layers:
        cost = layer.costs[best.weight_bits[layer.name], best.act_bits.get(layer.name)]
        assert cost.latency_s is not None
        total += cost.latency_s
    assert total == pytest.approx(best.latency_s, rel=1e-9)


def test_runs_are_kept_with_their_commands_while_there_is_something_to_do(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    found = study_in(tmp_path, **QUICK)
    (begun,) = read_runs(found.folder)
    more = found.folder.config.trials + 1
    resume(found.folder, tiny_task.make_task(), trials=more)
    resume(found.folder, tiny_task.make_task())  # nothing is left to do
    first, second = read_runs(found.folder)
    assert first == begun
    assert before <= datetime.fromisoformat(first.begun) <= datetime.fromisoformat(second.begun)
    assert first.command.startswith("adq-search --task tiny_task:make_task --budget-bits 4.2 ")
    assert second.command == f"adq-search resume s --out {tmp_path} --trials {more}"
    assert (first.trials, second.trials) == (0, more - 1)
    assert first.device.startswith("cpu: ")
    assert torch.__version__.startswith(first.versions["torch"])


@pytest.mark.parametrize("name", ["runs.json", "layers.json"])
def test_damage_is_said(study: Study, name: str) -> None:
    path = study.folder.file(name)
    whole = path.read_text()
    write_text(path, "{}")
    with pytest.raises(InputError, match=rf"{name} is damaged: KeyError"):
        (read_runs if name == "runs.json" else read_breakdown)(study.folder)
    write_text(path, whole)
