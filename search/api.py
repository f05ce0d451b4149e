"""The search as a Python function."""

from pathlib import Path
from typing import Any

from adq.quant.errors import InputError
from adq.search.budget import Budget
from adq.search.config import IN_PYTHON, StudyConfig, make_config
from adq.search.folder import StudyFolder, open_study
from adq.search.front import Front
from adq.search.observer import Observer
from adq.search.run import SILENT, start
from adq.search.run import resume as run_on
from adq.search.task import Task, load_task


def search(
    task: Task | str = "digits",
    budget: Budget | None = None,
    *,
    observer: Observer = SILENT,
    **options: Any,
) -> Front:
    """Search bit vectors for `task` under `budget`; returns the Pareto front of the final models.

    `task` is a Task, or text as for `--task`. `options` are the fields of StudyConfig (`trials`,
    `epochs`, `bits`, `act_bits`, `seed`, `study`, `out`, ...). The study is kept in a folder, as
    with the command line: `Front.folder` says where.

    Raises InputError for anything the caller can mend; on Ctrl-C a KeyboardInterrupt whose text
    says what is kept, once the front so far is written.
    """
    name = task if isinstance(task, str) else IN_PYTHON
    limits = {} if budget is None else {f"budget_{k}": v for k, v in vars(budget).items()}
    config = make_config(options, limits, {"task": name})
    return start(config, _task(config, task), observer)


def resume(
    name: str,
    task: Task | None = None,
    *,
    out: str | Path = "runs",
    trials: int | None = None,
    time_budget: float | str | None = None,
    observer: Observer = SILENT,
    **execution: Any,
) -> Front:
    """Bring the study `name` to its end; returns its front.

    Where other processes are at it, this one works along.

    `task` is needed when the study was started with a Task object. `trials` raises the number of
    candidates, `time_budget` (seconds, or text like `30m`) the time for all of it, and so both
    extend a finished study. `execution` are the options `executor`, `workers`, `gpus_per_trial`,
    `cpus_per_trial`, `address` and `checkpoints`, for this time.

    Raises InputError when there is no such study, when it is damaged, or when it was fetched from
    a cluster without what it needs to go on.
    """
    folder = open_study(out, name)
    _require_all(folder)
    return run_on(
        folder,
        _task(folder.config, task),
        observer,
        trials=trials,
        time_budget=time_budget,
        **execution,
    )


def _require_all(folder: StudyFolder) -> None:
    """Raise InputError where only the front of a study was fetched from a cluster."""
    needed = ["fp32.safetensors"] if folder.config.storage else ["study.db", "fp32.safetensors"]
    missing = [name for name in needed if not folder.file(name).exists()]
    if folder.file("fetched.json").exists() and missing:
        raise InputError(
            f"study {folder.name!r} was fetched without {' and '.join(missing)}, which resuming "
            f"needs: bring it all with 'adq-search fetch {folder.name} --all', then resume it with "
            "--executor local"
        )


def _task(config: StudyConfig, given: Task | str | None) -> Task:
    if isinstance(given, Task):
        return given
    if config.task == IN_PYTHON:
        raise InputError(
            "this study's task was given as a Python object: resume it from Python, with "
            "adq.resume(name, task)"
        )
    return load_task(config.task, config.model)
