"""Compiles every kernel ahead of time, without a GPU, and says what it takes of one.

    python -m adq.quant.kernels.aot

prints one line per kernel configuration and target: registers a thread, shared memory in bytes,
and what is spilled to memory for want of registers (bytes of local memory and stack on CUDA,
registers on AMD). It ends with exit status 1 if anything is spilled.

Configurations are those that the launchers of `n2uq` ask Triton for with float32 parameters: every
bit-width with every dtype of x, and once more where the number of elements is no multiple of 16,
for which Triton makes another kernel.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adq.quant.kernels import n2uq
from adq.quant.spec import MAX_BITS, MIN_BITS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """One compilation: a kernel of `n2uq` with the types of its arguments and its constants."""

    kernel: str
    target: str
    dtype: str
    constants: dict[str, int]
    types: dict[str, str]
    warps: int = 4
    even: bool = True
    """Whether the number of elements is known to be a multiple of 16."""


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes: registers of a thread, shared memory, and spills by name."""

    config: Config
    registers: int
    shared_bytes: int
    spills: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        config = self.config
        name = config.kernel.removesuffix("_kernel")
        spills = ", ".join(f"{k} {v}" for k, v in self.spills.items() if v) or "none"
        return (
            f"{config.target:7} {name:9} {config.constants['BITS']} bits {config.dtype:5}"
            f"{'' if config.even else 'odd':4} {self.registers:4} registers "
            f"{self.shared_bytes:6} bytes shared   spills: {spills}"
        )


def configurations() -> Iterator[Config]:
    """Every configuration, target by target."""
    for target in TARGETS:
        for bits in range(MIN_BITS, MAX_BITS + 1):
            constants = {"BITS": bits}
            yield Config("edges_kernel", target, "fp32", constants, {})
            rows = {**constants, "BLOCK": n2uq.FINISH_TILE >> bits}
            yield Config("finish_kernel", target, "fp32", rows, {"programs": "i32"})
            forward = {**constants, "BLOCK": n2uq.FORWARD_BLOCK}
            lanes, warps = n2uq.backward_shape(bits)
            backward = {**constants, "LANES": lanes}
            for dtype, even in [*((dtype, True) for dtype in DTYPES), ("fp32", False)]:
                types = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "grad_x_ptr"), f"*{dtype}")
                types |= {"place_ptr": "*u8" if bits < 8 else "*i16", "numel": "i32"}
                yield Config("forward_kernel", target, dtype, forward, types, even=even)
                yield Config("backward_kernel", target, dtype, backward, types, warps, even)


def compile_report(config: Config) -> Report:
    """Compiles one configuration down to machine code."""
    kernel = getattr(n2uq, config.kernel)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in config.constants else config.types.get(name, "*fp32")
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and config.even):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, config.constants, attributes)
    target = TARGETS[config.target]
    compiled = triton.compile(source, target=target, options={"num_warps": config.warps})
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
