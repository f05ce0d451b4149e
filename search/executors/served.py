"""Folders of the driver's machine, for workers that may be on another.

This module imports no torch: the process that serves the folders is soon there, and small.
"""

from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adq.search.files import Files, FolderFiles


class Server:
    """An actor: files by number, and what is done with them."""

    def __init__(self, files: tuple[Files, ...]) -> None:
        self._files = files

    def call(self, index: int, method: str, *arguments: Any) -> Any:
        return getattr(self._files[index], method)(*arguments)


@dataclass(frozen=True)
class ServedFiles:
    """Files that `actor` has under a number."""

    actor: Any
    index: int

    def read(self, name: str) -> bytes | None:
        return self._call("read", name)

    def write(self, name: str, content: bytes) -> None:
        self._call("write", name, content)

    def remove(self, name: str) -> None:
        self._call("remove", name)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(self.actor.call.remote(self.index, method, *arguments))
        except RayTaskError as error:
            raise error.cause from None  # as it was raised there: an OSError, an InputError


def serve(*files: Files) -> tuple[Files, ...]:
    """The same files for workers: folders through an actor on this node, the others as they are.

    The actor lives as long as what is returned, and is started again where it dies.
    """
    if not any(isinstance(each, FolderFiles) for each in files):
        return files
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(Server)
        .options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)
        .remote(files)
    )
    return tuple(
        ServedFiles(actor, i) if isinstance(each, FolderFiles) else each
        for i, each in enumerate(files)
    )
