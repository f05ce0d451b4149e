"""Ask, evaluate, tell: the same trials whenever the process dies, one line for a bad storage."""

import random
import re
import shutil
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import tiny_task
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from toy_space import all_points, smallest

from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.folder import TRIALS, Clock, StudyFolder, create_study
from adq.search.front import front_records
from adq.search.history import History
from adq.search.lattice import Indices, Lattice
from adq.search.problem import Problem, make_problem
from adq.search.samplers.base import Proposals
from adq.search.seeds import Point
from adq.search.study import Job, StudyLoop, create_storage_study, run_trials

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Death(BaseException):
    """The process dies here: nothing may catch it."""


class Telltale:
    """Proposes what depends on every bit of what it is given."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice

    def propose(
        self, history: History, pending: Sequence[Indices], rng: np.random.Generator
    ) -> Indices:
        given = [history.points, history.metric, *pending]
        check = zlib.crc32(b"|".join(array.tobytes() for array in given))
        return self.lattice.random(np.random.default_rng([check, rng.integers(2**31)]), 1)[0]


class StoppedClock(Clock):
    """Shows what it is set to."""

    seconds = 0.0  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def save(self) -> None:
        pass


@dataclass
class Bench:
    """A problem, and the pieces that a process would make anew each time it starts."""

    problem: Problem
    evaluated: Counter[str] = field(default_factory=Counter)
    heard: list[Record] = field(default_factory=list)
    die: Callable[[], None] = lambda: None
    failing: tuple[str, ...] = ("0001",)
    seeds: list[Point] = field(default_factory=list)
    clock: Clock | None = None

    def proposals(self) -> Proposals:
        space, costs = self.problem.space, self.problem.costs
        limits = costs.limits(self.problem.limits)
        scores = [np.array([0.1 * (10 - w) for w, _ in la.options]) for la in space.groups]
        lattice = Lattice(space, costs, limits, scores)
        seeds = self.seeds or [space.uniform(3), smallest(space)]
        return Proposals(lattice, seeds, Telltale(lattice), seed=4)

    def loop(self, folder: StudyFolder, uniform: int = 0) -> StudyLoop:
        clock = self.clock or Clock(folder.file("clock.json"))
        return StudyLoop(folder, self.problem, self.proposals(), clock, uniform)

    def run(self, folder: StudyFolder) -> bool:
        """False when the space has no new point left."""
        loop = self.loop(folder)

        def evaluate(job: Job) -> Record:
            self.die()
            self.evaluated[f"{job.id}@{job.epochs}"] += 1
            self.die()
            return self.result(job)

        def on_record(record: Record) -> None:
            self.heard.append(record)
            self.die()

        run_trials(loop, evaluate, on_record)
        return not loop.exhausted

    def result(self, job: Job) -> Record:
        return self.record(job.id, job.bits, job.epochs)

    def record(self, id: str, bits: BitVector, epochs: int) -> Record:
        noise = zlib.crc32(f"{bits.key}{epochs}".encode()) / 2**32
        metric = sum(b * (i + 1) for i, b in enumerate(bits.weight.values())) / 100 + noise
        failed = id in self.failing and epochs > 0
        validation = None if failed else Evaluation(1 - metric, metric, 0.01, 60)
        return Record(
            id=id,
            bits=bits,
            seed=0,
            epochs=epochs,
            costs=self.problem.costs.costs(bits),
            train_losses=(),
            flips=(),
            dead_levels=(),
            validation=validation,
            test=None,
            seconds=0.5,
            error="the loss became nan" if failed else None,
            rungs=(Rung(epochs, validation, 0.5),),
        )


def make_config(out: Path, **options: Any) -> StudyConfig:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4), "trials": 4, "study": "s", "epochs": 2}
    settings |= options
    return StudyConfig(task="tiny_task:make_task", out=str(out), **settings)


def make_study(out: Path, **options: Any) -> tuple[StudyFolder, Bench]:
    problem = make_problem(make_config(out, **options), tiny_task.make_task())
    folder = create_study(
        problem.config, lambda new: create_storage_study(new, problem, problem.config.study or "")
    )
    return folder, Bench(problem)


def open_storage(url: str) -> RDBStorage:
    """Without Optuna's look at the version of the tables, which takes longer than a trial."""
    return RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)


def load(folder: StudyFolder) -> optuna.Study:
    storage = open_storage(folder.storage_url)
    return optuna.load_study(study_name=folder.config.study, storage=storage)


def essence(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        trial.number,
        trial.state,
        trial.params,
        trial.values,
        trial.system_attrs,
        trial.user_attrs,
    )


def state_of(folder: StudyFolder) -> tuple[list[Any], list[Record]]:
    return [essence(t) for t in load(folder).get_trials()], folder.records(TRIALS)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, Bench]:
    """A study of four trials, none of them asked for yet, to be copied."""
    return make_study(tmp_path_factory.mktemp("template"))


@pytest.fixture
def fresh(template: tuple[StudyFolder, Bench], tmp_path: Path) -> Callable[[str], StudyFolder]:
    return lambda name: copy_of(template[0], tmp_path / name)


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


class Deaths:
    """Counts the steps of a run, and lets the process die at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, -1
        self.on_tick: Callable[[], Any] | None = None
        monkeypatch.setattr("adq.search.study.RDBStorage", open_storage)
        for owner, name in (
            (RDBStorage, "create_new_trial"),
            (RDBStorage, "set_trial_state_values"),
            (RDBStorage, "set_study_user_attr"),
            (StudyFolder, "write_record"),
        ):
            monkeypatch.setattr(owner, name, self.mortal(getattr(owner, name)))

    def tick(self) -> None:
        if self.on_tick is not None:
            self.on_tick()
        self.count += 1
        if self.count - 1 == self.at:
            raise Death

    def mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return wrapped

    def run(self, bench: Bench, folder: StudyFolder, at: int) -> bool | None:
        """None when it died."""
        self.count, self.at = 0, at
        try:
            return bench.run(folder)
        except Death:
            return None


def copy_of(folder: StudyFolder, path: Path) -> StudyFolder:
    shutil.copytree(folder.path, path)
    return StudyFolder(path)


RUNGS = [{"trials": 3}, {"trials": 7, "rungs": (0, 1), "reduction": 2}]


@pytest.mark.parametrize("options", RUNGS, ids=["no rungs", "rungs"])
def test_a_process_killed_at_any_step_is_resumed_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A seed, a proposal that fails in training, proposals that do not. What a kill leaves is the
    disk as it was: a copy of the folder after each change."""
    folder, bench = make_study(tmp_path / "calm", **options)
    bench.seeds = [bench.problem.space.uniform(3)]
    deaths = Deaths(monkeypatch)
    copies: list[StudyFolder] = []
    states: list[dict[Path, bytes]] = []

    def keep() -> None:
        files = (p for p in folder.path.rglob("*") if p.is_file() and p.name != "clock.json")
        state = {p: p.read_bytes() for p in files}
        if not states or state != states[-1]:
            states.append(state)
            copies.append(copy_of(folder, tmp_path / f"killed-{len(copies)}"))

    deaths.on_tick = keep
    bench.die = deaths.tick
    assert deaths.run(bench, folder, at=-1) is True
    expected, deaths.on_tick = state_of(folder), None
    assert set(bench.evaluated.values()) == {1}
    # nothing yet; then for each trial: asked, a record a rung, and told
    assert len(copies) == 1 + 2 * options["trials"] + len(bench.evaluated) + pruned(folder)
    for step, copy in enumerate(copies):
        again = Bench(bench.problem, seeds=bench.seeds)
        done = {f"{r.id}@{rung.epochs}" for r in copy.records(TRIALS) for rung in r.rungs}
        assert again.run(copy) is True
        assert state_of(copy) == expected, f"killed at step {step}"
        assert again.evaluated.keys() == bench.evaluated.keys() - done


def pruned(folder: StudyFolder) -> int:
    return sum(t.state == TrialState.PRUNED for t in load(folder).get_trials())


def test_an_error_at_any_step_of_a_trial_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C has it: the code between the error and the top runs on its way out."""
    template, bench = make_study(tmp_path / "template", trials=2)
    deaths = Deaths(monkeypatch)
    bench.seeds, bench.failing, bench.die = [bench.problem.space.uniform(3)], (), deaths.tick
    calm = copy_of(template, tmp_path / "calm")
    assert deaths.run(bench, calm, at=-1) is True
    expected, steps = state_of(calm), deaths.count
    for at in range(steps // 2, steps, 2):  # the end of one step is the beginning of the next
        folder = copy_of(template, tmp_path / f"died-{at}")
        bench.evaluated.clear()
        assert deaths.run(bench, folder, at) is None
        assert deaths.run(bench, folder, at=-1) is True
        assert state_of(folder) == expected, f"after a death at step {at}"
        # a candidate is evaluated again only where its record was never written
        assert sum(bench.evaluated.values()) <= 3


def test_a_process_that_dies_again_and_again_gets_there(
    fresh: Callable[[str], StudyFolder], template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = Deaths(monkeypatch)
    calm, folder = fresh("calm"), fresh("dying")
    deaths.run(Bench(template[1].problem, die=deaths.tick), calm, at=-1)
    for life in range(60):
        bench = Bench(template[1].problem, die=deaths.tick)
        if deaths.run(bench, folder, at=5 + 3 * (life % 2)):
            break
    else:
        pytest.fail("it never got there")
    assert life > 4
    assert state_of(folder) == state_of(calm)


def test_a_record_of_other_bits_is_not_taken_for_this_trials(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.loop(folder).ask()
    foreign = bench.problem.space.bit_vector(bench.problem.space.uniform(4))
    folder.write_record(TRIALS, bench.record("0000", foreign, 2))
    bench.run(folder)
    assert bench.evaluated["0000@2"] == 1
    first = bench.problem.space.bit_vector(bench.problem.space.uniform(3))
    assert folder.records(TRIALS)[0].bits == first != foreign


def test_a_damaged_record_stops_the_run_in_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    folder.record_path(TRIALS, "0000").write_text('{"id": "0000"')
    expect_one_line(folder, bench, r"0000\.json is missing or damaged")


def fitting_points(problem: Problem) -> int:
    limits = problem.costs.limits(problem.limits)
    totals = [problem.costs.totals(problem.space.bit_vector(p)) for p in all_points(problem.space)]
    return sum(all(t[name] <= limit for name, limit in limits.items()) for t in totals)


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


def test_death_while_the_end_of_the_space_is_noticed_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, bench = make_study(tmp_path / "a", bits=(2, 3), trials=9, budget_bits=2.8)
    bench.seeds = [smallest(bench.problem.space)]
    assert fitting_points(bench.problem) == 2
    first = copy_of(template, tmp_path / "first")
    deaths = Deaths(monkeypatch)
    assert deaths.run(bench, first, at=-1) is False
    expected, steps = state_of(first), deaths.count
    for at in range(steps - 6, steps):  # a record, a tell, and the end noticed
        folder = copy_of(template, tmp_path / f"died-{at}")
        assert deaths.run(bench, folder, at) is None
        assert deaths.run(bench, folder, at=-1) is False
        assert state_of(folder) == expected


class Crew:
    """Workers that run at most three jobs at a time and finish in random order."""

    def __init__(self, bench: Bench, loop: StudyLoop, seed: int) -> None:
        self.bench, self.loop, self.random = bench, loop, random.Random(seed)
        self.jobs: list[Job] = []
        self.most = 0

    def run(self, results: int | None = None) -> None:
        """To the end of the search, or for so many results."""
        while results is None or results > 0:
            while len(self.jobs) < 3 and (job := self.loop.ask()) is not None:
                self.jobs.append(job)
            if not self.jobs:
                self.loop.close()
                return
            self.most = max(self.most, len(self.jobs))
            job = self.jobs.pop(self.random.randrange(len(self.jobs)))
            self.loop.tell(job, self.bench.result(job))
            results = None if results is None else results - 1


MANY = {"bits": (2, 3, 4, 6), "act_bits": (4, 8), "trials": 14, "budget_bits": 4.5}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"rungs": (0, 1), "reduction": 2}], ids=["no", "rungs"])
def test_proposals_follow_from_the_recorded_order_when_workers_finish_out_of_order(
    tmp_path: Path, options: dict[str, Any], seed: int
) -> None:
    folder, bench = make_study(tmp_path, **MANY, **options)
    crew = Crew(bench, bench.loop(folder), seed)
    crew.run()
    assert crew.most == 3
    trials = load(folder).get_trials()
    assert len(trials) == 14
    records = {int(r.id): r for r in folder.records(TRIALS)}
    order = sorted(records, key=lambda number: records[number].told or 0)
    assert [records[number].told for number in order] == list(range(14))
    assert order != sorted(order)

    # the recorded order, replayed by a process that has nothing but the storage and the records
    proposals = bench.proposals()
    points = [
        proposals.lattice.encode(bench.problem.space.decode(trial.params)) for trial in trials
    ]
    pending_once = 0
    for trial in trials:
        history = History(len(points[0]))
        for number in order[: trial.user_attrs["told"]]:
            found = records[number].validation
            history.add(points[number], None if found is None else found.metric)
        told = set(order[: trial.user_attrs["told"]])
        pending = [points[n] for n in range(trial.number) if n not in told]
        pending_once += len(pending) > 0
        proposed = proposals.propose(trial.number, history, pending)
        assert np.array_equal(proposed, points[trial.number]), trial.number
    assert pending_once > 5


@pytest.mark.parametrize("seed", range(2))
def test_a_fresh_study_told_in_the_recorded_order_is_the_same_study(
    tmp_path: Path, seed: int
) -> None:
    folder, bench = make_study(tmp_path / "a", **MANY)
    Crew(bench, bench.loop(folder), seed).run()
    trials = load(folder).get_trials()
    order = sorted(folder.records(TRIALS), key=lambda record: record.told or 0)

    again, bench = make_study(tmp_path / "b", **MANY)
    loop, jobs = bench.loop(again), {}
    for step in range(len(order) + 1):
        while len(jobs) < len(trials) and trials[len(jobs)].user_attrs["told"] == step:
            job = loop.ask()
            assert job is not None
            jobs[job.id] = job
        if step < len(order):
            job = jobs[order[step].id]
            loop.tell(job, bench.result(job))
    assert loop.ask() is None
    assert state_of(again) == state_of(folder)


def test_workers_that_die_lose_what_they_were_at_and_nothing_else(tmp_path: Path) -> None:
    options = MANY | {"rungs": (0, 1), "reduction": 2}
    folder, bench = make_study(tmp_path, **options)
    crew = Crew(bench, bench.loop(folder), seed=0)
    crew.run(results=7)
    lost = {job.number for job in crew.jobs if job.rung == 0}
    before = {r.id: r for r in folder.records(TRIALS)}
    asked = {t.number: t.params for t in load(folder).get_trials()}

    loop = bench.loop(folder)
    first = [loop.ask() for _ in lost]
    assert {job.number for job in first if job is not None} == lost
    for job in first:
        assert job is not None
        loop.tell(job, bench.result(job))
    Crew(bench, loop, seed=1).run()
    for record in folder.records(TRIALS):
        if record.id in before:
            assert record.rungs[: len(before[record.id].rungs)] == before[record.id].rungs
    trials = load(folder).get_trials()
    assert len(trials) == 14
    assert {n: trials[n].params for n in asked} == asked


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
    assert {r.id for r in bench.loop(folder).front} == {
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
    folder, bench = make_study(tmp_path, **MANY, warm_start="on", ties="none")
    Crew(bench, bench.loop(folder), seed=5).run()
    records = {r.id: r for r in folder.records(TRIALS)}
    told = sorted(records.values(), key=lambda record: record.told or 0)
    parents = 0
    for trial in load(folder).get_trials():
        record = records[f"{trial.number:04d}"]
        known = [r for r in told[: trial.user_attrs["told"]] if r.validation is not None]
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


def test_the_storage_is_read_once(
    fresh: Callable[[str], StudyFolder], template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    for owner, name in ((RDBStorage, "_get_trials"), (StudyFolder, "records")):
        method = getattr(owner, name)

        def counted(*args: Any, method: Any = method, name: str = name) -> Any:
            reads[name] += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counted)
    Bench(template[1].problem).run(fresh("a"))
    assert reads == {"_get_trials": 1, "records": 1}


def test_the_time_budget_leaves_room_for_the_final_training(tmp_path: Path) -> None:
    """An epoch takes 0.25 s here, final training 10 of them for each model of the front and two
    more; another candidate starts while that still ends in time."""
    options = MANY | {"trials": 50, "time_budget": 20.0, "final_epochs": 10}
    folder, bench = make_study(tmp_path, **options)
    bench.clock = clock = StoppedClock()
    loop = bench.loop(folder, uniform=2)
    told = 0
    while True:
        front = len(front_records(folder.records(TRIALS), bench.problem.objectives))
        may = told == 0 or clock.seconds + (front + 2) * 10 * 0.25 <= 20
        job = loop.ask()
        assert (job is not None) == may
        if job is None:
            break
        clock.seconds += 0.5  # type: ignore[misc]
        loop.tell(job, bench.result(job))
        told += 1
    assert 1 < told < 50
    assert re.fullmatch(
        rf"the search ends after {told} trials: final training takes about \d+ s, and \d+ s of the "
        r"time budget of 20 s are over",
        loop.end,
    )


def test_one_candidate_is_trained_to_the_end_however_short_the_time(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, time_budget=1.0, rungs=(0, 1), reduction=2)
    bench.clock = clock = StoppedClock()
    clock.seconds = 5.0  # type: ignore[misc]
    bench.run(folder)
    (record,) = folder.records(TRIALS)
    assert [rung.epochs for rung in record.rungs] == [0, 1, 2]
    assert record.validation is not None
    more = replace(bench.problem, config=replace(bench.problem.config, time_budget=1e6))
    Bench(more).run(folder)
    assert len(folder.records(TRIALS)) == 14


def test_the_seconds_of_all_processes_add_up(tmp_path: Path) -> None:
    path = tmp_path / "clock.json"
    first = Clock(path)
    time.sleep(0.02)
    first.save()
    second = Clock(path)
    assert second.seconds >= 0.02
    time.sleep(0.01)
    second.save()
    assert Clock(path).seconds >= 0.03
    assert Clock(path).seconds < 60
    path.write_text("[]")
    with pytest.raises(InputError, match=r"clock\.json is damaged"):
        Clock(path)


def expect_one_line(folder: StudyFolder, bench: Bench, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        bench.run(folder)
    assert "\n" not in str(error.value)


def test_a_missing_store_is_one_line_and_none_is_made(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    folder.file("study.db").unlink()
    for _ in range(2):  # the first attempt must not leave an empty store behind for the second
        expect_one_line(folder, Bench(template[1].problem), r"storage sqlite:.*study\.db .*restore")
    assert not folder.file("study.db").exists()


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, None])
def test_a_damaged_store_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any, content: bytes | None
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    path = folder.file("study.db")
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    expect_one_line(folder, Bench(template[1].problem), r"storage sqlite:.*study\.db")


def test_a_store_with_garbled_text_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    bench.run(folder)
    path = folder.file("study.db")
    path.write_bytes(path.read_bytes().replace(b"weight:conv2", b"weight:\xff\xfe\xfdv2"))
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db cannot be used")


def test_a_store_of_another_version_of_optuna_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    with sqlite3.connect(folder.file("study.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        connection.execute("UPDATE version_info SET schema_version = 999, library_version = '99'")
    connection.close()
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db cannot be used: .* optuna")


def test_a_store_that_lost_its_study_is_one_line(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    optuna.delete_study(study_name="s", storage=folder.storage_url)
    expect_one_line(folder, bench, r"storage sqlite:.*study\.db .*'s'")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "not a url",
        "nosuchdatabase://here/there",
        "sqlite:////nowhere/at/all/study.db",
        "postgresql+nosuchdriver://localhost/x",
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_and_no_study(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"^storage .* cannot be used: .*--storage") as error:
        make_study(tmp_path, storage=url)
    assert "\n" not in str(error.value)
    assert url in str(error.value)
    assert list(tmp_path.iterdir()) == []


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
