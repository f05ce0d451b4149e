"""Read a model that a study wrote."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from adq.quant.errors import InputError
from adq.quant.export.loading import load_packed_, read_metadata

if TYPE_CHECKING:
    import torch

    from adq.quant.serving import Kernels


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    device: "torch.device | str | None" = None,
    kernels: "Kernels" = "auto",
) -> nn.Module:
    """The quantized model of a packed file, or the best one of a study's folder, in eval mode.

    Without `model` (an FP32 model of the right architecture, changed in place) the architecture is
    built by the task that the file names. It runs on `device` (the model's own if not given) by the
    fastest kernels there, or by plain PyTorch layers with `kernels="torch"`: see `load_packed_`,
    also for how exact that is.

    Raises InputError when the file is missing, damaged, or written for another architecture.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    if model is None:
        # a service that brings its model needs nothing of the search
        from adq.search.config import IN_PYTHON
        from adq.search.task import load_task, task_call

        metadata = read_metadata(path)
        spec = metadata.get("task")
        if not isinstance(spec, str) or spec == IN_PYTHON:
            raise InputError(f"{path} names no task to build its model from: pass model=...")
        task = load_task(spec, metadata.get("model"))
        model = task_call(spec, "building the model", task.model)
    return load_packed_(model, path, device=device, kernels=kernels)
