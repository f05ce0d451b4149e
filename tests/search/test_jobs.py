"""One training, whatever happens to it: tried again, gone on with, halved, or given up."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from adq.quant.errors import InputError
from adq.search.candidate import Record, train_candidate
from adq.search.config import StudyConfig
from adq.search.files import FolderFiles
from adq.search.jobs import Bench, Job, hand_in, run_job
from adq.search.problem import make_problem

STEPS = 4  # a pass over the training images
EPOCHS = 3


class OtherDevice:
    """Named otherwise, though it is the CPU."""

    type = "mps"


class Death(BaseException):
    """The process dies here: nothing may catch it."""


class Loss:
    """Cross-entropy, but `event` may interfere with training steps, counted from 1."""

    def __init__(self) -> None:
        self.event: Callable[[int, int], None] = lambda step, size: None
        self.steps = 0
        self.sizes: list[int] = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:
            self.steps += 1
            self.sizes.append(len(targets))
            self.event(self.steps, len(targets))
        return F.cross_entropy(outputs, targets)


@dataclass
class Place:
    """A study's folder, and what a process that trains there has."""

    bench: Bench
    job: Job
    loss: Loss
    folder: Path
    epochs: list[int] = field(default_factory=list)

    def run(self, job: Job | None = None) -> Record:
        return run_job(self.bench, job or self.job, lambda epoch, _: self.epochs.append(epoch))

    def files(self) -> dict[str, Any]:
        """Those that trainings leave, but for checkpoints: metadata and tensors of each."""
        return {
            str(path.relative_to(self.folder)): content_of(path)
            for kind in ("models", "start")
            for path in self.folder.glob(f"{kind}/*")
        }

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / self.job.name


def content_of(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return file.metadata(), {key: (t.dtype, t.tolist()) for key, t in tensors.items()}


def timeless(record: Record) -> Record:
    rungs = tuple(replace(rung, seconds=0.0) for rung in record.rungs)
    return replace(record, seconds=0.0, rungs=rungs)


def make_place(folder: Path, **options: Any) -> Place:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4), "epochs": EPOCHS, "device": "cpu"}
    loss = Loss()
    images, labels = (part[: STEPS * 60] for part in tiny_task.data())
    train = DataLoader(TensorDataset(images, labels), 60, shuffle=True)
    task = replace(tiny_task.make_task(), loss=loss, train=train)
    problem = make_problem(StudyConfig(task="t", **settings | options), task)
    fp32 = problem.initial_model.eval()
    places = FolderFiles(folder), FolderFiles(folder / "checkpoints")
    bench = Bench(problem, fp32, problem.input_ranges(fp32), *places)
    bits = problem.space.bit_vector(problem.space.uniform(3))
    return Place(bench, Job("0004", bits, EPOCHS, final=True, keep=True), loss, folder)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def calm(tmp_path: Path, **options: Any) -> Place:
    """A training that nothing happens to; `record` and files are what all others must come to."""
    return make_place(tmp_path / "calm", **options)


def error_of(function: Callable[..., Any], offset: int, text: str) -> str:
    return f"{text} ({__file__}:{function.__code__.co_firstlineno + offset})"


def test_a_job_gives_the_candidates_record_and_its_files(place: Place) -> None:
    record = place.run()
    bench, job = place.bench, place.job
    expected = train_candidate(bench.problem, bench.fp32, job.bits, id="0004", epochs=3, final=True)
    assert timeless(record) == timeless(replace(expected, weights="models/0004.safetensors"))
    assert record.parts == 1
    assert place.epochs == [0, 1, 2]
    assert sorted(place.files()) == ["models/0004.safetensors", "start/0004.safetensors"]
    other = Job("0005", job.bits, 1)
    assert place.run(other).weights is None
    assert len(place.files()) == 2  # neither final nor kept


@pytest.mark.parametrize("options", [{}, {"start_bits": (4,)}], ids=["plain", "progressive"])
def test_an_error_that_passes_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """Twice, and each time training goes on from the last epoch."""
    expected = calm(tmp_path, **options)
    place = make_place(tmp_path / "s", **options)

    def twice(step: int, size: int) -> None:
        if step in (STEPS + 2, STEPS + 2 + STEPS + 3):
            raise ConnectionError("the data is\non another machine")

    place.loss.event = twice
    assert timeless(place.run()) == timeless(expected.run())
    assert place.files() == expected.files()
    assert place.epochs == expected.epochs == [0, 1, 2]
    assert expected.loss.steps == 3 * STEPS
    assert place.loss.steps == 3 * STEPS + 2 + 3


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_training_that_fails_three_times_is_given_up(
    place: Place, kind: type[BaseException]
) -> None:
    def gone(step: int, size: int) -> None:
        if step > STEPS:
            raise kind("the disk\nis gone")

    place.loss.event = gone
    record = place.run()
    assert record.error == error_of(gone, 2, f"{kind.__name__}: the disk is gone")
    assert (record.id, record.bits, record.epochs) == ("0004", place.job.bits, EPOCHS)
    assert (record.validation, record.test, record.weights) == (None, None, None)
    assert record.costs == place.bench.problem.costs.costs(place.job.bits)
    (rung,) = record.rungs
    assert (rung.epochs, rung.validation) == (EPOCHS, None)
    assert rung.seconds == record.seconds > 0
    assert place.loss.steps == STEPS + 3  # two epochs were never begun anew
    assert place.epochs == [0]
    assert place.files() == {}


def test_a_loss_that_is_not_finite_is_no_reason_to_try_again(place: Place) -> None:
    task = replace(place.bench.problem.task, loss=lambda o, t: place.loss(o, t) * float("nan"))
    place.bench = replace(place.bench, problem=replace(place.bench.problem, task=task))
    record = place.run()
    assert record.error is not None
    assert record.error.startswith("the training loss became nan in epoch 1, step 1")
    assert place.loss.steps == 1


@pytest.mark.parametrize("error", [InputError("the disk is full"), KeyboardInterrupt(), Death()])
def test_what_does_not_lie_in_the_candidate_passes_through(
    place: Place, error: BaseException
) -> None:
    def fail(step: int, size: int) -> None:
        raise error

    place.loss.event = fail
    with pytest.raises(type(error)) as raised:
        place.run()
    assert raised.value is error
    assert place.loss.steps == 1


@pytest.mark.parametrize("options", [{}, {"start_bits": (4,)}], ids=["plain", "progressive"])
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_another_process_goes_on_from_the_last_epoch(
    tmp_path: Path, options: dict[str, Any], epoch: int
) -> None:
    """Also where all epochs were done, and not yet the evaluation."""
    expected = calm(tmp_path, **options)
    expected.run()
    dying, place = (make_place(tmp_path / "s", **options) for _ in range(2))

    def die(step: int, size: int) -> None:
        if step == epoch * STEPS + 1:
            raise Death

    dying.loss.event = die
    if epoch == EPOCHS:

        def dying_metric(outputs: Tensor, targets: Tensor) -> Tensor:
            raise Death

        task = replace(dying.bench.problem.task, metric=dying_metric)
        dying.bench = replace(dying.bench, problem=replace(dying.bench.problem, task=task))
    with pytest.raises(Death):
        dying.run()
    assert dying.epochs == list(range(epoch))
    assert dying.files() == {}
    torch.manual_seed(9)
    assert timeless(place.run()) == timeless(expected.run())
    assert place.epochs == list(range(epoch, EPOCHS))
    assert place.loss.steps == (EPOCHS - epoch) * STEPS
    assert place.files() == expected.files()


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no zip" * 50, _cut, _flipped])
def test_a_damaged_checkpoint_is_thrown_away(
    tmp_path: Path, place: Place, damage: Callable[[bytes], bytes]
) -> None:
    dying = make_place(tmp_path)

    def die(step: int, size: int) -> None:
        if step > 2 * STEPS:
            raise Death

    dying.loss.event = die
    with pytest.raises(Death):
        dying.run()
    place.checkpoint.write_bytes(damage(place.checkpoint.read_bytes()))
    assert timeless(place.run()) == timeless(calm(tmp_path).run())
    assert place.epochs == [0, 1, 2]


@pytest.mark.parametrize("change", ["model", "learning rate", "bits", "device", "batches"])
def test_a_checkpoint_of_another_training_is_not_taken_for_this_ones(
    tmp_path: Path, place: Place, change: str
) -> None:
    """As it lies there when a study of this name was given up, or when a study goes on on another
    machine."""
    other = make_place(tmp_path, **({"lr": 3e-3} if change == "learning rate" else {}))
    problem, job = other.bench.problem, other.job
    if change == "model":
        with torch.no_grad():
            other.bench.fp32.get_parameter("out.bias").add_(1e-3)
    elif change == "bits":
        job = replace(job, bits=problem.space.bit_vector(problem.space.uniform(2)))
    elif change == "device":
        other.bench = replace(other.bench, problem=replace(problem, device=OtherDevice()))
    elif change == "batches":
        task = replace(problem.task, train=[*problem.task.train][1:])
        other.bench = replace(other.bench, problem=replace(problem, task=task))
    other.run(job)
    assert place.checkpoint.exists()
    assert timeless(place.run()) == timeless(calm(tmp_path).run())
    assert place.epochs == [0, 1, 2]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError("Unable to allocate 20.0 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "python", "cpu"])
def test_a_batch_that_does_not_fit_is_cut_in_half(
    tmp_path: Path, place: Place, error: Exception
) -> None:
    def fits(step: int, size: int) -> None:
        if size > 30:
            raise error

    place.loss.event = fits
    record = place.run()
    assert record.error is None
    assert record.parts == 2
    assert place.loss.sizes == [60] + [30] * (2 * EPOCHS * STEPS)
    other = calm(tmp_path)
    bench, bits = other.bench, other.job.bits
    expected = train_candidate(
        bench.problem, bench.fp32, bits, id="0004", epochs=EPOCHS, final=True, parts=2
    )
    assert timeless(record) == timeless(replace(expected, weights="models/0004.safetensors"))
    assert Record.from_json(record.to_json()) == record


def test_a_half_that_does_not_fit_is_a_failure_that_says_so(place: Place) -> None:
    def never(step: int, size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    place.loss.event = never
    record = place.run()
    assert record.error == error_of(never, 1, "OutOfMemoryError: CUDA out of memory.")
    assert (record.parts, record.validation) == (2, None)
    assert place.loss.sizes == [60, 30]


def test_memory_that_ran_out_once_is_none_of_the_three_failures(place: Place) -> None:
    def fail(step: int, size: int) -> None:
        if size > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if step < 4:
            raise ConnectionError

    place.loss.event = fail
    record = place.run()
    assert (record.error, record.parts) == (None, 2)
    assert place.loss.sizes[:4] == [60, 30, 30, 30]


def test_an_attempt_elsewhere_is_tried_again_alike(place: Place) -> None:
    """As an executor has it that trains on other machines: `attempt` gets the parts."""
    expected = timeless(place.run())
    parts: list[int] = []

    def attempt(n: int) -> Record:
        parts.append(n)
        if len(parts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(parts) < 4:
            raise ConnectionError("a node is gone")
        return expected

    assert run_job(place.bench, place.job, attempt=attempt) == expected
    assert parts == [1, 2, 2, 2]


class Told:
    """A source that was told a record while the checkpoint was still there, or that cannot be."""

    done = False

    def __init__(self, checkpoint: Path, error: InputError | None = None) -> None:
        self.checkpoint, self.error = checkpoint, error
        self.records: list[Record] = []

    def ask(self) -> Job | None:
        return None

    def tell(self, job: Job, record: Record) -> Record:
        assert self.checkpoint.exists()
        if self.error is not None:
            raise self.error
        self.records.append(record)
        return replace(record, parent="told")


def test_a_checkpoint_is_forgotten_once_its_record_is_told_and_no_sooner(place: Place) -> None:
    record = place.run()
    full = Told(place.checkpoint, InputError("the disk is full"))
    with pytest.raises(InputError, match="the disk is full"):
        hand_in(full, place.bench, place.job, record)
    assert place.checkpoint.exists()
    source = Told(place.checkpoint)
    assert hand_in(source, place.bench, place.job, record).parent == "told"
    assert source.records == [record]
    assert not place.checkpoint.exists()


@pytest.mark.parametrize("content", [None, b"", b"no weights" * 9])
def test_weights_to_start_from_that_are_gone_are_one_line(
    place: Place, content: bytes | None
) -> None:
    if content is not None:
        place.bench.files.write("start/0001.safetensors", content)
    message = r"^start/0001\.safetensors, which another trial starts from, is missing or damaged"
    with pytest.raises(InputError, match=message) as error:
        place.run(replace(place.job, parent="0001"))
    assert "\n" not in str(error.value)
    assert place.loss.steps == 0


def test_a_training_starts_from_its_parents_weights(place: Place) -> None:
    place.run(Job("0001", place.job.bits, 1, keep=True))
    warm, cold = (
        place.run(Job(f"000{i}", place.job.bits, 0, parent=parent))
        for i, parent in enumerate(("0001", None), 2)
    )
    assert warm.validation is not None
    assert cold.validation is not None
    assert warm.validation.loss < cold.validation.loss


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_training_goes_on(
    tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def take_place(step: int, size: int) -> None:
        if step == STEPS:
            place.checkpoint.parent.touch()  # a file where the folder should be

    place.loss.event = take_place
    assert timeless(place.run()) == timeless(calm(tmp_path).run())
    assert place.loss.steps == EPOCHS * STEPS
    said = f"training 0004-0 goes on without a checkpoint: cannot write {place.checkpoint}: "
    assert [message.startswith(said) for message in caplog.messages] == [True] * EPOCHS
    assert not any("\n" in message for message in caplog.messages)


@pytest.mark.parametrize("kind", ["models", "start"])
def test_weights_that_cannot_be_written_are_one_line_and_no_failed_candidate(
    place: Place, kind: str
) -> None:
    (place.folder / kind).touch()  # a file where the folder should be
    message = rf"^cannot write .*/{kind}/0004\.safetensors: "
    with pytest.raises(InputError, match=message) as error:
        place.run()
    assert "\n" not in str(error.value)
    assert place.loss.steps == EPOCHS * STEPS
    place.loss.steps = 0
    (place.folder / kind).unlink()
    assert place.run().error is None
    assert place.loss.steps == 0  # from the last epoch's checkpoint


def test_no_room_for_temporary_files_is_one_line_and_no_failed_candidate(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"^cannot make a temporary folder .*TMPDIR") as error:
        place.run()
    assert "\n" not in str(error.value)
    assert place.loss.steps == 0


def test_nothing_is_left_in_the_folder_for_temporary_files(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def fail(step: int, size: int) -> None:
        if step == STEPS + 2:
            raise ValueError

    place.loss.event = fail
    place.run()
    assert place.loss.steps == 3 * STEPS + 2
    assert list(scratch.iterdir()) == []
