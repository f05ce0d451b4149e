"""The FP32 model: loaded or trained once, kept by a content key, measured."""

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from adq.quant.batches import seeded, take_samples
from adq.quant.digest import content_hash
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation, evaluate
from adq.quant.files import atomic_path, read_json, write_json, write_tensors
from adq.quant.qat import Epoch, TrainingConfig, train_
from adq.search.config import EXECUTION, OPTIONS, option_name
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem
from adq.search.space import option_terms


@dataclass(frozen=True)
class Fp32:
    """The FP32 model in eval mode, and how it does on both splits."""

    model: nn.Module
    validation: Evaluation
    test: Evaluation
    train_losses: tuple[float, ...]


def fp32_model(problem: Problem, folder: StudyFolder, observer: Observer) -> Fp32:
    """The study's FP32 model: from its folder, else from the cache, else trained now.

    The cache holds weights only; the metrics are measured for each study.

    Raises InputError when given weights do not fit, when training diverges, or when the task is
    no longer the one that the study began with.
    """
    model, (weights, facts) = problem.initial_model, _paths(folder.path, "fp32")
    if problem.config.weights is not None and not facts.exists():
        load_user_weights(model, Path(problem.config.weights))
    if not facts.exists():
        epochs = _epochs(problem)
        key = content_key(problem, epochs)
        cached_weights, cached_losses = _paths(folder.cache, f"fp32-{key}")
        if _readable(cached_weights, cached_losses):
            observer.stage("FP32 model", 2)
            observer.step("from the cache")
            losses = read_json(cached_losses)["train_losses"]
        else:
            folder.cache.mkdir(exist_ok=True)
            observer.stage("FP32 model", epochs + 1)
            losses = _train(problem, epochs, observer)
            write_tensors(cached_weights, model.state_dict(), {})
            write_json(cached_losses, {"train_losses": losses})
        _copy(cached_weights, weights)
        _load(model, weights)
        validation, test = _evaluate(problem)
        observer.step(f"validation {problem.task.metric_name} {validation.metric:.4f}")
        write_json(
            facts,
            {
                "train_losses": losses,
                "validation": asdict(validation),
                "test": asdict(test),
                "task_key": task_key(problem),
                "options": fixed_options(problem),
            },
        )
    data = read_json(facts)
    try:
        if "task_key" in data and "options" not in data:
            raise InputError(
                f"study {folder.name!r} is of an earlier version: start a new study, with the "
                "options in its study.toml"
            )
        before, now = data["options"], fixed_options(problem)
        if edited := [name for name, value in before.items() if now[name] != value]:
            name = edited[0]
            raise InputError(
                f"study {folder.name!r}: {option_name(OPTIONS[name])} is {now[name]!r} and was "
                f"{before[name]!r} when the study began; restore it in study.toml, or start a new "
                "study"
            )
        if data["task_key"] != task_key(problem):
            raise InputError(
                f"study {folder.name!r}: the task's data, loss or model, the choices of bits or "
                "what they cost are not those that the study began with; restore them, or start a "
                "new study"
            )
        found = Fp32(
            model.eval(),
            Evaluation(**data["validation"]),
            Evaluation(**data["test"]),
            tuple(data["train_losses"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{facts} is damaged: {error}") from None
    _load(model, weights)
    return found


def _epochs(problem: Problem) -> int:
    """Asked for, else none where trained weights were given, else the task's own."""
    config = problem.config
    if config.fp32_epochs is not None:
        return config.fp32_epochs
    return 0 if config.weights is not None else problem.task.fp32_epochs


def _train(problem: Problem, epochs: int, observer: Observer) -> list[float]:
    task = problem.task
    with seeded(problem.config.seed):
        log: list[Epoch] = problem.call(
            "FP32 training",
            lambda: train_(
                problem.initial_model,
                task.train,
                task.loss,
                TrainingConfig(epochs, task.fp32_lr),
                problem.config.seed,
                lambda _, loss: observer.step(f"loss {loss:.4f}"),
            ),
        )
    return [epoch.loss for epoch in log]


def _evaluate(problem: Problem) -> tuple[Evaluation, Evaluation]:
    """The FP32 model on the validation and on the test split."""
    task, model = problem.task, problem.initial_model
    with seeded(problem.config.seed):
        validation, test = problem.call(
            "evaluating the FP32 model",
            lambda: [
                evaluate(model, split, task.loss, task.metric)
                for split in (task.validation, task.test)
            ],
        )
    return validation, test


def content_key(problem: Problem, epochs: int) -> str:
    """A hash of all that the trained weights depend on.

    What the task is (`task_key`), the model's starting weights, and how it is trained.
    """
    config = problem.config
    return content_hash(
        [
            task_key(problem, choices=False),
            sorted(problem.initial_model.state_dict().items()),
            [epochs, problem.task.fp32_lr, config.seed, problem.device.type, torch.__version__],
        ]
    )


def task_key(problem: Problem, *, choices: bool = True) -> str:
    """A hash of the task: its data (`data_key` and first batches), loss and model, as source code
    where there is any, and, if asked for, the choices of bits and what they cost."""
    task, model = problem.task, problem.initial_model
    kinds = sorted({type(m) for m in model.modules()}, key=lambda kind: kind.__qualname__)
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.")]
    with seeded(problem.config.seed):
        validation = take_samples(task.validation, 256)
    terms = option_terms(problem.space, problem.costs)
    return content_hash(
        [
            task.data_key,
            repr(model),
            [_source(thing) for thing in (task.loss, *own)],
            problem.calibration,
            validation,
            repr((problem.space, problem.config.scheme, terms, problem.costs.fixed))
            if choices
            else "",
        ]
    )


RESUMABLE = (
    "task",
    "model",
    "weights",
    "fp32_epochs",
    "latency",
    "gradient_checkpoints",
    "trials",
    "time_budget",
    "device",
    *EXECUTION,
    "study",
    "storage",
    "out",
)
"""Options that may differ when a study is resumed: what they stand for is kept or checked in other
ways, or does not change the results."""


def fixed_options(problem: Problem) -> dict[str, Any]:
    """The options that a study's results follow from, as JSON has them."""
    chosen = {k: v for k, v in asdict(problem.config).items() if k not in RESUMABLE}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # built in, or defined at a prompt
        return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def load_user_weights(model: nn.Module, path: Path) -> None:
    """Load a user's state dict (safetensors, or torch.save read with weights_only=True)."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with the file, it is the user's)
        text = " ".join(str(error).split())
        raise InputError(
            f"weights {path}: not a state dict of {type(model).__name__} ({text[:300]})"
        ) from None


def _load(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path} is missing or damaged ({text[:200]})") from None


def _readable(weights: Path, facts: Path) -> bool:
    """Whether the cache holds this model, whole; a damaged one is made again."""
    try:
        load_file(weights)
        facts_read = read_json(facts)
    except (OSError, SafetensorError, InputError):
        return False
    return isinstance(facts_read, dict) and "train_losses" in facts_read


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _paths(folder: Path, stem: str) -> tuple[Path, Path]:
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"
