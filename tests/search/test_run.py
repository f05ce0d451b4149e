"""A study from beginning to end: what it leaves, recomputed; what stops it; how it goes on."""

import json
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny_task
import torch
from optuna.storages import RDBStorage
from safetensors.torch import load_file

from adq.quant.batches import threads
from adq.quant.errors import InputError
from adq.quant.evaluate import accuracy, evaluate
from adq.quant.export.loading import load_packed_
from adq.quant.files import write_json
from adq.quant.spec import BitVector
from adq.search import fp32, jobs, run, sensitivity
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.folder import FINAL, MODELS, START, TRIALS, StudyFolder, open_study
from adq.search.front import Front, Point
from adq.search.observer import Observer
from adq.search.problem import make_problem
from adq.search.run import load_front, resume, start
from adq.search.task import Task

NUMEL = {"conv1": 54, "conv2": 432, "conv3": 864, "hidden": 156, "out": 130}
MACS = {"conv1": 54 * 64, "conv2": 432 * 9, "conv3": 864, "hidden": 156, "out": 130}
BUDGET = 4.2
OPTIONS: dict[str, Any] = {
    "task": "tiny_task:make_task",
    "budget_bits": BUDGET,
    "bits": (2, 3, 4, 8),
    "seed": 1,
    "trials": 8,  # five seeds and three proposals
    "epochs": 0,
    "final_epochs": 1,
    "lr": 1e-4,
    "study": "s",
}
QUICK = {"trials": 3, "final_epochs": 0}


class Listener(Observer):
    """Keeps what it hears: (stage, announced steps, notes of its steps)."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, list[str]]] = []
        self.bests: list[str] = []
        self.messages: list[str] = []
        self.more: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total, []))

    def step(self, note: str = "") -> None:
        self.stages[-1][2].append(note)

    def best(self, text: str) -> None:
        self.bests.append(text)

    def note(self, text: str) -> None:
        self.more.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def notes(self, stage: str) -> list[str]:
        return next((notes for name, _, notes in self.stages if name == stage), [])


def config(out: Path, **options: Any) -> StudyConfig:
    return StudyConfig(**OPTIONS | {"out": str(out)} | options)


@dataclass
class Study:
    folder: StudyFolder
    front: Front
    heard: Listener


def study_in(out: Path, task: Task | None = None, **options: Any) -> Study:
    heard = Listener()
    front = start(config(out, **options), task or tiny_task.make_task(), heard)
    return Study(open_study(out, front.study), front, heard)


def only_json(folder: StudyFolder, front: Front) -> None:
    """Charts and pages are test_report's, and take longer than a study."""
    write_json(folder.file("front.json"), front.to_json())


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", only_json)
        patch.setattr(run, "SEEDS", 5)
        patch.setattr(sensitivity, "SAMPLES", 16)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_in(tmp_path_factory.mktemp("runs"))


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


def all_points(front: Front) -> tuple[Point, ...]:
    return front.points + front.uniform


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


def objectives_of(study: Study) -> list[str]:
    return json.loads(study.folder.file("results.json").read_text())["objectives"]


def raw(study: Study, kind: str) -> dict[str, dict[str, Any]]:
    """The records as they are on disk, without the seconds."""
    found = {}
    for path in sorted((study.folder.path / kind).glob("*.json")):
        found[path.stem] = record = json.loads(path.read_text())
        seconds = [rung.pop("seconds") for rung in record["rungs"]]
        assert record.pop("seconds") == sum(seconds) > 0
    return found


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


def contents(folder: StudyFolder) -> dict[str, bytes]:
    """But for the lock, which names the process that held it last."""
    files = (p for p in folder.path.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in files}


def test_resuming_a_finished_study_changes_nothing(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.folder.path, tmp_path / "s")
    folder, heard = StudyFolder(tmp_path / "s"), Listener()
    before = contents(folder)
    front = resume(folder, tiny_task.make_task(), heard)
    assert front == study.front
    assert contents(folder) == before
    assert [notes for name, _, notes in heard.stages if name == "search"] == [["done before"] * 8]
    assert [total for _, total, _ in heard.stages] == [len(notes) for _, _, notes in heard.stages]


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


def test_a_second_study_reuses_the_fp32_model_and_another_seed_does_not(tmp_path: Path) -> None:
    options = QUICK | {"study": None}
    first = study_in(tmp_path, **options)
    second = study_in(tmp_path, **options, bits=(2, 4))
    third = study_in(tmp_path, **options, seed=7)
    assert [s.front.study for s in (first, second, third)] == [f"tiny_task-{i}" for i in (1, 2, 3)]
    assert len(first.heard.notes("FP32 model")) == 4
    assert second.heard.notes("FP32 model")[0] == "from the cache"
    assert len(second.heard.notes("FP32 model")) == 2
    assert len(third.heard.notes("FP32 model")) == 4
    assert second.front.fp32_metric == first.front.fp32_metric


@pytest.mark.parametrize(
    ("budget", "cost", "limit"),
    [
        ({"budget_bits": None, "budget_size_mb": 0.0125}, "size_bytes", 12_500),
        ({"budget_bits": None, "budget_gbops": 0.00035}, "bops", 350_000),
        ({"budget_gbops": 0.00035}, "average_bits", BUDGET),
        ({"budget_gbops": 0.00035}, "bops", 350_000),
    ],
)
def test_budgets_of_every_kind_hold(
    tmp_path: Path, budget: dict[str, Any], cost: str, limit: float
) -> None:
    found = study_in(tmp_path, **QUICK, **budget)
    costs = [getattr(r.costs, cost) for r in found.folder.records(TRIALS)]
    assert len(costs) == 3
    assert max(costs) <= limit
    assert cost in objectives_of(found)
    assert all(getattr(p, cost) <= limit for p in found.front.points)


def test_the_uniform_models_have_bits_that_the_study_may_choose(tmp_path: Path) -> None:
    """Pins of 5 bits between choices of 2 and 8 make no uniform model of 5 bits."""
    found = study_in(tmp_path, **QUICK, bits=(2, 8), first_last_bits=5)
    assert [p.id for p in found.front.uniform] == ["uniform-2", "uniform-8"]
    for record in found.folder.records(TRIALS):
        assert {record.bits.weight[n] for n in ("conv2", "conv3", "hidden")} <= {2, 8}


def test_a_uniform_model_on_the_front_is_trained_once(tmp_path: Path) -> None:
    """Nothing but 2 bits everywhere is within this budget, and so it is all of the front."""
    found = study_in(tmp_path, bits=(2, 8), budget_bits=2.8, trials=9, final_epochs=0)
    searched = ("conv2", "conv3", "hidden")
    records = found.folder.records(TRIALS)
    (id,) = (r.id for r in records if {r.bits.weight[n] for n in searched} == {2})
    point = next(p for p in found.front.uniform if p.id == "uniform-2")
    assert point.weights == f"models/t{id}.safetensors"
    assert not found.folder.record_path(FINAL, "uniform-2").exists()
    assert "the search ends early" in found.heard.messages[-1]
    assert resume(found.folder, tiny_task.make_task()) == found.front


def test_the_best_bits_of_one_study_are_all_that_another_trains(
    study: Study, tmp_path: Path
) -> None:
    bits = BitVector.load(study.folder.file("best.bits.json"))
    more = study_in(
        tmp_path / "runs",
        layers=str(study.folder.file("best.bits.json")),
        trials=1,
        final_epochs=2,
        weights_average=0.9,
    )
    assert [point.weight_bits for point in all_points(more.front)[:1]] == [dict(bits.weight)]
    assert BitVector.load(more.folder.file("best.bits.json")) == bits
    (record,) = raw(more, FINAL).values()  # the uniform models are the same one
    assert len(record["train_losses"]) == 2
    refusal = "a single choice leaves nothing to search; --trials 1 trains it"
    with pytest.raises(InputError, match=refusal):
        study_in(tmp_path / "none", layers=str(study.folder.file("best.bits.json")), trials=2)


def test_a_name_that_is_taken_is_refused(study: Study) -> None:
    with pytest.raises(InputError, match="exists already"):
        start(config(study.folder.path.parent), tiny_task.make_task())


def test_a_process_waits_while_another_one_decides(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.folder.path, tmp_path / "s")
    folder, heard, held = StudyFolder(tmp_path / "s"), Listener(), threading.Event()

    def decide() -> None:
        with Crew(folder.path) as other, other.exclusive():
            held.set()
            while not heard.messages:
                time.sleep(0.01)

    thread = threading.Thread(target=decide)
    thread.start()
    assert held.wait(30)
    try:
        assert resume(folder, tiny_task.make_task(), heard) == study.front
    finally:
        heard.messages.append("")
        thread.join()
    assert heard.messages[0] == "waiting for another process that works on study s"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bits": 1.0}, "budget-bits 1 is below the smallest reachable"),
        ({"budget_bits": None}, "no budget"),
        ({"device": "cuda:99"}, "device cuda:99"),
        ({"bits": (4,), "budget_bits": None, "budget_gbops": 1.0}, "nothing to search"),
        ({"storage": "nosuch://x"}, "storage nosuch://x cannot be used"),
        ({"weights": "missing.pt"}, "weights missing.pt: not a state dict"),
    ],
)
def test_what_can_be_checked_is_checked_before_the_study_appears(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        study_in(tmp_path / "runs", **options)
    assert "\n" not in str(error.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


class Stop(BaseException):
    """The process ends here."""


STOPS: list[tuple[str, Any, str, int]] = [
    ("training FP32", fp32, "train_", 1),
    ("keeping FP32's losses", fp32, "write_json", 1),
    ("copying FP32", fp32, "_copy", 1),
    ("writing FP32's facts", fp32, "write_json", 1),
    ("measuring", sensitivity, "_attempt", 1),
    ("writing sensitivities", sensitivity, "write_json", 1),
    ("the first trial", jobs, "train_candidate", 1),
    ("the second trial", jobs, "train_candidate", 2),
    ("the first final model", jobs, "train_candidate", 4),  # three trials were left
    ("the second final model", jobs, "train_candidate", 2),
    ("choosing the best", run, "best_record", 1),
    ("the report", run, "write_report", 1),
    ("the results", run, "write_json", 2),
]
"""Moments of a study of four trials, in order: (name, module, function, which call in a process
that has started where the one before was stopped)."""

INTERRUPTED = {"trials": 4, "final_epochs": 0}


def stop_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int, after: bool) -> None:
    """End the process in a call of a function, before or after its work."""
    function, calls = getattr(module, name), [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise Stop
        result = function(*args, **kwargs)
        if calls[0] == call:
            raise Stop
        return result

    patch.setattr(module, name, stopping)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = study_in(tmp_path_factory.mktemp("undisturbed"), **INTERRUPTED)
    assert len(found.folder.records(FINAL)) >= 3
    return found


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_study_stopped_at_every_stage_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: Study, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    trained: list[str] = []
    train = jobs.train_candidate

    def counted(*args: Any, id: str, **kwargs: Any) -> Any:
        trained.append(id)
        return train(*args, id=id, **kwargs)

    monkeypatch.setattr(jobs, "train_candidate", counted)
    task, folder = tiny_task.make_task(), StudyFolder(tmp_path / "s")
    for stage, module, name, call in STOPS:
        assert folder.path.exists() == (stage != "training FP32")
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, module, name, call, after)
            with pytest.raises(Stop):
                resume(folder, task) if folder.path.exists() else study_in(tmp_path, **INTERRUPTED)
        finished = (stage, after) == ("the results", True)
        assert (folder.status() == "finished") == finished, stage
    assert resume(folder, task) == undisturbed.front
    stopped = Study(folder, undisturbed.front, Listener())
    assert raw(stopped, TRIALS) == raw(undisturbed, TRIALS)
    assert raw(stopped, FINAL) == raw(undisturbed, FINAL)
    # only what was stopped between its training and its record is trained again
    again = ["0000", "0001", *list(raw(undisturbed, FINAL))[:2]] if after else []
    assert len(trained) == len(set(trained)) + len(again)
    assert len(set(trained)) == len(raw(undisturbed, TRIALS)) + len(raw(undisturbed, FINAL))


def test_a_study_that_has_just_begun_keeps_its_place_in_a_shared_storage(tmp_path: Path) -> None:
    """It has no trial yet, as a leftover of a process that died before the folder was there."""
    storage = {"storage": f"sqlite:///{tmp_path}/shared.db"}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, fp32, "train_", 1, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path / "a", **QUICK, **storage)
    with pytest.raises(InputError, match="has a study 's' already"):
        study_in(tmp_path / "b", **QUICK, **storage)
    resume(open_study(tmp_path / "a", "s"), tiny_task.make_task())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("sqlite:///x.db", "sqlite:///{here}/x.db"),
        ("sqlite:///x.db?timeout=3", "sqlite:///{here}/x.db?timeout=3"),
        ("journal:x.log", "journal:{here}/x.log"),
        ("postgresql://me:secret@db/studies", "postgresql://me:secret@db/studies"),
    ],
)
def test_relative_places_are_those_of_where_the_study_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run._absolute(StudyConfig(storage=given, checkpoints="c"))
    assert config.storage == kept.format(here=tmp_path)
    assert config.checkpoints == str(tmp_path / "c")
    bucket = StudyConfig(checkpoints="s3://bucket/c")
    assert run._absolute(bucket) == bucket


def test_a_place_for_checkpoints_that_cannot_be_used_is_said_before_there_is_a_study(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/x"):
        study_in(tmp_path / "runs", **QUICK, checkpoints=str(tmp_path / "file" / "x"))
    assert not (tmp_path / "runs").exists()


def test_damaged_or_missing_weights_of_a_final_model_are_made_again(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    files = sorted(found.folder.file("models").iterdir())
    # clones: what load_file gives is a map of the file, and the file is about to be damaged
    whole = [{k: v.clone() for k, v in load_file(path).items()} for path in files]
    files[0].unlink()
    for path in files[1:]:
        path.write_bytes(path.read_bytes()[:100])
    assert resume(found.folder, tiny_task.make_task()) == found.front
    for path, tensors in zip(files, whole, strict=True):
        again = load_file(path)
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
    weights = {k: v.clone() for k, v in load_file(found.folder.file("best.safetensors")).items()}
    best = found.folder.path / found.front.best.weights
    assert all(torch.equal(weights[key], value) for key, value in load_file(best).items())


def test_a_lost_trial_record_is_named(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    found.folder.record_path(TRIALS, "0001").unlink()
    with pytest.raises(InputError, match=r"0001\.json is missing: restore it"):
        resume(found.folder, tiny_task.make_task())
    shutil.rmtree(found.folder.file(TRIALS))
    with pytest.raises(InputError, match="is missing"):
        resume(found.folder, tiny_task.make_task())


def test_a_study_that_goes_on_keeps_its_seeds(tmp_path: Path, undisturbed: Study) -> None:
    """Though `make_seeds` would now find other ones."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", 2, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path, **INTERRUPTED)
    folder = open_study(tmp_path, "s")
    kept = folder.file("seeds.json").read_bytes()
    assert json.loads(kept)["schema"] == "adq-seeds/1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_seeds", lambda space, *args: [space.uniform(2)])
        assert resume(folder, tiny_task.make_task()) == undisturbed.front
    assert folder.file("seeds.json").read_bytes() == kept
    params = json.loads(kept)["seeds"]
    space = make_problem(folder.config, tiny_task.make_task()).space
    first = folder.read_record(TRIALS, "0000")
    assert first is not None
    assert first.bits == space.bit_vector(space.decode(params[0]))
    assert len({json.dumps(p) for p in params}) == len(params) == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"seeds": 3}',
        '{"seeds": []}',
        '{"seeds": ["conv2"]}',
        '{"seeds": [{}]}',
        *[
            json.dumps(
                {"seeds": [{"weight:conv2": 2, "weight:conv3": 2, "weight:hidden": 2} | bad]}
            )
            for bad in (
                {"weight:conv2": 5},
                {"weight:conv2": [2]},
                {"weight:conv9": 2},
                {"weight:conv2": 8, "weight:conv3": 8},  # over the budget
            )
        ],
    ],
)
def test_damaged_seeds_are_one_line(undisturbed: Study, tmp_path: Path, content: str) -> None:
    shutil.copytree(undisturbed.folder.path, tmp_path / "s")
    folder = StudyFolder(tmp_path / "s")
    folder.file("seeds.json").write_text(content)
    problem = make_problem(folder.config, tiny_task.make_task())
    with pytest.raises(InputError, match=r"seeds\.json is .*damaged") as error:
        run._seeds(problem, folder, [])
    assert "\n" not in str(error.value)


def test_the_fp32_metric_is_measured_for_each_study(tmp_path: Path) -> None:
    first = study_in(tmp_path, **(QUICK | {"study": None}))
    task = replace(tiny_task.make_task(), metric=lambda o, t: 2 * accuracy(o, t))
    front = start(replace(first.folder.config, study="other"), task)
    assert front.fp32_metric == 2 * first.front.fp32_metric  # weights from the cache, metric not


def test_a_trial_that_was_recorded_and_not_told_is_counted_once(
    tmp_path: Path, undisturbed: Study
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, RDBStorage, "set_trial_state_values", 2, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path, **INTERRUPTED)
    folder, heard = open_study(tmp_path, "s"), Listener()
    assert len(folder.records(TRIALS)) == 2
    assert resume(folder, tiny_task.make_task(), heard) == undisturbed.front
    assert heard.notes("search")[:2] == ["done before"] * 2
    assert [total for _, total, _ in heard.stages] == [len(notes) for _, _, notes in heard.stages]


def test_optuna_does_not_speak_to_the_user(tmp_path: Path) -> None:
    said: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    optuna.logging.set_verbosity(optuna.logging.INFO)
    logging.getLogger("optuna").addHandler(ear)
    try:
        study_in(tmp_path, **QUICK)
    finally:
        logging.getLogger("optuna").removeHandler(ear)
    assert said == []


def test_more_trials_extend_a_finished_study_without_repeating_one(
    study: Study, tmp_path: Path
) -> None:
    found = study_in(tmp_path, **QUICK)
    before = raw(found, TRIALS)
    wrong = replace(tiny_task.make_task(), loss=lambda outputs, targets: outputs.sum())
    with pytest.raises(InputError, match="not those that the study began with"):
        resume(found.folder, wrong, trials=8)
    assert load_front(found.folder) == found.front  # nothing was changed by the refused one
    assert found.folder.status() == "finished"
    heard = Listener()
    front = resume(found.folder, tiny_task.make_task(), heard, trials=8)
    assert heard.messages == ["the search ends: 8 trials are done"]
    after = raw(found, TRIALS)
    assert list(after) == [f"{i:04d}" for i in range(8)]
    assert {id: after[id] for id in before} == before
    assert len({json.dumps(r["bits"]) for r in after.values()}) == 8
    assert heard.notes("search")[:3] == ["done before"] * 3
    assert front == load_front(found.folder)
    assert after == raw(study, TRIALS)  # which asked for as many at once


def failing(select: Callable[[str], bool]) -> Callable[..., Any]:
    """train_candidate, but those selected by id fail as if their loss had become nan."""
    train = jobs.train_candidate

    def train_or_fail(*args: Any, id: str, **kwargs: Any) -> Any:
        record = train(*args, id=id, **kwargs)
        if select(id):
            error = f"the training loss of {id} became nan"
            return replace(record, validation=None, test=None, weights=None, error=error)
        return record

    return train_or_fail


def test_failed_candidates_are_counted_shown_and_on_no_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "train_candidate", failing(lambda id: id in ("0000", "0002")))
    found = study_in(tmp_path, **QUICK | {"trials": 5})
    records = raw(found, TRIALS)
    assert [id for id, r in records.items() if r["validation"] is None] == ["0000", "0002"]
    assert not {"t0000", "t0002"} & {p.id for p in found.front.points}
    assert found.heard.notes("search")[0] == (
        "trial 0000: failed, the training loss of 0000 became nan"
    )
    store = optuna.load_study(study_name="s", storage=found.folder.storage_url)
    states = [t.state.name for t in store.get_trials()]
    assert states == ["FAIL", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_search_whose_first_candidates_all_failed_says_so_and_can_go_on(tmp_path: Path) -> None:
    said = r"every candidate failed; the last one: .* of 0002 became nan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train_candidate", failing(lambda id: True))
        with pytest.raises(InputError, match=said):
            study_in(tmp_path, **QUICK | {"trials": 6})
    folder = open_study(tmp_path, "s")
    assert folder.status() == "searching, 3 of 6 trials"
    resume(folder, tiny_task.make_task())
    assert [r.error is None for r in folder.records(TRIALS)] == [False] * 3 + [True] * 3


def graded(sign: Callable[[str], int]) -> Callable[..., Any]:
    """train_candidate, but more bits are better where the id's sign is 1, and worse where -1."""
    train = jobs.train_candidate

    def train_and_grade(*args: Any, id: str, **kwargs: Any) -> Any:
        record = train(*args, id=id, **kwargs)
        metric = 0.5 + sign(id) * record.costs.average_bits / 100
        return replace(record, validation=replace(record.validation, metric=metric))

    return train_and_grade


def test_a_final_model_that_turns_out_dominated_is_on_no_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the search more bits were better, so that all went on; in the end fewer are."""
    grade = graded(lambda id: -1 if id.startswith("t") else 1)
    monkeypatch.setattr(jobs, "train_candidate", grade)
    found = study_in(tmp_path, **QUICK)
    finals = [r for r in found.folder.records(FINAL) if r.id.startswith("t")]
    assert len(finals) >= 2
    cheapest = min(finals, key=lambda r: r.costs.average_bits)
    assert [p.id for p in found.front.points] == [cheapest.id]
    assert found.front.best.id == cheapest.id


def test_a_final_training_that_fails_is_on_no_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []

    def first_final(id: str) -> bool:
        if id.startswith("t") and not gone:
            gone.append(id)
        return id in gone

    monkeypatch.setattr(jobs, "train_candidate", graded(lambda id: 1))
    monkeypatch.setattr(jobs, "train_candidate", failing(first_final))
    found = study_in(tmp_path, **QUICK)
    finals = raw(found, FINAL)
    assert finals[gone[0]]["error"] == f"the training loss of {gone[0]} became nan"
    points = {p.id for p in found.front.points}
    assert points
    assert points == {id for id in finals if id.startswith("t")} - set(gone)
    assert resume(found.folder, tiny_task.make_task()) == found.front
    monkeypatch.setattr(jobs, "train_candidate", failing(lambda id: id.startswith("t")))
    with pytest.raises(InputError, match="every final training failed; the last one: "):
        study_in(tmp_path / "all", **QUICK)


class Broken:
    """The task's metric, but some of its calls raise."""

    def __init__(self, *failing: int) -> None:
        self.task, self.calls, self.failing = tiny_task.make_task(), 0, failing

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.failing:
            raise RuntimeError("the disk\nis gone")
        return self.task.metric(outputs, targets)

    @property
    def error(self) -> str:
        line = Broken.__call__.__code__.co_firstlineno + 3
        return f"RuntimeError: the disk is gone ({__file__}:{line})"


# two splits for FP32, then the third candidate
def test_an_error_of_the_users_code_that_passes_changes_nothing(
    tmp_path: Path, undisturbed: Study
) -> None:
    metric = Broken(5, 6)
    found = study_in(tmp_path, replace(metric.task, metric=metric), **INTERRUPTED)
    assert found.front == undisturbed.front
    assert raw(found, TRIALS) == raw(undisturbed, TRIALS)
    assert raw(found, FINAL) == raw(undisturbed, FINAL)


def test_an_error_of_the_users_code_that_stays_is_a_failed_candidate(
    tmp_path: Path, undisturbed: Study
) -> None:
    metric = Broken(5, 6, 7)
    found = study_in(tmp_path, replace(metric.task, metric=metric), **INTERRUPTED)
    records = raw(found, TRIALS)
    assert {id: r["error"] for id, r in records.items() if r["error"]} == {"0002": metric.error}
    assert f"trial 0002: failed, {metric.error}" in found.heard.notes("search")
    before = {id: r for id, r in raw(undisturbed, TRIALS).items() if id < "0002"}
    assert {id: r for id, r in records.items() if id < "0002"} == before
    assert records["0002"]["bits"] == raw(undisturbed, TRIALS)["0002"]["bits"]
    assert found.folder.status() == "finished"
    assert resume(found.folder, metric.task) == found.front


def test_an_error_of_the_users_code_before_the_search_is_one_line_and_the_study_can_go_on(
    tmp_path: Path, undisturbed: Study
) -> None:
    metric = Broken(2)
    task = replace(metric.task, metric=metric)
    with pytest.raises(InputError) as error:
        study_in(tmp_path, task, **INTERRUPTED)
    assert str(error.value) == (
        f"task 'tiny_task:make_task', evaluating the FP32 model: {metric.error}"
    )
    folder = open_study(tmp_path, "s")
    assert folder.status() == "preparing"
    with pytest.raises(InputError, match=r"study 's' has no front yet \(preparing\)"):
        load_front(folder)
    assert resume(folder, task) == undisturbed.front


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"best": "nobody"}'])
def test_a_damaged_front_is_one_line(undisturbed: Study, tmp_path: Path, content: str) -> None:
    shutil.copytree(undisturbed.folder.path, tmp_path / "s")
    (tmp_path / "s" / "front.json").write_text(content)
    with pytest.raises(InputError, match="damaged") as error:
        load_front(StudyFolder(tmp_path / "s"))
    assert "\n" not in str(error.value)


LADDER = {"trials": 7, "epochs": 1, "rungs": (0,), "reduction": 2, "final_epochs": 0}


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """With rungs, and candidates that start from others' weights."""
    return study_in(tmp_path_factory.mktemp("ladder"), **LADDER, warm_start="on")


def test_a_ladder_trains_fully_what_its_first_rung_favours(ladder: Study) -> None:
    records = ladder.folder.records(TRIALS)
    assert [r.rungs[0].epochs for r in records] == [0] * 7
    full = [r for r in records if r.validation is not None]
    assert 2 <= len(full) < 7
    assert all(r.epochs == 1 and len(r.rungs) == len(r.train_losses) + 1 == 2 for r in full)
    assert {p.id for p in ladder.front.points} <= {f"t{r.id}" for r in full}
    heard = ladder.heard
    assert len(heard.notes("search")) == 7
    assert all("after 0 epochs: accuracy" in note for note in heard.notes("search"))
    assert len(heard.more) == len(full)
    store = optuna.load_study(study_name="s", storage=ladder.folder.storage_url)
    last = {f"{t.number:04d}": t.user_attrs["trainings"][-1][0] for t in store.get_trials()}
    in_order = sorted(full, key=lambda record: last[record.id])
    assert [text[:5] for text in heard.more] == [f"{record.id}:" for record in in_order]


def test_a_warm_candidate_is_trained_from_its_parents_weights(ladder: Study) -> None:
    folder = ladder.folder
    records = {r.id: r for r in folder.records(TRIALS)}
    full = {id for id, r in records.items() if r.validation is not None}
    assert {p.stem for p in folder.file(START).iterdir()} == full
    problem = make_problem(folder.config, tiny_task.make_task())
    fp32_weights = tiny_task.TinyNet()
    fp32_weights.load_state_dict(load_file(folder.file("fp32.safetensors")))
    warm = [id for id in sorted(full) if records[id].parent is not None]
    assert warm
    for id in warm:
        record = records[id]
        start = load_file(folder.file(START) / f"{record.parent}.safetensors")
        with threads(problem.threads):
            again = jobs.train_candidate(
                problem, fp32_weights.eval(), record.bits, id=id, epochs=1, start=start
            )
        assert again.validation == record.validation
        assert again.train_losses == record.train_losses


def test_a_study_with_rungs_and_warm_starts_goes_on_wherever_it_stopped(
    ladder: Study, tmp_path: Path
) -> None:
    calls = len(ladder.heard.notes("search")) + len(ladder.heard.more)
    task, folder, options = tiny_task.make_task(), StudyFolder(tmp_path / "s"), LADDER.copy()
    options["warm_start"] = "on"
    for call in range(1, calls + 1):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, jobs, "train_candidate", 2, after=call % 2 == 0)
            with pytest.raises(Stop):
                resume(folder, task) if folder.path.exists() else study_in(tmp_path, **options)
    assert resume(folder, tiny_task.make_task()) == ladder.front
    again = Study(folder, ladder.front, Listener())
    assert raw(again, TRIALS) == raw(ladder, TRIALS)
    assert raw(again, FINAL) == raw(ladder, FINAL)


def test_lost_weights_that_another_trial_starts_from_are_named(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", 2, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path, **QUICK, warm_start="on")
    folder = open_study(tmp_path, "s")
    (folder.file(START) / "0000.safetensors").unlink()
    with pytest.raises(InputError, match=r"start/0000\.safetensors, .* is missing or damaged"):
        resume(folder, tiny_task.make_task())


@pytest.mark.parametrize(
    ("call", "points"),
    [(1, 0), (3, 2), (5, 4)],  # in the first trial, in the third, in final training
)
def test_ctrl_c_writes_the_front_so_far_and_the_study_goes_on(
    tmp_path: Path,
    undisturbed: Study,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    points: int,
) -> None:
    monkeypatch.setattr(
        jobs, "train_candidate", graded(lambda id: 1)
    )  # every trial is on the front
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", call, after=False)
        patch.setattr(sys.modules[__name__], "Stop", KeyboardInterrupt)
        with pytest.raises(run.Interrupted, match="'adq-search resume s' goes on") as stopped:
            study_in(tmp_path, **INTERRUPTED)
    folder = open_study(tmp_path, "s")
    assert folder.status() != "finished"
    assert folder.file("front.json").exists() == (points > 0)
    records = {r.id: r for r in folder.records(TRIALS)}
    assert len(records) == min(call - 1, 4)
    if points:
        assert str(folder.file("front.json")) in str(stopped.value)
        front = load_front(folder)
        assert front.split == "validation"
        assert {p.id for p in front.points} <= set(records)
        for point in front.points:
            found = records[point.id].validation
            assert found is not None
            assert (point.metric, point.samples) == (found.metric, 300)
            assert point.weights is None
        fp32_facts = json.loads(folder.file("fp32.json").read_text())
        assert front.fp32_metric == fp32_facts["validation"]["metric"]
    calm = study_in(tmp_path / "calm", **INTERRUPTED)
    assert resume(folder, tiny_task.make_task()) == calm.front
    assert folder.file("front.json").read_bytes() == calm.folder.file("front.json").read_bytes()


def test_ctrl_c_in_a_study_that_is_extended_keeps_the_earlier_front(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", 2, after=False)
        patch.setattr(sys.modules[__name__], "Stop", KeyboardInterrupt)
        with pytest.raises(run.Interrupted, match="the front of before stays"):
            resume(found.folder, tiny_task.make_task(), trials=8)
    assert load_front(found.folder) == found.front
    assert found.folder.status() == "final training"


def test_an_option_that_was_edited_is_refused(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    path = found.folder.file("study.toml")
    text = path.read_text()
    for old, new, name in (
        ("lr = 0.0001", "lr = 0.001", "lr is 0.001 and was 0.0001"),
        ("seed = 1", "seed = 2", "seed is 2 and was 1"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=name):
            resume(found.folder, tiny_task.make_task())
    path.write_text(text.replace('device = "auto"', 'device = "cpu"'))
    assert resume(found.folder, tiny_task.make_task()) == found.front


def test_a_study_is_the_same_with_any_window_run_again_and_says_which_it_had(
    tmp_path: Path, undisturbed: Study
) -> None:
    """In this process trainings run one after the other, whatever the window: but each is chosen
    without the results of those that might run beside it."""
    many = {"trials": 9, "final_epochs": 0, "window": 3}
    found = study_in(tmp_path / "a", **many)
    again = study_in(tmp_path / "b", **many, executor="local")
    assert again.front == found.front
    assert raw(again, TRIALS) == raw(found, TRIALS)
    assert raw(again, FINAL) == raw(found, FINAL)
    assert (found.folder.config.window, found.folder.config.ranks) == (3, 1)
    assert (undisturbed.folder.config.window, undisturbed.folder.config.ranks) == (1, 1)
    store = optuna.load_study(study_name="s", storage=found.folder.storage_url)
    known = [trial.user_attrs["trainings"] for trial in store.get_trials()]
    assert known == [[[i, max(0, i - 2)]] for i in range(9)]


def test_a_study_is_resumed_with_another_executor_and_not_with_another_window(
    tmp_path: Path, undisturbed: Study
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, jobs, "train_candidate", 2, after=False)
        with pytest.raises(Stop):
            study_in(tmp_path, **INTERRUPTED)
    folder, task = open_study(tmp_path, "s"), tiny_task.make_task()
    text = folder.file("study.toml").read_text()
    with pytest.raises(InputError, match="window") as error:
        resume(folder, task, window=2)
    assert "\n" not in str(error.value)
    folder.file("study.toml").write_text(text.replace("window = 1", "window = 2"))
    with pytest.raises(InputError, match="window is 2 and was 1"):
        resume(folder, task)
    folder.file("study.toml").write_text(text)
    places = tmp_path / "elsewhere"
    assert resume(folder, task, executor="local", checkpoints=str(places)) == undisturbed.front
    assert folder.file("study.toml").read_text() == text  # for that time only


def test_a_time_budget_ends_the_search_and_more_time_goes_on_with_it(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK | {"time_budget": 1e-3})
    assert len(found.folder.records(TRIALS)) == 1
    assert "the search ends after 1 trials: final training takes about" in found.heard.messages[-1]
    assert found.folder.status() == "finished"
    assert resume(found.folder, tiny_task.make_task()) == found.front
    with pytest.raises(InputError, match=r"time-budget: study 's' has 0.001 s"):
        resume(found.folder, tiny_task.make_task(), time_budget=1e-4)
    heard = Listener()
    resume(found.folder, tiny_task.make_task(), heard, time_budget="2h")
    assert found.folder.config.time_budget == 7200
    assert len(found.folder.records(TRIALS)) == 3
    assert heard.messages == ["the search ends: 3 trials are done"]


def test_records_of_an_earlier_version_are_refused_in_one_line(tmp_path: Path) -> None:
    found = study_in(tmp_path, **QUICK)
    path = found.folder.record_path(TRIALS, "0001")
    path.write_text(path.read_text().replace("adq-record/3", "adq-record/2"))
    with pytest.raises(InputError, match=r"0001\.json cannot be used: .*version.*a new study") as e:
        resume(found.folder, tiny_task.make_task())
    assert "\n" not in str(e.value)
