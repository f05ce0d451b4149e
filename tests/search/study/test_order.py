"""Trainings have an order: a study is the same whoever is fast, and with several processes."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_studies import MANY, Bench, load, make_study, state_of

from adq.search.folder import TRIALS
from adq.search.history import History
from adq.search.jobs import Job
from adq.search.study import StudyLoop


class Workers:
    """Workers that run as many jobs at a time as they get, and finish in random order."""

    def __init__(self, bench: Bench, loop: StudyLoop, seed: int) -> None:
        self.bench, self.loop, self.random = bench, loop, random.Random(seed)
        self.jobs: list[Job] = []
        self.most = 0
        self.order: list[str] = []

    def run(self, results: int | None = None) -> None:
        """To the end of the search, or for so many results."""
        while results is None or results > 0:
            while (job := self.loop.ask()) is not None:
                self.jobs.append(job)
            if not self.jobs:
                assert self.loop.done
                self.loop.close()
                return
            self.most = max(self.most, len(self.jobs))
            job = self.jobs.pop(self.random.randrange(len(self.jobs)))
            self.order.append(job.name)
            self.loop.tell(job, self.bench.result(job))
            results = None if results is None else results - 1


KINDS = [{}, {"rungs": (0, 1), "reduction": 2}, {"warm_start": "on"}]


@pytest.mark.parametrize("options", KINDS, ids=["plain", "rungs", "warm start"])
def test_a_study_is_the_same_whoever_is_fast_and_whoever_dies(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Three trainings at once or one after the other, in whatever order they end; and a process
    that is killed with three under way, again and again."""
    folder, bench = make_study(tmp_path / "a", **MANY, **options, window=3)
    bench.run(folder)
    expected = state_of(folder)
    assert len(expected[0]) == 14
    orders = set()
    for seed in range(3):
        folder, bench = make_study(tmp_path / f"many-{seed}", **MANY, **options, window=3)
        with bench.loop(folder) as loop:
            workers = Workers(bench, loop, seed)
            workers.run()
        assert workers.most == 3
        assert workers.order != sorted(workers.order)
        orders.add(tuple(workers.order))
        assert state_of(folder) == expected
    assert len(orders) == 3

    folder, bench = make_study(tmp_path / "dying", **MANY, **options, window=3)
    for seed in range(9):
        with bench.loop(folder) as loop:
            Workers(bench, loop, seed).run(results=2)
    with bench.loop(folder) as loop:
        Workers(bench, loop, seed=9).run()
    assert state_of(folder) == expected


def test_a_proposal_knows_the_results_of_all_but_the_window_before_it(tmp_path: Path) -> None:
    """Replayed from nothing but the storage and the records."""
    folder, bench = make_study(tmp_path, **MANY, window=4)
    bench.run(folder)
    trials = load(folder).get_trials()
    records = {int(r.id): r for r in folder.records(TRIALS)}
    proposals = bench.proposals()
    points = [
        proposals.lattice.encode(bench.problem.space.decode(trial.params)) for trial in trials
    ]
    for trial in trials:
        known = max(0, trial.number - 3)
        assert trial.user_attrs["trainings"] == [[trial.number, known]]
        history = History(len(points[0]))
        for number in range(known):
            found = records[number].validation
            history.add(points[number], None if found is None else found.metric)
        proposed = proposals.propose(trial.number, history, points[known : trial.number])
        assert np.array_equal(proposed, points[trial.number]), trial.number


def test_a_large_window_is_proposed_in_batches_that_know_the_same(tmp_path: Path) -> None:
    """Of 70, in twos: the second of each is proposed with what was known and pending at the
    first, and is another point."""
    many = {**MANY, "bits": (2, 3, 4, 5, 6), "trials": 80, "ties": "none", "window": 70}
    folder, bench = make_study(tmp_path / "a", **many)
    bench.run(folder)
    expected = state_of(folder)
    trials = load(folder).get_trials()
    assert len({tuple(trial.params.items()) for trial in trials}) == 80
    records = {int(r.id): r for r in folder.records(TRIALS)}
    proposals = bench.proposals()
    points = [
        proposals.lattice.encode(bench.problem.space.decode(trial.params)) for trial in trials
    ]
    for trial in trials[2:]:
        first = trial.number - trial.number % 2
        known = max(0, first - 69)
        history = History(len(points[0]))
        for number in range(known):
            found = records[number].validation
            history.add(points[number], None if found is None else found.metric)
        proposed = proposals.propose(
            trial.number, history, points[known:first], points[first : trial.number]
        )
        assert np.array_equal(proposed, points[trial.number]), trial.number

    folder, bench = make_study(tmp_path / "b", **many)
    for seed in range(3):  # killed in the middle of a batch, too
        with bench.loop(folder) as loop:
            Workers(bench, loop, seed).run(results=3)
    bench.run(folder)
    assert state_of(folder) == expected


@pytest.mark.parametrize("options", KINDS, ids=["plain", "rungs", "warm start"])
def test_two_processes_share_a_study(tmp_path: Path, options: dict[str, Any]) -> None:
    """Each asks, tells and dies as it likes: nothing is done twice, and the study is the same."""
    folder, bench = make_study(tmp_path / "one", **MANY, **options, window=4)
    bench.run(folder)
    expected = state_of(folder)
    folder, bench = make_study(tmp_path / "two", **MANY, **options, window=4)
    told: Counter[str] = Counter()
    draw = random.Random(3)
    for _ in range(6):
        with bench.loop(folder) as one, bench.loop(folder) as two:
            jobs: list[tuple[StudyLoop, Job]] = []
            for _ in range(12):
                loop = draw.choice((one, two))
                if draw.random() < 0.5 and (job := loop.ask()) is not None:
                    assert job.name not in {other.name for _, other in jobs}
                    jobs.append((loop, job))
                elif jobs:
                    loop, job = jobs.pop(draw.randrange(len(jobs)))
                    loop.tell(job, bench.result(job))
                    told[job.name] += 1
    bench.evaluated.clear()
    bench.run(folder)
    assert state_of(folder) == expected
    assert set(told.values()) == {1}
    assert len(told) > 8
    again = {name.replace("@0", "-0").replace("@1", "-1") for name in bench.evaluated}
    assert options or not again & told.keys()


def test_a_result_that_comes_late_from_a_process_taken_for_dead_changes_nothing(
    tmp_path: Path,
) -> None:
    folder, bench = make_study(tmp_path, window=2)
    with bench.loop(folder) as lost:
        job = lost.ask()
        assert job is not None
        lost.crew._mine.clear()
        (folder.path / "running" / job.name).write_text("elsewhere-1-2")  # gone: has no file
        with bench.loop(folder) as other:
            assert other.ask() == job
            kept = other.tell(job, bench.result(job))
            assert lost.tell(job, replace(bench.result(job), seconds=9.0)) == kept
            assert folder.records(TRIALS) == [kept]
            assert lost.ask() != job


def test_a_search_is_not_closed_while_another_process_has_begun_more(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, rungs=(0,), reduction=2)
    bench.run(folder)
    more = Bench(replace(bench.problem, config=replace(bench.problem.config, trials=16)))
    with bench.loop(folder) as short, more.loop(folder) as long:
        assert short.ask() is None
        assert short.done
        job = long.ask()
        assert job is not None
        assert short.close() is False
        assert short.ask() is None
        assert not short.done
        long.tell(job, more.result(job))
        assert long.close() is True
        assert short.ask() is None
        assert short.close() is True
