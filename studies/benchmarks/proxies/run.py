"""What the proxies cost: python studies/benchmarks/proxies/run.py [--cifar FOLDER] [--rounds 2]

Times per-layer Hessian traces beside PyHessian's on one batch of 128 training images, and how the
proxies' time grows with layers, bit-widths and batch size. One thread. With `--cifar`, the folder
that `studies/grounds/cifar10.py` describes, the network is ResNet-20; without, the small CNN of
Fashion-MNIST. Writes results.json (raw), summary.json (name -> number) and the tables of README.md;
`--quick` tries everything once and writes nothing. About ten minutes of one core.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import growth
import torch
import traces
from grounds import cifar10, fashion
from grounds.report import write_between
from torch import nn

from adq.proxies.trace import HessianTrace
from adq.quant.batches import Batch, threads
from adq.quant.files import write_json

HERE = Path(__file__).parent
BATCH, ROUNDS, PROBES = 128, 2, 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 images and ResNet-20")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="try everything, write nothing")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    rounds, probes, batch, cases = arguments.rounds, PROBES, BATCH, growth.cases()
    if arguments.quick:
        rounds, probes, batch = 1, 8, 16
    raw: dict[str, Any] = {"environment": environment()}
    print(json.dumps(raw["environment"]), flush=True)
    with threads(1):
        title, model, data = ground(arguments.cifar, batch)
        subject = traces.subject_of(model, data)
        samples = traces.measure(subject, rounds, probes)
        seconds = growth.measure(rounds, cases)
    raw |= {"ground": title, "batch": batch, "layers": subject.names}
    raw["traces"] = {name: [asdict(one) for one in found] for name, found in samples.items()}
    raw["growth_seconds"] = seconds
    found = traces.evaluate(samples)
    summary = summarise(found, seconds)
    text = tables(raw, found, seconds)
    if arguments.quick:
        print(text)
    else:
        write_json(HERE / "results.json", raw)
        write_json(HERE / "summary.json", summary)
        write_between(HERE / "README.md", {"tables": text})
    print(json.dumps(summary, indent=1))
    return 0


def ground(cifar: Path | None, batch: int) -> tuple[str, nn.Module, Batch]:
    if cifar is None:
        title, model, data = "small CNN, Fashion-MNIST", fashion.fp32(), fashion.load()
    else:
        title, model, data = "ResNet-20, CIFAR-10", cifar10.fp32(cifar), cifar10.load(cifar)
    images, labels = data.train
    return title, model, (images[:batch], labels[:batch])


def environment() -> dict[str, Any]:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyhessian": version("pyhessian"),
    }


def summarise(
    found: dict[str, dict[str, Any]], seconds: dict[str, dict[str, list[float]]]
) -> dict[str, float]:
    theirs, ours = found[traces.PYHESSIAN], found[traces.GAUSS_NEWTON]
    key = "time_at_equal_stderr"
    summary: dict[str, float] = {
        f"pyhessian_over_ours_{key}": theirs["seconds"] / ours["seconds"],
        f"pyhessian_over_ours_{key}_geometric_mean": _by_layer(theirs, ours),
    }
    hessian = found[traces.DEFAULT]
    relative = traces.TARGET * (hessian["most"] / HessianTrace().probes) ** 0.5
    summary["hessian_largest_relative_stderr_at_default_probes"] = relative
    for name, one in found.items():
        summary[f"{name}_probe_ms"] = 1e3 * one["each"].sum()
        summary[f"{name}_fixed_ms"] = 1e3 * one["fixed"].sum()
        summary[f"{name}_probes_worst_layer"] = one["most"]
        summary[f"{name}_seconds_to_target"] = one["seconds"]
        if name != traces.PYHESSIAN:
            summary[f"pyhessian_over_{name}_{key}"] = theirs["seconds"] / one["seconds"]
            summary[f"pyhessian_over_{name}_{key}_geometric_mean"] = _by_layer(theirs, one)
            summary[f"largest_z_{name}_against_pyhessian"] = traces.largest_z(one, theirs)
    for proxy, by_case in seconds.items():
        for name, values in growth.GROWTH.items():
            pairs = zip(values, growth.ratios(by_case, name), strict=True)
            for value, ratio in list(pairs)[1:]:
                summary[f"growth_{proxy}_{name}_{value}_over_{values[0]}"] = ratio
    return {name: round(float(value), 3) for name, value in summary.items()}


def _by_layer(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    return traces.geometric_mean(theirs["by_layer"] / ours["by_layer"])


def tables(
    raw: dict[str, Any],
    found: dict[str, dict[str, Any]],
    seconds: dict[str, dict[str, list[float]]],
) -> str:
    env, layers = raw["environment"], raw["layers"]
    theirs = found[traces.PYHESSIAN]
    lines = [
        f"{env['date']}, commit {env['commit']}, {env['cores']} cores (load "
        f"{env['load_before']:.1f} before), one thread (OMP_NUM_THREADS=1), torch {env['torch']}, "
        f"PyHessian {env['pyhessian']}.",
        "",
        f"**{raw['ground']}, one batch of {raw['batch']}, {len(layers)} layers.** Seconds of the "
        f"processor, from {theirs['probes']} probes each; the aim is a standard error of "
        f"{traces.TARGET:.0%} of the trace in every layer:",
        "",
        "| contender | fixed, s | a probe, s | probes, worst layer | seconds to the aim "
        "| PyHessian over it | geometric mean over layers | largest z |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in traces.TITLES.items():
        one = found[name]
        z = "–" if one is theirs else f"{traces.largest_z(one, theirs):.1f}"
        lines.append(
            f"| {title} | {one['fixed'].sum():.2f} | {one['each'].sum():.2f} | {one['most']:.0f} "
            f"({layers[one['worst']]}) | {one['seconds']:.1f} "
            f"| {theirs['seconds'] / one['seconds']:.2f} | {_by_layer(theirs, one):.2f} | {z} |"
        )
    lines += [
        "",
        "PyHessian stops each layer at its own number of probes here; with the worst layer's "
        f"number for all it takes {theirs['seconds_same_probes']:.1f} s.",
        "",
        "Traces, with standard errors, and probes to the aim:",
        "",
        "| layer | " + " | ".join(traces.TITLES.values()) + " |",
        "| --- |" + " --- |" * len(traces.TITLES),
    ]
    for number, layer in enumerate(layers):
        cells = [
            f"{one['trace'][number]:.1f} ± {one['stderr'][number]:.1f}; {one['needed'][number]:.0f}"
            for one in (found[name] for name in traces.TITLES)
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    base = growth.BASE
    lines += [
        "",
        f"**Growth.** Plain networks of {base.layers} layers, {base.bits} bit-widths and batches "
        f"of {base.batch} where nothing else is said; seconds at the smallest, and times over it:",
        "",
        "| proxy | growing | seconds | times |",
        "| --- | --- | --- | --- |",
    ]
    for proxy, title in growth.TITLES.items():
        for name, values in growth.GROWTH.items():
            ratios = growth.ratios(seconds[proxy], name)
            times = ", ".join(f"{v}: {r:.2f}" for v, r in zip(values, ratios, strict=True))
            lines.append(
                f"| {title} | {name} | {growth.smallest(seconds[proxy], name):.2f} | {times} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
