"""The command `export`: a study's model, or a packed file, in the format that a service runs or
another library reads."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adq.options import Json, studies_folder
from adq.quant.errors import InputError
from adq.search.config import IN_PYTHON

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adq.quant.serving import Kernels
    from adq.search.front import Front, Point
    from adq.search.task import Task

FORMATS = {
    "adq": ".safetensors",
    "onnx": ".onnx",
    "torch": ".pt2",
    "bits": ".bits.json",
    "modelopt": ".modelopt.json",
    "aimet": ".aimet.json",
    "compressed-tensors": ".compressed-tensors.json",
    "torchao": ".torchao.json",
    "nncf": ".nncf.json",
}
"""Format -> how its files end."""

RUNNABLE = ("adq", "onnx", "torch")
"""Formats that hold weights, so that their outputs can be compared."""


@dataclass(frozen=True)
class Compared:
    """A written file beside the packed model, on one batch of validation data.

    The packed model runs in plain PyTorch layers, a file of format adq by the fastest kernels.
    `max_difference` is the largest of the outputs, `largest_output` the packed model's largest
    absolute one; both over all tensors where a model gives several. `same_predictions` is the share
    of samples with the same largest output, None where there is one output only, or several
    tensors. The metrics are means over the batch.
    """

    samples: int
    max_difference: float
    largest_output: float
    same_predictions: float | None
    metric_name: str
    metric: float
    packed_metric: float


@dataclass(frozen=True)
class Exported:
    """What was written. `budget_bytes` is the size that the search counted; `fp32_bytes` that of
    the parameters and buffers of the FP32 model."""

    file: str
    format: str
    point: str | None
    size_bytes: int
    budget_bytes: int | None
    fp32_bytes: int | None
    compared: Compared | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """A model to export: where its packed file is (None: not packed), and what is known of it."""

    name: str
    packed: Path | None
    missing: str
    task: str | None
    model: str | None
    point: "Point | None"
    seed: int = 0


def export(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="the study's name, the path of its folder, or a packed file"),
    ],
    point: Annotated[
        str, typer.Option("--point", help="best, knee, or a model of the front: t0003, uniform-3")
    ] = "best",
    format: Annotated[
        str, typer.Option("--format", help=", ".join(FORMATS).replace(", nncf", ""))
    ] = "adq",
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="the file to write, NAME-POINT in this folder if not given; a folder that holds "
            "NAME is where the study is looked for, as with the other commands",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for deployment, or its bits for another library; print sizes and errors.

    adq is the packed file itself, onnx and torch (torch.export) run without ADQ, bits is what
    adq.quantize reads, and the others are what their libraries read.
    """
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    root = studies_folder(context)
    if out is not None and Path(name).name == name and (Path(out) / name).is_dir():
        root, out = out, None
    if Path(name).is_file():
        source, stem = _packed_file(Path(name), point), Path(name).stem
    else:
        source = _study_point(root, name, point)
        stem = f"{source.name}-{point}"
    path = Path(out if out is not None else stem + FORMATS[format])
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file; name another one")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it")
    if source.packed is not None and path.resolve() == source.packed.resolve():
        raise InputError(f"{path} is the file that is exported: name another one with --out")
    with redirect_stdout(sys.stderr):  # what a user's code prints is no result of ours
        done = _export(source, format, path)
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    else:
        _print(done)


def _packed_file(path: Path, point: str) -> _Source:
    from adq.quant.export.loading import read_metadata

    if point != "best":
        raise InputError(f"point: {path} holds one model only; leave out --point {point}")
    about = read_metadata(path)
    task, model = about.get("task"), about.get("model")
    return _Source(
        path.stem,
        path,
        "",
        task if isinstance(task, str) else None,
        model if isinstance(model, str) else None,
        None,
    )


def _study_point(root: str, name: str, wanted: str) -> _Source:
    from adq.search.folder import open_study
    from adq.search.run import load_front

    folder = open_study(root, name)
    front, config = load_front(folder), folder.config
    point = _find(front, wanted)
    if point.weights is None:
        missing = (
            f"point {point.id} of study {folder.name!r} is not packed yet ({folder.status()}): "
            f"finish it with 'adq-search resume {folder.name}'"
        )
        packed = None
    else:
        packed = folder.path / point.weights
        missing = f"{packed} is missing: 'adq-search resume {folder.name}' makes it again"
        packed = packed if packed.is_file() else None
    return _Source(folder.name, packed, missing, config.task, config.model, point, config.seed)


def _find(front: "Front", wanted: str) -> "Point":
    if wanted == "best":
        return front.best
    if wanted == "knee":
        if front.knee is None:
            raise InputError(
                f"point knee: the front of study {front.study!r} does not bend anywhere; take best "
                "or a model by its name"
            )
        return front.knee
    points = {point.id: point for point in (*front.points, *front.uniform)}
    if wanted not in points:
        raise InputError(
            f"point: expected best, knee or one of {', '.join(points)}, got {wanted!r}"
        )
    return points[wanted]


def _export(source: _Source, format: str, path: Path) -> Exported:
    from adq.quant.export.loading import read_metadata
    from adq.quant.files import write_json
    from adq.quant.spec import BitVector

    point = source.point
    notes: list[str] = []
    compared = fp32_bytes = None
    if format == "bits":  # an unpacked point has them as well
        if point is not None:
            bits = BitVector(point.weight_bits, point.act_bits)
        else:
            assert source.packed is not None
            bits = BitVector.from_json(read_metadata(source.packed)["bits"], str(source.packed))
        write_json(path, bits.to_json())
    else:
        if source.packed is None:
            raise InputError(source.missing)
        packed = source.packed
        read_metadata(packed)  # damage is said before anything else
        task, why = _task(source)
        if task is None and format != "adq":
            raise InputError(f"format {format} needs the task: {why}")
        if task is None:
            notes.append(f"not compared with the packed model: {why}")
        else:
            fp32_bytes = _bytes(_build(task, source))
        if format == "adq":
            _copy(packed, path)
        else:
            assert task is not None
            notes += _write(source, task, format, packed, path)
        if task is not None and format in RUNNABLE:
            try:
                compared = _compare(task, source, packed, _runner(task, source, format, path))
            except InputError as error:
                notes.append(f"not compared with the packed model: {error}")
    return Exported(
        str(path),
        format,
        None if point is None else point.id,
        path.stat().st_size,
        None if point is None else point.size_bytes,
        fp32_bytes,
        compared,
        notes,
    )


def _task(source: _Source) -> "tuple[Task | None, str]":
    """The task, or None and why there is none."""
    from adq.search.task import load_task

    if source.task is None or source.task == IN_PYTHON:
        return None, (
            f"{source.name} names none, it was given in Python; use adq.load(FILE, model) and "
            "adq.quant.export there"
        )
    try:
        return load_task(source.task, source.model), ""
    except InputError as error:
        return None, str(error)


def _build(task: "Task", source: _Source) -> "nn.Module":
    from adq.quant.batches import seeded
    from adq.search.task import task_call

    with seeded(source.seed):
        model: nn.Module = task_call(str(source.task), "building the model", task.model)
    return model


def _loaded(
    task: "Task", source: _Source, packed: Path, kernels: "Kernels" = "torch"
) -> "nn.Module":
    from adq.quant.export.loading import load_packed_

    return load_packed_(_build(task, source), packed, kernels=kernels)


def _batch(task: "Task", source: _Source) -> Any:
    from adq.quant.batches import seeded
    from adq.search.task import task_call

    def first() -> Any:
        return next(iter(task.validation), None)

    with seeded(source.seed):
        batch = task_call(str(source.task), "the first validation batch", first)
    if batch is None:
        raise InputError(f"task {source.task!r}: the validation batches are empty")
    return batch


def _bytes(model: "nn.Module") -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def _copy(packed: Path, path: Path) -> None:
    """A copy that was read back and found whole."""
    from adq.quant.export.loading import read_metadata
    from adq.quant.files import atomic_path

    with atomic_path(path) as temporary:
        shutil.copyfile(packed, temporary)
        read_metadata(temporary)


def _write(source: _Source, task: "Task", format: str, packed: Path, path: Path) -> list[str]:
    """Write a file of this format; returns notes for its reader."""
    if format == "onnx":
        from adq.quant.export.onnx import save_onnx

        model, inputs = _loaded(task, source, packed), _batch(task, source)[0]
        save_onnx(model, path, inputs, packed=packed)
        return []
    if format == "torch":
        from adq.quant.export.program import save_program

        model, inputs = _loaded(task, source, packed), _batch(task, source)[0]
        save_program(model, path, inputs)
        return ["its weights are unpacked to FP32, which runs fastest in a compiled program"]
    from adq.quant.export.policies import save_policy

    return save_policy(format, packed, _build(task, source), path)


def _runner(task: "Task", source: _Source, format: str, path: Path) -> "Callable[[Any], Any]":
    """inputs -> outputs of the written file, run as its user does; those of an ONNX file in a list,
    in the order in which the model's own are nested."""
    import torch

    from adq.quant.batches import forward

    if format == "onnx":
        from adq.quant.export.onnx import run_onnx

        return lambda inputs: [torch.from_numpy(array) for array in run_onnx(path, inputs)]
    if format == "torch":
        program = torch.export.load(path).module()
        return lambda inputs: forward(program, inputs)
    model = _loaded(task, source, path, "auto")
    return lambda inputs: forward(model, inputs)


def _compare(task: "Task", source: _Source, packed: Path, run: "Callable[[Any], Any]") -> Compared:
    import torch
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

    from adq.quant.batches import batch_size, device_of, forward, to_device
    from adq.search.task import one_line, task_call

    model = _loaded(task, source, packed)
    inputs, targets = batch = to_device(_batch(task, source), device_of(model))
    with torch.no_grad():
        expected = forward(model, inputs)
        try:
            outputs = tree_leaves(run(inputs))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"it does not run here: {one_line(error)}") from error
    leaves, nested = tree_flatten(expected)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        raise InputError(f"its outputs are not tensors alone, but {kinds}")
    if [leaf.shape for leaf in leaves] != [output.shape for output in outputs]:
        shapes = [
            " and ".join(str(tuple(one.shape)) for one in given) for given in (leaves, outputs)
        ]
        raise InputError(f"expected outputs of the shapes {shapes[0]}, got {shapes[1]}")

    def metric(of: Any) -> float:
        values = task_call(str(source.task), "the metric", lambda: task.metric(of, targets))
        return float(values.double().mean())

    same = None
    if len(leaves) == 1 and leaves[0].dim() > 1 and leaves[0].shape[-1] > 1:
        same = (leaves[0].argmax(-1) == outputs[0].argmax(-1)).double().mean().item()
    return Compared(
        batch_size(batch),
        max(_largest(a.double() - b.double()) for a, b in zip(outputs, leaves, strict=True)),
        max(map(_largest, leaves)),
        same,
        task.metric_name,
        metric(tree_unflatten(outputs, nested)),
        metric(expected),
    )


def _largest(values: "Tensor") -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _print(done: Exported) -> None:
    sizes = [f"{done.size_bytes} bytes"]
    if done.format in RUNNABLE:
        if done.budget_bytes is not None:
            sizes.append(f"{done.size_bytes - done.budget_bytes:+d} against the budget's count")
        if done.fp32_bytes is not None:
            sizes.append(f"{done.size_bytes / done.fp32_bytes:.1%} of FP32's {done.fp32_bytes}")
    which = "" if done.point is None else f" of {done.point}"
    print(f"{done.file}: {done.format}{which}, {', '.join(sizes)}")
    if (found := done.compared) is not None:
        same = found.same_predictions
        equal = "" if same is None else f", {same:.1%} equal predictions"
        print(
            f"beside the packed model, on {found.samples} validation samples: largest difference "
            f"of outputs {found.max_difference:.2g} (outputs up to {found.largest_output:.3g})"
            f"{equal}, {found.metric_name} {found.metric:.4f} against {found.packed_metric:.4f}"
        )
    for note in done.notes:
        print(note)
