"""Ask, evaluate, tell, resume: the one place that touches the Optuna storage."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy import make_url

from adq.quant.errors import InputError
from adq.quant.spec import MAX_BITS, BitVector
from adq.search.candidate import Record, Rung
from adq.search.folder import TRIALS, Clock, StudyFolder
from adq.search.front import front_records
from adq.search.history import History
from adq.search.ladder import Ladder, Result, band_of
from adq.search.lattice import Floats, Indices, Lattice
from adq.search.problem import Problem
from adq.search.samplers.base import Proposals
from adq.search.space import FP32, cost_range

EXHAUSTED = "exhausted"


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a database says of a missing, damaged or locked store into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, OptunaError, ImportError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"storage {url} cannot be used: {text[:200]}; restore it, or give another --storage"
        ) from error


def create_storage_study(folder: StudyFolder, problem: Problem, name: str) -> None:
    """Create the Optuna study of a new folder; InputError if the storage has one of that name."""
    url = folder.storage_url
    with storage_errors(url):
        storage = RDBStorage(url)
        try:
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[StudyDirection.MAXIMIZE]
                + [StudyDirection.MINIMIZE] * len(problem.objectives),
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage)
            if study.trials:
                raise InputError(
                    f"storage {url} has a study {name!r} already: choose another name with --study"
                ) from None
            # a process died between creating it and creating its folder: nothing is in it
            optuna.delete_study(study_name=name, storage=storage)
            storage.engine.dispose()
            create_storage_study(folder, problem, name)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([problem.task.metric_name, *problem.objectives])
        storage.engine.dispose()
        _require_file(url)


def _open_storage(folder: StudyFolder) -> tuple[RDBStorage, int]:
    """The storage and the study's id in it."""
    url, name = folder.storage_url, folder.config.study or ""
    _require_file(url)
    try:
        storage = RDBStorage(url)
        return storage, storage.get_study_id_from_name(name)
    except RuntimeError as error:  # written by another version of Optuna
        raise InputError(f"storage {url} cannot be used: {' '.join(str(error).split())}") from None
    except KeyError:
        raise InputError(
            f"storage {url} has no study {name!r}: restore it, or give another --storage"
        ) from None


def _require_file(url: str) -> None:
    """Raise InputError where SQLite would make an empty database, or keep one in memory only."""
    parsed = make_url(url)
    path = parsed.database or ":memory:"
    if (
        parsed.get_backend_name() == "sqlite"
        and not path.startswith("file:")
        and not Path(path).is_file()
    ):
        raise InputError(
            f"storage {url} cannot be used: there is no file {path}; restore it, or give another "
            "--storage"
        )


@dataclass(frozen=True)
class Job:
    """One training to do: trial `id` with these bits, on rung number `rung` of the ladder.

    `parent` is the trial from whose weights it starts; the FP32 model's where None.
    """

    id: str
    number: int
    bits: BitVector
    rung: int
    epochs: int
    parent: str | None


@dataclass(frozen=True)
class _Trial:
    number: int
    storage_id: int
    point: Indices
    bits: BitVector
    parent: str | None

    @property
    def id(self) -> str:
        return f"{self.number:04d}"


class StudyLoop:
    """Which training is next, and what came of it: `ask` and `tell`, by any number of workers.

    Trials are proposed by `proposals` and climb a `Ladder` from --rungs to --epochs. Results of the
    last rung and failures are told to the sampler, and when the search ends, as pruned, the trials
    that were never promoted.

    A record is written before the storage hears of it, and a trial that a process left unfinished
    is taken up again under its own number, so that nothing finished is lost or repeated, whenever
    the process dies. A proposal follows from what is recorded: trial k carries the number n of
    results that had been told when it was proposed (`told`, a user attribute), each record its
    place in the order of telling (`Record.told`), and pending were the trials numbered below k that
    are not among the first n told.

    The caller holds the folder's lock: the storage is read once. `uniform` is the number of models
    that final training adds to the front, which --time-budget must leave room for.

    Raises InputError for a storage that cannot be used, or records that are missing or damaged.
    """

    def __init__(
        self,
        folder: StudyFolder,
        problem: Problem,
        proposals: Proposals,
        clock: Clock,
        uniform: int = 0,
    ) -> None:
        self.folder, self.problem, self.proposals = folder, problem, proposals
        self.clock, self.uniform = clock, uniform
        config, self._lattice = problem.config, proposals.lattice
        self.ladder = Ladder((*(config.rungs or ()), config.epochs), config.reduction)
        self.history = History(len(self._lattice.sizes))
        self.records: dict[str, Record] = {}
        self.front: list[Record] = []
        self._trials: dict[int, _Trial] = {}
        self._told: dict[int, None] = {}  # numbers in the order of telling
        self._next = 0  # the number of the next trial
        self._left: list[int] = []  # asked by a process that ended before it had a result
        self._distributions = problem.space.distributions()
        self._weight_widths, self._act_widths = _widths(self._lattice)
        names = self._lattice.names
        self._columns = [names.index(name) for name in problem.objectives]
        self._limited = [names.index(name) for name in problem.limits]
        first = problem.objectives[0]
        least, largest = (ends[first] for ends in cost_range(problem.space, problem.costs))
        limit = int(self._lattice.limits[names.index(first)])
        self._band_ends = least, min(largest, limit)
        self._url = folder.storage_url
        with storage_errors(self._url):
            self._storage, self._study_id = _open_storage(folder)
            self.exhausted = EXHAUSTED in self._storage.get_study_user_attrs(self._study_id)
            self._read()

    def ask(self) -> Job | None:
        """What to train next; None where there is nothing.

        That is the end of the search, unless something is running: its result may lead on.
        """
        if self._left:
            return self._job(self._left.pop(0), 0)
        in_time = not self._trials or self.in_time()
        if not in_time and self.front:
            return None
        promoted = self.ladder.promotion()
        if promoted is None and in_time and self._more():
            number = self._new()
            if number is not None:
                return self._job(number, 0)
        promoted = promoted or self.ladder.promotion(last=True)
        return None if promoted is None else self._job(*promoted)

    def tell(self, job: Job, result: Record) -> Record:
        """Take what came of a job; returns the record of its trial with all its rungs."""
        before = self.records.get(job.id)
        rungs = (() if before is None else before.rungs) + result.rungs
        last = job.rung == self.ladder.top
        record = replace(
            result,
            validation=result.validation if last else None,
            seconds=sum(rung.seconds for rung in rungs),
            rungs=rungs,
            parent=job.parent,
            told=len(self._told) if last or result.error is not None else None,
        )
        trial = self._trials[job.number]
        self._write(record)
        self._climb(trial, result.rungs[-1], result.error)
        if record.told is not None:
            self._learn(trial, record)
            self._store(trial, record)
        if record.validation is not None:
            self.front = front_records([*self.front, record], self.problem.objectives)
        return record

    def close(self) -> None:
        """End the search: trials that wait on a rung are told as pruned."""
        for number in self.ladder.waiting():
            trial = self._trials[number]
            record = replace(self.records[trial.id], told=len(self._told))
            self._write(record)
            self.ladder.stop(number)
            self._learn(trial, record)
            self._store(trial, record)
        self._storage.engine.dispose()

    def in_time(self) -> bool:
        """Whether the time budget has room for another candidate before final training."""
        budget = self.problem.config.time_budget
        return budget is None or self.clock.seconds + self.final_seconds() <= budget

    def final_seconds(self) -> float:
        """What final training of the front and the uniform models will take: its epochs, each at
        the mean seconds of an epoch so far (of an evaluation, where none was trained)."""
        rungs = [rung for record in self.records.values() for rung in record.rungs]
        trained = [rung for rung in rungs if rung.epochs > 0] or rungs
        epochs = sum(max(1, rung.epochs) for rung in trained)
        seconds = sum(rung.seconds for rung in trained) / max(1, epochs)
        models = len(self.front) + self.uniform
        return seconds * max(1, self.problem.config.final_epochs) * models

    @property
    def end(self) -> str:
        """Why there is nothing left to ask for, in words."""
        if self.exhausted:
            return "no new bit vector is found under the budget: the search ends early"
        if self._more():
            return (
                f"the search ends after {len(self._trials)} trials: final training takes about "
                f"{self.final_seconds():.0f} s, and {self.clock.seconds:.0f} s of the time budget "
                f"of {self.problem.config.time_budget:.0f} s are over"
            )
        return f"the search ends: {self.problem.config.trials} trials are done"

    def _more(self) -> bool:
        return not self.exhausted and len(self._trials) < self.problem.config.trials

    def _job(self, number: int, rung: int) -> Job:
        trial = self._trials[number]
        self.ladder.start(number, rung, self._band(trial))
        return Job(trial.id, number, trial.bits, rung, self.ladder.rungs[rung], trial.parent)

    def _band(self, trial: _Trial) -> int:
        first = self._columns[0]
        cost = self._lattice.totals(trial.point)[first]
        return band_of(int(cost), *self._band_ends)

    def _new(self) -> int | None:
        """The number of a new trial, created in one transaction; None where no point is left."""
        lattice, space = self._lattice, self.problem.space
        pending = [t.point for number, t in self._trials.items() if number not in self._told]
        point = self.proposals.propose(self._next, self.history, pending)
        if point is None:
            with storage_errors(self._url):  # else each resumption would search once more
                self._storage.set_study_user_attr(self._study_id, EXHAUSTED, True)
            self.exhausted = True
            return None
        options, over = lattice.decode(point), lattice.totals(point) - lattice.limits
        parent = self._nearest(point) if self.problem.config.warm_start == "on" else None
        template = create_trial(
            state=TrialState.RUNNING,
            params=space.encode(options),
            distributions={**self._distributions},
            user_attrs={"told": len(self._told), "parent": parent},
            # whole numbers: on the budget is within it
            constraints={lattice.names[i]: float(over[i]) for i in self._limited},
        )
        with storage_errors(self._url):
            storage_id = self._storage.create_new_trial(self._study_id, template)
            number = self._storage.get_trial_number_from_id(storage_id)
        self._next = number + 1
        self._trials[number] = _Trial(number, storage_id, point, space.bit_vector(options), parent)
        return number

    def _nearest(self, point: Indices) -> str | None:
        """The finished trial with the least sum of bit differences over all layers' weights and
        inputs; of equal ones the lowest number."""
        done = np.flatnonzero(~np.isnan(self.history.metric))
        if not len(done):
            return None
        groups, others = np.arange(len(point)), self.history.points[done]
        distance = sum(
            np.abs(widths[groups, others] - widths[groups, point]).sum(axis=1)
            for widths in (self._weight_widths, self._act_widths)
        )
        numbers = np.array(list(self._told))[done]
        return self._trials[int(numbers[np.lexsort((numbers, distance))[0]])].id

    def _read(self) -> None:
        """What earlier processes left: trials, results in the order of telling, rungs."""
        lattice, space = self._lattice, self.problem.space
        found = self._storage.get_all_trials(self._study_id, deepcopy=False)
        records = {record.id: record for record in self.folder.records(TRIALS)}
        finished = set()
        for frozen in found:
            if set(frozen.params) != set(self._distributions):
                continue  # put there by hand
            options = space.decode(frozen.params)
            trial = _Trial(
                frozen.number,
                frozen._trial_id,
                lattice.encode(options),
                space.bit_vector(options),
                frozen.user_attrs.get("parent"),
            )
            record = records.get(trial.id)
            if record is not None and record.bits != trial.bits:
                record = None
            if frozen.state.is_finished():
                if record is None or record.told is None:
                    path = self.folder.record_path(TRIALS, trial.id)
                    raise InputError(f"{path} is missing: restore it, or start a new study")
                finished.add(trial.number)
            self._trials[trial.number] = trial
            if record is None:
                self._left.append(trial.number)
            else:
                self.records[trial.id] = record
        self._next = len(found)
        for trial in self._trials.values():
            if (record := self.records.get(trial.id)) is not None:
                for i, rung in enumerate(record.rungs):
                    self.ladder.start(trial.number, i, self._band(trial))
                    error = record.error if i == len(record.rungs) - 1 else None
                    self._climb(trial, rung, error)
        told = [t for t in self._trials.values() if self._place(t) is not None]
        for trial in sorted(told, key=lambda t: self._place(t) or 0):
            record = self.records[trial.id]
            self._learn(trial, record)
            self.ladder.stop(trial.number)
            if trial.number not in finished:
                self._store(trial, record)
        self.front = front_records([*self.records.values()], self.problem.objectives)

    def _place(self, trial: _Trial) -> int | None:
        record = self.records.get(trial.id)
        return None if record is None else record.told

    def _climb(self, trial: _Trial, rung: Rung, error: str | None) -> None:
        """Let the ladder know what came of the rung that the trial was started on."""
        if error is not None or rung.validation is None:
            self.ladder.fail(trial.number)
            return
        costs = self._lattice.totals(trial.point)[self._columns]
        result = Result(rung.validation.metric, rung.validation.loss, tuple(map(float, costs)))
        self.ladder.finish(trial.number, result)

    def _write(self, record: Record) -> None:
        self.folder.write_record(TRIALS, record)
        self.records[record.id] = record
        self.clock.save()

    def _learn(self, trial: _Trial, record: Record) -> None:
        """Tell the sampler."""
        self._told[trial.number] = None
        found = record.validation
        self.history.add(trial.point, None if found is None else found.metric)

    def _store(self, trial: _Trial, record: Record) -> None:
        """Tell the storage."""
        state, values = TrialState.PRUNED, None
        if record.error is not None:
            state = TrialState.FAIL
        elif record.validation is not None:
            costs = [float(getattr(record.costs, name)) for name in self.problem.objectives]
            state, values = TrialState.COMPLETE, [record.validation.metric, *costs]
        with storage_errors(self._url):
            self._storage.set_trial_state_values(trial.storage_id, state, values)


def _widths(lattice: Lattice) -> tuple[Floats, Floats]:
    """(groups, options) bits of weights and of inputs, times the group's number of layers; an
    input in FP32 counts as one bit more than the most."""
    weight, act = np.zeros(lattice.scores.shape), np.zeros(lattice.scores.shape)
    for g, group in enumerate(lattice.space.groups):
        for i, (w, a) in enumerate(group.options):
            weight[g, i] = w * len(group.names)
            act[g, i] = (MAX_BITS + 1 if a == FP32 else a) * len(group.names)
    return weight, act


def run_trials(
    loop: StudyLoop, evaluate: Callable[[Job], Record], on_record: Callable[[Record], None]
) -> None:
    """The search in this process, one training after the other."""
    while (job := loop.ask()) is not None:
        on_record(loop.tell(job, evaluate(job)))
    loop.close()
