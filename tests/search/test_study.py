"""Ask, evaluate, tell: the same trials whenever the process dies, one line for a bad storage."""

import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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
from adq.search.candidate import Record
from adq.search.config import StudyConfig
from adq.search.folder import TRIALS, StudyFolder, create_study
from adq.search.problem import Problem, make_problem
from adq.search.sampler import BudgetSampler
from adq.search.seeds import Point
from adq.search.study import create_storage_study, run_trials

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Death(BaseException):
    """The process dies here: nothing may catch it."""


@dataclass
class Bench:
    """A problem, and the pieces that a process would make anew each time it starts."""

    problem: Problem
    evaluated: Counter[str] = field(default_factory=Counter)
    heard: list[Record] = field(default_factory=list)
    die: Callable[[], None] = lambda: None
    failing: tuple[str, ...] = ("0001",)
    seeds: list[Point] = field(default_factory=list)

    def sampler(self) -> BudgetSampler:
        space, costs = self.problem.space, self.problem.costs
        limits = costs.limits(self.problem.limits)
        scores = [np.array([0.1 * (10 - w) for w, _ in la.options]) for la in space.groups]
        seeds = self.seeds or [space.uniform(3), smallest(space)]
        return BudgetSampler(space, costs, limits, scores, seeds, seed=4)

    def run(self, folder: StudyFolder) -> bool:
        def evaluate(id: str, bits: BitVector) -> Record:
            assert not folder.record_path(TRIALS, id).exists(), f"{id} was there already"
            self.die()
            self.evaluated[id] += 1
            self.die()
            return self.record(id, bits)

        def on_record(record: Record) -> None:
            self.heard.append(record)
            self.die()

        return run_trials(folder, self.problem, self.sampler(), evaluate, on_record)

    def record(self, id: str, bits: BitVector) -> Record:
        metric = sum(b * (i + 1) for i, b in enumerate(bits.weight.values())) / 100
        failed = id in self.failing
        return Record(
            id=id,
            bits=bits,
            seed=0,
            epochs=1,
            costs=self.problem.costs.costs(bits),
            train_losses=(),
            flips=(),
            dead_levels=(),
            validation=None if failed else Evaluation(1 - metric, metric, 0.01, 60),
            test=None,
            seconds=0.5,
            error="the loss became nan" if failed else None,
        )


def make_config(out: Path, **options: Any) -> StudyConfig:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4), "trials": 4, "study": "s"} | options
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
    return trial.number, trial.state, trial.params, trial.values, trial.system_attrs


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
    assert [space.decode(t.params) for t in trials[:2]] == bench.sampler().seeds


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
            (optuna.Study, "ask"),
            (optuna.Study, "tell"),
            (optuna.trial.Trial, "suggest_categorical"),
            (optuna.trial.Trial, "set_constraint"),
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


def test_a_process_killed_at_any_step_is_resumed_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trials: a seed, a proposal that fails in training, a proposal that does not. What a
    kill leaves is the disk as it was: a copy of the folder after each change."""
    folder, bench = make_study(tmp_path / "calm", trials=3)
    bench.seeds = [bench.problem.space.uniform(3)]
    deaths = Deaths(monkeypatch)
    copies: list[StudyFolder] = []
    states: list[dict[Path, bytes]] = []

    def keep() -> None:
        state = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
        if not states or state != states[-1]:
            states.append(state)
            copies.append(copy_of(folder, tmp_path / f"killed-{len(copies)}"))

    deaths.on_tick = keep
    bench.die = deaths.tick
    assert deaths.run(bench, folder, at=-1) is True
    expected, deaths.on_tick = state_of(folder), None
    # asked, three parameters, a record, a constraint and told, for each trial
    assert len(copies) >= 3 * 7
    for step, copy in enumerate(copies):
        again = Bench(bench.problem, seeds=bench.seeds)
        done = {r.id for r in copy.records(TRIALS)}
        assert again.run(copy) is True
        assert state_of(copy) == expected, f"killed at step {step}"
        assert again.evaluated.keys() == {"0000", "0001", "0002"} - done


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
        if deaths.run(bench, folder, at=9 + 5 * (life % 2)):
            break
    else:
        pytest.fail("it never got there")
    assert life > 4
    assert state_of(folder) == state_of(calm)


def test_a_record_of_other_bits_is_not_taken_for_this_trials(
    fresh: Callable[[str], StudyFolder], template: Any
) -> None:
    folder, bench = fresh("a"), Bench(template[1].problem)
    foreign = bench.problem.space.bit_vector(bench.problem.space.uniform(4))
    folder.write_record(TRIALS, bench.record("0000", foreign))
    first = bench.problem.space.bit_vector(bench.sampler().seeds[0])
    assert first != foreign
    calls = []
    run_trials(
        folder,
        bench.problem,
        bench.sampler(),
        lambda id, bits: calls.append(id) or bench.record(id, bits),  # type: ignore[func-returns-value]
        lambda record: None,
    )
    assert calls[0] == "0000"
    assert folder.records(TRIALS)[0].bits == first


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
    for at in range(steps - 10, steps):  # one ask, three parameters, one tell, twice each
        folder = copy_of(template, tmp_path / f"died-{at}")
        assert deaths.run(bench, folder, at) is None
        assert deaths.run(bench, folder, at=-1) is False
        assert state_of(folder) == expected


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
    path = folder.file("study.db")
    path.write_bytes(path.read_bytes().replace(b"MAXIMIZE", b"MAX\xff\xfe\xfdZE"))
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
