"""Does a searched bit vector beat uniform bits on CIFAR-10, everything else equal?

    python studies/cifar10_resnet20/run.py --data FOLDER [--workers 2]

Searches ResNet-20 at 2.81 average bits a weight (`vectors.py`; the study is in build/), then
fine-tunes the chosen points, uniform bits under four quantizers, a HAWQ-V2 allocation and the FP32
network equally long under three seeds (`finetuning.py`), and writes results.json, summary.json and
the tables of README.md. What is there already is not made again: remove results.json to train anew,
vectors.json and build/ to search anew. FOLDER is that of `grounds/cifar10.py`, or holds the true
CIFAR-10.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

from finetuning import FineTuning, start, train
from grounds.runs import measure
from report import GIVEN, SEEDS, Found, report
from vectors import METHODS, UNIFORM, layer_sizes, uniform, vectors

from adq.quant.spec import BitVector

HERE = Path(__file__).parent


def runs(sizes: dict[str, int], mixed: dict[str, BitVector]) -> list[FineTuning]:
    """All fine-tunings: seed by seed, so that what is there early is balanced."""
    equal = [FineTuning("fp32", None)]
    equal += [FineTuning(name, bits) for name, bits in mixed.items()]
    for bits in UNIFORM:
        equal += [
            FineTuning(f"{method}-{bits}", uniform(sizes, bits), method) for method in METHODS
        ]
    trained = [replace(run, seed=seed) for seed in SEEDS for run in equal]
    return [GIVEN, *trained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    arguments = parser.parse_args()
    folder = arguments.data
    sizes, mixed = layer_sizes(folder), vectors(folder)
    kept = HERE / "results.json"
    results = measure(runs(sizes, mixed), train, kept, arguments.workers, start, (folder,))
    report(Found(results, sizes, mixed))


if __name__ == "__main__":
    main()
