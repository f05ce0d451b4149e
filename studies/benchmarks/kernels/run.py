"""What do the kernels cost: python studies/benchmarks/kernels/run.py [--rounds 15] [--no-compile]

First compares every operator with its reference, and stops with exit status 1 where one is wrong.
Then times Triton kernels and a ResNet-50 (with a GPU), compiles every kernel ahead of time, and
times training steps of ResNet-20 on the CPU. Writes results.json (raw), summary.json (name ->
number) and the tables of README.md. Leave the machine alone while it runs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[2]))

import cpu
import gpu
import torch
from verify import WrongError, verify

from adq.quant.files import write_json
from adq.quant.kernels import aot

HERE = Path(__file__).parent

BEGIN, END = "<!-- tables: written by run.py -->", "<!-- end of tables -->"
NO_GPU = "GPU parts are skipped: torch.cuda.is_available() is false, no kernel can run here"
LARGEST = max(gpu.SIZES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=cpu.ROUNDS, help="of the CPU's steps, >= 2")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {arguments.rounds}")
    has_gpu = torch.cuda.is_available()
    try:
        print(f"verified: {verify()} comparisons agree", flush=True)
    except WrongError as error:
        print(f"wrong, nothing is timed: {error}", file=sys.stderr)
        return 1
    raw: dict[str, Any] = {"environment": environment(), "gpu": None}
    print(json.dumps(raw["environment"]), flush=True)
    if has_gpu:
        print(json.dumps(gpu.device()), flush=True)
        raw["gpu"] = gpu.measure(not arguments.no_compile)
    else:
        print(NO_GPU, flush=True)
    raw["cpu_seconds"] = cpu.measure(arguments.rounds)
    reports = aot.reports()
    raw["aot"] = [str(report) for report in reports]
    summary = summarise(raw)
    summary["aot_kernels"] = len(reports)
    summary["aot_spills"] = sum(any(report.spills.values()) for report in reports)
    write_json(HERE / "results.json", raw)
    write_json(HERE / "summary.json", summary)
    write_tables(tables(raw, summary))
    print(json.dumps(summary, indent=1))
    return 0


def environment() -> dict[str, Any]:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": load,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return (names or [platform.processor()])[0] + (", AVX-512" if "avx512f" in flags else "")


def summarise(raw: dict[str, Any]) -> dict[str, float]:
    """The medians. Names without a suffix are those at torch's own number of threads."""
    summary: dict[str, float] = {}
    counts = list(raw["cpu_seconds"])
    for count, seconds in raw["cpu_seconds"].items():
        suffix = "" if count == counts[0] else "_one_thread"
        for key, pair in cpu.RATIOS.items():
            summary[key + suffix] = round(cpu.ratio(seconds, *pair)[1], 3)
        for name in cpu.CONTENDERS:
            key = f"cpu_{name}_step_ms{suffix}"
            summary[key] = round(1e3 * cpu.quartiles(seconds[name])[1], 1)
    summary["cpu_threads"] = int(counts[0])
    if raw["gpu"] is not None:
        summary |= _summarise_gpu(raw["gpu"])
    return summary


def _summarise_gpu(raw: dict[str, Any]) -> dict[str, float]:
    summary: dict[str, float] = {}
    for timing in (gpu.Timing(**one) for one in raw["timings"]):
        if timing.elements == LARGEST:
            name = timing.kernel.replace(" + ", "_").replace(" ", "_")
            key = f"gpu_{name}_{timing.bits}bit_{timing.dtype}"
            summary[f"{key}_gbps"] = round(timing.gigabytes_per_second, 1)
            summary[f"{key}_over_copy"] = round(timing.fraction_of_copy, 3)
            summary[f"{key}_speedup_over_reference"] = round(
                timing.reference_us / timing.kernel_us, 2
            )
            if timing.compiled_us is not None:
                summary[f"{key}_speedup_over_compiled"] = round(
                    timing.compiled_us / timing.kernel_us, 2
                )
    for name, kernels in raw["launches"].items():
        summary[f"gpu_resnet50_weights_launches_{name}"] = sum(kernels.values())
    if raw["resnet50_seconds"] is not None:
        ratio = cpu.ratio(raw["resnet50_seconds"], "adq", "plain")[1]
        summary["gpu_resnet50_qat_over_bf16_step"] = round(ratio, 3)
    return summary


def tables(raw: dict[str, Any], summary: dict[str, float]) -> str:
    env = raw["environment"]
    lines = [
        f"{env['date']}, commit {env['commit']}, {env['cpu']}, {env['cores']} cores "
        f"(load {env['load_before']:.1f} before), torch {env['torch']}.",
        "",
        f"**CPU: one training step of ResNet-20**, batch {cpu.BATCH}. Medians, with the first and "
        "third quartile of the rounds' own ratios:",
        "",
        "| threads | contender | ms | over FP32 | over plain LSQ |",
        "| --- | --- | --- | --- | --- |",
    ]
    for count, seconds in raw["cpu_seconds"].items():
        for name, title in cpu.CONTENDERS.items():
            ms = 1e3 * cpu.quartiles(seconds[name])[1]
            cells = [_ratio_cell(seconds, name, below) for below in ("fp32", "plain_lsq")]
            lines.append(f"| {count} | {title} | {ms:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        f"**Ahead of time:** {summary['aot_kernels']:.0f} kernel configurations for "
        f"{', '.join(aot.TARGETS)}; {summary['aot_spills']:.0f} of them spill registers.",
        "",
    ]
    if raw["gpu"] is None:
        return "\n".join([*lines, f"**GPU:** {NO_GPU}."])
    return "\n".join([*lines, *_gpu_lines(raw["gpu"])])


def _ratio_cell(seconds: dict[str, list[float]], above: str, below: str) -> str:
    if above == below:
        return "1"
    first, median, third = cpu.ratio(seconds, above, below)
    return f"{median:.2f} ({first:.2f} to {third:.2f})"


def _gpu_lines(raw: dict[str, Any]) -> list[str]:
    device = raw["device"]
    lines = [
        f"**GPU:** {device['card']}, driver {device['driver']}, CUDA {device['cuda']}, "
        f"Triton {device['triton']}. Microseconds; the copy moves the same bytes.",
        "",
        "| kernel | bits | dtype | elements | kernel | reference | compiled | copy | GB/s "
        "| of the copy's speed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in (gpu.Timing(**fields) for fields in raw["timings"]):
        compiled = "–" if one.compiled_us is None else f"{one.compiled_us:.1f}"
        lines.append(
            f"| {one.kernel} | {one.bits} | {one.dtype} | 2^{one.elements.bit_length() - 1} | "
            f"{one.kernel_us:.1f} | {one.reference_us:.1f} | {compiled} | {one.copy_us:.1f} | "
            f"{one.gigabytes_per_second:.0f} | {one.fraction_of_copy:.2f} |"
        )
    ours, theirs = (sum(raw["launches"][name].values()) for name in ("kernels", "reference"))
    lines += ["", f"A ResNet-50's weights take {ours} launches, with the reference {theirs}."]
    if raw["resnet50_seconds"] is None:
        return [*lines, "", "The memory is too small for ResNet-50 at batch 256."]
    ms = [1e3 * cpu.quartiles(raw["resnet50_seconds"][name])[1] for name in ("plain", "adq")]
    first, median, third = cpu.ratio(raw["resnet50_seconds"], "adq", "plain")
    lines += [
        "",
        f"ResNet-50, batch {gpu.RESNET50_BATCH}, bf16: {ms[0]:.0f} ms a plain step, {ms[1]:.0f} ms "
        f"an ADQ step, {median:.2f} times as long ({first:.2f} to {third:.2f}).",
    ]
    return lines


def write_tables(text: str) -> None:
    """Put the tables between the marks in README.md."""
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
