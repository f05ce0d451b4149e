"""One candidate: its record survives JSON, repeats under one seed, and says why it failed."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_task
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_space import largest, smallest

from adq.proxies.costs import Costs
from adq.quant.apply import bits_of
from adq.quant.batches import Batch, Batches
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation, evaluate
from adq.quant.export.loading import load_packed_, read_metadata
from adq.quant.modules import original_weight
from adq.quant.qat import Epoch, train_
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung, train_candidate
from adq.search.config import StudyConfig
from adq.search.problem import Problem, make_problem
from adq.search.task import Task


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem_of(task: Task, **options: Any) -> Problem:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4)} | options
    return make_problem(StudyConfig(task="tiny_task:make_task", **settings), task)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(tiny_task.make_task())


@pytest.fixture(scope="module")
def bits(problem: Problem) -> BitVector:
    return problem.space.bit_vector(problem.space.uniform(3))


names = st.text(min_size=1, max_size=5)
numbers = st.floats(allow_nan=False, allow_infinity=False)
evaluations = st.builds(Evaluation, numbers, numbers, numbers, st.integers(1, 10**6))
widths = st.dictionaries(names, st.integers(2, 8), max_size=4)
records = st.builds(
    Record,
    id=names,
    bits=widths.map(lambda w: BitVector(w, dict(list(w.items())[::2]))),
    seed=st.integers(0, 10**9),
    epochs=st.integers(0, 100),
    costs=st.builds(
        Costs, numbers, numbers, numbers, st.integers(), st.integers(), st.none() | numbers
    ),
    train_losses=st.lists(numbers, max_size=3).map(tuple),
    flips=st.lists(numbers, max_size=3).map(tuple),
    dead_levels=st.lists(numbers, max_size=3).map(tuple),
    validation=st.none() | evaluations,
    test=st.none() | evaluations,
    seconds=numbers,
    weights=st.none() | names,
    error=st.none() | names,
    rungs=st.lists(
        st.builds(Rung, st.integers(0, 100), st.none() | evaluations, numbers), max_size=3
    ).map(tuple),
    parent=st.none() | names,
    parts=st.integers(1, 4),
)


@settings(max_examples=50)
@given(records)
def test_a_record_survives_json(record: Record) -> None:
    data = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert data["schema"] == "adq-record/3"
    assert Record.from_json(data) == record
    assert list(data["bits"]["weight_bits"]) == list(record.bits.weight)  # in the model's order


def timeless(record: Record) -> Record:
    rungs = tuple(replace(rung, seconds=0.0) for rung in record.rungs)
    return replace(record, seconds=0.0, rungs=rungs)


def test_a_candidate_repeats_under_one_seed_and_differs_under_another(
    problem: Problem, bits: BitVector
) -> None:
    def train(seed: int) -> Record:
        seeded = replace(problem, config=replace(problem.config, seed=seed))
        record = train_candidate(seeded, problem.initial_model, bits, id="0007", epochs=2)
        return timeless(record)

    torch.manual_seed(1)
    first = train(3)
    torch.manual_seed(2)  # what the process drew before does not matter
    assert train(3) == first
    assert first.seed == 3
    assert first.epochs == len(first.train_losses) == len(first.flips) == 2
    assert 0 < first.flips[0] < 1
    assert len(first.dead_levels) == 2
    assert train(4).train_losses != first.train_losses


class Noisy:
    """Batches whose images are disturbed anew in each pass, as an augmenting pipeline does it."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for x, y in self.batches:
            yield x + 0.5 * torch.randn_like(x) + random.random() + np.random.rand(), y


def test_random_data_repeats_under_one_seed_in_training_and_evaluation(
    problem: Problem, bits: BitVector
) -> None:
    task = problem.task
    noisy = replace(
        task, train=Noisy(task.train), validation=Noisy(task.validation), test=Noisy(task.test)
    )
    noisy_problem = replace(problem, task=noisy)

    def train() -> Record:
        record = train_candidate(
            noisy_problem, problem.initial_model, bits, id="0", epochs=1, final=True
        )
        return timeless(record)

    first = train()
    torch.rand(7), random.random(), np.random.rand(3)  # the state moves on
    assert train() == first


def test_the_fp32_model_and_the_random_state_are_left_as_they_were(
    problem: Problem, bits: BitVector
) -> None:
    before = copy.deepcopy(problem.initial_model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_candidate(problem, problem.initial_model, bits, id="0", epochs=1)
    assert torch.equal(torch.rand(3), expected)
    after = problem.initial_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_searched_candidate_is_validated_and_not_tested(
    problem: Problem, bits: BitVector
) -> None:
    def guard() -> Any:
        raise AssertionError("the test split was read during the search")
        yield

    task = replace(problem.task, test=guard())
    record = train_candidate(
        replace(problem, task=task), problem.initial_model, bits, id="0", epochs=0
    )
    assert record.validation is not None
    assert record.validation.samples == 300
    assert record.test is None
    assert record.weights is None
    assert record.train_losses == record.flips == record.dead_levels == ()
    assert record.costs == problem.costs.costs(bits)
    assert record.seconds > 0


def test_the_packed_file_of_a_final_candidate_gives_its_results_again(
    problem: Problem, bits: BitVector, tmp_path: Path
) -> None:
    path = tmp_path / "models" / "t1.safetensors"
    path.parent.mkdir()
    record = train_candidate(
        problem, problem.initial_model, bits, id="t1", epochs=1, final=True, save_to=path
    )
    assert record.weights == "models/t1.safetensors"
    task = problem.task
    model = load_packed_(tiny_task.TinyNet(), path)
    for split, found in ((task.validation, record.validation), (task.test, record.test)):
        assert found is not None
        again = evaluate(model, split, task.loss, task.metric)
        assert again.metric == found.metric
        assert again.loss == pytest.approx(found.loss, rel=1e-5)  # float32 sums in another order
    metadata = read_metadata(path)
    assert metadata["task"] == "tiny_task:make_task"
    assert metadata["point"] == "t1"
    assert BitVector.from_json(metadata["bits"]) == bits


def test_batchnorm_is_estimated_anew_for_the_quantized_layers(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mean is that of what two-bit weights make of the calibration samples."""
    bits = problem.space.bit_vector(smallest(problem.space))
    kept: list[Any] = []
    monkeypatch.setattr(
        "adq.search.candidate.save_packed", lambda model, *_: kept.append(copy.deepcopy(model))
    )
    path = tmp_path / "weights.safetensors"
    train_candidate(problem, problem.initial_model, bits, id="0", epochs=0, save_to=path)
    [model] = kept
    seen: list[torch.Tensor] = []
    model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for module in (model.bn1, model.bn2):
            module.train()  # the statistics of each batch, as while they were estimated
            module.momentum = 0.0
        for x, _ in problem.calibration:
            model(x)
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    torch.testing.assert_close(model.bn2.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_the_bits_asked_for_are_the_bits_trained(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: Any, *args: Any, **options: Any) -> list[Epoch]:
        seen.append(bits_of(model))
        return []

    monkeypatch.setattr("adq.search.candidate.train_", spy)
    for point in (smallest(problem.space), largest(problem.space)):
        bits = problem.space.bit_vector(point)
        assert train_candidate(problem, problem.initial_model, bits, id="0", epochs=1).bits == bits
        assert seen.pop() == bits


def test_a_start_at_more_bits_ends_at_the_bits_asked_for(problem: Problem) -> None:
    config = replace(problem.config, start_bits=(4, 3))
    bits = problem.space.bit_vector(smallest(problem.space))
    made = {}
    for name, changed in (("direct", problem), ("stages", replace(problem, config=config))):
        record = train_candidate(changed, problem.initial_model, bits, id="0", epochs=4)
        assert record.error is None
        assert record.bits == bits
        assert len(record.train_losses) == 4
        made[name] = record.train_losses
    assert made["direct"] != made["stages"]


def failing_loss(at: int, value: float) -> Callable[[Any, Any], torch.Tensor]:
    """The plain loss, but `value` from its call number `at` on."""
    calls = [0]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        plain = torch.nn.functional.cross_entropy(outputs, targets)
        return plain * value if calls[0] > at else plain

    return loss


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (3, float("nan"), "the training loss became nan in epoch 1, step 4"),
        (15, float("inf"), "the training loss became inf in epoch 2, step 6"),
        (20, float("nan"), "the evaluation loss is nan"),  # 2 epochs of 10 steps went well
    ],
)
def test_a_loss_that_is_not_finite_gives_a_failed_record(
    at: int, value: float, message: str, problem: Problem, bits: BitVector, tmp_path: Path
) -> None:
    task = replace(problem.task, loss=failing_loss(at, value))
    record = train_candidate(
        replace(problem, task=task),
        problem.initial_model,
        bits,
        id="0",
        epochs=2,
        final=True,
        save_to=tmp_path / "weights.safetensors",
    )
    assert record.validation is None
    assert record.test is None
    assert record.weights is None
    assert record.error is not None
    assert message in record.error
    assert list(tmp_path.iterdir()) == []
    assert Record.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record


def test_a_final_test_loss_that_is_not_finite_leaves_no_result_at_all(
    problem: Problem, bits: BitVector
) -> None:
    task = replace(problem.task, loss=failing_loss(10 + 1, float("nan")))
    record = train_candidate(
        replace(problem, task=task), problem.initial_model, bits, id="0", epochs=1, final=True
    )
    assert record.validation is None
    assert record.test is None
    assert "the evaluation loss is nan" in (record.error or "")


def test_progress_is_told_epoch_by_epoch(problem: Problem, bits: BitVector) -> None:
    heard: list[tuple[int, float]] = []
    record = train_candidate(
        problem,
        problem.initial_model,
        bits,
        id="0",
        epochs=2,
        on_epoch=lambda epoch, loss: heard.append((epoch, loss)),
    )
    assert heard == list(enumerate(record.train_losses))
    assert asdict(record)["train_losses"] == tuple(loss for _, loss in heard)


def test_a_candidate_is_one_rung(problem: Problem, bits: BitVector) -> None:
    record = train_candidate(problem, problem.initial_model, bits, id="0", epochs=1)
    assert record.rungs == (Rung(1, record.validation, record.seconds),)
    assert (record.parent, record.parts, record.state) == (None, 1, "done")


def test_the_weights_kept_are_those_under_the_quantizers_and_can_be_started_from(
    problem: Problem, bits: BitVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fp32 = tmp_path / "0.safetensors", problem.initial_model
    trained: list[dict[str, torch.Tensor]] = []

    def spy(model: Any, *args: Any, **options: Any) -> list[Epoch]:
        log = train_(model, *args, **options)
        layer = model.get_submodule("conv2")
        trained.append({"conv2": original_weight(layer).detach().clone()})
        return log

    monkeypatch.setattr("adq.search.candidate.train_", spy)
    first = train_candidate(problem, fp32, bits, id="0", epochs=1, keep_in=path)
    kept = load_file(path)
    assert kept.keys() == fp32.state_dict().keys()
    assert torch.equal(kept["conv2.weight"], trained[0]["conv2"])
    assert not torch.equal(kept["conv2.weight"], fp32.state_dict()["conv2.weight"])

    # without training, a model that starts from them is what FP32 weights of these values give
    plain = copy.deepcopy(fp32)
    plain.load_state_dict(kept)
    ranges = problem.input_ranges(fp32)
    warm = train_candidate(problem, fp32, bits, id="1", epochs=0, start=kept)
    same = train_candidate(problem, plain, bits, id="1", epochs=0, ranges=ranges)
    assert timeless(warm) == timeless(same)
    cold = train_candidate(problem, fp32, bits, id="1", epochs=0)
    assert first.validation is not None
    assert warm.validation is not None
    assert cold.validation is not None
    assert warm.validation.loss < cold.validation.loss


def test_the_teacher_of_a_warm_candidate_is_the_fp32_model(
    problem: Problem, bits: BitVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []

    def spy(model: Any, *args: Any, teacher: Any, **options: Any) -> list[Epoch]:
        teachers.append(teacher)
        return []

    monkeypatch.setattr("adq.search.candidate.train_", spy)
    start = {k: v.clone() for k, v in problem.initial_model.state_dict().items()}
    train_candidate(problem, problem.initial_model, bits, id="0", epochs=1, start=start)
    assert teachers == [problem.initial_model]


def test_a_record_of_another_version_is_refused(problem: Problem, bits: BitVector) -> None:
    data = train_candidate(problem, problem.initial_model, bits, id="0", epochs=0).to_json()
    with pytest.raises(InputError, match=r"'adq-record/2', expected 'adq-record/3'.*new study"):
        Record.from_json(data | {"schema": "adq-record/2"})
