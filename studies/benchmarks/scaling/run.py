"""From one worker to a thousand: python studies/benchmarks/scaling/run.py

With --only simulate or --only ray, one part; with --quick, everything is tried, nothing written.

`simulate`: 1,000 workers with two-minute trials on a simulated clock, against the real search,
SQLite storage and folder; then more and fewer workers, and other windows, by a model that has the
real run's seconds. `ray`: trainings on this machine by Ray, one worker against two, and what it
costs to start. Writes results.json (raw; the part that is not run stays), summary.json (name ->
number) and the tables of README.md. Leave the machine alone while it runs; about five minutes.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from grounds.made_up import (
    TimedStorage,
    environment,
    lattice_of,
    new_study,
    open_loop,
    problem_of,
    proposals_of,
)
from grounds.report import table, write_between
from real import ray_part
from simulate import Cluster, Course, ModelDriver, RealDriver, Seconds, simulate
from torchvision.models import resnet18

from adq.quant.files import read_json, write_json
from adq.search.config import StudyConfig
from adq.search.study import BATCHES

HERE = Path(__file__).parent
WORKERS, TRIALS, FACTOR = 1_000, 5_000, 3.0
FACTORS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
ROUNDS, SEEDS = 6, 3  # of the model
SWEEP = (50, 100, 250, 500, 1_000, 1_500, 2_000, 3_000, 4_000)
AIM = 0.95


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("simulate", "ray"))
    parser.add_argument("--quick", action="store_true", help="try everything, write nothing")
    given = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {"simulate": simulated_part, "ray": ray_part}
    if given.quick:
        for part in (partial(simulated_part, workers=20, trials=100), partial(ray_part, trials=4)):
            print(json.dumps(part(), indent=1))
        return 0
    only, path = given.only, HERE / "results.json"
    raw = read_json(path) if path.exists() else {}
    for name, part in parts.items():
        if only in (None, name):
            raw[name] = {"environment": environment("optuna", "torch", "ray"), **part()}
            write_json(path, raw)
    if set(raw) == set(parts):
        write_json(HERE / "summary.json", summary_of(raw))
        print(json.dumps(summary_of(raw), indent=1))
    write_between(HERE / "README.md", tables_of(raw))
    return 0


def simulated_part(workers: int = WORKERS, trials: int = TRIALS) -> dict[str, Any]:
    """The real search, then the model with its seconds everywhere else."""
    window = int(FACTOR * workers)
    with tempfile.TemporaryDirectory() as out:
        config = StudyConfig(
            task="resnet18",
            budget_bits=4.0,
            first_last_bits=0,
            ties="none",
            trials=trials,
            window=window,
            study="scaling",
            out=out,
        )
        folder, problem = new_study(problem_of(lambda: resnet18(weights=None), 64, config))
        proposals = proposals_of(problem, lattice_of(problem))
        storage = TimedStorage(folder.storage_url, folder.name)
        with open_loop(folder, problem, proposals, storage) as loop:
            real = simulate(Cluster(workers), RealDriver(loop))
            failed = sum(record.error is not None for record in loop.records.values())
            if len(loop.records) != trials or sorted(real.begun) != list(range(trials)):
                raise AssertionError(f"{len(loop.records)} of {trials} trials have a record")
            loop.close()
    seconds = Seconds(mean(real.ask_s[:window]), mean(real.ask_s[window:]), mean(real.tell_s))
    late = replace(seconds, blind_ask_s=seconds.ask_s)  # a study that has gone on for long
    return {
        "parameters": len(problem.space.groups),
        "cluster": asdict(Cluster(workers)),
        "trials": trials,
        "failed": failed,
        "window": window,
        "batch": max(1, window // BATCHES),
        "real": {
            **shares(real),
            "supplied_s": real.supplied_s,
            "driver_s_per_trial": real.driver_s_per_trial,
            "propose_s_per_trial": proposals.seconds / trials,
            "storage_s_per_trial": storage.seconds / trials,
            "vain_s_per_trial": real.vain_s / trials,
            **asdict(seconds),
            "ask_s_by_hundreds": [mean(part) for part in batched(real.ask_s, 100)],
            "tell_s_by_hundreds": [mean(part) for part in batched(real.tell_s, 100)],
        },
        "model_of_real": shares(simulate(Cluster(workers), ModelDriver(trials, window, seconds))),
        "windows": [
            {"workers": some, "factor": factor, **over_seeds(some, factor, seconds)}
            for some in (16, 64, 256, workers)
            for factor in FACTORS
        ],
        "workers": [{"workers": some, **over_seeds(some, FACTOR, late)} for some in SWEEP],
        "trial_s": [
            {"trial_s": trial_s, "workers": most_workers(trial_s, late)}
            for trial_s in (30.0, 60.0, 120.0)
        ],
    }


def shares(course: Course) -> dict[str, float]:
    return {"from_start": course.from_start, "steady": course.steady}


def over_seeds(workers: int, factor: float, seconds: Seconds) -> dict[str, float]:
    """Means over SEEDS clusters, and the least, of the busy share in ROUNDS rounds."""
    trials, window = ROUNDS * workers, int(factor * workers)
    found = [
        shares(simulate(Cluster(workers, seed=seed), ModelDriver(trials, window, seconds)))
        for seed in range(SEEDS)
    ]
    steady = [one["steady"] for one in found]
    from_start = mean(one["from_start"] for one in found)
    return {"from_start": from_start, "steady": mean(steady), "least_steady": min(steady)}


def most_workers(trial_s: float, seconds: Seconds) -> int:
    """How many workers are AIM busy in steady state, to 2 %: by bisection."""

    def enough(workers: int) -> bool:
        driver = ModelDriver(ROUNDS * workers, int(FACTOR * workers), seconds)
        return simulate(Cluster(workers, trial_s), driver).steady >= AIM

    most = trial_s / (seconds.ask_s + seconds.tell_s)  # workers that the driver alone could serve
    low, high = int(0.5 * most), int(1.5 * most)
    if not enough(low) or enough(high):
        raise AssertionError(f"{trial_s:.0f} s: the limit is not between {low} and {high} workers")
    while high - low > 0.02 * low:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def batched(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def summary_of(raw: dict[str, Any]) -> dict[str, float]:
    real, ray = raw["simulate"]["real"], raw["ray"]
    two_minutes = next(r for r in raw["simulate"]["trial_s"] if r["trial_s"] == 120.0)
    return {
        "speedup_2_workers": round(speedup(ray), 3),
        "sim_1000_busy_fraction": round(real["from_start"], 4),
        "sim_1000_busy_fraction_steady": round(real["steady"], 4),
        "driver_s_per_trial": round(real["driver_s_per_trial"], 4),
        "ray_driver_cpu_s_per_trial": round(ray["driver_cpu_s_per_trial"], 4),
        "workers_at_95_percent": two_minutes["workers"],
        "start_s": round(sum(ray["start"].values()), 2),
    }


def speedup(ray: dict[str, Any]) -> float:
    rates = {
        workers: median(r["trials_per_hour"] for r in ray["runs"] if r["workers"] == workers)
        for workers in (1, 2)
    }
    return rates[2] / rates[1]


def tables_of(raw: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    if "simulate" in raw:
        found |= simulated_tables(raw["simulate"])
    if "ray" in raw:
        found["ray"] = ray_table(raw["ray"])
    return found


def where(environment: dict[str, Any], *packages: str) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in packages)
    return (
        f"{environment['date']}, {environment['cores']} cores (load "
        f"{environment['load_before']:.1f} before), Python {environment['python']}, {versions}."
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def simulated_tables(part: dict[str, Any]) -> dict[str, str]:
    real, model = part["real"], part["model_of_real"]
    other = real["driver_s_per_trial"] - real["propose_s_per_trial"] - real["storage_s_per_trial"]
    lines = [
        where(part["environment"], "optuna"),
        "",
        table(
            ["1,000 workers, two-minute trials", ""],
            [
                ["trials, of which failed", f"{part['trials']}, {part['failed']}"],
                ["window, proposals that know the same", f"{part['window']}, {part['batch']}"],
                ["busy, from the start until the last trial begins", percent(real["from_start"])],
                ["busy, without the first four minutes", percent(real["steady"])],
                ["the same two by the model", " and ".join(map(percent, model.values()))],
                ["driver, a trial", ms(real["driver_s_per_trial"])],
                ["of it proposals", ms(real["propose_s_per_trial"])],
                ["of it storage", ms(real["storage_s_per_trial"])],
                ["of it files and all else", ms(other)],
                ["an ask before the first result is due", ms(real["blind_ask_s"])],
                ["an ask after", ms(real["ask_s"])],
                ["a tell", ms(real["tell_s"])],
            ],
        ),
    ]  # fmt: skip
    by_workers: dict[int, list[str]] = {}
    for row in part["windows"]:
        cell = f"{percent(row['steady'])} ({percent(row['least_steady'])})"
        by_workers.setdefault(row["workers"], [f"{row['workers']}"]).append(cell)
    windows = table(
        ["workers", *(f"window {factor:g} × workers" for factor in FACTORS)],
        [*by_workers.values()],
    )
    workers = table(
        ["workers", "busy (least of three)"],
        [
            [f"{r['workers']}", f"{percent(r['steady'])} ({percent(r['least_steady'])})"]
            for r in part["workers"]
        ],
    )
    most = table(
        ["a trial takes", "workers that are 95 % busy"],
        [[f"{r['trial_s']:.0f} s", f"{r['workers']}"] for r in part["trial_s"]],
    )
    return {
        "simulated": "\n".join(lines),
        "windows": windows,
        "workers": f"{workers}\n\n{most}",
    }


def ray_table(part: dict[str, Any]) -> str:
    runs = [
        [f"{r['workers']}", f"{r['trials']}", f"{r['trial_s']:.2f}", f"{r['trials_per_hour']:.0f}"]
        for r in part["runs"]
    ]
    texts = {
        "import": "importing torch, Ray and this package",
        "connect": "starting Ray on this machine",
        "send": "pickling task and model into the object store",
        "first": "the first worker: process, torch, the first training begins",
        "load": "opening task and model there",
    }
    start = [[texts[name], f"{part['start'][name]:.2f}"] for name in texts]
    return "\n".join(
        [
            where(part["environment"], "ray", "torch"),
            "",
            table(["workers", "trials", "seconds of a trial", "trials per hour"], runs),
            "",
            f"Two workers do {speedup(part):.2f} times as much as one. The driver takes "
            f"{ms(part['driver_cpu_s_per_trial'])} of a processor for a trial, Ray Tune and "
            "its polling included, "
            f"of which the search's asks and tells {ms(part['search_s_per_trial'])} of the clock.",
            "",
            table(["start", "seconds"], start),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
