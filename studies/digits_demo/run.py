"""The demo's search under three seeds: python studies/digits_demo/run.py

Claim: a searched model of at most 2.8 average bits against the FP32 model and the uniform 2-bit
and 3-bit models trained with the same number of steps; scikit-learn's digits, 450 test images,
n = 3 seeds (each seed trains its own FP32 model). Writes results.json (raw: every front),
summary.json (what README.md here says) and front.png (the first seed's picture).
"""

import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import adq

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
BUDGET_BITS = 2.8


def main() -> None:
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out:
        for seed in SEEDS:
            started = time.monotonic()
            front = adq.search("digits", adq.Budget(bits=BUDGET_BITS), seed=seed, out=out)
            raw.append(
                {
                    "seed": seed,
                    "seconds": time.monotonic() - started,
                    "best": front.best.id,
                    "front": front.to_json(),
                    "uniform": {p.id: p.metric for p in front.uniform},
                    "uniform_average_bits": {p.id: p.average_bits for p in front.uniform},
                    "best_metric": front.best.metric,
                    "best_average_bits": front.best.average_bits,
                    "best_size_bytes": front.best.size_bytes,
                }
            )
            print(f"seed {seed}: {front.best.metric:.4f} at {front.best.average_bits:.3f} bits")
            if seed == SEEDS[0]:
                shutil.copyfile(Path(front.folder) / "front.png", HERE / "front.png")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write("results.json", {"versions": versions, "runs": raw})

    def mean(values: list[float]) -> float:
        return round(statistics.mean(values), 5)

    write(
        "summary.json",
        {
            "seeds": len(SEEDS),
            "fp32_test_accuracy": mean([run["front"]["fp32_metric"] for run in raw]),
            "best_test_accuracy": mean([run["best_metric"] for run in raw]),
            "uniform2_test_accuracy": mean([run["uniform"]["uniform-2"] for run in raw]),
            "uniform3_test_accuracy": mean([run["uniform"]["uniform-3"] for run in raw]),
            "best_average_bits": mean([run["best_average_bits"] for run in raw]),
            "best_average_bits_max": round(max(run["best_average_bits"] for run in raw), 5),
            "best_size_bytes": mean([run["best_size_bytes"] for run in raw]),
            "test_samples": 450,
        },
    )


def write(name: str, data: Any) -> None:
    (HERE / name).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
