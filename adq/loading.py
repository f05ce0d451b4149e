"""Read a model that a study wrote."""

from pathlib import Path

from torch import nn

from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_, read_metadata
from adq.search.config import IN_PYTHON
from adq.search.task import load_task, task_call


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The quantized model of a packed file, or the best one of a study's folder, in eval mode.

    Without `model` (an FP32 model of the right architecture, changed in place) the architecture is
    built by the task that the file names.

    Raises InputError when the file is missing, damaged, or written for another architecture.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    metadata = read_metadata(path)
    if model is None:
        spec = metadata.get("task")
        if not isinstance(spec, str) or spec == IN_PYTHON:
            raise InputError(f"{path} names no task to build its model from: pass model=...")
        task = load_task(spec, metadata.get("model"))
        model = task_call(spec, "building the model", task.model)
    return load_packed_(model, path)
