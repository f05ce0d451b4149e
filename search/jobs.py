"""One training, whatever happens to it: what a worker does, in this process or on a cluster."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from adq.quant.batches import threads
from adq.quant.calibrate import Ranges
from adq.quant.digest import content_hash
from adq.quant.errors import CheckpointError, InputError, out_of_memory
from adq.quant.files import atomic_path
from adq.quant.qat import CHECKPOINT
from adq.quant.spec import BitVector
from adq.search.candidate import Record, failed_record, train_candidate
from adq.search.files import Files
from adq.search.folder import MODELS, START
from adq.search.fp32 import fixed_options
from adq.search.problem import Problem
from adq.search.task import one_line

log = logging.getLogger(__name__)

TRIES = 3
"""A training that fails so many times is recorded with its error and given up."""


@dataclass(frozen=True)
class Job:
    """One training to do.

    id      of the record that it leads to: a trial's number as text, or a final model's name
    rung    which of the trial's trainings it is
    parent  the trial from whose kept weights it starts; the FP32 model's where None
    final   whether the model is tested and packed
    keep    whether its weights are kept, for other trials to start from
    """

    id: str
    bits: BitVector
    epochs: int
    rung: int = 0
    parent: str | None = None
    final: bool = False
    keep: bool = False

    @property
    def name(self) -> str:
        return f"{self.id}-{self.rung}"


@dataclass(frozen=True)
class Bench:
    """What all trainings of a study share.

    files        packed models and kept weights, by their names in the study's folder
    checkpoints  where running trainings are, by the names of their jobs
    logs         folder for an executor's own records; none where None
    """

    problem: Problem
    fp32: nn.Module
    ranges: Ranges
    files: Files
    checkpoints: Files
    logs: Path | None = None

    @cached_property
    def key(self) -> str:
        """A hash of all that its trainings depend on, but for the job."""
        problem, options = self.problem, fixed_options(self.problem)
        try:
            batches = len(problem.task.train)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        data = [problem.task.data_key, batches, problem.device.type]
        return content_hash([CHECKPOINT, options, data, sorted(self.fp32.state_dict().items())])


class Source(Protocol):
    """What is to be trained: a search, or the final models."""

    def ask(self) -> Job | None:
        """What to train next; None where there is nothing now."""

    def tell(self, job: Job, record: Record) -> Record:
        """Take what came of a job; returns the record as it is kept."""

    @property
    def done(self) -> bool:
        """Whether nothing is left, neither to ask for nor running anywhere."""


class Executor(Protocol):
    """Runs jobs, as many at a time as it has workers."""

    @property
    def workers(self) -> int: ...

    def run(self, source: Source, bench: Bench, heard: Callable[[Record], None]) -> None:
        """Run all jobs of a source until it is done; `heard` gets each record."""


def run_job(
    bench: Bench,
    job: Job,
    on_epoch: Callable[[int, float], None] | None = None,
    attempt: Callable[[int], Record] | None = None,
) -> Record:
    """The record of a job.

    `attempt(parts)` trains once, each batch in so many parts: here, in this process, if not given.
    What fails is tried again, from the last checkpoint, and after TRIES failures the record says
    why. Memory that runs out is answered once by halves of batches, with summed gradients, and is
    no failure the first time.

    Raises InputError for what does not lie in the candidate, such as a full disk.
    """
    parts, errors, started = 1, 0, time.monotonic()
    while True:
        try:
            if attempt is not None:
                return attempt(parts)
            return train_job(bench, job, parts, on_epoch)
        except CheckpointError:  # damaged: from the start, then
            bench.checkpoints.remove(job.name)
            continue
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a user's code raises)
            text, memory = one_line(error), out_of_memory(error)
        # outside the handler: the error's traceback holds on to what filled the memory
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if memory and parts == 1:
            parts = 2
            continue
        errors += 1
        if errors == TRIES or memory:
            seconds = time.monotonic() - started
            return failed_record(bench.problem, job.bits, job.id, job.epochs, text, seconds, parts)


def train_job(
    bench: Bench,
    job: Job,
    parts: int = 1,
    on_epoch: Callable[[int, float], None] | None = None,
    parallel: bool = False,
) -> Record:
    """Train once, from the last checkpoint where there is one of this training: not of a study that
    had this name before, nor of another device or version.

    With `parallel` all ranks of torch's process group do it together, and the first one writes.
    """
    problem = bench.problem
    first = not parallel or torch.distributed.get_rank() == 0
    key = content_hash([bench.key, job]).encode()
    with _scratch() as folder, threads(problem.threads):
        checkpoint = folder / "checkpoint"
        content = bench.checkpoints.read(job.name) if first else None
        if content is not None and content.startswith(key):  # else another training's
            with atomic_path(checkpoint) as temporary:
                temporary.write_bytes(content[len(key) :])

        def saved(epoch: int, loss: float) -> None:
            if first:
                try:
                    bench.checkpoints.write(job.name, key + checkpoint.read_bytes())
                except InputError as error:  # a full disk, say: no reason to lose the training
                    log.warning("training %s goes on without a checkpoint: %s", job.name, error)
            if on_epoch is not None:
                on_epoch(epoch, loss)

        places = [folder / f"{kind}/{job.id}.safetensors" for kind in (MODELS, START)]
        for place in places:
            place.parent.mkdir()
        record = train_candidate(
            problem,
            bench.fp32,
            job.bits,
            id=job.id,
            epochs=job.epochs,
            ranges=bench.ranges,
            start=None if job.parent is None else _start(bench.files, job.parent),
            final=job.final,
            save_to=places[0] if job.final and first else None,
            keep_in=places[1] if job.keep and first else None,
            on_epoch=saved,
            checkpoint=checkpoint,
            parts=parts,
            parallel=parallel,
        )
        for place in places:
            if place.exists():
                bench.files.write(str(place.relative_to(folder)), place.read_bytes())
    return record


@contextmanager
def _scratch() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="adq-", ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot make a temporary folder ({error.strerror or error}): free space, or set "
            "TMPDIR to another place"
        ) from None
    with folder as path:
        yield Path(path)


def _start(files: Files, parent: str) -> Mapping[str, Tensor]:
    name = f"{START}/{parent}.safetensors"
    content = files.read(name)
    try:
        if content is None:
            raise ValueError("there is no such file")
        return load(content)
    except (SafetensorError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}, which another trial starts from, is missing or damaged ({text}): restore it, "
            "or start a new study"
        ) from None


def hand_in(source: Source, bench: Bench, job: Job, record: Record) -> Record:
    """Tell the record, and only then forget the job's checkpoint."""
    record = source.tell(job, record)
    bench.checkpoints.remove(job.name)
    return record
