"""What a user brings: a model, a loss, data and a metric; and how a name becomes a task."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from adq.quant.batches import Batches
from adq.quant.errors import InputError
from adq.quant.evaluate import Metric, accuracy
from adq.quant.qat import Loss
from adq.search.tasks.place import IMAGE_TASKS


@dataclass(frozen=True)
class Task:
    """A trained (or trainable) model with its data.

    model        () -> a new FP32 model, the same architecture and start each time under one seed
    loss         (outputs, targets) -> mean loss of a batch, a scalar
    train        training batches (inputs, targets); iterated once an epoch, so a DataLoader that
                 shuffles will do: torch, numpy and random are seeded before each epoch
    validation   batches that every choice is made on
    test         batches that are reported and never used to choose
    metric       (outputs, targets) -> one value per sample, shape (batch,); higher is better
    metric_name  what reports call it
    fp32_epochs  epochs of FP32 training before the search; 0 where `model` gives trained weights
    fp32_lr      peak learning rate of that training
    data_key     text that changes when the data does, for data too large to be hashed; the first
                 batches are hashed in any case
    """

    model: Callable[[], nn.Module]
    loss: Loss
    train: Batches
    validation: Batches
    test: Batches
    metric: Metric = accuracy
    metric_name: str = "accuracy"
    fp32_epochs: int = 0
    fp32_lr: float = 2e-3
    data_key: str = ""


BUILT_IN = ("digits", "imagefolder:PATH", "webdataset:PATH", "cifar10:PATH")


def load_task(spec: str, model: str | None = None) -> Task:
    """The task that a text names.

    `digits`, `imagefolder:PATH`, `webdataset:PATH`, `cifar10:PATH` (see `tasks.images`, also for
    the options behind a path), or `module:function`, where the function takes no argument (or the
    model's name, if one is given) and returns a Task. Modules are looked up among the installed
    packages first, then in the current folder.

    Raises InputError for an unknown task, and for one whose own code fails.
    """
    name, _, rest = spec.partition(":")
    if name == "digits" and not rest:
        from adq.search.tasks.digits import digits

        if model is not None:
            raise InputError(f"task digits brings its own model: leave out --model {model}")
        return digits()
    if name in IMAGE_TASKS:
        from adq.search.tasks import images

        if not rest:
            raise InputError(f"task {name} needs a folder: --task {name}:PATH")
        make = {
            "imagefolder": images.image_folder,
            "webdataset": images.web_dataset,
            "cifar10": images.cifar10,
        }[name]
        return make(rest, model)
    if not name or not rest:
        raise InputError(
            f"unknown task {spec!r}; known are {', '.join(BUILT_IN)}, or mymodule:make_task for "
            "your own"
        )
    return _user_task(spec, model)


def import_from_here(what: str, spec: str) -> Any:
    """The attribute `module:name` of an installed module, or else of one in the current folder.

    `what` says whose it is in an InputError.
    """
    module_name, _, name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # behind the installed packages
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # one that the module wants
            raise InputError(f"{what} {spec!r} failed: {one_line(error)}") from error
        raise InputError(
            f"{what} {spec!r}: no module {module_name!r} among the installed packages or in {here}"
        ) from None
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} {spec!r} failed: {one_line(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        place = getattr(module, "__file__", None) or "built in"
        raise InputError(
            f"{what} {spec!r}: module {module_name!r} ({place}) has no {name!r}; "
            "a module of that name in the current folder stands behind installed ones"
        )
    return found


def _user_task(spec: str, model: str | None) -> Task:
    function = import_from_here("task", spec)
    try:
        task = function() if model is None else function(model)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"task {spec!r} failed: {one_line(error)}") from error
    if not isinstance(task, Task):
        name = spec.partition(":")[2]
        raise InputError(
            f"task {spec!r}: expected an adq.Task from {name}(), got {type(task).__name__}"
        )
    return task


def one_line(error: BaseException) -> str:
    """Kind, message and place of an error in a user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place


def task_call(task_spec: str, what: str, function: Callable[[], Any]) -> Any:
    """`function()`, with an error of the user's code turned into one line that says where."""
    try:
        return function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"task {task_spec!r}, {what}: {one_line(error)}") from error
