"""What a study asks for and begins with: budgets, choices of bits, its name and places, FP32."""

import logging
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny_task
from tiny_studies import (
    BUDGET,
    QUICK,
    Listener,
    Stop,
    Study,
    all_points,
    config,
    objectives_of,
    raw,
    stop_at,
    study_in,
)

from adq.quant.errors import InputError
from adq.quant.evaluate import accuracy
from adq.quant.spec import BitVector
from adq.search import fp32, run
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.folder import FINAL, TRIALS, StudyFolder, open_study
from adq.search.run import resume, start


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


def test_the_fp32_metric_is_measured_for_each_study(tmp_path: Path) -> None:
    first = study_in(tmp_path, **(QUICK | {"study": None}))
    task = replace(tiny_task.make_task(), metric=lambda o, t: 2 * accuracy(o, t))
    front = start(replace(first.folder.config, study="other"), task)
    assert front.fp32_metric == 2 * first.front.fp32_metric  # weights from the cache, metric not


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
