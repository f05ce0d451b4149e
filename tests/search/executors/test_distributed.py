"""One candidate on several ranks, by Ray Train in a Ray Tune trial: as one rank would train it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import watched_task
from jobs_to_do import JobsToDo
from ray.exceptions import RayTaskError
from trainings import bench_of, jobs_of

from adq.quant.errors import CheckpointError, InputError
from adq.search.config import StudyConfig
from adq.search.executors.distributed import _telling
from adq.search.executors.local import LocalExecutor
from adq.search.executors.ray import RayExecutor

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # Ray's own sockets and logs
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # short: sockets' paths have limits
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests they would starve
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        config = StudyConfig(task="python", budget_bits=4.0, device="cpu", ranks=2)
        with RayExecutor(config, "test") as executor:
            yield executor


def test_two_ranks_train_as_one_does_though_a_rank_dies(
    executor: RayExecutor, tmp_path: Path
) -> None:
    bench = bench_of(tmp_path, watched_task.make_task(tmp_path))
    jobs = jobs_of(bench, 1, epochs=2, final=True)
    alone = JobsToDo(jobs)
    LocalExecutor().run(alone, bench, lambda _: None)
    (tmp_path / "kill").write_text("3")  # one rank, in the second epoch of both
    together = JobsToDo(jobs)

    executor.run(together, bench, lambda _: None)

    one, two = alone.records["0000-0"], together.records["0000-0"]
    assert two.error is None
    assert two.bits == one.bits
    # sums over a batch are added up in another order: a relative 1e-3 is far above what 20 steps
    # make of that, and far below what a wrong gradient or BatchNorm would
    assert two.train_losses == pytest.approx(one.train_losses, rel=1e-3)
    for split in ("validation", "test"):
        expected, found = getattr(one, split), getattr(two, split)
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        assert found.metric == pytest.approx(expected.metric, abs=0.01)  # 3 of 300 images
        assert found.samples == expected.samples
    assert (tmp_path / "files/models/0000.safetensors").exists()
    lines = watched_task.epochs(tmp_path)
    assert len({line[0] for line in lines}) == 4  # two ranks, twice
    assert 5 <= len(lines) <= 6  # two epochs and one begun again, not four


def test_of_several_ranks_errors_the_one_that_tells_most_is_raised() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    memory = torch.OutOfMemoryError("CUDA out of memory")
    misfit = InputError("a full disk")
    code = KeyError("weights")
    wrapped = RuntimeError("Ray's own words")
    wrapped.__cause__ = memory

    assert _telling({0: lost, 1: code}) is code
    assert _telling({0: lost, 1: code, 2: misfit}) is misfit
    assert _telling({0: lost, 1: misfit, 2: memory}) is memory
    assert _telling({0: lost, 1: wrapped}) is memory
    assert _telling({0: lost}) is lost


@pytest.mark.parametrize("kind", [InputError, CheckpointError])
def test_bad_input_keeps_its_text_whatever_it_came_from(kind: type[InputError]) -> None:
    misfit = kind("checkpoint: expected a disk with room")
    misfit.__cause__ = OSError(28, "No space left on device")
    assert _telling({0: misfit}) is misfit
    wrapped = RayTaskError("train", "a remote traceback", misfit).as_instanceof_cause()
    assert isinstance(wrapped, kind)  # and one of Ray's, with its text
    assert _telling({0: wrapped}) is misfit
