"""Compiles every kernel ahead of time, without a GPU, and says what it takes of one.

    python -m adq.quant.kernels.aot

prints one line per kernel configuration and target: registers a thread, shared memory in bytes,
and what is spilled to memory for want of registers (bytes of local memory and stack on CUDA,
registers on AMD). It ends with exit status 1 if anything is spilled.

Configurations are those that the launchers ask Triton for with float32 parameters (or scales and
levels) at addresses that are multiples of 16: in `n2uq` every bit-width with every dtype of x, and
once more where the number of elements is no multiple of 16, for which Triton makes another kernel;
in `inputs` the same; in `weights` every dtype of w with and without statistics, and with every
backward rule; in `codebooks` one. Over packed weights there are some hundreds: of them every width
with fp16 and sizes that are multiples of 16, and each other dtype, kind of scale and of image once.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adq.quant.kernels import (
    codebooks,
    inputs,
    n2uq,
    packed_matrix,
    packed_vector,
    packed_words,
    weights,
)
from adq.quant.kernels.packed_reference import WIDTHS
from adq.quant.kernels.weights_reference import DEAD_COUNT, PART, RULES
from adq.quant.spec import MAX_BITS, MIN_BITS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """One compilation: a kernel with the types of its arguments and its constants."""

    module: str
    kernel: str
    target: str
    dtype: str
    constants: Mapping[str, float]
    types: Mapping[str, str]
    warps: int = 4
    even: bool = True
    """Whether the number of elements is known to be a multiple of 16."""
    multiples: tuple[str, ...] = ()
    """Other sizes that are."""
    fusion: bool = True
    """Whether a product and a sum may become one instruction."""

    def __str__(self) -> str:
        name = f"{self.module} {self.kernel.removesuffix('_kernel')}"
        notes = [self.dtype, *([] if self.even else ["odd"])]
        bits = self.constants.get("BITS", self.constants.get("STEPS"))
        if bits is not None:
            notes.insert(0, f"{bits} bits")
        if self.constants.get("GATHER"):
            notes.append("statistics")
        if "PIXELS" in self.constants:
            notes.append(f"{self.constants['PIXELS']} pixels")
        names = {"GROUPS": "group scales", "PARTED": "parts"}
        notes += [note for name, note in names.items() if self.constants.get(name)]
        if not self.constants.get("ALIGNED", True):
            notes.append("scattered")
        if "RULE" in self.constants:
            notes.append(RULES[int(self.constants["RULE"])])
        return f"{self.target:7} {name:16} {' '.join(notes):16}"


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes: registers of a thread, shared memory, and spills by name."""

    config: Config
    registers: int
    shared_bytes: int
    spills: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        spills = ", ".join(f"{k} {v}" for k, v in self.spills.items() if v) or "none"
        return (
            f"{self.config} {self.registers:4} registers {self.shared_bytes:6} bytes shared"
            f"   spills: {spills}"
        )


def configurations() -> Iterator[Config]:
    """Every configuration, target by target."""
    for target in TARGETS:
        yield from _n2uq_configurations(target)
        yield from _weights_configurations(target)
        yield from _inputs_configurations(target)
        yield from _packed_configurations(target)
        yield Config(
            *("codebooks", "step_kernel", target, "fp32"),
            {"DEAD": DEAD_COUNT, "WIDTH": codebooks.WIDTH},
            {
                **dict.fromkeys(("partials_ptr", "scratch_ptr"), "*fp64"),
                **dict.fromkeys(("stride", "scratch_stride"), "i32"),
                "decay": "fp64",
                "epsilon": "fp64",
                "split": "u1",
                "zero": "u1",
                "layers_ptr": "*i64",
                "dead_ptr": "*i32",
            },
            codebooks.WARPS,
            fusion=False,
        )


def _n2uq_configurations(target: str) -> Iterator[Config]:
    for bits in range(MIN_BITS, MAX_BITS + 1):
        constants = {"BITS": bits}
        yield Config("n2uq", "edges_kernel", target, "fp32", constants, {})
        rows = {**constants, "BLOCK": n2uq.FINISH_TILE >> bits}
        yield Config("n2uq", "finish_kernel", target, "fp32", rows, {"programs": "i32"})
        forward = {**constants, "BLOCK": n2uq.FORWARD_BLOCK}
        lanes, warps = n2uq.backward_shape(bits)
        backward = {**constants, "LANES": lanes}
        for dtype, even in [*((dtype, True) for dtype in DTYPES), ("fp32", False)]:
            types = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "grad_x_ptr"), f"*{dtype}")
            types |= {"place_ptr": "*u8" if bits < 8 else "*i16", "numel": "i32"}
            yield Config("n2uq", "forward_kernel", target, dtype, forward, types, even=even)
            yield Config("n2uq", "backward_kernel", target, dtype, backward, types, warps, even)


def _weights_configurations(target: str) -> Iterator[Config]:
    warps = weights.LANES // TARGETS[target].warp_size
    for dtype in DTYPES:
        types = dict.fromkeys(("w_ptr", "out_ptr", "grad_ptr", "grad_w_ptr"), f"*{dtype}")
        types |= {"codes_ptr": "*u8", "layers_ptr": "*i64", "owners_ptr": "*i32"}
        for gather in (False, True):
            constants = {"GATHER": gather, "PART": PART, "LANES": weights.LANES}
            sums = {**types, "partials_ptr": "*fp64", "stride": "i32"}
            yield Config("weights", "forward_kernel", target, dtype, constants, sums, warps)
        for rule in range(len(RULES)):
            constants = {"RULE": rule, "TILE": weights.TILE}
            yield Config("weights", "backward_kernel", target, dtype, constants, types)


def _inputs_configurations(target: str) -> Iterator[Config]:
    for bits in range(MIN_BITS, MAX_BITS + 1):
        constants = {"STEPS": bits, "BLOCK": inputs.BLOCK}
        for dtype, even in [*((dtype, True) for dtype in DTYPES), ("fp32", False)]:
            types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}")
            types |= {"codes_ptr": "*u8", "numel": "i32", "count": "i32"}
            for kernel in ("quantize_kernel", "codes_kernel"):
                yield Config("inputs", kernel, target, dtype, constants, types, even=even)


def _packed_configurations(target: str) -> Iterator[Config]:
    multiples = ("rows", "size", "width", "cells", "channels", "own", "own_rows", "pixels")
    counts = (
        *(*multiples, "levels", "groups", "has_bias", "steps", "middle", "numel", "columns"),
        *("parts", *packed_matrix.GEOMETRY),
    )

    def config(module: str, kernel: str, dtype: str, warps: int = 4, **constants: float) -> Config:
        integers = kernel.startswith("integer")
        types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(counts, "i32")
        types |= {"q_ptr": "*u8", "step": "fp32", "centre": "fp32"}
        types |= dict.fromkeys(("words_ptr", "sums_ptr", "totals_ptr"), "*i32")
        if integers and (constants.get("PARTED") or "finish" in kernel):
            types |= {"parts_ptr": "*i32"} | ({} if "finish" in kernel else {"out_ptr": "*i32"})
        return Config(module, kernel, target, dtype, constants, types, warps, multiples=multiples)

    def vector(bits: int, dtype: str = "fp16", groups: int = 0) -> Config:
        constants = {"BITS": bits, "GROUPS": groups, "W": packed_vector.BLOCK_CELLS[bits]}
        return config("packed_vector", "vector_kernel", dtype, threads // 32, **constants)

    def matrix(
        bits: int, pixels: int, dtype: str = "fp16", groups: int = 0, aligned: bool = True
    ) -> Config:
        constants = {"BITS": bits, "GROUPS": groups, **shape(pixels, aligned)}
        return config("packed_matrix", "matrix_kernel", dtype, packed_matrix.WARPS, **constants)

    def integer(bits: int, pixels: int, parted: bool = False, aligned: bool = True) -> Config:
        constants = {"BITS": bits, "PARTED": parted, **shape(pixels, aligned)}
        return config("packed_matrix", "integer_kernel", "fp16", packed_matrix.WARPS, **constants)

    def shape(pixels: int, aligned: bool) -> dict[str, int]:
        step, rows = packed_matrix.STEP, packed_matrix.ROWS
        return {"ALIGNED": aligned, "PIXELS": pixels, "ROWS": rows, "STEP": step}

    few, some = packed_matrix.FEW_PIXELS, packed_matrix.SOME_PIXELS
    many = packed_matrix.MANY_PIXELS
    threads = 64 * 32 // TARGETS[target].warp_size
    for bits in WIDTHS:
        yield vector(bits)
        yield matrix(bits, few)
        yield matrix(bits, many)
        yield integer(bits, many)
    for dtype in ("fp32", "bf16"):
        yield vector(4, dtype)
    yield matrix(4, many, "bf16")
    yield matrix(4, some, aligned=False)
    yield integer(4, few, parted=True)
    yield integer(4, some, aligned=False)
    for groups in (1, 2):
        yield vector(4, groups=groups)
        yield matrix(4, some, groups=groups)
    blocks = packed_words.FINISH_BLOCK, packed_matrix.FINISH_BLOCK
    yield config("packed_words", "finish_kernel", "fp16", BLOCK=blocks[0])
    yield config("packed_matrix", "integer_finish_kernel", "fp16", BLOCK=blocks[1])


def compile_report(config: Config) -> Report:
    """Compiles one configuration down to machine code."""
    kernel = getattr(import_module(f"adq.quant.kernels.{config.module}"), config.kernel)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in config.constants else config.types.get(name, "*fp32")
        signature[name] = kind
        count = kind == "i32" and name in ("numel", "programs")
        if kind.startswith("*") or (count and config.even) or name in config.multiples:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, config.constants, attributes)
    target = TARGETS[config.target]
    options = {"num_warps": config.warps, "enable_fp_fusion": config.fusion}
    compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        usage = _cuda_usage(compiled.asm["cubin"])
        spills = {"local": usage["LOCAL"], "stack": usage["STACK"]}
        return Report(config, usage["REG"], shared, spills)
    found = dict(re.findall(r"\.(\w+):\s*(\d+)\n", compiled.asm["amdgcn"]))
    spills = {
        "vector": int(found["vgpr_spill_count"]),
        "scalar": int(found["sgpr_spill_count"]),
        "private": int(found["private_segment_fixed_size"]),
    }
    return Report(config, int(found["vgpr_count"]), shared, spills)


def _cuda_usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG), stack (STACK) and local memory (LOCAL) by the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def reports(processes: int = 2) -> list[Report]:
    """The reports of all configurations."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_report, configurations(), chunksize=8))


def main() -> int:
    """Prints the table; 1 if a kernel spills."""
    found = reports()
    print("\n".join(map(str, found)))
    spilling = [report for report in found if any(report.spills.values())]
    print(f"{len(found)} kernels, {len(spilling)} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
