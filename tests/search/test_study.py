"""Ask, evaluate, tell: the same trials whenever the process dies, one line for a bad storage."""

import random
import re
import shutil
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
import tiny_task
from optuna.storages import RDBStorage
from optuna.storages._rdb.storage import _VersionManager
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from toy_space import all_points, smallest

from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.folder import TRIALS, Clock, StudyFolder, create_study
from adq.search.front import front_records
from adq.search.history import History
from adq.search.jobs import Job
from adq.search.lattice import Indices, Lattice
from adq.search.problem import Problem, make_problem
from adq.search.samplers.base import Proposals
from adq.search.seeds import Point
from adq.search.storage import StudyStorage, create_study_in
from adq.search.study import StudyLoop

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

    @contextmanager
    def loop(self, folder: StudyFolder, uniform: int = 0) -> Iterator[StudyLoop]:
        clock = self.clock or Clock(folder.file("clock.json"))
        storage = StudyStorage(folder.storage_url, folder.config.study or "", patience_s=0)
        with Crew(folder.path) as crew:
            args = folder, self.problem, self.proposals(), clock, crew, storage, uniform
            yield StudyLoop(*args)

    def run(self, folder: StudyFolder) -> bool:
        """False when the space has no new point left."""
        with self.loop(folder) as loop:
            while (job := loop.ask()) is not None:
                self.die()
                self.evaluated[f"{job.id}@{job.epochs}"] += 1
                self.die()
                self.heard.append(loop.tell(job, self.result(job)))
                self.die()
            assert loop.done
            loop.close()
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
    directions = [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * len(problem.objectives)
    names = [problem.task.metric_name, *problem.objectives]

    def add_storage(new: StudyFolder) -> None:
        create_study_in(new.storage_url, problem.config.study or "", names, directions)

    return create_study(problem.config, add_storage), Bench(problem)


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


@pytest.fixture(scope="module", autouse=True)
def quick_storage() -> Iterator[None]:
    """Optuna looks through its migrations once, and SQLite waits for no disk: a process that dies
    leaves what it wrote all the same."""

    def relax(connection: sqlite3.Connection, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    head: list[str] = []
    original = _VersionManager.get_head_version

    def get_head_version(self: _VersionManager) -> str:
        if not head:
            head.append(original(self))
        return head[0]

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", relax)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "get_head_version", get_head_version)
        yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", relax)


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
        for owner, name in (
            (RDBStorage, "_create_new_trial"),
            (RDBStorage, "set_trial_state_values"),
            (RDBStorage, "set_trial_user_attr"),
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
        parts = (p for name in ("study.db", "trials") for p in folder.path.rglob(f"{name}*"))
        state = {p: p.read_bytes() for d in parts for p in (d, *d.glob("*")) if p.is_file()}
        if not states or state != states[-1]:
            states.append(state)
            copies.append(copy_of(folder, tmp_path / f"killed-{len(copies)}"))

    deaths.on_tick = keep
    bench.die = deaths.tick
    assert deaths.run(bench, folder, at=-1) is True
    expected, deaths.on_tick = state_of(folder), None
    assert set(bench.evaluated.values()) == {1}
    # nothing yet; then for each trial: asked, promoted, a record a rung, marked as pruned, and told
    changes = 2 * options["trials"] + 2 * len(bench.evaluated) - options["trials"] + pruned(folder)
    assert len(copies) == 1 + changes
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
    with bench.loop(folder) as loop:
        loop.ask()
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
    with bench.loop(folder) as loop:
        loop.ask()
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


MANY = {"bits": (2, 3, 4, 6), "act_bits": (4, 8), "trials": 14, "budget_bits": 4.5}
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


def test_a_search_whose_first_candidates_all_fail_ends(tmp_path: Path) -> None:
    folder, bench = make_study(tmp_path, **MANY, window=1)
    bench.failing = tuple(f"{i:04d}" for i in range(14))
    bench.run(folder)
    assert len(folder.records(TRIALS)) == 3
    bench.failing = ("0000", "0001", "0002")
    bench.run(folder)
    assert len(folder.records(TRIALS)) == 14


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


def test_the_time_budget_leaves_room_for_the_final_training(tmp_path: Path) -> None:
    """An epoch takes 0.25 s here, final training 10 of them for each model of the front and two
    more; another candidate starts while that still ends in time."""
    options = MANY | {"trials": 50, "time_budget": 20.0, "final_epochs": 10}
    folder, bench = make_study(tmp_path, **options)
    bench.clock = clock = StoppedClock()
    with bench.loop(folder, uniform=2) as loop:
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
            rf"the search ends after {told} trials: final training takes about \d+ s, and \d+ s of "
            r"the time budget of 20 s are over",
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
