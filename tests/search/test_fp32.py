"""The FP32 model: trained once by what its weights depend on, kept, checked when it is read."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adq.proxies.costs import CostModel
from adq.proxies.latency import from_callable
from adq.quant.batches import seeded
from adq.quant.errors import InputError
from adq.quant.evaluate import evaluate
from adq.quant.qat import TrainingConfig, train_
from adq.search import fp32
from adq.search.config import StudyConfig
from adq.search.folder import StudyFolder
from adq.search.fp32 import Fp32, fp32_model
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.task import Task


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of every FP32 training that was run."""
    seen: list[int] = []

    def counted(model: nn.Module, batches: Any, loss: Any, config: Any, *more: Any) -> list[float]:
        seen.append(config.epochs)
        return train_(model, batches, loss, config, *more)

    monkeypatch.setattr(fp32, "train_", counted)
    return seen


def problem_of(task: Task | None = None, **options: Any) -> Problem:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4), "fp32_epochs": 1} | options
    return make_problem(StudyConfig(task="t", **settings), task or tiny_task.make_task())


def folder_in(root: Path, name: str = "s") -> StudyFolder:
    (root / name).mkdir(parents=True, exist_ok=True)
    return StudyFolder(root / name)


def run(problem: Problem, folder: StudyFolder) -> Fp32:
    return fp32_model(problem, folder, Observer())


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def refused(problem: Problem, folder: StudyFolder) -> str:
    with pytest.raises(InputError) as error:
        run(problem, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_is_the_training_loop_on_the_initial_model(tmp_path: Path) -> None:
    problem = problem_of(fp32_epochs=2, seed=3)
    task, by_hand = problem.task, copy.deepcopy(problem.initial_model)
    log = train_(by_hand, task.train, task.loss, TrainingConfig(2, task.fp32_lr), seed=3)
    losses = [epoch.loss for epoch in log]
    found = run(problem, folder_in(tmp_path))
    assert same_weights(found.model, by_hand)
    assert list(found.train_losses) == losses
    assert found.validation == evaluate(by_hand, task.validation, task.loss, task.metric)
    assert found.test == evaluate(by_hand, task.test, task.loss, task.metric)
    assert not found.model.training


def test_the_files_hold_the_weights_and_the_facts(tmp_path: Path) -> None:
    found = run(problem_of(), folder_in(tmp_path))
    weights = load_file(tmp_path / "s" / "fp32.safetensors")
    state = found.model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)
    facts = json.loads((tmp_path / "s" / "fp32.json").read_text())
    assert facts["validation"] == vars(found.validation)
    assert facts["test"] == vars(found.test)
    assert facts["train_losses"] == list(found.train_losses)


def test_the_task_says_how_long_to_train_unless_the_study_does(
    tmp_path: Path, trainings: list[int]
) -> None:
    run(problem_of(fp32_epochs=None), folder_in(tmp_path, "a"))
    run(problem_of(fp32_epochs=0), folder_in(tmp_path, "b"))
    run(problem_of(fp32_epochs=2), folder_in(tmp_path, "c"))
    assert trainings == [3, 0, 2]


def test_a_study_reads_its_own_model_and_a_second_one_the_cache(
    tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(problem_of(), folder_in(tmp_path, "a"))
    again = run(problem_of(), folder_in(tmp_path, "a"))
    other = run(problem_of(bits=(2, 8), trials=3), folder_in(tmp_path, "b"))
    assert trainings == [1]
    for found in (again, other):
        assert same_weights(found.model, first.model)
        assert found.validation == first.validation
        assert found.train_losses == first.train_losses
    monkeypatch.setattr(fp32, "content_key", lambda *args: pytest.fail("not needed any more"))
    run(problem_of(), folder_in(tmp_path, "a"))


class Deeper(tiny_task.TinyNet):
    """The same parameters, another structure."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ReLU()


def moved(batches: Any, by: float) -> list[Any]:
    return [(x + by, y) for x, y in batches]


def other_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)


CHANGES: dict[str, Callable[[Task], tuple[Task, dict[str, Any]]]] = {
    "seed": lambda task: (task, {"seed": 1}),
    "epochs": lambda task: (task, {"fp32_epochs": 2}),
    "model": lambda task: (replace(task, model=Deeper), {}),
    "learning rate": lambda task: (replace(task, fp32_lr=1e-3), {}),
    "data key": lambda task: (replace(task, data_key="new"), {}),
    "loss": lambda task: (replace(task, loss=other_loss), {}),
    "training data": lambda task: (replace(task, train=moved(task.train, 0.5)), {}),
    "validation data": lambda task: (replace(task, validation=moved(task.validation, 0.5)), {}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_whatever_the_weights_depend_on_trains_anew(
    tmp_path: Path, trainings: list[int], change: str
) -> None:
    run(problem_of(), folder_in(tmp_path, "a"))
    task, options = CHANGES[change](tiny_task.make_task())
    run(problem_of(task, **options), folder_in(tmp_path, "b"))
    assert len(trainings) == 2


def test_what_they_do_not_depend_on_does_not(tmp_path: Path, trainings: list[int]) -> None:
    run(problem_of(), folder_in(tmp_path, "a"))
    options = {"budget_bits": 3.9, "lr": 1e-4, "epochs": 7, "first_last_bits": 0, "act_bits": 4}
    run(problem_of(**options), folder_in(tmp_path, "b"))
    assert len(trainings) == 1


def test_an_interrupted_training_leaves_neither_model_nor_cache(
    tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fp32, "train_", die)
        with pytest.raises(KeyboardInterrupt):
            run(problem_of(), folder_in(tmp_path))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    run(problem_of(), folder_in(tmp_path))
    assert len(trainings) == 1


def test_the_source_of_the_loss_and_of_the_models_own_modules_counts(tmp_path: Path) -> None:
    task = tiny_task.make_task()
    same = problem_of(replace(task, loss=lambda o, t: nn.functional.cross_entropy(o, t)))
    other = problem_of(replace(task, loss=lambda o, t: nn.functional.cross_entropy(o, t) / 2))
    assert fp32.task_key(same) != fp32.task_key(other)
    assert fp32.task_key(problem_of(task)) == fp32.task_key(problem_of(tiny_task.make_task()))
    wide = problem_of(task, budget_bits=3.0)
    assert fp32.task_key(wide) != fp32.task_key(problem_of(task, bits=(2, 3), budget_bits=3.0))

    # another latency table gives the same bits other costs
    def timed(seconds: float) -> Problem:
        latency = from_callable(lambda *_: seconds)
        parts = (same.initial_model, same.layers, same.space.searched)
        return replace(same, costs=CostModel(*parts, latency=latency))

    one, other = timed(1e-3), timed(2e-3)
    assert len({fp32.task_key(p) for p in (same, one, other)}) == 3


class Tied(tiny_task.TinyNet):
    """Two names for one tensor, which safetensors does not store as such."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(12, 13)
        self.twin.weight = self.hidden.weight


def test_tied_weights_are_kept_and_stay_tied(tmp_path: Path) -> None:
    task = replace(tiny_task.make_task(), model=Tied)
    first = run(problem_of(task), folder_in(tmp_path))
    again = run(problem_of(task), folder_in(tmp_path))
    assert same_weights(first.model, again.model)
    assert again.model.twin.weight is again.model.hidden.weight


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    with seeded(11):
        return tiny_task.TinyNet().state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_a_users_weights_are_loaded_and_not_trained_further(
    tmp_path: Path, trainings: list[int], state: dict[str, torch.Tensor], suffix: str
) -> None:
    path = tmp_path / f"mine.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    found = run(problem_of(weights=str(path), fp32_epochs=None), folder_in(tmp_path))
    assert trainings == [0]
    assert all(torch.equal(found.model.state_dict()[key], state[key]) for key in state)


def test_a_users_weights_are_the_start_of_a_training_that_was_asked_for(
    tmp_path: Path, trainings: list[int], state: dict[str, torch.Tensor]
) -> None:
    save_file(state, tmp_path / "mine.safetensors")
    weights = str(tmp_path / "mine.safetensors")
    problem = problem_of(weights=weights, fp32_epochs=2)
    by_hand = tiny_task.TinyNet()
    by_hand.load_state_dict(state)
    task = problem.task
    train_(by_hand, task.train, task.loss, TrainingConfig(2, task.fp32_lr), seed=0)
    assert same_weights(run(problem, folder_in(tmp_path)).model, by_hand)
    assert trainings == [2]


def test_other_weights_of_a_user_are_another_model(
    tmp_path: Path, trainings: list[int], state: dict[str, torch.Tensor]
) -> None:
    for i in range(2):
        state["conv1.weight"] = state["conv1.weight"] + i
        save_file(state, tmp_path / "mine.safetensors")
        run(problem_of(weights=str(tmp_path / "mine.safetensors")), folder_in(tmp_path, str(i)))
    assert len(trainings) == 2


def test_a_finished_model_needs_the_users_file_no_more(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    problem = problem_of(weights=str(path))
    first = run(problem, folder_in(tmp_path))
    path.unlink()
    assert same_weights(run(problem_of(weights=str(path)), folder_in(tmp_path)).model, first.model)


class Touch:
    """What a hostile pickle does: a call while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    def text_of(name: str) -> str:
        path = tmp_path / name
        text = refused(problem_of(weights=str(path)), folder_in(tmp_path))
        assert text.startswith(f"weights {path}: not a state dict of TinyNet (")
        assert list((tmp_path / "s").iterdir()) == []
        return text

    assert "No such file" in text_of("missing.safetensors")
    assert "No such file" in text_of("missing.pt")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 30)
    (tmp_path / "garbage.pt").write_bytes(b"garbage" * 30)
    text_of("garbage.safetensors")
    text_of("garbage.pt")
    save_file({k: v for k, v in state.items() if k != "out.bias"}, tmp_path / "less.safetensors")
    assert "out.bias" in text_of("less.safetensors")
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "more.pt")
    assert "extra" in text_of("more.pt")
    torch.save({**state, "conv1.weight": torch.ones(2)}, tmp_path / "shape.pt")
    assert "size mismatch for conv1.weight" in text_of("shape.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    text_of("list.pt")


@pytest.mark.parametrize(
    "save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))]
)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, save: Callable[[Any, Path], Any], state: dict[str, torch.Tensor]
) -> None:
    mark = tmp_path / "was-here"
    save({**state, "out.bias": Touch(mark)}, tmp_path / "evil.pt")
    assert "evil.pt: not a state dict" in refused(
        problem_of(weights=str(tmp_path / "evil.pt")), folder_in(tmp_path)
    )
    assert not mark.exists()


@pytest.mark.parametrize("name", ["fp32.safetensors", "fp32.json"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 30, b"{}", b"null", None])
def test_damaged_files_of_the_study_are_named(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = folder_in(tmp_path)
    run(problem_of(), folder)
    path = folder.file(name)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    assert f"{name} is " in refused(problem_of(), folder)


def test_missing_weights_of_the_study_are_named(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    run(problem_of(), folder)
    folder.file("fp32.safetensors").unlink()
    assert "fp32.safetensors is missing or damaged" in refused(problem_of(), folder)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 30])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, trainings: list[int], suffix: str, content: bytes | None
) -> None:
    first = run(problem_of(), folder_in(tmp_path, "a"))
    (path,) = (tmp_path / ".cache").glob(f"*.{suffix}")
    path.unlink() if content is None else path.write_bytes(content)
    second = run(problem_of(), folder_in(tmp_path, "b"))
    assert same_weights(first.model, second.model)
    assert len(trainings) == 2
    run(problem_of(), folder_in(tmp_path, "c"))
    assert len(trainings) == 2


def test_a_training_that_diverges_is_one_line(tmp_path: Path) -> None:
    task = replace(tiny_task.make_task(), loss=lambda outputs, targets: outputs.sum() * torch.nan)
    assert "the training loss became nan" in refused(problem_of(task), folder_in(tmp_path))


def test_a_study_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = folder_in(tmp_path, "a")
    run(problem_of(), folder)
    facts = json.loads(folder.file("fp32.json").read_text())
    del facts["options"]
    folder.file("fp32.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="'a' is of an earlier version: start a new study"):
        run(problem_of(), folder)


def test_options_that_change_no_result_may_change(tmp_path: Path) -> None:
    folder = folder_in(tmp_path, "a")
    first = run(problem_of(trials=5), folder)
    again = run(problem_of(trials=9, time_budget=60, device="cpu", fp32_epochs=3), folder)
    assert again.validation == first.validation
    with pytest.raises(InputError, match=r"epochs is 4 and was 3 when the study began"):
        run(problem_of(epochs=4), folder)
