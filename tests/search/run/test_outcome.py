"""What a study leaves, recomputed from its files, and that its seed decides it."""

import json
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny_task
import torch
from safetensors.torch import load_file
from tiny_studies import BUDGET, QUICK, Study, all_points, objectives_of, raw, study_in

from adq.quant.evaluate import evaluate
from adq.quant.export.loading import load_packed_
from adq.quant.spec import BitVector
from adq.search.folder import FINAL, MODELS, TRIALS
from adq.search.run import load_front

NUMEL = {"conv1": 54, "conv2": 432, "conv3": 864, "hidden": 156, "out": 130}


MACS = {"conv1": 54 * 64, "conv2": 432 * 9, "conv3": 864, "hidden": 156, "out": 130}


@pytest.fixture(scope="module")
def two_costs(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Weight and input bits are free, in the first and last layer as well."""
    options = {"act_bits": (3, 8), "first_last_bits": 0, "budget_bits": 3.5, "seed": 2}
    return study_in(tmp_path_factory.mktemp("two"), **options)


@pytest.fixture(params=["study", "two_costs"])
def any_study(request: pytest.FixtureRequest) -> Study:
    return request.getfixturevalue(request.param)


def average(bits: dict[str, int], names: Any = NUMEL) -> float:
    return sum(NUMEL[n] * bits[n] for n in names) / sum(NUMEL[n] for n in names)


def test_every_promised_file_is_there(study: Study) -> None:
    path = study.folder.path
    promised = ["study.toml", "study.db", "fp32.safetensors", "fp32.json", "sensitivity.json"]
    promised += ["sensitivity.csv", "front.json", "best.safetensors", "best.bits.json"]
    promised += ["results.json", "clock.json", "seeds.json", TRIALS, FINAL, MODELS]
    promised += ["layers.json", "runs.json"]
    of_work = {"lock", "checkpoints", "drivers", "running"}
    assert {p.name for p in path.iterdir()} - of_work == set(promised)
    assert not [p for name in of_work for p in (path / name).glob("*")]
    assert {p.name for p in (path / TRIALS).iterdir()} == {f"{i:04d}.json" for i in range(8)}
    finals = {p.stem for p in (path / FINAL).iterdir()}
    assert {p.stem for p in (path / MODELS).iterdir()} == finals
    assert {p.id for p in study.front.points} <= finals
    assert study.folder.status() == "finished"
    assert study.front.folder == str(path)
    assert not list(path.rglob("*.tmp"))


def test_front_json_has_the_schemas_keys_and_no_others(any_study: Study) -> None:
    data = json.loads(any_study.folder.file("front.json").read_text())
    assert set(data) == {
        "schema", "study", "task", "split", "metric_name", "fp32_metric", "budget",
        "objectives", "best", "knee", "hypervolume", "points", "uniform",
    }  # fmt: skip
    assert data["schema"] == "adq-front/2"
    assert data["study"] == "s"
    assert data["task"] == "tiny_task:make_task"
    assert data["split"] == "test"
    assert data["metric_name"] == "accuracy"
    for point in data["points"]:
        assert set(point) == {
            "id", "metric", "metric_stderr", "samples", "validation_metric", "validation_loss",
            "average_bits", "average_bits_searched", "average_act_bits", "size_bytes", "bops",
            "latency_s", "weight_bits", "act_bits", "seed", "weights",
        }  # fmt: skip
    assert data["points"] == [asdict(p) for p in any_study.front.points]


def test_the_front_has_points_to_choose_from(any_study: Study) -> None:
    """The tests around this one say little about a front of one."""
    assert len(any_study.front.points) >= 2


def test_each_points_metric_is_that_of_its_file_on_the_test_split(any_study: Study) -> None:
    task = tiny_task.make_task()
    for point in all_points(any_study.front):
        model = load_packed_(tiny_task.TinyNet(), any_study.folder.path / point.weights)
        found = evaluate(model, task.test, task.loss, task.metric)
        assert point.metric == found.metric
        assert point.metric_stderr == found.metric_stderr


def test_each_points_costs_are_those_of_its_bits_and_its_file(any_study: Study) -> None:
    pinned = ("conv1", "out") if any_study.folder.config.first_last_bits else ()
    for point in all_points(any_study.front):
        assert point.average_bits == average(point.weight_bits)
        assert point.average_bits_searched == average(
            point.weight_bits, [n for n in NUMEL if n not in pinned]
        )
        assert point.bops == sum(
            MACS[n] * w * point.act_bits[n] for n, w in point.weight_bits.items()
        )
        assert point.size_bytes == (any_study.folder.path / point.weights).stat().st_size
        assert point.latency_s is None


def test_pinned_layers_keep_their_bits_and_the_others_vary(study: Study, two_costs: Study) -> None:
    for name, width in (("conv1", {8}), ("out", {8})):
        assert {p.weight_bits[name] for p in study.front.points} == width
        assert {r.bits.weight[name] for r in study.folder.records(TRIALS)} == width
        assert len({r.bits.weight[name] for r in two_costs.folder.records(TRIALS)}) > 1
    for record in two_costs.folder.records(TRIALS):
        assert record.costs.average_bits_searched == record.costs.average_bits


def test_the_fp32_metric_is_that_of_the_fp32_weights(any_study: Study) -> None:
    task, model = tiny_task.make_task(), tiny_task.TinyNet()
    model.load_state_dict(load_file(any_study.folder.file("fp32.safetensors")))
    assert evaluate(model, task.test, task.loss, task.metric).metric == any_study.front.fp32_metric


def undominated(records: dict[str, dict[str, Any]], objectives: list[str]) -> set[str]:
    def row(record: dict[str, Any]) -> list[float]:
        return [-record["validation"]["metric"]] + [record["costs"][name] for name in objectives]

    rows = {id: row(record) for id, record in records.items()}
    return {
        id
        for id, mine in rows.items()
        if not any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True))
            for other in rows.values()
        )
    }


def test_no_point_is_dominated_and_no_undominated_record_is_left_out(any_study: Study) -> None:
    objectives, trials = objectives_of(any_study), raw(any_study, TRIALS)
    finals = {k: v for k, v in raw(any_study, FINAL).items() if k.startswith("t")}

    def row(record: dict[str, Any]) -> Any:
        return record["validation"]["metric"], *(record["costs"][n] for n in objectives)

    trained = {f"t{id}" for id in undominated(trials, objectives)}
    assert set(finals) <= trained
    # of trials that are equal in every objective one is trained
    assert {row(trials[id[1:]]) for id in finals} == {row(trials[id[1:]]) for id in trained}
    shown = {p.id for p in any_study.front.points}
    front = undominated(finals, objectives)
    assert shown <= front
    assert {row(finals[id]) for id in shown} == {row(finals[id]) for id in front}
    costs = [[getattr(p, name) for name in objectives] for p in any_study.front.points]
    assert costs == sorted(costs)


def test_every_trial_and_every_point_is_within_the_budget(any_study: Study) -> None:
    limit = any_study.folder.config.budget_bits
    records = [*raw(any_study, TRIALS).values()]
    assert all(r["costs"]["average_bits"] <= limit for r in records)
    assert max(r["costs"]["average_bits"] for r in records) > limit - 0.3
    assert all(p.average_bits <= limit for p in any_study.front.points)
    assert len({json.dumps(r["bits"]) for r in records}) == len(records) == 8


def test_the_best_is_the_best_on_the_validation_split(any_study: Study) -> None:
    finals = raw(any_study, FINAL)
    ranked = sorted(
        (p.id for p in any_study.front.points),
        key=lambda id: (-finals[id]["validation"]["metric"], finals[id]["validation"]["loss"]),
    )
    best = any_study.front.best
    assert best.id == ranked[0]
    path = any_study.folder.path
    assert (path / "best.safetensors").read_bytes() == (path / best.weights).read_bytes()
    assert BitVector.load(path / "best.bits.json") == BitVector(best.weight_bits, best.act_bits)


def test_the_uniform_models_stand_on_both_sides_of_the_budget_and_train_as_long(
    study: Study, two_costs: Study
) -> None:
    assert [p.id for p in study.front.uniform] == ["uniform-3", "uniform-4"]
    assert [p.id for p in two_costs.front.uniform] == ["uniform-3", "uniform-4"]
    for each, limit in ((study, BUDGET), (two_costs, 3.5)):
        below, above = each.front.uniform
        assert below.average_bits <= limit < above.average_bits
        finals = raw(each, FINAL)
        for point in all_points(each.front):
            record = finals.get(point.id) or finals[Path(point.weights).stem]
            assert record["epochs"] == len(record["train_losses"]) == 1
            assert record["seed"] == each.folder.config.seed
    assert set(two_costs.front.uniform[0].weight_bits.values()) == {3}
    assert set(two_costs.front.uniform[0].act_bits.values()) == {8}


def test_a_choice_of_input_bits_is_searched_against_bit_operations(two_costs: Study) -> None:
    assert objectives_of(two_costs) == ["average_bits", "bops"]
    used = {b for r in two_costs.folder.records(TRIALS) for b in r.bits.act.values()}
    assert used == {3, 8}
    store = optuna.load_study(study_name="s", storage=two_costs.folder.storage_url)
    assert store.metric_names == ["accuracy", "average_bits", "bops"]


def test_the_store_holds_what_the_records_say(any_study: Study) -> None:
    store = optuna.load_study(study_name="s", storage=any_study.folder.storage_url)
    records = raw(any_study, TRIALS)
    trials = store.get_trials()
    assert [f"{t.number:04d}" for t in trials] == list(records)
    for trial, record in zip(trials, records.values(), strict=True):
        costs = [record["costs"][name] for name in objectives_of(any_study)]
        assert trial.values == [record["validation"]["metric"], *costs]
        for key, width in trial.params.items():
            kind, _, layer = key.partition(":")
            assert record["bits"][f"{kind}_bits"][layer] == width


def test_progress_comes_in_stages_of_as_many_steps_as_announced(study: Study) -> None:
    heard = study.heard
    names = ["FP32 model", "sensitivity", "search", "final training", "report"]
    assert [name for name, _, _ in heard.stages] == names
    assert [total for _, total, _ in heard.stages] == [len(notes) for _, _, notes in heard.stages]
    assert len(heard.notes("FP32 model")) == 3 + 1  # epochs and the evaluation
    assert len(heard.notes("search")) == 8
    assert heard.messages == [
        f"study s in {study.folder.path}",
        "the search ends: 8 trials are done",
    ]
    bests = [
        [float(x) for x in re.findall(r"accuracy ([\d.]+), loss ([\d.]+), ([\d.]+) bits", text)[0]]
        for text in heard.bests
    ]
    for (metric, loss, bits), (other, other_loss, other_bits) in pairwise(bests):
        assert other > metric or (other == metric and (other_loss < loss or other_bits < bits))
    assert 1 <= len(bests) < 8


def test_the_front_is_read_back_as_it_was(any_study: Study) -> None:
    assert load_front(any_study.folder) == any_study.front


def test_one_seed_gives_the_same_study_and_another_does_not(study: Study, tmp_path: Path) -> None:
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    again = study_in(tmp_path)
    assert raw(again, TRIALS) == raw(study, TRIALS)
    assert raw(again, FINAL) == raw(study, FINAL)
    assert again.front == study.front
    for name in ("front.json", "results.json", "fp32.json", "best.bits.json"):
        assert again.folder.file(name).read_bytes() == study.folder.file(name).read_bytes()
    for name in ("fp32.safetensors", "best.safetensors"):
        mine, other = (load_file(s.folder.file(name)) for s in (again, study))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    seed_2 = study_in(tmp_path / "other", seed=2, **QUICK)
    assert all(r["seed"] == 2 for r in raw(seed_2, TRIALS).values())
    assert seed_2.front.fp32_metric != study.front.fp32_metric
