"""A study from beginning to end: FP32, sensitivities, seeds, search, final training, results.

Each stage leaves its result in the study's folder and is skipped when it is there, so that
running a study and resuming one are the same thing.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from adq.proxies.base import Sensitivity
from adq.quant.batches import threads
from adq.quant.errors import InputError
from adq.quant.export.packed import read_metadata
from adq.quant.files import atomic_path, read_json, write_json, write_text
from adq.quant.spec import BitVector
from adq.search.candidate import Record, train_candidate
from adq.search.config import StudyConfig
from adq.search.folder import FINAL, MODELS, TRIALS, StudyFolder, create_study
from adq.search.fp32 import Fp32, fp32_model, load_user_weights
from adq.search.front import Front, Point, best_record, front_records, point_of
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.report import write_report
from adq.search.sampler import BudgetSampler
from adq.search.seeds import combined_scores, make_seeds
from adq.search.sensitivity import (
    ensemble_of,
    load_sensitivities,
    sensitivities,
    to_csv,
)
from adq.search.study import create_storage_study, run_trials
from adq.search.task import Task

RESULTS_SCHEMA = "adq-results/1"
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


def resume(
    folder: StudyFolder,
    task: Task,
    observer: Observer = SILENT,
    problem: Problem | None = None,
    trials: int | None = None,
) -> Front:
    """Bring a study to its end from wherever it stands; on a finished one, its front.

    `trials` raises the number of candidates. Earlier results stay until new ones are written.

    Raises InputError when the study is damaged, is being run by another process, or when the
    user's task fails.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with folder.locked():
        config = folder.extended(trials)
        if problem is None:
            problem = make_problem(config, task)
        with threads(problem.threads):
            return _run(problem, folder, observer)


def _run(problem: Problem, folder: StudyFolder, observer: Observer) -> Front:
    fp32 = fp32_model(problem, folder, observer)
    if problem.config.trials != folder.config.trials:  # everything that can be checked is
        write_text(folder.file("study.toml"), problem.config.to_toml())
    found = sensitivities(problem, fp32.model, folder, observer)
    ranges = problem.call("measuring input ranges", lambda: problem.input_ranges(fp32.model))
    train = partial(train_candidate, problem, fp32.model, ranges=ranges)
    records = _search(problem, folder, found, train, observer)
    finals, uniform = _final(problem, folder, train, records, observer)
    return _results(problem, folder, fp32, finals, uniform, observer)


def _search(
    problem: Problem,
    folder: StudyFolder,
    found: list[Sensitivity],
    train: Callable[..., Record],
    observer: Observer,
) -> list[Record]:
    config = problem.config
    limits = problem.costs.limits(problem.limits)
    seeds = make_seeds(problem.space, problem.costs, limits, found, SEEDS)
    scores = combined_scores(problem.space, found)
    sampler = BudgetSampler(problem.space, problem.costs, limits, scores, seeds, config.seed)
    records = folder.records(TRIALS)
    observer.stage("search", config.trials)
    for _ in records:
        observer.step("done before")

    def evaluate(id: str, bits: BitVector) -> Record:
        record: Record = problem.call(
            f"training candidate {id}",
            lambda: train(bits, id=id, epochs=config.epochs),
        )
        return record

    def best() -> Record | None:
        done = [r for r in records if r.validation is not None]
        return best_record(done) if done else None

    def heard(record: Record) -> None:
        before = best()
        if all(r.id != record.id for r in records):
            records.append(record)
            observer.step(_summary(problem, record))
        now = best()
        if now is not None and now is not before:
            observer.best(f"best so far {_summary(problem, now)}")

    if not run_trials(folder, problem, sampler, evaluate, heard):
        observer.message("no new bit vector is left under the budget: the search ends early")
    if not records:
        raise InputError(f"no trial record in {folder.file(TRIALS)}: restore them")
    if all(record.validation is None for record in records):
        raise InputError(f"every candidate failed; the last one: {records[-1].error}")
    return records


def _summary(problem: Problem, record: Record) -> str:
    costs = record.costs
    if record.validation is None:
        return f"trial {record.id}: failed, {record.error}"
    return (
        f"{record.id}: {problem.task.metric_name} {record.validation.metric:.4f}, "
        f"loss {record.validation.loss:.4f}, {costs.average_bits:.3f} bits, "
        f"{costs.size_bytes / 1e3:.1f} kB"
    )


def _final(
    problem: Problem,
    folder: StudyFolder,
    train: Callable[..., Record],
    records: list[Record],
    observer: Observer,
) -> tuple[list[Record], list[Record]]:
    """Final training of the front and of the uniform vectors around the budget."""
    chosen = {f"t{r.id}": r.bits for r in front_records(records, problem.objectives)}
    uniform = _uniform_around(problem)
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
        points=tuple(point_of(record) for record in points),
        best=point_of(best),
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
            "fp32": {"validation": asdict(fp32.validation), "test": asdict(fp32.test)},
            "uniform": [asdict(point) for point in front.uniform],
        },
    )
    observer.step("written")
    return front


def _read_point(data: dict[str, Any]) -> Point:
    point = Point(**data)
    numbers = (point.metric, point.metric_stderr, point.average_bits, point.size_bytes, point.bops)
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError(f"point {point.id} has a text where a number belongs")
    return point


def load_front(folder: StudyFolder) -> Front:
    """The front of a finished study, from its files; InputError when it has none yet."""
    if not folder.file("results.json").exists():
        raise InputError(
            f"study {folder.name!r} has no front yet ({folder.status()}): finish it with "
            f"'adq-search resume {folder.name}'"
        )
    front, results = read_json(folder.file("front.json")), read_json(folder.file("results.json"))
    try:
        points = tuple(_read_point(point) for point in front["points"])
        fields: dict[str, Any] = {
            name: front[name] for name in ("study", "task", "metric_name", "fp32_metric")
        }
        return Front(
            **fields,
            points=points,
            best=next(p for p in points if p.id == results["best"]),
            uniform=tuple(_read_point(point) for point in results["uniform"]),
            folder=str(folder.path),
        )
    except (KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"study {folder.name!r} is damaged: front.json and results.json do not fit "
            f"({type(error).__name__} {error})"
        ) from None
