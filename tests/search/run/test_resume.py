"""A study that is stopped, anywhere and anyhow, ends like an undisturbed one; or is made longer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny_studies
import tiny_task
from optuna.storages import RDBStorage
from tiny_studies import INTERRUPTED, QUICK, Listener, Stop, Study, graded, raw, stop_at, study_in

from adq.quant.errors import InputError
from adq.search import fp32, jobs, run, sensitivity
from adq.search.folder import FINAL, TRIALS, StudyFolder, open_study
from adq.search.problem import make_problem
from adq.search.run import load_front, resume


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
        patch.setattr(tiny_studies, "Stop", KeyboardInterrupt)
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
        patch.setattr(tiny_studies, "Stop", KeyboardInterrupt)
        with pytest.raises(run.Interrupted, match="the front of before stays"):
            resume(found.folder, tiny_task.make_task(), trials=8)
    assert load_front(found.folder) == found.front
    assert found.folder.status() == "final training"


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
