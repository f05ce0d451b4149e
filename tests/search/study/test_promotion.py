"""Rungs and warm starts: what counts as a result, what is promoted, whose weights are taken."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from made_up_studies import MANY, Bench, load, make_study, state_of
from optuna.trial import TrialState
from toy_space import smallest

from adq.search.candidate import Record
from adq.search.folder import TRIALS
from adq.search.front import front_records


def test_only_the_last_rung_is_a_result(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, rungs=(0, 1), reduction=2)
    assert bench.run(folder) is True
    records = folder.records(TRIALS)
    trials = load(folder).get_trials()
    climbed = Counter(len(record.rungs) for record in records)
    assert min(climbed[1], climbed[2], climbed[3]) >= 2
    for trial, record in zip(trials, records, strict=True):
        assert [rung.epochs for rung in record.rungs] == [0, 1, 2][: len(record.rungs)]
        assert record.seconds == 0.5 * len(record.rungs)
        assert record.epochs == record.rungs[-1].epochs
        if record.error is not None:
            assert trial.state == TrialState.FAIL
        elif len(record.rungs) == 3:
            assert trial.state == TrialState.COMPLETE
            assert record.validation == record.rungs[-1].validation
        else:
            assert (trial.state, trial.values) == (TrialState.PRUNED, None)
            assert record.validation is None
            assert record.state == f"stopped after {record.epochs} epochs"
    with bench.loop(folder) as loop:
        assert {r.id for r in loop.front} == {
            r.id for r in front_records(records, bench.problem.objectives)
        }


def test_every_band_of_costs_has_a_result_in_the_end(tmp_path: Path) -> None:
    """However few candidates it has: of fewer than `reduction` the best one goes on."""
    folder, bench = make_study(tmp_path, **MANY | {"trials": 6}, rungs=(0,), reduction=4)
    bench.failing = ()
    bench.run(folder)
    low = bench.problem.costs.costs(bench.problem.space.bit_vector(smallest(bench.problem.space)))
    width = (4.5 - low.average_bits) / 4

    def band(record: Record) -> int:
        return min(3, int((record.costs.average_bits - low.average_bits) / width))

    records = folder.records(TRIALS)
    assert {band(r) for r in records} == {band(r) for r in records if r.validation is not None}
    assert all(len(r.rungs) == 1 for r in records if r.validation is None)


def test_more_trials_extend_a_search_with_rungs(tmp_path: Path) -> None:
    """What was pruned stays so, and counts among those that new ones are compared with."""
    folder, bench = make_study(tmp_path, **MANY, rungs=(0,), reduction=2)
    bench.run(folder)
    before = state_of(folder)[0]
    more = replace(bench.problem, config=replace(bench.problem.config, trials=20))
    assert Bench(more).run(folder) is True
    after = state_of(folder)[0]
    assert after[:14] == before
    assert len(after) == 20
    assert all(t.state.is_finished() for t in load(folder).get_trials())


def test_a_candidate_starts_from_the_nearest_finished_one(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, warm_start="on", ties="none", window=3)
    bench.run(folder)
    records = folder.records(TRIALS)
    parents = 0
    for trial, record in zip(load(folder).get_trials(), records, strict=True):
        known = [r for r in records[: max(0, trial.number - 2)] if r.validation is not None]
        distance = {
            r.id: sum(
                abs(mine.get(name, 9) - other.get(name, 9))
                for mine, other in (
                    (record.bits.weight, r.bits.weight),
                    (record.bits.act, r.bits.act),
                )
                for name in record.bits.weight
            )
            for r in known
        }
        nearest = min(distance, key=lambda id: (distance[id], id)) if distance else None
        assert record.parent == trial.user_attrs["parent"] == nearest
        parents += nearest is not None
    assert parents > 8


def test_without_a_warm_start_there_are_no_parents(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path)
    bench.run(folder)
    assert {r.parent for r in folder.records(TRIALS)} == {None}
