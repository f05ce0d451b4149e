"""What a packed model takes: python studies/benchmarks/packed/run.py [--rounds 15] [--quick]

For a small ResNet on 8 x 8 digits, a ResNet-18 and a MobileNetV2 at 224 x 224, with random weights
and bit vectors of 2.8 bits a weight: compares the packed model with the quantized one, in PyTorch
and as ONNX, and stops with exit status 1 where they differ; then sizes, latencies on the CPU beside
FP32, and how well a latency table foretells them. With a GPU, the kernels too (`gpu.py`). Writes
results.json (raw), summary.json (name -> number) and the tables of README.md. Leave the machine
alone while it runs; some ten minutes. --quick tries everything and writes nothing.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import gpu
import torch
from grounds.made_up import environment
from grounds.report import table, write_between
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18

from adq.proxies.costs import CostModel
from adq.proxies.latency import LatencyTable, network_seconds
from adq.proxies.profile import device_name, measure
from adq.quant.apply import quantize
from adq.quant.calibrate import reestimate_batchnorm_
from adq.quant.export.loading import load_packed_
from adq.quant.export.onnx import run_onnx, save_onnx
from adq.quant.export.packed import save_packed
from adq.quant.files import write_json
from adq.quant.fold import fold_batchnorm_
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector
from adq.search.tasks.digits import digits

HERE = Path(__file__).parent
AVERAGE_BITS, ENDS, ACT_BITS = 2.8, 8, (4, 8)
BATCHES = (1, 8)
ROUNDS, VECTORS = 15, 5
SCHEMES = {"adq": Scheme(), "lsq": Scheme("lsq", "lsq")}
TIMES, FLOOR = 3.0, 1e-4
"""An input value near a threshold may get the next code, and random nets pass that on: a packed
model may be TIMES as far from the quantized one in float64 as the quantized one in float32 is."""
AIM = 1.10


@dataclass(frozen=True)
class Ground:
    """A model and the shape of its images."""

    name: str
    make: Callable[[], nn.Module]
    image: tuple[int, int, int]


GROUNDS = (
    Ground("digits net", digits().model, (1, 8, 8)),
    Ground("ResNet-18", resnet18, (3, 224, 224)),
    Ground("MobileNetV2", mobilenet_v2, (3, 224, 224)),
)


class WrongError(Exception):
    """A packed model does not compute what it should."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="try everything, write nothing")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    raw: dict[str, Any] = {
        "environment": environment("torch", "onnxruntime")
        | {"cpu": device_name(torch.device("cpu"))},
        "models": [],
        "tables": [],
    }
    try:
        for ground in GROUNDS[:1] if arguments.quick else GROUNDS:
            for name, scheme in SCHEMES.items():
                print(f"{ground.name}, {name}", flush=True)
                raw["models"].append(one_model(ground, name, scheme, rounds))
                print(json.dumps(raw["models"][-1]["ratios"]), flush=True)
        for ground in GROUNDS[:1] if arguments.quick else GROUNDS[1:]:
            raw["tables"].append(one_table(ground, rounds))
            print(json.dumps(raw["tables"][-1]["errors"]), flush=True)
        raw["gpu"] = gpu.measure() if torch.cuda.is_available() else None
    except WrongError as error:
        print(f"wrong, nothing is written: {error}", file=sys.stderr)
        return 1
    summary = summarise(raw)
    if not arguments.quick:
        write_json(HERE / "results.json", raw)
        write_json(HERE / "summary.json", summary)
        write_between(HERE / "README.md", {"tables": tables(raw)})
    print(json.dumps(summary, indent=1))
    return 0


def images(ground: Ground, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *ground.image, generator=torch.Generator().manual_seed(seed))


def mixed_bits(layers: tuple[LayerInfo, ...], seed: int) -> BitVector:
    """Random bits from 2 to 4 of AVERAGE_BITS at most over all weights; 8 at both ends; the images
    stay as they are."""
    rng = random.Random(seed)
    names = [layer.name for layer in layers]
    numel = {layer.name: layer.weight_numel for layer in layers}
    weight = {name: ENDS if name in (names[0], names[-1]) else 2 for name in names}
    inner = names[1:-1]
    rng.shuffle(inner)
    for name in (*inner, *inner):
        more = {**weight, name: weight[name] + 1}
        if sum(numel[n] * more[n] for n in names) <= AVERAGE_BITS * sum(numel.values()):
            weight = more
    return BitVector(weight, {name: rng.choice(ACT_BITS) for name in names[1:]})


def fp32_model(ground: Ground) -> nn.Module:
    torch.manual_seed(0)
    model = ground.make()
    reestimate_batchnorm_(model, [(images(ground, 8, i), None) for i in range(2)])
    return model.eval()


def one_model(ground: Ground, scheme_name: str, scheme: Scheme, rounds: int) -> dict[str, Any]:
    fp32 = fp32_model(ground)
    layers = trace_layers(fp32, images(ground, 1))
    bits = mixed_bits(layers, 0)
    quantized = quantize(fp32, bits, [(images(ground, 8), None)], scheme).eval()
    folded = copy.deepcopy(fp32)
    fold_batchnorm_(folded)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, onnx_path = Path(folder) / "m.safetensors", Path(folder) / "m.onnx"
        save_packed(quantized, path, {})
        packed = load_packed_(copy.deepcopy(fp32), path)
        x = images(ground, max(BATCHES), 1)
        exact = copy.deepcopy(quantized).double()(x.double())
        own = distance(quantized(x), exact)
        save_onnx(
            load_packed_(copy.deepcopy(fp32), path, kernels="torch"), onnx_path, x, packed=path
        )
        errors = {
            "packed": compared(f"{ground.name} packed", packed(x), exact, own),
            "onnx": compared(
                f"{ground.name} as ONNX", torch.from_numpy(run_onnx(onnx_path, x)[0]), exact, own
            ),
        }
        names = [layer.name for layer in layers]
        counted = CostModel(fp32, layers, names, scheme.group_size).costs(bits)
        sizes = {
            "packed": path.stat().st_size,
            "budget": counted.size_bytes,
            "onnx": onnx_path.stat().st_size,
            "fp32": sum(t.nbytes for t in fp32.state_dict().values()),
        }
        runs = {"fp32": fp32, "fp32_folded": folded, "packed": packed}
        seconds = {str(b): interleaved(runs, x[:b], rounds) for b in BATCHES}
    return {
        "model": ground.name,
        "scheme": scheme_name,
        "average_bits": counted.average_bits,
        "bytes": sizes,
        "errors": errors,
        "seconds": seconds,
        "ratios": {
            b: {name: ratio(found, "packed", name)[1] for name in ("fp32", "fp32_folded")}
            for b, found in seconds.items()
        },
    }


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def compared(what: str, found: Tensor, exact: Tensor, own: float) -> dict[str, float]:
    """Raises WrongError where a model is farther from the exact outputs than rounding explains."""
    error = distance(found, exact)
    if not error <= TIMES * own + FLOOR:
        raise WrongError(f"{what}: a relative error of {error:.2g}, where rounding makes {own:.2g}")
    same = (found.argmax(-1) == exact.argmax(-1)).double().mean()
    return {"relative_error": error, "of_rounding": own, "equal_predictions": float(same)}


def interleaved(runs: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, taking turns; rounds are as long for small models."""
    names, calls = list(runs), 20 if x[0].numel() < 1000 else 1
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(3 + rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            began = perf_counter()
            for _ in range(calls):
                runs[name](x)
            if i >= 3:
                seconds[name].append((perf_counter() - began) / calls)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Quartiles of the ratio of two contenders' seconds in one round."""
    pairs = zip(seconds[above], seconds[below], strict=True)
    return quantiles([a / b for a, b in pairs], n=4, method="inclusive")


def one_table(ground: Ground, rounds: int) -> dict[str, Any]:
    """A latency table of one image, and whole packed models beside the sums of its entries.

    Between the two measurements the machine may have become faster or slower: `drift` is the FP32
    model's time beside the packed ones over that in the table, and `errors` are those of the sums
    times it.
    """
    fp32, x = fp32_model(ground), images(ground, 1)
    layers = trace_layers(fp32, x)
    found: LatencyTable = measure(
        *(fp32, layers, x, (2, 3, 4, 8), (*ACT_BITS, None), torch.device("cpu")),
        repeats=rounds,
    )
    told = []
    folded = copy.deepcopy(fp32)
    fold_batchnorm_(folded)
    in_table = found.rest_seconds + sum(found.seconds(layer, 32, None) for layer in layers)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = {"fp32": folded}
        for seed in range(VECTORS):
            bits = mixed_bits(layers, seed)
            path = Path(folder) / f"{seed}"
            save_packed(quantize(fp32, bits, [(images(ground, 8), None)]).eval(), path, {})
            models[str(seed)] = load_packed_(copy.deepcopy(fp32), path)
            told.append(network_seconds(found, layers, bits))
        seconds = interleaved(models, x, rounds)
        seen = [median(seconds[str(seed)]) for seed in range(VECTORS)]
        drift = median(seconds["fp32"]) / in_table
    return {
        "model": ground.name,
        "table": asdict(found),
        "told_seconds": told,
        "measured_seconds": seen,
        "drift": drift,
        "errors": [drift * a / b - 1 for a, b in zip(told, seen, strict=True)],
    }


def summarise(raw: dict[str, Any]) -> dict[str, float]:
    """The three claims, each at its worst but for the mean error, and what they are made of."""
    models = raw["models"]
    everything = [r for m in models for ratios in m["ratios"].values() for r in ratios.values()]
    errors = [abs(error) for found in raw["tables"] for error in found["errors"]]
    summary = {
        "cpu_packed_over_fp32_latency": max(everything),
        "latency_table_error": mean(errors),
        "latency_table_error_worst": max(errors),
        "packed_bytes_over_budget_bytes": max(
            m["bytes"]["packed"] / m["bytes"]["budget"] for m in models
        ),
    }
    for m in models:
        name = f"{m['model'].lower().replace('-', '').replace(' ', '_')}_{m['scheme']}"
        for batch, ratios in m["ratios"].items():
            summary[f"{name}_batch{batch}_over_fp32"] = ratios["fp32"]
        summary[f"{name}_packed_over_fp32_bytes"] = m["bytes"]["packed"] / m["bytes"]["fp32"]
        summary[f"{name}_onnx_over_fp32_bytes"] = m["bytes"]["onnx"] / m["bytes"]["fp32"]
    if raw["gpu"] is not None:
        case = raw["gpu"]["cases"][f"linear {gpu.SIZE}x{gpu.SIZE}, 1 rows"]
        for name, found in case.items():
            key = name.replace(" ", "_")
            summary[f"gpu_{key}_times_as_fast_as_fp16"] = found["times_as_fast_as_fp16"]
            summary[f"gpu_{key}_bandwidth_share"] = found["bandwidth_share"]
    return {key: round(value, 4) for key, value in summary.items()}


def tables(raw: dict[str, Any]) -> str:
    env = raw["environment"]
    sizes, times = [], []
    for m in raw["models"]:
        n, e = m["bytes"], m["errors"]
        sizes.append(
            [m["model"], m["scheme"], f"{m['average_bits']:.3f}"]
            + [f"{n[kind]:,}" for kind in ("packed", "budget", "onnx", "fp32")]
            + [
                f"{error:.1e}"
                for error in (
                    e["packed"]["of_rounding"],
                    *(e[kind]["relative_error"] for kind in ("packed", "onnx")),
                )
            ]
        )
        for batch, seconds in m["seconds"].items():
            cells = [f"{1e3 * median(found):.3g}" for found in seconds.values()]
            for name in ("fp32", "fp32_folded"):
                first, middle, third = ratio(seconds, "packed", name)
                cells.append(f"{middle:.2f} ({first:.2f} to {third:.2f})")
            times.append([m["model"], m["scheme"], batch, *cells])
    foretold = [
        [
            found["model"],
            f"{1e3 * told:.3g}",
            f"{found['drift']:.2f}",
            f"{1e3 * seen:.3g}",
            f"{100 * error:+.1f}%",
        ]
        for found in raw["tables"]
        for told, seen, error in zip(
            found["told_seconds"], found["measured_seconds"], found["errors"], strict=True
        )
    ]
    parts = [
        f"{env['date']}, {env['cpu']} (load {env['load_before']:.1f} before), one thread, torch "
        f"{env['torch']}, onnxruntime {env['onnxruntime']}.",
        "**Bytes and errors.** Errors are distances from the quantized model's outputs in float64, "
        "over their norm; the first is the quantized model's own in float32.",
        table(
            [
                "model",
                "quantizers",
                "average bits",
                "packed file",
                "counted by the budget",
                "ONNX file",
                "FP32",
                "error quantized",
                "error packed",
                "error ONNX",
            ],
            sizes,
        ),
        "**Milliseconds a call on the CPU**, medians; ratios of one round with their quartiles.",
        table(
            [
                "model",
                "quantizers",
                "batch",
                "FP32",
                "FP32, folded",
                "packed",
                "packed over FP32",
                "packed over folded",
            ],
            times,
        ),
        "**Latency tables** on the CPU, one image: five bit vectors each.",
        table(
            ["model", "sum of the table's entries, ms", "drift", "measured, ms", "error"], foretold
        ),
    ]
    parts.append(
        "**GPU:** skipped, there is none here." if raw["gpu"] is None else gpu_table(raw["gpu"])
    )
    return "\n\n".join(parts)


def gpu_table(found: dict[str, Any]) -> str:
    rows = [
        [
            *(case, name, f"{one['us']:.1f}"),
            f"{one['times_as_fast_as_fp16']:.2f}",
            f"{100 * one['bandwidth_share']:.0f}%",
        ]
        for case, contenders in found["cases"].items()
        for name, one in contenders.items()
    ]
    header = ["case", "kernel", "µs", "times as fast as FP16", "of the bandwidth"]
    return f"**GPU:** {found['card']}.\n\n{table(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
