"""Whose choice of bits is best at 2.80 average bits, everything else equal?

    python studies/peers/run.py --data FOLDER [--workers 2]

Asks ModelOpt, MCT, PyHessian and this package for bit vectors of ResNet-20 on CIFAR-10, each in a
process and a virtual environment of its own (`build/`, made here), then quantizes and fine-tunes
all in the same way (`cifar10_resnet20/finetuning.py`). Writes searches.json (what was chosen, in
which time and memory), results.json (one line a fine-tuning), summary.json and the tables of
README.md. What is there already is not made again: remove the files to start anew. FOLDER is that
of `grounds/cifar10.py`. The searched vector is that of `cifar10_resnet20/run.py`'s study.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(1, str(Path(__file__).parents[1] / "cifar10_resnet20"))
sys.path.insert(1, str(Path(__file__).parents[1]))

from finetuning import EPOCH, FineTuning, start, train
from grounds import cifar10
from grounds.runs import measure
from searching import BUDGET, SAMPLES
from tables import SEEDS, report
from vectors import searched

import adq
from adq.quant.files import read_json, write_json, write_tensors
from adq.search.folder import open_study
from adq.search.run import load_front

HERE = Path(__file__).parent
BUILD, SEARCHES = HERE / "build", HERE / "searches.json"
SEARCHED = "ours-searched"
STAGES = ("searches", "untuned", "tuned")


@dataclass(frozen=True)
class Searcher:
    """A script, whether it has an environment of its own, and more words for the script."""

    script: str
    environment: str | None
    words: tuple[str, ...] = ()


SEARCHERS = {
    "modelopt": Searcher("modelopt_bits.py", "modelopt"),
    "modelopt-1000": Searcher("modelopt_bits.py", "modelopt", ("1000",)),
    "mct": Searcher("mct_bits.py", "mct"),
    "pyhessian": Searcher("pyhessian_bits.py", "pyhessian"),
    "ours-seed": Searcher("ours_bits.py", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the images")
    parser.add_argument("--workers", type=int, default=1, help="fine-tunings at a time")
    parser.add_argument("--searched", type=Path, help="a study's folder, if not the CIFAR study's")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="what is done last")
    arguments = parser.parse_args()
    found: dict[str, Any] = read_json(SEARCHES) if SEARCHES.exists() else {}
    for name in [name for name in SEARCHERS if "weight_bits" not in found.get(name, {})]:
        found[name] = choose(SEARCHERS[name], arguments.data)
        write_json(SEARCHES, found)
        print(name, found[name], flush=True)
    stage = STAGES.index(arguments.until)
    if SEARCHED not in found and (arguments.searched or stage == STAGES.index("tuned")):
        found[SEARCHED] = from_study(arguments.data, arguments.searched)
        write_json(SEARCHES, found)
    vectors = {
        name: adq.BitVector(one["weight_bits"])
        for name, one in found.items()
        if "weight_bits" in one
    }
    wanted = [
        run for run in runs(vectors) if stage >= STAGES.index("tuned" if run.steps else "untuned")
    ]
    results = measure(
        wanted, train, HERE / "results.json", arguments.workers, start, (arguments.data,)
    )
    report(found, owners(vectors), results)


def owners(vectors: dict[str, adq.BitVector]) -> dict[str, str]:
    """Each name -> the first name of an equal vector, under which it is tuned."""
    first: dict[str, str] = {}
    return {name: first.setdefault(bits.key, name) for name, bits in vectors.items()}


def runs(vectors: dict[str, adq.BitVector]) -> list[FineTuning]:
    """Calibrated ones, then trainings seed by seed; each different vector once."""
    names = list(dict.fromkeys(owners(vectors).values()))
    untuned = [FineTuning("fp32", None, steps=0)]
    untuned += [FineTuning(name, vectors[name], steps=0) for name in names]
    return untuned + [
        FineTuning(name, vectors[name], seed=seed, steps=EPOCH) for seed in SEEDS for name in names
    ]


def choose(searcher: Searcher, data: Path) -> dict[str, Any]:
    """What a search leaves (see `searching.main`), or the last line of what it died of."""
    inputs, out = BUILD / "inputs.safetensors", BUILD / "found.json"
    if not inputs.exists():
        write_inputs(inputs, data)
    try:
        python = sys.executable
        if searcher.environment is not None:
            python = environment(searcher.environment)
        command = [python, str(HERE / searcher.script), str(inputs), str(out), *searcher.words]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return {"error": lines[-1].strip() if lines else str(error)}
    return json.loads(out.read_text())


def write_inputs(path: Path, data: Path) -> None:
    """The FP32 weights, and the first training images with labels."""
    BUILD.mkdir(exist_ok=True)
    images, labels = (values[:SAMPLES].clone() for values in cifar10.load(data).train)
    state = cifar10.fp32(data).state_dict()
    write_tensors(path, {**state, "images": images, "labels": labels}, {})


def environment(name: str) -> str:
    """The Python of a virtual environment with a peer's pinned packages.

    Behind them it sees the packages of the one that runs this, such as torch."""
    home, wanted = BUILD / name, HERE / "requirements" / f"{name}.txt"
    python, installed = home / "bin" / "python", home / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted.read_text():
        pipe = {"check": True, "stderr": subprocess.PIPE, "text": True}
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], **pipe)
        (site,) = home.glob("lib/python*/site-packages")
        shared = sysconfig.get_path("purelib")
        (site / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([str(python), *install, str(wanted)], **pipe)
        shutil.copyfile(wanted, installed)
    return str(python)


def from_study(data: Path, folder: Path | None) -> dict[str, Any]:
    """The best point of a study's front within the budget, and the seconds that the study took."""
    kept = None if folder is None else load_front(open_study(folder.parent, folder.name))
    front = kept or searched(data)
    point = front.best_under({"average_bits": BUDGET})
    clock = read_json(Path(front.folder) / "clock.json")
    return {"weight_bits": dict(point.weight_bits), "seconds": round(clock["seconds"], 1)}


if __name__ == "__main__":
    main()
