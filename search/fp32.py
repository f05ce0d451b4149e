"""The FP32 model: loaded or trained once, kept by a content key, measured."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adq.quant.batches import seeded, take_samples
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation, evaluate
from adq.quant.files import atomic_path, read_json, write_json, write_tensors
from adq.quant.qat import TrainingConfig, train_
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem


@dataclass(frozen=True)
class Fp32:
    """The FP32 model in eval mode, and how it does on both splits."""

    model: nn.Module
    validation: Evaluation
    test: Evaluation
    train_losses: tuple[float, ...]


def fp32_model(problem: Problem, folder: StudyFolder, observer: Observer) -> Fp32:
    """The study's FP32 model: from its folder, else from the cache, else trained now.

    Raises InputError when given weights do not fit, or when training diverges.
    """
    model, (weights, facts) = problem.initial_model, _paths(folder.path, "fp32")
    if not facts.exists():
        epochs = _epochs(problem)
        if problem.config.weights is not None:
            load_user_weights(model, Path(problem.config.weights))
        key = _content_key(problem, epochs)
        cached_weights, cached_facts = _paths(folder.cache, f"fp32-{key}")
        if _readable(cached_weights, cached_facts):
            observer.stage("FP32 model", 1)
            observer.step("from the cache")
        else:
            folder.cache.mkdir(exist_ok=True)
            _train_and_save(problem, epochs, cached_weights, cached_facts, observer)
        _copy(cached_weights, weights)
        _copy(cached_facts, facts)
    _load(model, weights)
    data = read_json(facts)
    try:
        return Fp32(
            model.eval(),
            Evaluation(**data["validation"]),
            Evaluation(**data["test"]),
            tuple(data["train_losses"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{facts} is damaged: {error}") from None


def _epochs(problem: Problem) -> int:
    """Asked for, else none where trained weights were given, else the task's own."""
    config = problem.config
    if config.fp32_epochs is not None:
        return config.fp32_epochs
    return 0 if config.weights is not None else problem.task.fp32_epochs


def _train_and_save(
    problem: Problem, epochs: int, weights: Path, facts: Path, observer: Observer
) -> None:
    task, model = problem.task, problem.initial_model
    observer.stage("FP32 model", epochs + 1)
    with seeded(problem.config.seed):
        losses = problem.call(
            "FP32 training",
            lambda: train_(
                model,
                task.train,
                task.loss,
                TrainingConfig(epochs, task.fp32_lr),
                problem.config.seed,
                lambda _, loss: observer.step(f"loss {loss:.4f}"),
            ),
        )
        validation, test = problem.call(
            "evaluating the FP32 model",
            lambda: [
                evaluate(model, split, task.loss, task.metric)
                for split in (task.validation, task.test)
            ],
        )
    observer.step(f"validation {task.metric_name} {validation.metric:.4f}")
    write_tensors(weights, model.state_dict(), {})
    write_json(
        facts,
        {"train_losses": losses, "validation": asdict(validation), "test": asdict(test)},
    )


def _content_key(problem: Problem, epochs: int) -> str:
    """A hash of all that the trained weights depend on.

    The data's `data_key`, its first batches (in the order of the seed), the model's structure and
    starting weights, and how it is trained.
    """
    config, task = problem.config, problem.task
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous()
            add(f"{array.dtype} {tuple(array.shape)}")
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)
        else:
            digest.update(f"{value!r}\n".encode())

    add([task.data_key, epochs, task.fp32_lr, config.seed, repr(problem.initial_model)])
    add([torch.__version__, problem.device.type, getattr(task.loss, "__qualname__", "")])
    add(sorted(problem.initial_model.state_dict().items()))
    add(problem.calibration)
    with seeded(config.seed):
        add([take_samples(split, 1024) for split in (task.validation, task.test)])
    return digest.hexdigest()[:16]


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
        read_json(facts)
    except (OSError, SafetensorError, InputError):
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _paths(folder: Path, stem: str) -> tuple[Path, Path]:
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"
