"""Every stage of the recipe on 200 made-up images, on CPUs: python prove.py FOLDER

In FOLDER, by the same run.py that a full run takes: the search on folders of images, by Ray with
two workers, killed after its first trial and gone on with; the final training on tar shards, by two
ranks, killed after its first epoch and gone on with; a final training that nobody kills, to compare
with; the packed model and the ONNX file. Before, a table of latencies is measured. Writes
results.json (what each stage took and found), summary.json (name -> number) and README's table.
It goes on where it was stopped itself. With --summary nothing is run: the last two are made again
from results.json.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import made_up
import numpy as np
import onnxruntime
import torch
from grounds.report import table, write_between

import adq
from adq.quant.files import read_json, write_json
from adq.search.task import load_task

HERE = Path(__file__).parent
TINY = ",size=32,batch=16"
EPOCHS = 3
SEARCH = "--device cpu --trials 3 --final-epochs 1 --workers 2 --cpus-per-trial 1 --bits 2,4"
FINAL = (
    f"--device cpu --final-epochs {EPOCHS} --ranks 2 --cpus-per-trial 2 --workers 1 "
    "--weights-average 0.99"
)


class Proof:
    """What was run in a folder, and what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder / "proof.json"
        self.results: dict[str, Any] = {"stages": {}, "finished_trials_kept": True}
        if self.kept.exists():
            self.results = read_json(self.kept)

    def run(self, stage: str, words: list[str], until: Callable[[], bool] | None = None) -> None:
        """Run a command to its end, or kill it and all it started once `until` holds."""
        if stage in self.results["stages"]:
            return
        started = time.monotonic()
        with open(self.folder / f"{stage}.log", "w") as log:
            process = subprocess.Popen(
                words, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None:
                if until is not None and until():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(0.05)
        killed = process.returncode == -signal.SIGKILL
        seconds = round(time.monotonic() - started, 1)
        print(f"{stage}: {seconds} s{', killed' if killed else ''}", file=sys.stderr, flush=True)
        if killed != (until is not None) or (not killed and process.returncode):
            sys.exit(f"{stage}: ended with {process.returncode}, see {log.name}")
        self.results["stages"][stage] = {"seconds": seconds, "killed": killed}
        write_json(self.kept, self.results)

    def recipe(self, out: str) -> list[str]:
        """run.py with the search on folders; the final training reads shards."""
        data = f"imagefolder:{self.folder / 'data' / 'images'}{TINY}"
        if (self.folder / out / "imagenet-search" / "results.json").exists():
            data = f"webdataset:{self.folder / 'data' / 'shards'}{TINY}"
        return [
            *(sys.executable, str(HERE / "run.py"), "--data", data, "--out", out),
            *("--weights", str(self.folder / "data" / "resnet18.safetensors")),
            *("--address", "local", "--decoders", "1", "--search", SEARCH, "--final", FINAL),
        ]


def prove(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    made_up.write(folder / "data")
    proof = Proof(folder)
    search, final = folder / "runs" / "imagenet-search", folder / "runs" / "imagenet-final"
    words = ["profile", "times.json", "--device", "cpu", "--bits", "2,4", "--act-bits", "4"]
    words += ["--task", f"imagefolder:{folder / 'data' / 'images'}{TINY}", "--model", "resnet18"]
    program = str(Path(sys.executable).with_name("adq-search"))
    proof.run("profile", [program, *words])

    trials = search / "trials"
    proof.run("search-killed", proof.recipe("runs"), lambda: any(trials.glob("*.json")))
    before = {path.name: read_json(path)["rungs"] for path in trials.glob("*.json")}
    # stopped once the search is over: from there on the data are the shards
    done = search / "results.json"
    proof.run("search-resumed", proof.recipe("runs"), done.exists)
    for name, rungs in before.items():  # a trial that is promoted gets more of them
        now = read_json(trials / name)["rungs"][: len(rungs)]
        proof.results["finished_trials_kept"] &= now == rungs

    checkpoints = final / "checkpoints"

    def saved() -> bool:
        return any(path.is_file() for path in checkpoints.rglob("*"))

    proof.run("final-killed", proof.recipe("runs"), saved)
    proof.run("final-resumed", proof.recipe("runs"))
    whole = [*proof.recipe("runs")]
    whole[whole.index("--out") + 1] = "whole"
    (folder / "whole").mkdir(exist_ok=True)
    if not (folder / "whole" / "imagenet-search").exists():
        (folder / "whole" / "imagenet-search").symlink_to(search)
    proof.run("final-whole", whole)
    same = (final / "best.safetensors").read_bytes() == (
        folder / "whole" / "imagenet-final" / "best.safetensors"
    ).read_bytes()
    facts = found_in(folder, final)
    return {**proof.results, **facts, "resumed_to_same_bits": same}


def found_in(folder: Path, final: Path) -> dict[str, Any]:
    """What the finished study and its exports are."""
    record = read_json(next((final / "final").glob("*.json")))
    packed, onnx = (folder / f"imagenet-final-best.{kind}" for kind in ("safetensors", "onnx"))
    task = load_task(f"webdataset:{folder / 'data' / 'shards'}{TINY}", "resnet18")
    images, _ = next(iter(task.test))
    with torch.no_grad():
        expected = adq.load(packed, task.model(), kernels="torch")(images).numpy()
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return {
        "average_bits": record["costs"]["average_bits"],
        "size_bytes": packed.stat().st_size,
        "size_bytes_predicted": record["costs"]["size_bytes"],
        "epochs": len(record["train_losses"]),
        "test": record["test"],
        "onnx_same_class": float((found.argmax(1) == expected.argmax(1)).mean()),
        "onnx_largest_difference": float(np.abs(found - expected).max()),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "cpus": os.cpu_count(),
    }


def summary_of(results: dict[str, Any]) -> dict[str, float]:
    stages = results["stages"]
    return {
        "stages_passed": len(stages),
        "stages_killed_and_resumed": sum(stage["killed"] for stage in stages.values()),
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "finished_trials_kept": int(results["finished_trials_kept"]),
        "resumed_to_same_bits": int(results["resumed_to_same_bits"]),
        "average_bits": round(results["average_bits"], 4),
        "size_bytes": results["size_bytes"],
        "onnx_same_class": results["onnx_same_class"],
        "full_imagenet_run_made": 0,
    }


STAGES = {
    "profile": "table of latencies measured",
    "search-killed": "search, two Ray workers, killed after its first trial",
    "search-resumed": "search gone on with to its end, then killed between the studies",
    "final-killed": "final training, two ranks, killed after its first epoch",
    "final-resumed": "final training gone on with; packed model and ONNX file",
    "final-whole": "the same final training, not killed; packed model and ONNX file",
}


def table_of(results: dict[str, Any]) -> str:
    seconds = [
        [STAGES[name], f"{stage['seconds']:.0f}"] for name, stage in results["stages"].items()
    ]
    bits, size = results["average_bits"], results["size_bytes"]
    foretold, agreed = results["size_bytes_predicted"], results["onnx_same_class"]
    same = "the same bits" if results["resumed_to_same_bits"] else "OTHER bits"
    kept = "all kept" if results["finished_trials_kept"] else "NOT all kept"
    facts = f"""
Finished trials were {kept}, and the final training that was killed ended in {same} as the one
that was not. The model has {bits:.3f} average bits and {size:,} bytes, {foretold:,} foretold.
Of one batch of test images the ONNX file puts {agreed:.0%} into the class that the packed model
does; outputs differ by {results["onnx_largest_difference"]:.1e} at most."""
    return f"{table(['stage', 'seconds'], seconds)}\n{facts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if not options.summary:
        if options.folder is None:
            parser.error("expected a folder to work in, or --summary")
        write_json(HERE / "results.json", prove(options.folder.absolute()))
    results = read_json(HERE / "results.json")
    write_json(HERE / "summary.json", summary_of(results))
    write_between(HERE / "README.md", {"stages": table_of(results)})


if __name__ == "__main__":
    main()
