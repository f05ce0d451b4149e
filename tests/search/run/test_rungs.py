"""A study with rungs and warm starts: what is promoted, and from which weights it is trained."""

from pathlib import Path

import optuna
import pytest
import tiny_task
from safetensors.torch import load_file
from tiny_studies import Listener, Stop, Study, raw, stop_at, study_in

from adq.quant.batches import threads
from adq.search import jobs
from adq.search.folder import FINAL, START, TRIALS, StudyFolder
from adq.search.problem import make_problem
from adq.search.run import resume

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
