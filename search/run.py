"""A study from beginning to end: FP32, sensitivities, seeds, search, final training, results.

Each stage leaves its result in the study's folder and is skipped when it is there, so that
running a study and resuming one are the same thing.
"""

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from sqlalchemy import make_url

from adq.proxies.base import Sensitivity
from adq.quant.batches import threads
from adq.quant.errors import InputError
from adq.quant.files import atomic_path, read_json, write_json, write_text
from adq.quant.spec import BitVector
from adq.search.breakdown import keep_breakdown
from adq.search.candidate import Record
from adq.search.config import EXECUTION, StudyConfig, make_config
from adq.search.crew import Crew
from adq.search.executors.select import make_executor, settled
from adq.search.files import FolderFiles, open_files
from adq.search.final import FinalTraining
from adq.search.folder import CHECKPOINTS, TRIALS, Clock, StudyFolder, create_study
from adq.search.fp32 import Fp32, fp32_model, load_user_weights
from adq.search.front import Front, best_record, front_records, point_of
from adq.search.jobs import Bench, Executor, Job
from adq.search.lattice import Lattice
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.report import write_report
from adq.search.report.command import command_line, resume_line
from adq.search.runs import RUNS, note_run
from adq.search.samplers import make_sampler
from adq.search.samplers.base import Proposals
from adq.search.seeds import Point as SeedPoint
from adq.search.seeds import combined_scores, fits, make_seeds
from adq.search.sensitivity import ensemble_of, load_sensitivities, sensitivities, to_csv
from adq.search.storage import StudyStorage, create_study_in
from adq.search.storage_url import JOURNAL, file_of
from adq.search.study import StudyLoop
from adq.search.task import Task

RESULTS_SCHEMA = "adq-results/1"
SEEDS_SCHEMA = "adq-seeds/1"
SEEDS = 12  # not a share of the trials: a study that is extended later keeps its seeds
SILENT = Observer()


def start(config: StudyConfig, task: Task, observer: Observer = SILENT) -> Front:
    """Run a new study. Everything that can be checked is checked before its folder appears."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = _absolute(config)
    problem = make_problem(config, task)
    if config.weights is not None:
        load_user_weights(problem.initial_model, Path(config.weights))
    _try_checkpoints(config)
    with make_executor(config) as executor:
        problem = replace(problem, config=settled(config, executor))

        def add_storage(folder: StudyFolder) -> None:
            create_study_in(
                folder.storage_url,
                folder.config.study or "",
                [task.metric_name, *problem.objectives],
                [StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * len(problem.objectives),
                observer.message,
            )

        folder = create_study(problem.config, add_storage)
        _claim_storage(folder, observer)
        observer.message(f"study {folder.name} in {folder.path}")
        return _resume(folder, problem, folder.config, executor, observer)


def _absolute(config: StudyConfig) -> StudyConfig:
    """With places that mean the same wherever the study is resumed from."""
    changed: dict[str, Any] = {}
    if config.checkpoints is not None and "://" not in config.checkpoints:
        changed["checkpoints"] = str(Path(config.checkpoints).absolute())
    if config.storage is not None and (file := file_of(config.storage)) is not None:
        if config.storage.startswith(JOURNAL):
            changed["storage"] = f"{JOURNAL}{file}"
        else:
            url = make_url(config.storage).set(database=str(file))
            changed["storage"] = url.render_as_string(hide_password=False)
    return make_config(vars(config), changed)


def _try_checkpoints(config: StudyConfig) -> None:
    """InputError now, not after the first epoch, where checkpoints cannot be written."""
    if config.checkpoints is not None:
        name, files = f"probe-{secrets.token_hex(4)}", open_files(config.checkpoints)
        files.write(name, b"")
        files.remove(name)


def _claim_storage(folder: StudyFolder, observer: Observer) -> None:
    """Say in the storage that the study has a folder: else it counts as a leftover of a process
    that died in between, and a study of the same name takes its place."""
    storage = StudyStorage(folder.storage_url, folder.config.study or "", observer.message)
    if storage.study_attr("folder") is None:
        storage.set_study_attr("folder", folder.name)
    storage.close()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a study; the text says what is kept and how to go on."""


def resume(
    folder: StudyFolder,
    task: Task,
    observer: Observer = SILENT,
    trials: int | None = None,
    time_budget: float | str | None = None,
    **execution: Any,
) -> Front:
    """Bring a study to its end from wherever it stands; on a finished one, its front.

    Where other processes are at it, this one works along. `trials` and `time_budget` raise the
    number of candidates and the time for all of it; `execution` are the options that say how and
    where trainings run (EXECUTION), for this time. Earlier results stay until new ones are written.

    Raises InputError when the study is damaged or when the user's task fails; Interrupted on
    Ctrl-C, once the front so far is written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if fixed := sorted(set(execution) - set(EXECUTION)):
        raise InputError(
            f"{fixed[0]}: expected one of {', '.join(EXECUTION)}, which alone may change when a "
            "study is resumed, beside trials and time_budget"
        )
    kept = folder.extended(trials, time_budget)
    if _nothing_left(folder, kept):
        execution = {"executor": "local"}  # only damaged models are made again
    config = _absolute(make_config(vars(kept), execution))
    problem = make_problem(config, task)
    _try_checkpoints(config)
    with make_executor(config) as executor:
        return _resume(folder, problem, kept, executor, observer)


def _resume(
    folder: StudyFolder,
    problem: Problem,
    kept: StudyConfig,
    executor: Executor,
    observer: Observer,
) -> Front:
    def waiting() -> None:
        observer.message(f"waiting for another process that works on study {folder.name}")

    with Crew(folder.path) as crew, threads(problem.threads):
        clock = Clock(folder.file("clock.json"))
        finished = folder.file("results.json").exists()
        try:
            with crew.exclusive(waiting):
                crew.sweep()
                _claim_storage(folder, observer)
                prepared = _prepare(problem, folder, kept, observer)
            window = problem.config.window or 1
            if window < executor.workers or (window == 1 and crew.others()):
                observer.message(
                    f"window {window}: no more than {window} of this study's trainings run at "
                    "once, which was fixed when it began; a new one may have a larger --window"
                )
            loop, final = _train_all(prepared, folder, clock, crew, executor, observer)
            with crew.exclusive(waiting):
                front = _results(problem, folder, prepared.fp32, loop, final, observer)
        except KeyboardInterrupt:
            clock.save()
            raise Interrupted(_write_so_far(problem, folder)) from None
        if not finished:
            clock.save()
        return front


@dataclass(frozen=True)
class _Prepared:
    fp32: Fp32
    proposals: Proposals
    bench: Bench


def _prepare(
    problem: Problem, folder: StudyFolder, kept: StudyConfig, observer: Observer
) -> _Prepared:
    """What the search starts from, measured once and kept in the folder."""
    fp32 = fp32_model(problem, folder, observer)
    _note_run(problem, folder, kept)
    keep_breakdown(folder, problem)
    if kept != folder.config:  # it was extended, and everything that can be checked is
        write_text(folder.file("study.toml"), kept.to_toml())
    found = sensitivities(problem, fp32.model, folder, observer)
    ranges = problem.call("measuring input ranges", lambda: problem.input_ranges(fp32.model))
    files = FolderFiles(folder.path)
    shared = problem.config.checkpoints  # by several studies
    where = folder.file(CHECKPOINTS) if shared is None else f"{shared.rstrip('/')}/{folder.name}"
    logs = folder.file("tune")
    bench = Bench(
        problem, fp32.model, ranges, files, open_files(str(where), observer.message), logs
    )
    return _Prepared(fp32, _proposals(problem, folder, found), bench)


def _nothing_left(folder: StudyFolder, kept: StudyConfig) -> bool:
    """Whether the study has ended as it is asked for."""
    with suppress(InputError):  # a damaged results.json is made again
        return folder.finished and kept == folder.config
    return False


def _note_run(problem: Problem, folder: StudyFolder, kept: StudyConfig) -> None:
    """Keep that this process works on the study, unless there is nothing left to do."""
    if _nothing_left(folder, kept):
        return
    begun = folder.file(RUNS).exists()
    command = resume_line(folder.config, problem.config) if begun else command_line(kept)
    note_run(folder, command, problem.device, problem.threads)


def _train_all(
    prepared: _Prepared,
    folder: StudyFolder,
    clock: Clock,
    crew: Crew,
    executor: Executor,
    observer: Observer,
) -> tuple[StudyLoop, FinalTraining]:
    """Search, and train the front and the uniform models."""
    bench = prepared.bench
    problem, config = bench.problem, bench.problem.config
    uniform = _uniform_around(problem)
    storage = StudyStorage(folder.storage_url, folder.config.study or "", observer.message)
    loop = StudyLoop(folder, problem, prepared.proposals, clock, crew, storage, len(uniform))
    observer.stage("search", config.trials)
    for _ in loop.records:
        observer.step("done before")
    shown = best_record(loop.front) if loop.front else None

    def heard(record: Record) -> None:
        nonlocal shown
        note = observer.step if len(record.rungs) == 1 else observer.note
        note(_summary(problem, record))
        now = best_record(loop.front) if loop.front else None
        if now is not None and now is not shown:
            observer.best(f"best so far {_summary(problem, now)}")
        shown = now

    def begin_final() -> FinalTraining:
        if not loop.records:
            raise InputError(f"no trial record in {folder.file(TRIALS)}: restore them")
        if not loop.front:
            errors = [record.error for record in loop.records.values() if record.error is not None]
            raise InputError(f"every candidate failed; the last one: {errors[-1]}")
        observer.message(loop.end)
        chosen = {f"t{record.id}": record.bits for record in loop.front}
        final = FinalTraining(folder, chosen | uniform, config.final_epochs, clock, crew)
        observer.stage("final training", len(final.models))
        for id in final.models:
            if (record := final.record(id)) is not None:
                observer.step(_summary(problem, record))
        return final

    both = _Phases(loop, begin_final)
    executor.run(both, bench, heard)
    assert both.final is not None
    return loop, both.final


class _Phases:
    """The search and then final training as one `Source`, so that workers are kept."""

    def __init__(self, loop: StudyLoop, begin_final: Callable[[], FinalTraining]) -> None:
        self.loop, self._begin_final = loop, begin_final
        self.final: FinalTraining | None = None

    @property
    def done(self) -> bool:
        return self.final is not None and self.final.done

    def ask(self) -> Job | None:
        if self.final is None:
            job = self.loop.ask()
            if job is not None or not self.loop.done:
                return job
            if not self.loop.close():
                return None
            self.final = self._begin_final()
        return self.final.ask()

    def tell(self, job: Job, record: Record) -> Record:
        if not job.final:
            return self.loop.tell(job, record)
        assert self.final is not None
        return self.final.tell(job, record)


def _write_so_far(problem: Problem, folder: StudyFolder) -> str:
    """Write the front of the finished trials, where no final one is there; what to say of it."""
    text = f"interrupted: 'adq-search resume {folder.name}' goes on, and nothing finished is lost"
    records = front_records(folder.records(TRIALS), problem.objectives)
    if folder.file("results.json").exists():
        return f"{text}; the front of before stays"
    if not records:
        return text
    facts = read_json(folder.file("fp32.json"))
    front = Front(
        study=folder.name,
        task=problem.config.task,
        metric_name=problem.task.metric_name,
        fp32_metric=facts["validation"]["metric"],
        budget=problem.limits,
        objectives=problem.ends,
        points=tuple(point_of(record, "validation") for record in records),
        split="validation",
        folder=str(folder.path),
    )
    write_report(folder, front)
    return f"{text}; the front so far, by validation, is in {folder.file('front.json')}"


def _proposals(problem: Problem, folder: StudyFolder, found: list[Sensitivity]) -> Proposals:
    config, space, costs = problem.config, problem.space, problem.costs
    limits = costs.limits(problem.limits)
    seeds = _seeds(problem, folder, found)
    lattice = Lattice(space, costs, limits, combined_scores(space, found))
    sampler = make_sampler(config.sampler, lattice, problem.objectives, len(seeds))
    return Proposals(lattice, seeds, sampler, config.seed)


def _seeds(problem: Problem, folder: StudyFolder, found: list[Sensitivity]) -> list[SeedPoint]:
    """The study's seeds, as its first process made them: a solver that runs out of time finds
    other ones on another machine."""
    path, space = folder.file("seeds.json"), problem.space
    limits = problem.costs.limits(problem.limits)
    if not path.exists():
        seeds = make_seeds(space, problem.costs, limits, found, SEEDS)
        write_json(path, {"schema": SEEDS_SCHEMA, "seeds": [space.encode(p) for p in seeds]})
    try:
        kept = read_json(path)["seeds"]
        points = [space.decode(params) for params in kept]
        if not points or [space.encode(point) for point in points] != kept:
            raise ValueError("the parameters are not the study's")
        if any(o not in g.options for p in points for g, o in zip(space.groups, p, strict=True)):
            raise ValueError("bits that are no choice of theirs")
        if not all(fits(space, problem.costs, limits, point) for point in points):
            raise ValueError("a seed is over the budget")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__} {error}): restore it, or start a new study"
        ) from None
    return points


def _summary(problem: Problem, record: Record) -> str:
    costs, found = record.costs, record.validation
    if record.error is not None:
        return f"trial {record.id}: failed, {record.error}"
    trained = ""
    if found is None:
        found, trained = record.rungs[-1].validation, f" after {record.epochs} epochs"
    assert found is not None
    return (
        f"{record.id}{trained}: {problem.task.metric_name} {found.metric:.4f}, "
        f"loss {found.loss:.4f}, {costs.average_bits:.3f} bits, {costs.size_bytes / 1e3:.1f} kB"
    )


def _uniform_around(problem: Problem) -> dict[str, BitVector]:
    """The uniform vectors on both sides of the first budget: what the front has to beat."""
    cost, limit = next(iter(problem.limits.items()))
    widths = problem.space.weight_choices
    vectors = {b: problem.space.bit_vector(problem.space.uniform(b)) for b in widths}
    value = {b: getattr(problem.costs.costs(v), cost) for b, v in vectors.items()}
    below = [b for b in widths if value[b] <= limit][-1:]
    above = [b for b in widths if value[b] > limit][:1]
    return {f"uniform-{b}": vectors[b] for b in below + above}


def _results(
    problem: Problem,
    folder: StudyFolder,
    fp32: Fp32,
    loop: StudyLoop,
    final: FinalTraining,
    observer: Observer,
) -> Front:
    """Write everything that a finished study leaves; results.json comes last and says so."""
    records = [record for id in final.models if (record := final.record(id)) is not None]
    chosen = {f"t{record.id}" for record in loop.front}
    finals = [record for record in records if record.id in chosen and record.error is None]
    uniform = [record for record in records if record.id not in chosen and record.error is None]
    if not finals:
        raise InputError(f"every final training failed; the last one: {records[-1].error}")
    points = front_records(finals, problem.objectives)
    best = best_record(points)
    front = Front(
        study=folder.name,
        task=problem.config.task,
        metric_name=problem.task.metric_name,
        fp32_metric=fp32.test.metric,
        budget=problem.limits,
        objectives=problem.ends,
        points=tuple(point_of(record) for record in points),
        uniform=tuple(point_of(record) for record in uniform),
        folder=str(folder.path),
    )
    observer.stage("report", 1)
    assert best.weights is not None
    with atomic_path(folder.file("best.safetensors")) as temporary:
        shutil.copyfile(folder.path / best.weights, temporary)
    write_json(folder.file("best.bits.json"), best.bits.to_json())
    scores = load_sensitivities(folder)
    ensemble = ensemble_of(scores, folder.records(TRIALS))
    if ensemble is not None:
        write_text(folder.file("sensitivity.csv"), to_csv([*scores, ensemble]))
    write_report(folder, front)
    write_json(
        folder.file("results.json"),
        {
            "schema": RESULTS_SCHEMA,
            "best": best.id,
            "objectives": list(problem.objectives),
            "trials": problem.config.trials,
            "time_budget": problem.config.time_budget,
            "fp32": {"validation": asdict(fp32.validation), "test": asdict(fp32.test)},
        },
    )
    shutil.rmtree(folder.file(CHECKPOINTS), ignore_errors=True)  # nothing is under way
    observer.step("written")
    return front


def load_front(folder: StudyFolder) -> Front:
    """The front of a study, from its front.json; InputError when it has none yet."""
    path = folder.file("front.json")
    if not path.exists():
        raise InputError(
            f"study {folder.name!r} has no front yet ({folder.status()}): finish it with "
            f"'adq-search resume {folder.name}'"
        )
    data = read_json(path)
    try:
        return Front.from_json(data, str(folder.path))
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
