"""Final training: each model once, whoever trains it; what is missing or damaged again."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from safetensors.torch import load, load_file

from adq.quant.errors import InputError
from adq.quant.spec import BitVector
from adq.search.candidate import Record, failed_record
from adq.search.config import StudyConfig
from adq.search.crew import Crew
from adq.search.files import FolderFiles
from adq.search.final import FinalTraining
from adq.search.folder import FINAL, Clock, StudyFolder, create_study
from adq.search.jobs import Bench, Job, hand_in, run_job
from adq.search.problem import make_problem


class Place:
    """A study's folder, three models to be trained there, two of them alike, and a process's part
    in it."""

    def __init__(self, out: Path) -> None:
        options = {"budget_bits": 4.0, "bits": (2, 3, 4), "study": "s", "out": str(out)}
        config = StudyConfig(task="t", device="cpu", **options)
        self.folder: StudyFolder = create_study(config, lambda folder: None)
        self.problem = make_problem(config, tiny_task.make_task())
        fp32, path = self.problem.initial_model.eval(), self.folder.path
        ranges = self.problem.input_ranges(fp32)
        places = FolderFiles(path), FolderFiles(path / "checkpoints")
        self.bench = Bench(self.problem, fp32, ranges, *places)
        three, two = (self.bits(b) for b in (3, 2))
        self.models = {"t0003": three, "uniform-2": two, "uniform-3": three}
        self.trained: Counter[str] = Counter()

    def bits(self, width: int) -> BitVector:
        return self.problem.space.bit_vector(self.problem.space.uniform(width))

    @contextmanager
    def process(self) -> Iterator[FinalTraining]:
        clock = Clock(self.folder.file("clock.json"))
        with Crew(self.folder.path) as crew:
            yield FinalTraining(self.folder, self.models, 0, clock, crew)

    def train(self, job: Job) -> Record:
        self.trained[job.id] += 1
        return run_job(self.bench, job)

    def run(self) -> dict[str, Record | None]:
        with self.process() as final:
            while (job := final.ask()) is not None:
                assert not final.done
                hand_in(final, self.bench, job, self.train(job))
            assert final.done
            return {id: final.record(id) for id in self.models}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_models_of_equal_bits_are_trained_once(place: Place) -> None:
    records = place.run()
    assert place.trained == {"t0003": 1, "uniform-2": 1}
    assert {r.id for r in place.folder.records(FINAL)} == {"t0003", "uniform-2"}
    twin, uniform = records["t0003"], records["uniform-3"]
    assert twin is not None
    assert uniform == replace(twin, id="uniform-3")
    assert twin.test is not None  # a final model is tested
    assert twin.weights == "models/t0003.safetensors"
    assert (place.folder.path / twin.weights).is_file()
    assert twin == place.folder.read_record(FINAL, "t0003")
    assert place.folder.file("clock.json").exists()


def test_what_is_finished_is_not_trained_again(place: Place) -> None:
    first = place.run()
    place.trained.clear()
    assert place.run() == first
    assert not place.trained


def test_damaged_or_missing_weights_are_made_again(place: Place) -> None:
    place.run()
    whole = {p: p.read_bytes() for p in place.folder.path.glob("models/*")}
    assert len(whole) == 2
    cut, gone = whole
    cut.write_bytes(whole[cut][: len(whole[cut]) // 2])
    gone.unlink()
    with place.process() as final:
        assert [final.record(id) for id in place.models] == [None] * 3
    place.trained.clear()
    place.run()
    assert place.trained == {"t0003": 1, "uniform-2": 1}
    for path, before in whole.items():
        now, then = load_file(path), load(before)
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], value) for key, value in then.items())


def test_a_record_of_other_bits_is_not_taken_for_the_models(place: Place) -> None:
    place.run()
    place.trained.clear()
    place.models["t0003"] = place.bits(4)
    records = place.run()
    assert place.trained == {"t0003": 1, "uniform-3": 1}  # no twins any more
    assert all(r is not None and r.bits == place.models[id] for id, r in records.items())


def test_a_model_that_failed_is_done_for_this_process_and_tried_by_the_next(place: Place) -> None:
    with place.process() as final:
        job = final.ask()
        assert job is not None
        failed = failed_record(place.problem, job.bits, job.id, job.epochs, "the loss became nan")
        assert hand_in(final, place.bench, job, failed) == failed
        assert final.record("t0003") == failed
        assert final.record("uniform-3") == replace(failed, id="uniform-3")
        other = final.ask()
        assert other is not None
        assert other.id == "uniform-2"
        hand_in(final, place.bench, other, place.train(other))
        assert final.ask() is None
        assert final.done
    records = place.run()
    assert place.trained == {"uniform-2": 1, "t0003": 1}
    assert all(record is not None and record.error is None for record in records.values())


def test_a_damaged_record_is_one_line(place: Place) -> None:
    place.run()
    place.folder.record_path(FINAL, "t0003").write_text("{")
    with pytest.raises(InputError, match=r"final/t0003\.json is missing or damaged") as error:
        place.run()
    assert "\n" not in str(error.value)


def test_two_processes_share_the_models(place: Place) -> None:
    with place.process() as one, place.process() as two:
        jobs: list[Any] = [one.ask(), two.ask()]
        assert [job.id for job in jobs] == ["t0003", "uniform-2"]
        assert all(job.final and not job.keep and job.epochs == 0 for job in jobs)
        assert one.ask() is None
        assert two.ask() is None
        assert not one.done  # the other one's is still under way
        hand_in(two, place.bench, jobs[1], place.train(jobs[1]))
        assert one.ask() is None
        assert not one.done
        hand_in(one, place.bench, jobs[0], place.train(jobs[0]))
        for final in (one, two):
            assert final.ask() is None
            assert final.done
            assert [final.record(id) is not None for id in place.models] == [True] * 3
        assert one.record("uniform-2") == two.record("uniform-2")
    assert set(place.trained.values()) == {1}


def test_what_a_process_left_unfinished_is_trained_by_another(place: Place) -> None:
    with place.process() as lost:
        assert lost.ask() == Job("t0003", place.bits(3), 0, final=True)
    records = place.run()
    assert place.trained == {"t0003": 1, "uniform-2": 1}
    assert None not in records.values()
