"""Processes that join gloo groups of two or three, started once for all that is asked of them."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 120  # a busy machine takes its time to start them


class Ranks:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def run(self, size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What `job(*args)` gives on each rank, or the exception that it raises there."""
        with tempfile.TemporaryDirectory() as folder:
            # each waits for all the others, so that no process takes two
            futures = [
                self.pool.submit(_rank, rank, size, Path(folder) / "store", job, args)
                for rank in range(size)
            ]
            return [future.result(LIMIT_S) for future in futures]


@contextmanager
def started(processes: int) -> Iterator[Ranks]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        yield Ranks(pool)


def _rank(rank: int, size: int, store: Path, job: Callable[..., Any], args: Any) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LIMIT_S / 2),
    )
    try:
        return job(*args)
    except Exception as error:  # noqa: BLE001 (it is the result)
        return error
    finally:
        dist.destroy_process_group()
