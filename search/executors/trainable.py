"""What Ray Tune runs on a worker: one training, and its job as Tune's hyperparameters."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ray import tune

from adq.quant.errors import InputError
from adq.quant.spec import BitVector
from adq.search.candidate import Record
from adq.search.executors.distributed import train_together
from adq.search.executors.parcel import Parcel, unpack
from adq.search.jobs import Job, run_job

RECORD, MISFIT = "record", "misfit"
"""Keys of a training's last report: its record, or what does not lie in its candidate."""


def trainable_of(parcel: Parcel) -> Callable[[dict[str, Any]], None]:
    """What Tune runs on a worker: one training, its record in the last report."""

    def train(config: dict[str, Any]) -> None:
        _train(config, parcel)

    return train


def _train(config: dict[str, Any], parcel: Parcel) -> None:
    started = time.time()
    job = _job(config)
    try:
        bench = unpack(parcel)
        opened = time.time()
        attempt = partial(train_together, parcel, job) if parcel.ranks > 1 else None
        record = run_job(bench, job, _report, attempt)
    except InputError as error:
        tune.report({MISFIT: str(error)})
        return
    tune.report(
        _metrics(record)
        | {RECORD: json.dumps(record.to_json()), "started": started, "load": opened - started}
    )


def _report(epoch: int, loss: float) -> None:
    tune.report({"epoch": epoch, "loss": loss})


def _metrics(record: Record) -> dict[str, Any]:
    """What TensorBoard shows of a record."""
    found: dict[str, Any] = {"epoch": record.epochs, "seconds": record.seconds}
    if record.train_losses:
        found["loss"] = record.train_losses[-1]
    for split in ("validation", "test"):
        if (evaluation := getattr(record, split)) is not None:
            found[split] = {"loss": evaluation.loss, "metric": evaluation.metric}
    return found | {"costs": {k: v for k, v in asdict(record.costs).items() if v is not None}}


def config_of(job: Job) -> dict[str, Any]:
    """The job as Tune's hyperparameters."""
    values = asdict(replace(job, bits=BitVector({}))) | {"bits": job.bits.to_json()}
    return {name: value for name, value in values.items() if value is not None}


def _job(config: dict[str, Any]) -> Job:
    return Job(**config | {"bits": BitVector.from_json(config["bits"])})


def name_of(trial: Any) -> str:
    """The name of a Tune trial's job."""
    return _job(trial.config).name
