"""Other kinds of models under the same command: a transformer, audio in one dimension, a detector.

    python studies/models/run.py

Claim: each is searched, packed, read back and exported to ONNX by `adq-search` and the study file
beside this, with no code of its own in the product; n = 1 seed each. Studies are kept in build/,
and one that is there already is brought to its end, not begun anew. Writes results.json (raw: every
front, and what the exported files gave), summary.json and the tables of README.md. A few minutes of
one core for each study.
"""

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from grounds.report import table, write_between

from adq.quant.files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = HERE / "build"
MODELS = {"vit": "transformer", "audio": "audio", "detector": "detector"}
EXPORTS = {"adq": "safetensors", "onnx": "onnx", "torch": "pt2"}
"""Format -> the file name's ending."""


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    raw = {name: studied(name) for name in MODELS}
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "torchvision", "onnxruntime")}
    write_json(HERE / "results.json", {"versions": versions, "studies": raw})
    write_json(HERE / "summary.json", summary(raw))
    write_between(HERE / "README.md", {"results": results(raw), "exports": exports(raw)})


def studied(name: str) -> dict[str, Any]:
    """A study from its file, or what is missing of one that was begun; and its best model in every
    format that runs, beside the packed one."""
    file, folder = HERE / f"{name}.toml", BUILD / name
    begun = (folder / "study.toml").exists()
    front = command(*(("resume", name) if begun else ("--config", str(file))), "--out", str(BUILD))
    ways = {
        kind: command(
            "export", str(folder), "--format", kind, "--out", str(BUILD / f"{name}.{ending}")
        )
        for kind, ending in EXPORTS.items()
    }
    for way in ways.values():
        del way["file"]
    return {
        "config": tomllib.loads(file.read_text(encoding="utf-8")),
        "seconds": json.loads((folder / "clock.json").read_text())["seconds"],
        "fp32": json.loads((folder / "fp32.json").read_text())["test"],
        "front": front,
        "proxies": [s["proxy"] for s in sensitivity(folder)],
        "exports": ways,
    }


def sensitivity(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sensitivity.json").read_text())["proxies"]


def command(*arguments: str) -> Any:
    """What `adq-search` prints as JSON, run at the repository's root."""
    program = Path(sys.executable).with_name("adq-search")
    done = subprocess.run(
        [program, *arguments, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def best(study: dict[str, Any]) -> dict[str, Any]:
    front = study["front"]
    return next(point for point in front["points"] if point["id"] == front["best"])


def summary(raw: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, study in raw.items():
        onnx = study["exports"]["onnx"]["compared"]
        found |= {
            f"{name}_fp32_metric": round(study["fp32"]["metric"], 5),
            f"{name}_searched_metric": round(best(study)["metric"], 5),
            f"{name}_searched_metric_stderr": round(best(study)["metric_stderr"], 5),
            f"{name}_searched_average_bits": round(best(study)["average_bits"], 4),
            f"{name}_searched_size_bytes": best(study)["size_bytes"],
            f"{name}_onnx_relative_difference": onnx["max_difference"] / onnx["largest_output"],
            f"{name}_seconds": round(study["seconds"], 1),
        }
        found |= {
            f"{name}_{point['id'].replace('-', '')}_metric": round(point["metric"], 5)
            for point in study["front"]["uniform"]
        }
    return found


def results(raw: dict[str, Any]) -> str:
    header = ["study", "model", "average bits", "kB", "test metric", "layers of each width"]
    rows = []
    for name, study in raw.items():
        fp32, size = study["fp32"], study["exports"]["adq"]["fp32_bytes"]
        metric = f"{study['front']['metric_name']} {value(fp32['metric'], fp32['metric_stderr'])}"
        rows.append([MODELS[name], "FP32", "32", kilobytes(size), metric, ""])
        points = [*study["front"]["uniform"], {**best(study), "id": "searched"}]
        for point in points:
            widths = Counter(point["weight_bits"].values())
            rows.append(
                [
                    "",
                    point["id"],
                    f"{point['average_bits']:.2f}",
                    kilobytes(point["size_bytes"]),
                    value(point["metric"], point["metric_stderr"]),
                    ", ".join(f"{count} at {bits}" for bits, count in sorted(widths.items())),
                ]
            )
    return table(header, rows)


def exports(raw: dict[str, Any]) -> str:
    header = ["study", "scored by", "file", "largest difference", "largest output", "metric"]
    rows = []
    for name, study in raw.items():
        for kind, way in study["exports"].items():
            compared = way["compared"]
            rows.append(
                [
                    MODELS[name],
                    ", ".join(study["proxies"]),
                    kind,
                    f"{compared['max_difference']:.1e}",
                    f"{compared['largest_output']:.3g}",
                    f"{compared['metric']:.4f} against {compared['packed_metric']:.4f}",
                ]
            )
    return table(header, rows)


def value(metric: float, stderr: float) -> str:
    return f"{metric:.3f} ± {stderr:.3f}"


def kilobytes(size: int) -> str:
    return f"{size / 1e3:.1f}"


if __name__ == "__main__":
    main()
