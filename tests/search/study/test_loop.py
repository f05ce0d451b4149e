"""Ask, evaluate, tell: what a study records, what its storage is told, and when it ends."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_task
from made_up_studies import MANY, Bench, fitting_points, load, make_config, make_study, state_of
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from toy_space import all_points, smallest

from adq.quant.errors import InputError
from adq.search.folder import TRIALS, StudyFolder
from adq.search.problem import make_problem


def test_the_study_names_its_metric_and_costs_and_their_directions(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder, _ = make_study(tmp_path, budget_size_mb=0.0115, act_bits=(4, 8))
    assert len(recwarn) == 0  # Optuna calls the names experimental; users need not hear of it
    study = load(folder)
    assert study.metric_names == ["accuracy", "average_bits", "size_bytes", "bops"]
    assert [d.name for d in study.directions] == ["MAXIMIZE"] + ["MINIMIZE"] * 3
    assert study.get_trials() == []


def test_records_and_told_values_agree(fresh: Callable[[str], StudyFolder], template: Any) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    assert bench.run(folder) is True
    trials, records = load(folder).get_trials(), folder.records(TRIALS)
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert [r.id for r in records] == ["0000", "0001", "0002", "0003"]
    assert bench.heard == records
    space = bench.problem.space
    for trial, record in zip(trials, records, strict=True):
        assert space.bit_vector(space.decode(trial.params)) == record.bits
        if record.id == "0001":
            assert trial.state == TrialState.FAIL
            assert trial.values is None
        else:
            assert record.validation is not None
            assert trial.state == TrialState.COMPLETE
            assert trial.values == [record.validation.metric, record.costs.average_bits]
    assert [space.decode(t.params) for t in trials[:2]] == [space.uniform(3), smallest(space)]


def test_a_second_run_does_nothing(fresh: Callable[[str], StudyFolder], template: Any) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    before = state_of(folder)
    again = Bench(template[1].problem)
    assert again.run(folder) is True
    assert not again.evaluated
    assert not again.heard
    assert state_of(folder) == before


def test_a_candidate_exactly_on_its_budget_is_feasible_to_optuna(tmp_path: Path) -> None:
    """A cost whose budget, as it is typed, is less than the cost in binary."""
    bits = (2, 3, 4, 6, 8)
    problem = make_problem(make_config(tmp_path, bits=bits), tiny_task.make_task())
    bit_operations = {
        problem.costs.totals(problem.space.bit_vector(point))["bops"]: point
        for point in all_points(problem.space)
    }
    bops = next(b for b in bit_operations if b / 1e9 * 1e9 < b)
    budget = {"budget_bits": None, "budget_gbops": bops / 1e9}
    folder, bench = make_study(tmp_path, bits=bits, trials=1, **budget)
    bench.seeds = [bit_operations[bops]]
    bench.run(folder)
    (trial,) = load(folder).get_trials()
    assert trial.constraints == {"bops": 0}


@pytest.mark.parametrize("failing", [(), ("0000", "0002", "0003")])
def test_a_space_without_new_points_ends_the_search_and_stays_ended(
    tmp_path: Path, failing: tuple[str, ...]
) -> None:
    folder, bench = make_study(tmp_path, bits=(2, 3), trials=20, budget_bits=3.2)
    bench.failing, bench.seeds = failing, [smallest(bench.problem.space)]
    expected = fitting_points(bench.problem)
    assert 2 < expected < 8
    assert bench.run(folder) is False
    records = folder.records(TRIALS)
    assert len({r.bits.key for r in records}) == len(records) == expected
    assert len(bench.heard) == expected
    told = [t for t in load(folder).get_trials() if t.state == TrialState.COMPLETE]
    assert len(told) == expected - len([f for f in failing if int(f) < expected])
    before = state_of(folder)
    again = Bench(bench.problem, failing=failing, seeds=bench.seeds)
    assert again.run(folder) is False
    assert not again.evaluated
    assert state_of(folder) == before


def test_a_search_whose_first_candidates_all_fail_ends(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, window=1)
    bench.failing = tuple(f"{i:04d}" for i in range(14))
    bench.run(folder)
    assert len(folder.records(TRIALS)) == 3
    bench.failing = ("0000", "0001", "0002")
    bench.run(folder)
    assert len(folder.records(TRIALS)) == 14


def test_the_storage_is_read_once(
    fresh: Callable[[str], StudyFolder], template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    for owner, name in ((RDBStorage, "_get_trials"), (StudyFolder, "read_record")):
        method = getattr(owner, name)

        def counted(*args: Any, method: Any = method, name: str = name, **kwargs: Any) -> Any:
            reads[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    Bench(template[1].problem).run(fresh("a"))
    assert reads == {"_get_trials": 1}


def test_a_shared_storage_refuses_a_second_study_of_one_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    folder, bench = make_study(tmp_path / "a", storage=url)
    bench.run(folder)
    with pytest.raises(InputError, match=r"has a study 's' already: .*--study"):
        make_study(tmp_path / "b", storage=url)
    assert not (tmp_path / "b" / "s").exists()
    other, bench = make_study(tmp_path / "b", storage=url, study="other")
    assert bench.run(other)
    assert len(load(folder).get_trials()) == len(load(other).get_trials()) == 4
    assert not folder.file("study.db").exists()


@pytest.mark.parametrize("name", ["with space", "per%20cent", "a#b", "what?x=1"])
def test_a_study_runs_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder, bench = make_study(tmp_path / name, study=name, trials=2)
    assert bench.run(folder)
    assert folder.file("study.db").is_file()
    assert len(load(folder).get_trials()) == 2
