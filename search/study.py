"""Ask, tell, resume: which training is next, and what is known of those before."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from adq.quant.errors import InputError
from adq.quant.spec import MAX_BITS, BitVector
from adq.search.candidate import Record
from adq.search.crew import Crew
from adq.search.folder import TRIALS, Clock, StudyFolder
from adq.search.front import front_records
from adq.search.history import History
from adq.search.jobs import TRIES, Job
from adq.search.ladder import Ladder, Result, band_of
from adq.search.lattice import Floats, Indices, Lattice
from adq.search.problem import Problem
from adq.search.samplers.base import Proposals
from adq.search.space import FP32, cost_range
from adq.search.storage import StudyStorage

EXHAUSTED = "exhausted"
BATCHES = 32
"""A window is filled by proposals from so many states of knowledge at least."""


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


@dataclass(frozen=True)
class _Training:
    """The i-th training of a study: of which trial, on which rung, and the number of trainings
    whose results were taken when it was chosen."""

    trial: _Trial
    rung: int
    known: int

    @property
    def name(self) -> str:
        return f"{self.trial.id}-{self.rung}"


class StudyLoop:
    """Which training is next, and what came of it: the search as a `Source` of jobs.

    Trials are proposed by `proposals` and climb a `Ladder` from --rungs to --epochs. Results of the
    last rung and failures are told to the sampler, and when the search ends, as pruned, the trials
    that were never promoted.

    Trainings have an order, and the results are taken in that order, whoever is ready first:
    training i is chosen once the results of all before i − `window` + 1 are taken, and those of no
    others unless there is nothing to choose without them. So what is tried, and what comes of it,
    depends neither on the number of workers nor on their speed, nor on when one of them dies (but
    for --time-budget). Up to `window` trainings run at once.

    Several processes may share a study, each with its own loop and the folder's lock while it asks
    or tells. The trials in the storage say what was chosen (`trainings`, a user attribute: for each
    rung, the place of the training in the order and the number of results taken before), the
    folder's records what came of it. A record is written before the storage hears of it, and what a
    process left unfinished is taken up by another, so that nothing finished is lost or repeated,
    whenever a process dies.

    `uniform` is the number of models that final training adds to the front, which --time-budget
    must leave room for.

    Raises InputError for a storage that cannot be used, or records that are missing or damaged.
    """

    def __init__(
        self,
        folder: StudyFolder,
        problem: Problem,
        proposals: Proposals,
        clock: Clock,
        crew: Crew,
        storage: StudyStorage,
        uniform: int = 0,
    ) -> None:
        self.folder, self.problem, self.proposals = folder, problem, proposals
        self.clock, self.crew, self.uniform = clock, crew, uniform
        config, self._lattice = problem.config, proposals.lattice
        self.window = config.window or 1
        self.batch = max(1, self.window // BATCHES)
        self.ladder = Ladder((*(config.rungs or ()), config.epochs), config.reduction)
        self.history = History(len(self._lattice.sizes))
        self.records: dict[str, Record] = {}
        self.front: list[Record] = []
        self.exhausted = self.done = False
        self._trials: dict[int, _Trial] = {}
        self._foreign: set[int] = set()  # numbers of trials that somebody put into the storage
        self._trainings: list[_Training] = []
        self._taken = 0  # results taken, of the first trainings
        self._open: dict[int, None] = {}  # trainings without a result
        self._mine: dict[str, int] = {}  # those that this process is at, by their jobs' names
        self._pruned: dict[int, list[_Trial]] = {}  # by the number of trainings before
        self._learned: dict[int, None] = {}  # trials that the sampler knows
        self._known_at: dict[int, int] = {}  # how many it knew when a trial was proposed
        self._failed = 0  # told in this process
        self._distributions = problem.space.distributions()
        self._weight_widths, self._act_widths = _widths(self._lattice)
        names = self._lattice.names
        self._columns = [names.index(name) for name in problem.objectives]
        self._limited = [names.index(name) for name in problem.limits]
        first = problem.objectives[0]
        least, largest = (ends[first] for ends in cost_range(problem.space, problem.costs))
        limit = int(self._lattice.limits[names.index(first)])
        self._band_ends = least, min(largest, limit)
        self._storage = storage
        with crew.exclusive():
            self._read()

    def ask(self) -> Job | None:
        """What to train next; None where there is nothing now."""
        with self.crew.exclusive() as changed:
            if changed:
                self._read()
            place = self._untaken()
            if place is None and not self._hopeless:
                place = self._choose()
            self.done = place is None and not self._open
            if place is None:
                return None
            job = self._job(self._trainings[place])
            self.crew.take(job.name)
            self._mine[job.name] = place
            return job

    def tell(self, job: Job, record: Record) -> Record:
        """Take what came of a job; returns the record of its trial with all its rungs."""
        with self.crew.exclusive() as changed:
            if changed:
                self._read()
            self.crew.drop(job.name)
            self._mine.pop(job.name, None)
            before = self.records.get(job.id)
            rungs = () if before is None else before.rungs
            if before is not None and len(rungs) > job.rung:
                return before  # by a process that was taken for dead
            place = next(i for i in self._open if self._trainings[i].name == job.name)
            rungs += record.rungs
            last = job.rung == self.ladder.top
            record = replace(
                record,
                validation=record.validation if last else None,
                seconds=sum(rung.seconds for rung in rungs),
                rungs=rungs,
                parent=job.parent,
            )
            self.folder.write_record(TRIALS, record)
            self.clock.save()
            self._note(place, record)
            self._failed += record.error is not None
            if self._over(record):
                self._store(self._trainings[place].trial, record)
            return record

    def close(self) -> bool:
        """End the search: trials that wait on a rung are told as pruned.

        False, and nothing else, where another process has chosen a training since.
        """
        with self.crew.exclusive() as changed:
            if changed:
                self._read()
            if self._open:
                return False
            while self._taken < len(self._trainings):
                self._take()
            for number in self.ladder.waiting():
                trial, place = self._trials[number], len(self._trainings)
                self._storage.set_attr(trial.storage_id, "pruned", place)
                self._prune(trial)
                self._store(trial, self.records[trial.id])
        self._storage.close()
        return True

    def in_time(self) -> bool:
        """Whether the time budget has room for another candidate before final training."""
        budget = self.problem.config.time_budget
        return budget is None or self.clock.seconds + self.final_seconds() <= budget

    def final_seconds(self) -> float:
        """What final training of the front and the uniform models will take: its epochs, each at
        the mean seconds of an epoch so far (of an evaluation, where none was trained). Failures
        say little, as they come early or after several tries."""
        rungs = [rung for record in self.records.values() for rung in record.rungs]
        rungs = [rung for rung in rungs if rung.validation is not None] or rungs
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

    @property
    def _hopeless(self) -> bool:
        """Whether there is more wrong than a candidate: the first TRIES all failed."""
        failed = all(record.error is not None for record in self.records.values())
        return self._failed >= TRIES and failed

    def _more(self) -> bool:
        return not self.exhausted and len(self._trials) < self.problem.config.trials

    def _untaken(self) -> int | None:
        """A training that was chosen and that nobody alive is at."""
        for place in sorted(self._open.keys() - self._mine.values()):
            if self.crew.is_free(self._trainings[place].name):
                return place
        return None

    def _choose(self) -> int | None:
        """The next training, with results taken as far as that needs them."""
        while True:
            place = len(self._trainings)
            room = place < self._taken + self.window
            if room and (chosen := self._next()) is not None:
                self._begin(chosen)
                return place
            if self._taken == place or self._taken in self._open:
                return None
            self._take()

    def _next(self) -> _Training | None:
        """A promotion, else a new trial, else what is promoted when no new trials will come."""
        in_time = not self._trials or self.in_time()
        if not in_time and self.front:
            return None
        promoted = self.ladder.promotion()
        if promoted is None and in_time and self._more():
            trial = self._new()
            if trial is not None:
                return _Training(trial, 0, self._taken)
        promoted = promoted or self.ladder.promotion(last=True)
        if promoted is None:
            return None
        trial, rung = self._trials[promoted[0]], promoted[1]
        trainings = [
            [place, training.known]
            for place, training in enumerate(self._trainings)
            if training.trial is trial
        ]
        trainings.append([len(self._trainings), self._taken])
        self._storage.set_attr(trial.storage_id, "trainings", trainings)
        return _Training(trial, rung, self._taken)

    def _job(self, training: _Training) -> Job:
        trial, rung = training.trial, training.rung
        keep = self.problem.config.warm_start == "on" and rung == self.ladder.top
        epochs = self.ladder.rungs[rung]
        return Job(trial.id, trial.bits, epochs, rung, trial.parent, keep=keep)

    def _begin(self, training: _Training) -> None:
        """Add a training that was chosen."""
        self._open[len(self._trainings)] = None
        self._trainings.append(training)
        if training.rung == 0:
            self._known_at[training.trial.number] = len(self.history)
        self.ladder.start(training.trial.number, training.rung, self._band(training.trial))

    def _note(self, place: int, record: Record) -> None:
        """A training has its result, which is taken when its turn comes."""
        del self._open[place]
        self.records[record.id] = record
        if record.validation is not None and self._trainings[place].rung == self.ladder.top:
            self.front = front_records([*self.front, record], self.problem.objectives)

    def _take(self) -> None:
        """Let ladder and sampler know the next result."""
        training = self._trainings[self._taken]
        self._taken += 1
        trial, record = training.trial, self.records[training.trial.id]
        found = record.rungs[training.rung].validation
        if found is None:
            self.ladder.fail(trial.number)
        else:
            costs = self._lattice.totals(trial.point)[self._columns]
            result = Result(found.metric, found.loss, tuple(map(float, costs)))
            self.ladder.finish(trial.number, result)
        if found is None or training.rung == self.ladder.top:
            self._learn(trial, None if found is None else found.metric)

    def _prune(self, trial: _Trial) -> None:
        self.ladder.stop(trial.number)
        self._learn(trial, None)

    def _learn(self, trial: _Trial, metric: float | None) -> None:
        self._learned[trial.number] = None
        self.history.add(trial.point, metric)

    def _band(self, trial: _Trial) -> int:
        first = self._columns[0]
        cost = self._lattice.totals(trial.point)[first]
        return band_of(int(cost), *self._band_ends)

    def _new(self) -> _Trial | None:
        """A new trial, created in one transaction; None where no point is left."""
        lattice, space = self._lattice, self.problem.space
        point = self._propose()
        if point is None:
            self._storage.set_study_attr(EXHAUSTED, True)  # else each process would search again
            self.exhausted = True
            return None
        place = len(self._trainings)
        options, over = lattice.decode(point), lattice.totals(point) - lattice.limits
        parent = self._nearest(point) if self.problem.config.warm_start == "on" else None
        template = create_trial(
            state=TrialState.RUNNING,
            params=space.encode(options),
            distributions={**self._distributions},
            user_attrs={"job": str(place), "trainings": [[place, self._taken]], "parent": parent},
            # whole numbers: on the budget is within it
            constraints={lattice.names[i]: float(over[i]) for i in self._limited},
        )
        number, storage_id = self._storage.create(template)
        trial = _Trial(number, storage_id, point, space.bit_vector(options), parent)
        self._trials[number] = trial
        return trial

    def _propose(self) -> Indices | None:
        """The point of the next trial.

        What is known stays as it was for `batch` trials in a row: where a thousand are pending, the
        next result or two change little, and working it out anew takes most of a proposal's time.
        """
        trials = list(self._trials.values())
        first = len(trials) - len(trials) % self.batch
        if first < len(trials):
            history = self.history.first(self._known_at[trials[first].number])
        else:
            history = self.history
        learned = {*itertools.islice(self._learned, len(history))}
        pending = [trial.point for trial in trials[:first] if trial.number not in learned]
        beside = [trial.point for trial in trials[first:]]
        number = len(trials) + len(self._foreign)
        return self.proposals.propose(number, history, pending, beside)

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
        numbers = np.array(list(self._learned))[done]
        return self._trials[int(numbers[np.lexsort((numbers, distance))[0]])].id

    def _read(self) -> None:
        """Take in what other processes did, before this one began and since."""
        self.exhausted = bool(self._storage.study_attr(EXHAUSTED))
        chosen: dict[int, _Training] = {}
        finished: set[int] = set()
        for frozen in self._storage.trials():
            trial = self._trials.get(frozen.number) or self._read_trial(frozen)
            if trial is None:
                continue
            for rung, (place, known) in enumerate(frozen.user_attrs["trainings"]):
                if place >= len(self._trainings):
                    chosen[place] = _Training(trial, rung, known)
            if frozen.state.is_finished():
                finished.add(trial.number)
            pruned = frozen.user_attrs.get("pruned")
            if pruned is not None and trial.number not in self._learned:
                self._pruned.setdefault(pruned, []).append(trial)
        news = {t.trial.number: t.trial for t in chosen.values()}
        news |= {self._trainings[place].trial.number: self._trainings[place].trial
                 for place in self._open}  # fmt: skip
        found = {number: self._read_record(trial, finished) for number, trial in news.items()}
        for place in [*self._open]:
            self._note_if_done(place, found[self._trainings[place].trial.number])
        for place, training in sorted(chosen.items()):
            self._catch_up(training.known)
            self._begin(training)
            self._note_if_done(place, found[training.trial.number])
        self._catch_up(self._taken)
        for number, record in found.items():
            told = number in self._learned and record is not None  # else it is pruned
            if record is not None and number not in finished and (self._over(record) or told):
                self._store(self._trials[number], record)

    def _read_trial(self, frozen: FrozenTrial) -> _Trial | None:
        """What the storage says of a trial; None for one that somebody else put there."""
        if set(frozen.params) != set(self._distributions) or "trainings" not in frozen.user_attrs:
            self._foreign.add(frozen.number)
            return None
        options = self.problem.space.decode(frozen.params)
        trial = _Trial(
            frozen.number,
            frozen._trial_id,
            self._lattice.encode(options),
            self.problem.space.bit_vector(options),
            frozen.user_attrs.get("parent"),
        )
        self._trials[frozen.number] = trial
        return trial

    def _read_record(self, trial: _Trial, finished: set[int]) -> Record | None:
        """A trial's record, None where there is none or it is another trial's."""
        record = self.folder.read_record(TRIALS, trial.id)
        if record is not None and record.bits != trial.bits:
            record = None
        if record is None and trial.number in finished:
            raise self._missing(trial)
        return record

    def _missing(self, trial: _Trial) -> InputError:
        path = self.folder.record_path(TRIALS, trial.id)
        return InputError(f"{path} is missing: restore it, or start a new study")

    def _note_if_done(self, place: int, record: Record | None) -> None:
        if record is not None and len(record.rungs) > self._trainings[place].rung:
            self._note(place, record)

    def _catch_up(self, known: int) -> None:
        """Take results, and let go of trials that were pruned, as it was before a training was
        chosen that knew so many results."""
        for place in sorted(p for p in self._pruned if p <= len(self._trainings)):
            self._take_to(place)
            for trial in self._pruned.pop(place):
                self._prune(trial)
        self._take_to(known)

    def _take_to(self, count: int) -> None:
        while self._taken < count:
            if self._taken in self._open:
                raise self._missing(self._trainings[self._taken].trial)
            self._take()

    def _over(self, record: Record) -> bool:
        """Whether no further training of the trial will come."""
        return record.error is not None or len(record.rungs) > self.ladder.top

    def _store(self, trial: _Trial, record: Record) -> None:
        """Tell the storage."""
        state, values = TrialState.PRUNED, None
        if record.error is not None:
            state = TrialState.FAIL
        elif record.validation is not None:
            costs = [float(getattr(record.costs, name)) for name in self.problem.objectives]
            state, values = TrialState.COMPLETE, [record.validation.metric, *costs]
        self._storage.finish(trial.storage_id, state, values)


def _widths(lattice: Lattice) -> tuple[Floats, Floats]:
    """(groups, options) bits of weights and of inputs, times the group's number of layers; an
    input in FP32 counts as one bit more than the most."""
    weight, act = np.zeros(lattice.scores.shape), np.zeros(lattice.scores.shape)
    for g, group in enumerate(lattice.space.groups):
        for i, (w, a) in enumerate(group.options):
            weight[g, i] = w * len(group.names)
            act[g, i] = (MAX_BITS + 1 if a == FP32 else a) * len(group.names)
    return weight, act
