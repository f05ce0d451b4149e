"""Many trainings of one core each, side by side, their results kept as they come."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from adq.quant.files import write_json

Run = TypeVar("Run")
Result = dict[str, Any]


def measure(
    runs: Sequence[Run],
    train: Callable[[Run], Result],
    kept: Path,
    workers: int,
    start: Callable[..., None],
    shared: tuple[Any, ...],
) -> dict[str, Result]:
    """The result of each run, by `str(run)`; those that the file `kept` holds are not made again.

    Each worker process calls `start(*shared)` first.
    """
    done: list[Result] = json.loads(kept.read_text()) if kept.exists() else []
    known = {result["run"] for result in done}
    missing = [run for run in runs if str(run) not in known]
    if missing:
        with multiprocessing.get_context("spawn").Pool(workers, start, shared) as pool:
            for i, result in enumerate(pool.imap_unordered(train, missing), 1):
                done.append(result)
                write_json(kept, done)
                print(f"{i}/{len(missing)} {result}", flush=True)
    return {result["run"]: result for result in done}
