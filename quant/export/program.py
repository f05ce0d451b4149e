"""A packed model as a torch.export program, which ExecuTorch and AOTInductor read.

    operators   of ATen alone, none of `adq::`; of core ATen after `run_decompositions()`
    inputs      quantized by gathers and comparisons (see `PackedInput`)
    weights     in FP32, as fast and as large as those of the FP32 model; or, with `packed`, codes
                of 2, 4 (for 3 bits as well) or 8 bits (for 5 to 7), looked up at every call, which
                is small and slow

Outputs equal those of the loaded model, bit by bit.

`torch.export.load` unpickles where a file tells it to: load only what you trust. The files written
here hold no pickle, and the example inputs are left out.
"""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from adq.quant.batches import first_tensor, resized, to_device
from adq.quant.errors import InputError
from adq.quant.export.loading import PackedFile, read_packed
from adq.quant.files import atomic_path
from adq.quant.packed import PackedWeight
from adq.quant.packing import pack

WIDTHS = (2, 4, 8)


def export_program(
    model: nn.Module, inputs: Any, *, packed: Path | None = None, dynamic_batch: bool = True
) -> ExportedProgram:
    """The program of a model that `load_packed_` filled; the model stays as it is.

    `inputs` is one batch's, a tensor or a tuple. With `dynamic_batch` the program takes any number
    of samples. With `packed`, the file that the model was loaded from, weights stay packed.

    Raises InputError for a model that torch.export cannot follow, or that was not loaded with
    `kernels="torch"`.
    """
    model = exportable(model)
    if packed is not None:
        for name, weight in packed_weights(model, packed, read_packed(packed)).items():
            replace_weight_(model.get_submodule(name), PackedLookup(weight))
    return trace(model, inputs, dynamic_batch)


def save_program(
    model: nn.Module,
    path: Path,
    inputs: Any,
    *,
    packed: Path | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write `export_program` as a .pt2 file, for torch.export.load."""
    program = export_program(model, inputs, packed=packed, dynamic_batch=dynamic_batch)
    program.example_inputs = None  # data, and pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    buffer = io.BytesIO()  # in a file the archive bears the temporary name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


class PackedLookup(nn.Module):
    """A parametrization: the weight from its codes, whatever it is given.

    A byte holds 8/width codes, so that a table of 256 rows looks up all of them at once:
    table[v, j] = codebook[v >> width·j & 2^width − 1].
    """

    codes: Tensor
    table: Tensor
    scale: Tensor

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        assert weight.rows is not None
        self.rows = weight.rows
        width = width_of(weight.bits)
        shifts = torch.arange(0, 8, width)
        code = (torch.arange(256)[:, None] >> shifts) & (2**width - 1)
        # bytes that no code makes look something up as well
        table = weight.codebook[code.clamp(max=weight.codebook.numel() - 1)]
        self.register_buffer("codes", pack(weight.matrix(), width))
        self.register_buffer("table", table)
        self.register_buffer("scale", weight.scale)

    def forward(self, _: Tensor) -> Tensor:
        levels = self.table.index_select(0, self.codes.int()).flatten()
        count = self.rows.count * self.rows.size
        levels = levels[:count].reshape(self.rows.count, self.rows.size)
        return self.rows.join(self.scale[:, None] * levels)


def width_of(bits: int) -> int:
    """The bits of a code in formats that have 2, 4 and 8."""
    return next(width for width in WIDTHS if width >= bits)


def packed_weights(model: nn.Module, path: Path, file: PackedFile) -> dict[str, PackedWeight]:
    """Layer's name -> its weight in the file; raises InputError where the model has another."""
    found: dict[str, PackedWeight] = {}
    try:
        for name, weight in file.weights.items():
            layer = model.get_submodule(name)
            found[name] = weight.fitted(layer)
            if not torch.equal(found[name].values(), layer.get_parameter("weight")):
                raise ValueError(f"{name} has another weight")
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected the file that this {type(model).__name__} was loaded from, with "
            f"kernels='torch' ({error})"
        ) from None
    return found


def exportable(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without gradients; raises InputError if it is not FP32."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputError(
                f"{name} is {parameter.dtype}: an FP32 model is exported, so load the file into one"
            )
    return model


def replace_weight_(layer: nn.Module, source: nn.Module) -> None:
    """Let `source` make the layer's weight; its parameter goes."""
    parametrize.register_parametrization(layer, "weight", source, unsafe=True)
    parameters: Any = layer.parametrizations
    parameters.weight.original = nn.Parameter(torch.empty(0), requires_grad=False)


def trace(model: nn.Module, inputs: Any, dynamic_batch: bool) -> ExportedProgram:
    """The program of a model as it is; raises InputError where torch.export cannot follow it."""
    inputs = to_device(inputs, torch.device("cpu"))
    if dynamic_batch and first_tensor(inputs).shape[0] == 1:
        inputs = resized(inputs, 2)  # what is 1 in the example is 1 in the program
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    shapes = batch_shapes(inputs) if dynamic_batch else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:  # noqa: BLE001 (a user's forward may raise anything)
        advice = "; a fixed batch size may work (dynamic_batch=False)" if dynamic_batch else ""
        raise InputError(
            f"torch.export cannot follow {type(model).__name__}: {first_line(error)}{advice}"
        ) from None
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", None) == "adq":
            raise InputError(f"the model calls {node.target}: load it with kernels='torch'")
    return program


def batch_shapes(inputs: Any) -> tuple[Any, ...]:
    """The dynamic dimension of each argument, as torch.export wants to be told."""
    args = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(_batch_of(value) for value in args)


def _batch_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: Dim("batch")} if value.dim() else None
    if isinstance(value, dict):
        return {key: _batch_of(inner) for key, inner in value.items()}
    return type(value)(map(_batch_of, value)) if isinstance(value, tuple | list) else None


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
