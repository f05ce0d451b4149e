"""A study from beginning to end: FP32, sensitivities, seeds, search, final training, results.

Each stage leaves its result in the study's folder and is skipped when it is there, so that
running a study and resuming one are the same thing.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import optuna
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adq.proxies.base import Sensitivity
from adq.quant.batches import threads
from adq.quant.errors import InputError
from adq.quant.export.packed import read_metadata
from adq.quant.files import atomic_path, read_json, write_json, write_text
from adq.quant.spec import BitVector
from adq.search.candidate import Record, train_candidate
from adq.search.config import StudyConfig
from adq.search.folder import (
    FINAL,
    MODELS,
    START,
    TRIALS,
    Clock,
    StudyFolder,
    create_study,
)
from adq.search.fp32 import Fp32, fp32_model, load_user_weights
from adq.search.front import Front, best_record, front_records, point_of
from adq.search.lattice import Lattice
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.report import write_report
from adq.search.samplers import make_sampler
from adq.search.samplers.base import Proposals
from adq.search.seeds import Point as SeedPoint
from adq.search.seeds import combined_scores, fits, make_seeds
from adq.search.sensitivity import (
    ensemble_of,
    load_sensitivities,
    sensitivities,
    to_csv,
)
from adq.search.study import Job, StudyLoop, create_storage_study, run_trials
from adq.search.task import Task

RESULTS_SCHEMA = "adq-results/1"
SEEDS_SCHEMA = "adq-seeds/1"
SEEDS = 12  # not a share of the trials: a study that is extended later keeps its seeds
SILENT = Observer()


def start(config: StudyConfig, task: Task, observer: Observer = SILENT) -> Front:
    """Run a new study. Everything that can be checked is checked before its folder appears."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem = make_problem(config, task)
    if config.weights is not None:
        load_user_weights(problem.initial_model, Path(config.weights))

    def add_storage(folder: StudyFolder) -> None:
        create_storage_study(folder, problem, folder.config.study or "")

    folder = create_study(config, add_storage)
    observer.message(f"study {folder.name} in {folder.path}")
    return resume(folder, task, observer, problem)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a study; the text says what is kept and how to go on."""


def resume(
    folder: StudyFolder,
    task: Task,
    observer: Observer = SILENT,
    problem: Problem | None = None,
    trials: int | None = None,
    time_budget: float | str | None = None,
) -> Front:
    """Bring a study to its end from wherever it stands; on a finished one, its front.

    `trials` and `time_budget` raise the number of candidates and the time for all of it. Earlier
    results stay until new ones are written.

    Raises InputError when the study is damaged, is being run by another process, or when the
    user's task fails; Interrupted on Ctrl-C, once the front so far is written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with folder.locked():
        clock = Clock(folder.file("clock.json"))
        config = folder.extended(trials, time_budget)
        finished = folder.file("results.json").exists()
        if problem is None:
            problem = make_problem(config, task)
        with threads(problem.threads):
            try:
                fp32, finals, uniform = _run(problem, folder, config, clock, observer)
                front = _results(problem, folder, fp32, finals, uniform, observer)
            except KeyboardInterrupt:
                clock.save()
                raise Interrupted(_write_so_far(problem, folder)) from None
            if not finished:
                clock.save()
            return front


def _run(
    problem: Problem, folder: StudyFolder, config: StudyConfig, clock: Clock, observer: Observer
) -> tuple[Fp32, list[Record], list[Record]]:
    """The FP32 model, and the final records of the front and of the uniform models."""
    fp32 = fp32_model(problem, folder, observer)
    if config != folder.config:  # it was extended, and everything that can be checked is
        write_text(folder.file("study.toml"), config.to_toml())
    found = sensitivities(problem, fp32.model, folder, observer)
    ranges = problem.call("measuring input ranges", lambda: problem.input_ranges(fp32.model))
    train = partial(train_candidate, problem, fp32.model, ranges=ranges)
    uniform = _uniform_around(problem)
    loop = StudyLoop(folder, problem, _proposals(problem, folder, found), clock, len(uniform))
    _search(loop, train, observer)
    return fp32, *_final(loop, train, uniform, observer)


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


def _search(loop: StudyLoop, train: Callable[..., Record], observer: Observer) -> None:
    problem, folder = loop.problem, loop.folder
    if problem.config.warm_start == "on":
        folder.file(START).mkdir(exist_ok=True)
    observer.stage("search", problem.config.trials)
    for _ in loop.records:
        observer.step("done before")

    def best() -> Record | None:
        return best_record(loop.front) if loop.front else None

    def evaluate(job: Job) -> Record:
        start = None if job.parent is None else _load_start(folder, job.parent)
        keep = problem.config.warm_start == "on" and job.rung == loop.ladder.top
        record: Record = problem.call(
            f"training candidate {job.id}",
            partial(
                train,
                job.bits,
                id=job.id,
                epochs=job.epochs,
                start=start,
                keep_in=_start_path(folder, job.id) if keep else None,
            ),
        )
        return record

    shown = best()

    def heard(record: Record) -> None:
        nonlocal shown
        (observer.step if len(record.rungs) == 1 else observer.note)(_summary(problem, record))
        now = best()
        if now is not None and now is not shown:
            observer.best(f"best so far {_summary(problem, now)}")
        shown = now

    run_trials(loop, evaluate, heard)
    observer.message(loop.end)
    if not loop.records:
        raise InputError(f"no trial record in {folder.file(TRIALS)}: restore them")
    if not loop.front:
        errors = [r.error for r in loop.records.values() if r.error is not None]
        raise InputError(f"every candidate failed; the last one: {errors[-1]}")


def _start_path(folder: StudyFolder, id: str) -> Path:
    return folder.file(START) / f"{id}.safetensors"


def _load_start(folder: StudyFolder, id: str) -> dict[str, Tensor]:
    path = _start_path(folder, id)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}, which another trial starts from, is missing or damaged ({text}): restore it, "
            "or start a new study"
        ) from None


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


def _final(
    loop: StudyLoop,
    train: Callable[..., Record],
    uniform: dict[str, BitVector],
    observer: Observer,
) -> tuple[list[Record], list[Record]]:
    """Final training of the front and of the uniform vectors around the budget, from FP32."""
    problem, folder = loop.problem, loop.folder
    chosen = {f"t{r.id}": r.bits for r in loop.front}
    observer.stage("final training", len(chosen) + len(uniform))
    done: list[Record] = []
    for id, bits in (chosen | uniform).items():
        record = _intact(folder, folder.read_record(FINAL, id))
        twin = next((r for r in done if r.bits == bits), None)
        if twin is not None:  # a uniform vector that is on the front is trained once
            record = replace(twin, id=id)
        elif record is None or record.bits != bits:
            record = problem.call(
                f"final training of {id}",
                partial(
                    train,
                    bits,
                    id=id,
                    epochs=problem.config.final_epochs,
                    final=True,
                    save_to=folder.file(MODELS) / f"{id}.safetensors",
                ),
            )
            folder.write_record(FINAL, record)
            loop.clock.save()
        done.append(record)
        observer.step(_summary(problem, record))
    finals = [r for r in done if r.id in chosen and r.error is None]
    if not finals:
        raise InputError(f"every final training failed; the last one: {done[-1].error}")
    return finals, [r for r in done if r.id in uniform and r.error is None]


def _intact(folder: StudyFolder, record: Record | None) -> Record | None:
    """The record, or None where its packed weights are missing or damaged: they are made again."""
    if record is None or record.weights is None:
        return record
    try:
        read_metadata(folder.path / record.weights)
    except InputError:
        return None
    return record


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
    finals: list[Record],
    uniform: list[Record],
    observer: Observer,
) -> Front:
    """Write everything that a finished study leaves; results.json comes last and says so."""
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
