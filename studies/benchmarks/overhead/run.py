"""What does a trial cost beside its training: python studies/benchmarks/overhead/run.py

Asks and tells 20 trials of a study of ResNet-50 that has 5,000 finished ones, with the weight bits
and the input bits of every layer free. Writes results.json (raw), summary.json (name -> number)
and the table of README.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from grounds.made_up import (
    Stopwatch,
    environment,
    lattice_of,
    new_study,
    open_loop,
    problem_of,
    proposals_of,
    record_of,
)
from grounds.report import table, write_between
from torchvision.models import resnet50

from adq.quant.files import write_json
from adq.search.config import StudyConfig
from adq.search.folder import TRIALS, StudyFolder
from adq.search.history import History
from adq.search.jobs import Job
from adq.search.lattice import Lattice
from adq.search.problem import Problem
from adq.search.study import StudyLoop

HERE = Path(__file__).parent
FINISHED, ASKED = 5_000, 20
OTHERS = ("tpe", "nsga2", "nsga3", "random")  # a Gaussian process of 5,000 results takes minutes
ROUNDS = 5


def main() -> None:
    before = environment("optuna")
    with tempfile.TemporaryDirectory() as out:
        folder, problem = new_study(
            problem_of(lambda: resnet50(weights=None), 224, configuration(out))
        )
        lattice = lattice_of(problem)
        fill(folder, problem, lattice)
        proposals = proposals_of(problem, lattice)
        watch = Stopwatch()
        with open_loop(folder, problem, proposals) as loop:
            opening = watch.read()
            assert len(loop.records) == FINISHED
            trials = [{**one_trial(loop, problem), "propose": proposals.took} for _ in range(ASKED)]
            history = loop.history
            assert len(history) == FINISHED + ASKED - 1  # the last result is not taken yet
            assert not np.isnan(history.metric).any()
            loop.close()
    raw = {
        "environment": before,
        "parameters": len(problem.space.distributions()),
        "finished": FINISHED,
        "sampler": problem.config.sampler,
        "opening": opening,
        "trials": trials,
        "other_samplers": {n: others(n, problem, lattice, history) for n in OTHERS},
    }
    summary = summarise(raw)
    write_json(HERE / "results.json", raw)
    write_json(HERE / "summary.json", summary)
    write_between(HERE / "README.md", {"tables": tables_of(raw["environment"], summary)})
    print(json.dumps(summary, indent=1))


def tables_of(environment: dict[str, Any], summary: dict[str, float]) -> str:
    texts = {
        "ask_tell": "ask and tell",
        "propose": "of it the proposal",
        "storage": "of it the rest",
        **{f"{name}_propose": f"a proposal of `{name}`" for name in OTHERS},
    }
    rows = [
        [text, f"{summary[f'{name}_s']:.4f}", f"{summary[f'{name}_cpu_s']:.4f}"]
        for name, text in texts.items()
    ]
    return (
        f"{environment['date']}, {environment['cores']} cores (load "
        f"{environment['load_before']:.1f} before), Python {environment['python']}, Optuna "
        f"{environment['optuna']}. Medians:\n\n"
        + table(["", "seconds of the clock", "of the processor"], rows)
    )


def configuration(out: str) -> StudyConfig:
    return StudyConfig(
        task="resnet50",
        budget_bits=4.5,
        bits=(2, 3, 4, 6, 8),
        act_bits=(4, 6, 8),
        first_last_bits=0,
        ties="none",
        trials=FINISHED + ASKED,
        study="overhead",
        out=out,
    )


def one_trial(loop: StudyLoop, problem: Problem) -> dict[str, Any]:
    watch = Stopwatch()
    job = loop.ask()
    ask = watch.read()
    assert job is not None
    record = record_of(problem, job)
    watch = Stopwatch()
    loop.tell(job, record)
    return {"ask": ask, "tell": watch.read()}


def fill(folder: StudyFolder, problem: Problem, lattice: Lattice) -> None:
    """Bring the study to FINISHED trials: records in its folder, rows in its database.

    The first trial runs as usual. The others' rows are copies of its rows with their own numbers in
    them, since Optuna takes minutes to create trials one by one. Whether all is well shows when the
    study is opened, which compares trials with records.
    """
    with open_loop(folder, problem, proposals_of(problem, lattice, "random")) as loop:
        one_trial(loop, problem)
        loop.close()
    points = lattice.random(np.random.default_rng(0), 10 * FINISHED)
    points = points[lattice.fits(points)][: FINISHED - 1]
    distributions = problem.space.distributions()
    with closing(sqlite3.connect(folder.file("study.db"))) as base, base:
        (trial,) = base.execute("SELECT study_id, datetime_start, datetime_complete FROM trials")
        (trial_id,) = base.execute("SELECT trial_id FROM trials").fetchone()
        for number, point in enumerate(points, 1):
            bits, id = problem.space.bit_vector(lattice.decode(point)), trial_id + number
            record = record_of(problem, Job(f"{number:04d}", bits, problem.config.epochs))
            text = json.dumps(record.to_json())  # `write_record` waits for the disk
            folder.record_path(TRIALS, record.id).write_text(text, encoding="utf-8")
            base.execute(
                "INSERT INTO trials (trial_id, number, state, study_id, datetime_start, "
                "datetime_complete) VALUES (?, ?, 'COMPLETE', ?, ?, ?)",
                (id, number, *trial),
            )
            params = problem.space.encode(lattice.decode(point))
            base.executemany(
                "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
                "SELECT ?, param_name, ?, distribution_json FROM trial_params "
                "WHERE trial_id = ? AND param_name = ?",
                [
                    (id, distributions[name].to_internal_repr(value), trial_id, name)
                    for name, value in params.items()
                ],
            )
            costs = [getattr(record.costs, name) for name in problem.objectives]
            assert record.validation is not None
            base.executemany(
                "INSERT INTO trial_values (trial_id, objective, value, value_type) "
                "VALUES (?, ?, ?, 'FINITE')",
                [(id, i, value) for i, value in enumerate([record.validation.metric, *costs])],
            )
            attributes = {
                "job": json.dumps(str(number)),
                "trainings": json.dumps([[number, number]]),
                "parent": "null",
            }
            base.executemany(
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                [(id, *item) for item in attributes.items()],
            )
            base.execute(
                "INSERT INTO trial_system_attributes (trial_id, key, value_json) "
                "SELECT ?, key, value_json FROM trial_system_attributes WHERE trial_id = ?",
                (id, trial_id),
            )


def others(
    name: str, problem: Problem, lattice: Lattice, history: History
) -> list[dict[str, float]]:
    """Proposals after all results but the last ones, of which each tells one more."""
    proposals = proposals_of(problem, lattice, name)
    took = []
    for told in range(len(history) - ROUNDS, len(history) + 1):
        proposals.propose(told, history.first(told), [])
        took.append(proposals.took)
    return took


def summarise(raw: dict[str, Any]) -> dict[str, float]:
    """Medians: seconds of the clock, and of the processor where `cpu` says so."""
    summary: dict[str, float] = {}
    for kind, suffix in (("seconds", ""), ("cpu_seconds", "_cpu")):
        trials = raw["trials"]
        parts = {part: [t[part][kind] for t in trials] for part in ("ask", "tell", "propose")}
        both = [ask + tell for ask, tell in zip(parts["ask"], parts["tell"], strict=True)]
        storage = [a - b for a, b in zip(both, parts["propose"], strict=True)]
        found = {"ask_tell": both, **parts, "storage": storage}
        found |= {
            f"{name}_propose": [one[kind] for one in took[1:]]  # the first takes all results in
            for name, took in raw["other_samplers"].items()
        }
        summary |= {f"{name}{suffix}_s": round(median(s), 4) for name, s in found.items()}
    summary |= {"parameters": raw["parameters"], "finished": raw["finished"]}
    return summary


if __name__ == "__main__":
    main()
