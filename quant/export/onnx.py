"""A packed model as an ONNX file, its weights still packed.

    weight   codes  ->  Cast  ->  Gather (codebook)  ->  Mul (scales)  ->  Reshape
    input    Min  ->  QuantizeLinear  ->  DequantizeLinear                     uniform thresholds
             table of cells (see `cells`)  ->  Quantize-, DequantizeLinear     learned ones

Codes of 3 and 4 bits are UINT4 tensors, those of 5 to 8 bits UINT8. Codes of 2 bits are UINT2 from
opset 25 on; before, four of them are a byte, taken apart by BitShift and BitwiseAnd. A runtime that
folds constants, as onnxruntime does, makes FP32 weights of them when it loads the file.

The grid of an input's levels is uniform, scale·(q − zero_point) with q in UINT8, so that a runtime
sees the pair that it knows. Thresholds in the middle between its levels are QuantizeLinear's, but
for values within rounding of a threshold: that divides, and rounds halves to even. Learned
thresholds are compared as they are; what the pair then gets is on the grid, and stays. NaN is of no
use: its level is the runtime's matter.

Min stands there at 8 bits too, where it does nothing, and is no Clip: of a convolution between
DequantizeLinear and, but for Relu and Clip, QuantizeLinear, onnxruntime rounds a float weight that
it has folded to INT8 with one scale (its WeightBiasQuantization), and the codebook is lost.

BatchNorms are folded where `adq.quant.fold` can. torch.onnx.export translates the rest. It meets
weights and input quantizers as operators of a domain of our own, which no optimisation looks into;
each is replaced by what is drawn above afterwards. So nothing depends on how a layer is translated
or what becomes of its parameters: shared layers, attention and transposed convolutions need no
rules.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from adq.quant.apply import INPUT_QUANTIZER
from adq.quant.errors import InputError
from adq.quant.export.cells import cells_of
from adq.quant.export.loading import read_packed
from adq.quant.export.program import (
    batch_shapes,
    exportable,
    first_line,
    packed_weights,
    replace_weight_,
    trace,
    width_of,
)
from adq.quant.files import atomic_path
from adq.quant.fold import batchnorm_pairs, fold_batchnorm_, fold_factors
from adq.quant.packed import PackedInput, PackedWeight
from adq.quant.packing import pack

if TYPE_CHECKING:
    import onnx_ir as ir

FIRST_OPSET = 21  # UINT4
UINT2_OPSET = 25
DOMAIN = "adq.export"
MOST_BYTES = 2**31 - 2**20  # a protobuf message ends below 2 GiB; names and nodes take the rest


def save_onnx(
    model: nn.Module,
    path: Path,
    inputs: Any,
    *,
    packed: Path,
    opset: int = FIRST_OPSET,
    dynamic_batch: bool = True,
) -> None:
    """Write a model that `load_packed_` filled from the file `packed`; the model stays as it is.

    `inputs` is one batch's, a tensor or a tuple. With `dynamic_batch` the graph takes any number of
    samples. The metadata entry `adq` is the packed file's.

    Raises InputError when the packages of the extra `onnx` are missing, and for a model that
    torch.export or ONNX cannot express, has other weights than the file, or exceeds 2 GiB packed.
    """
    onnx_ir, onnx = _package("onnx_ir"), _package("onnx")
    _package("onnxscript")
    if type(opset) is not int or opset < FIRST_OPSET:
        raise InputError(f"opset: expected {FIRST_OPSET} or later, got {opset!r}")
    model = exportable(model)
    sources: dict[str, Callable[[_Builder, ir.Value], ir.Value]] = {}
    file = read_packed(packed)
    for name, weight in _folded(model, packed_weights(model, packed, file)).items():
        mark, layer = f"{name}.weight", model.get_submodule(name)
        sources[mark] = partial(_weight, mark, weight)
        replace_weight_(layer, _Mark(mark, layer.get_parameter("weight").shape))
    for name, quantizer in file.inputs.items():
        mark = f"{name}.input"
        sources[mark] = partial(_input, mark, *_grid(mark, quantizer))
        model.get_submodule(name).register_module(INPUT_QUANTIZER, _Mark(mark))

    graph = _translated(model, inputs, opset, dynamic_batch)
    _replace_marks(graph, opset, sources)
    _tidy(graph)
    opsets = [onnx.helper.make_opsetid("", opset)]
    graph.ir_version = max(graph.ir_version, onnx.helper.find_min_ir_version_for(opsets))
    graph.metadata_props["adq"] = json.dumps(file.metadata)
    size_bytes = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    if size_bytes > MOST_BYTES:
        raise InputError(f"{path}: {size_bytes} bytes of tensors, an ONNX file has 2 GiB at most")
    proto = onnx_ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def run_onnx(path: Path, inputs: Any) -> list[np.ndarray]:
    """The outputs of an ONNX file for a batch's inputs, by onnxruntime on the CPU."""
    runtime = _package("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = torch.utils._pytree.tree_leaves(inputs)
    names = [value.name for value in session.get_inputs()]
    feed = {name: t.detach().cpu().numpy() for name, t in zip(names, tensors, strict=True)}
    return session.run(None, feed)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f'ONNX needs the package {name} ({error}): pip install "adq-search[onnx]"'
        ) from None


def _folded(model: nn.Module, weights: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
    """Fold the BatchNorms of `model`; their factors go to the scales."""
    factors = {
        layer: fold_factors(model.get_submodule(norm))[0]  # type: ignore[arg-type]
        for norm, layer in batchnorm_pairs(model).items()
    }
    fold_batchnorm_(model)
    found = dict(weights)
    for name in weights.keys() & factors.keys():
        weight, factor = weights[name], factors[name]
        scale = weight.scale * factor.repeat_interleave(weight.scale.numel() // factor.numel())
        found[name] = replace(weight, scale=scale)
    return found


class _Mark(nn.Module):
    """An operator of our own, whose output has the given shape or its input's."""

    def __init__(self, name: str, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.name, self.shape = name, shape

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape if self.shape is None else self.shape
        about: dict[str, Any] = {"name": self.name}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Mark", (x,), about, dtype=torch.float32, shape=shape, version=1
        )


def _translated(model: nn.Module, inputs: Any, opset: int, dynamic_batch: bool) -> "ir.Model":
    program = trace(model, inputs, dynamic_batch)
    count = len(program.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                opset_version=opset,
                dynamo=True,
                verbose=False,
                dynamic_shapes=batch_shapes(inputs) if dynamic_batch else None,
                output_names=names,
            )
    except Exception as error:  # noqa: BLE001 (of the exporter's own classes, and of any operator)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(
            f"torch.onnx cannot translate {type(model).__name__}: {first_line(cause)}"
        ) from None
    assert exported is not None
    graph: ir.Model = exported.model
    if (reached := graph.opset_imports[""]) != opset:
        raise InputError(f"opset: this torch.onnx reaches {reached}, not {opset}")
    return graph


@dataclass
class _Builder:
    """The nodes that take a mark's place, and the initializers of the graph."""

    graph: "ir.Graph"
    opset: int
    tape: "ir.tape.Tape"

    def node(self, kind: str, *inputs: "ir.Value", **attributes: Any) -> "ir.Value":
        return self.tape.op(kind, inputs, attributes)

    def constant(self, name: str, array: "np.ndarray | Tensor", dtype: str = "") -> "ir.Value":
        """The initializer of this name, made the first time; `dtype` is one of ONNX's."""
        onnx_ir = _package("onnx_ir")
        if name not in self.graph.initializers:
            array = np.asarray(array)
            kind = onnx_ir.DataType[dtype] if dtype else onnx_ir.DataType.from_numpy(array.dtype)
            tensor = onnx_ir.Tensor(array.astype(kind.numpy()), name=name)
            shape, of = onnx_ir.Shape(array.shape), onnx_ir.TensorType(kind)
            value = onnx_ir.Value(name=name, shape=shape, type=of, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def shape(self, sizes: Sequence[int]) -> "ir.Value":
        name = "shape." + "x".join(map(str, sizes))
        return self.constant(name, np.array(sizes, dtype=np.int64))


def _replace_marks(
    model: "ir.Model",
    opset: int,
    sources: "dict[str, Callable[[_Builder, ir.Value], ir.Value]]",
) -> None:
    onnx_ir = _package("onnx_ir")
    weights: dict[tuple[int, str], ir.Value] = {}  # a shared layer is called several times
    for node in list(onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain != DOMAIN:
            continue
        name = node.attributes["name"].as_string()
        [x], [old] = node.inputs, node.outputs
        new = weights.get((id(node.graph), name))
        if new is None:
            build = _Builder(model.graph, opset, onnx_ir.tape.Tape())
            new = sources[name](build, x)
            new.shape, new.type = old.shape, old.type
            node.graph.insert_before(node, build.tape.nodes)
            if name.endswith(".weight"):
                new.name = name
                weights[id(node.graph), name] = new
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def _weight(name: str, weight: PackedWeight, build: _Builder, _: "ir.Value") -> "ir.Value":
    rows, codes, width = weight.rows, weight.matrix(), width_of(weight.bits)
    assert rows is not None
    if width == 2 and build.opset < UINT2_OPSET:
        four = build.constant(f"{name}.codes", pack(codes, 2)[:, None])
        shifts = np.arange(0, 8, 2, dtype=np.uint8)
        index = build.node("BitShift", four, build.constant("shifts", shifts), direction="RIGHT")
        index = build.node("BitwiseAnd", index, build.constant("mask", np.array([3], np.uint8)))
        index = build.node("Reshape", index, build.shape([-1]))
        if codes.numel() % 4:
            ends = build.shape([0]), build.shape([codes.numel()])
            index = build.node("Slice", index, *ends)
        index = build.node("Reshape", index, build.shape(codes.shape))
    else:
        index = build.constant(f"{name}.codes", codes, f"UINT{width}")
    index = build.node("Cast", index, to=_package("onnx_ir").DataType.INT32)
    levels = build.node("Gather", build.constant(f"{name}.codebook", weight.codebook), index)
    value = build.node("Mul", build.constant(f"{name}.scale", weight.scale[:, None]), levels)
    if rows.groups is not None:
        inputs, outputs, *kernel = rows.shape
        parts = (rows.groups, outputs, inputs // rows.groups, *kernel)
        value = build.node("Reshape", value, build.shape(parts))
        value = build.node("Transpose", value, perm=[0, 2, 1, *range(3, len(parts))])
    return build.node("Reshape", value, build.shape(rows.shape))


def _grid(name: str, quantizer: PackedInput) -> tuple[Tensor, np.float32, int]:
    """Thresholds, scale and zero point of an input quantizer.

    Raises InputError where QuantizeLinear has no such grid: for a zero point that is no UINT8.
    Those of all our quantizers are whole and from 0 to 2^bits − 1.
    """
    scale, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    if not (zero_point.is_integer() and 0 <= zero_point <= 255):
        raise InputError(f"{name}: expected a whole zero point from 0 to 255, got {zero_point:g}")
    if not 0 < scale < float("inf"):
        raise InputError(f"{name}: expected a positive scale, got {scale:g}")
    return quantizer.thresholds.detach(), np.float32(scale), int(zero_point)


def _midway(thresholds: Tensor, scale: np.float32, zero_point: int) -> bool:
    """Whether T_i = scale·(i − 1/2 − zero_point), but for rounding at the largest of them."""
    n = thresholds.numel()
    expected = torch.arange(1, n + 1).double() - 0.5 - zero_point
    away = (thresholds.double() / float(scale) - expected).abs()
    return away.max().item() <= 2.0**-22 * max(n, zero_point)


def _input(
    name: str,
    thresholds: Tensor,
    scale: np.float32,
    zero_point: int,
    build: _Builder,
    x: "ir.Value",
) -> "ir.Value":
    step = build.constant(f"{name}.scale", np.array(scale))
    codes = thresholds.numel()  # the largest one
    if _midway(thresholds, scale, zero_point):
        high = build.constant(f"{name}.high", scale * np.array(codes - zero_point, np.float32))
        x = build.node("Min", x, high)
    else:
        x = build.node("Mul", _code(name, thresholds, zero_point, build, x), step)
    zero = build.constant(f"{name}.zero_point", np.array(zero_point, np.uint8))
    return build.node("DequantizeLinear", build.node("QuantizeLinear", x, step, zero), step, zero)


def _code(
    name: str, thresholds: Tensor, zero_point: int, build: _Builder, x: "ir.Value"
) -> "ir.Value":
    """#{thresholds <= x} − zero_point, in FLOAT."""
    types = _package("onnx_ir").DataType
    cells = cells_of(thresholds)
    code = build.constant(f"{name}.top", cells.top - zero_point)
    edges = [build.constant(f"{name}.edges.{d}", row) for d, row in enumerate(cells.edges)]
    if cells.count > 1:
        low = build.constant(f"{name}.first", np.array(cells.low, np.float32))
        inverse = build.constant(f"{name}.inverse", np.array(cells.inverse, np.float32))
        last = build.constant(f"{name}.last", np.array(cells.count - 1, np.float32))
        zero = build.constant("zero", np.array(0, np.float32))
        place = build.node("Mul", build.node("Sub", x, low), inverse)
        place = build.node("Where", build.node("Less", place, last), place, last)  # NaN is high
        cell = build.node("Cast", build.node("Max", place, zero), to=types.INT32)
        code = build.node("Gather", code, cell)
        edges = [build.node("Gather", row, cell) for row in edges]
    for edge in edges:
        below = build.node("Cast", build.node("Less", x, edge), to=types.FLOAT)
        code = build.node("Sub", code, below)
    return code


def _tidy(model: "ir.Model") -> None:
    """Leave out what only the exporter needed: unused parameters, and where each node is from."""
    common = _package("onnx_ir.passes.common")
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    graph = model.graph
    nodes = _package("onnx_ir").traversal.RecursiveGraphIterator(graph)
    outputs = [value for node in nodes for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "adq-search"
