"""Which executor a study gets, and what follows from that for its configuration."""

from contextlib import AbstractContextManager, nullcontext

import torch

from adq.quant.errors import InputError
from adq.search.config import StudyConfig, make_config
from adq.search.executors.local import LocalExecutor
from adq.search.executors.shares import ranks_of
from adq.search.jobs import Executor


def make_executor(config: StudyConfig) -> AbstractContextManager[Executor]:
    """The executor that a configuration asks for.

    Raises InputError for a cluster that cannot be reached or has no room for one training.
    """
    if config.executor == "local" or (config.executor == "auto" and not _many(config)):
        return nullcontext(LocalExecutor())
    from adq.search.executors.ray import RayExecutor

    return RayExecutor(config)


def _many(config: StudyConfig) -> bool:
    """Whether there is more to train with than this process."""
    asked = (config.workers or 1) > 1 or (config.ranks or 1) > 1 or (config.gpus_per_trial or 0) > 1
    return asked or config.address is not None or torch.cuda.device_count() > 1


def settled(config: StudyConfig, executor: Executor) -> StudyConfig:
    """The configuration with what is fixed when a study begins, so that its results stay the same
    however it is resumed: its window, and how many processes train a candidate together.

    Raises InputError for options that the executor has no use for.
    """
    idle = {name: getattr(config, name) for name in ("workers", "ranks", "gpus_per_trial")}
    idle = {name: value for name, value in idle.items() if (value or 1) > 1}
    if config.address is not None:
        idle["address"] = config.address
    if isinstance(executor, LocalExecutor) and idle:
        name, value = next(iter(idle.items()))
        raise InputError(
            f"{name.replace('_', '-')} {value}: the local executor trains one candidate at a time, "
            "in this process; leave it out, or use --executor ray"
        )
    # a training that takes twice as long as others must not keep them waiting; of very many
    # workers some always meet one (studies/benchmarks/scaling)
    workers = executor.workers
    window = config.window or (1 if workers == 1 else (2 if workers <= 64 else 3) * workers)
    return make_config(vars(config), {"window": window, "ranks": ranks_of(config)})
