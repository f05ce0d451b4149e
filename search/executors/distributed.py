"""One candidate trained by several processes together, by Ray Train's TorchTrainer.

The trainer runs inside a Ray Tune trial that takes a byte of memory and nothing else; the ranks
get theirs in one placement group, all or none, so that trials which wait for theirs never hold on
to a part. A rank that dies ends the attempt, and the next one goes on from the last epoch's
checkpoint: `run_job` counts them.
"""

import tempfile
from collections.abc import Mapping
from typing import Any, cast

import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from adq.quant.errors import InputError, out_of_memory
from adq.search.candidate import Record
from adq.search.executors.parcel import Parcel, unpack
from adq.search.jobs import Job, train_job


def train_together(parcel: Parcel, job: Job, parts: int) -> Record:
    """Train once, on `parcel.ranks` processes, batches cut among them; in a Ray Tune trial only.

    Ranks talk by gloo on CPUs, by nccl on GPUs. Raises what a rank raised: of several errors the
    one that tells most, since ranks whose partner is gone fail too.
    """
    with tempfile.TemporaryDirectory(prefix="adq-") as scratch:
        trainer = TorchTrainer(
            cast(Any, _train_rank),  # Ray's types do not know yet that it may return something
            train_loop_config={"parcel": parcel, "job": job, "parts": parts},
            scaling_config=ScalingConfig(
                num_workers=parcel.ranks,
                use_gpu=parcel.gpus > 0,
                resources_per_worker=resources(parcel.cpus, parcel.gpus),
            ),
            run_config=RunConfig(
                name=job.name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0),
                callbacks=cast(Any, [TuneReportCallback()]),
            ),
        )
        try:
            result: Any = trainer.fit()
        except WorkerGroupError as error:
            raise _telling(error.worker_failures) from None
    return Record.from_json(result.return_value)


def resources(cpus: int, gpus: float) -> dict[str, float]:
    """As Ray writes them; it takes no GPU at all for something else than 0 GPUs."""
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def _train_rank(config: dict[str, Any]) -> dict[str, Any]:
    """What one rank does; the first one's answer counts."""

    def on_epoch(epoch: int, loss: float) -> None:
        ray.train.report({"epoch": epoch, "loss": loss})

    bench = unpack(config["parcel"])
    return train_job(bench, config["job"], config["parts"], on_epoch, parallel=True).to_json()


def _telling(failures: Mapping[int, BaseException]) -> BaseException:
    """Memory that ran out first, then bad input, then an error of the code rather than of the
    ranks' connection."""

    def rank_of(error: BaseException) -> int:
        if out_of_memory(error):
            return 0
        if isinstance(error, InputError):
            return 1
        lost = any(word in str(error) for word in ("Gloo", "gloo", "NCCL", "Connection closed"))
        return 3 if lost else 2

    return min((_cause(error) for error in failures.values()), key=rank_of)


def _cause(error: BaseException) -> BaseException:
    """The error itself, out of what Ray wrapped around it; bad input is told as it was put."""
    while not isinstance(error, InputError) or isinstance(error, RayError):  # Ray's may be both
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error
