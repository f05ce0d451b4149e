"""Candidates, final models and user code that fail: what counts, what is shown, what goes on."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import tiny_task
import torch
from tiny_studies import INTERRUPTED, QUICK, Study, failing, graded, raw, study_in

from adq.quant.errors import InputError
from adq.search import jobs
from adq.search.folder import FINAL, TRIALS, open_study
from adq.search.run import load_front, resume


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
