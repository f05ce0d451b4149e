"""Would the tests notice? Mutants of quant/ and proxies/, and what the tests say of each.

    python studies/mutation/run.py [--quant 160] [--proxies 90] [--again]

Needs the extra `mutation` (pip install -e '.[test,mutation]'). Freezes the repository's HEAD, draws
the mutants, and runs each against its tests: an hour or two of one core. Writes results.json (one
line a mutant), summary.json and the tables of README.md.
What is in results.json is not run again: a second start goes on, a larger number adds mutants.
--again runs the survivors against the tests as they are committed now, on the code as it was.
Reasons why a survivor is no hole in the tests are in verdicts.json, by mutant.
"""

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import sessions
from asked import Asked
from mutants import Mutant, found_again, mutants_of, named, sample

HERE = Path(__file__).resolve().parent
HOME = HERE.parents[1]
RESULTS = HERE / "results.json"
SEED = 8
PACKAGES = ("quant", "proxies")
MIRROR_S, OTHERS_S = 20.0, 15.0
"""Processor time for the tests of a file's mirror, and for those of others."""
CONTROL = 25
"""After so many mutants the same tests are run on the code itself: they must pass."""


Row = dict[str, Any]
Results = dict[str, Any]


def freeze(folder: Path, commit: str) -> Path:
    """The repository at `commit`, and in site/ its packages laid out as installed."""
    root = folder / commit[:12]
    shutil.rmtree(root, ignore_errors=True)
    (root / "site/adq").mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", commit], cwd=HOME, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x"], cwd=root, check=True, input=archive.stdout)
    for path in (root / "adq").iterdir():
        (root / "site/adq" / path.name).symlink_to(path)
    for package in ("quant", "proxies", "search"):
        (root / "site/adq" / package).symlink_to(root / package)
    for library in (HOME / "quant").rglob("*.so"):  # what setup.py has compiled
        shutil.copy(library, root / library.relative_to(HOME))
    compileall.compile_dir(root, quiet=1)
    return root


def possible(root: Path) -> dict[str, list[str]]:
    """The names of all mutants of each package."""
    kept = root.with_suffix(".json")
    if not kept.exists():
        names = {}
        for package in PACKAGES:
            files = [path for path in (root / package).rglob("*.py") if not _of_triton(path)]
            every = (m for path in files for m in mutants_of(root, str(path.relative_to(root))))
            names[package] = [mutant.name for mutant in every]
        kept.write_text(json.dumps(names), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def mixed(samples: list[list[str]]) -> list[str]:
    """In an order whose every beginning has its share of each."""
    places = [((at + 0.5) / len(names), name) for names in samples for at, name in enumerate(names)]
    return [name for _, name in sorted(places)]


def _of_triton(path: Path) -> bool:
    """A GPU's kernel, its launcher, or their compiler: without a GPU only the interpreter runs them
    (minutes a mutant)."""
    return "import triton" in path.read_text(encoding="utf-8")


def tested(root: Path, file: str, asked: Asked) -> Row:
    """What the file's tests say: the mirror's, and where they pass, the others'."""
    outcome, by, passed, cpu_s = "survived", None, 0, 0.0
    for files, limit_s in ((asked.mirror(file), MIRROR_S), (asked.others(file), OTHERS_S)):
        if files and outcome == "survived":
            report = sessions.run(root, files, limit_s)
            passed, cpu_s = passed + report.passed, cpu_s + report.cpu_s
            if report.code is None:
                outcome = "timed out"
            elif report.code != 0:
                outcome = "killed"
                by = report.failed[0] if report.failed else f"exit status {report.code}"
    return {"outcome": outcome, "by": by, "passed": passed, "cpu_s": round(cpu_s, 1)}


def tried(root: Path, mutant: Mutant, asked: Asked) -> Row:
    path = root / mutant.file
    whole, times = path.read_text(encoding="utf-8"), path.stat()
    try:
        path.write_text(mutant.code(), encoding="utf-8")
        return tested(root, mutant.file, asked)
    finally:
        path.write_text(whole, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def first_time(results: Results, folder: Path, counts: dict[str, int]) -> Iterator[Row]:
    """One row a mutant that has none; a row "control", of the same tests without it, now and then.
    What Python does not compile is passed over."""
    root = freeze(folder, results["commit"])
    every = possible(root)
    results["made"] = {package: len(names) for package, names in every.items()}
    names = mixed([sample(every[package], counts[package], SEED) for package in PACKAGES])
    have = {row["mutant"] for row in results["runs"]}
    asked = Asked(root)
    left = (named(root, name) for name in names if name not in have)
    for at, mutant in enumerate(filter(Mutant.viable, left), start=1):
        row = {
            "mutant": mutant.name,
            "function": mutant.function,
            "operator": mutant.operator,
            "change": mutant.change(),
        } | tried(root, mutant, asked)
        results["runs"].append(row)
        yield row
        if at % CONTROL == 0:
            name = f"control {at}: tests of {mutant.file}"
            results["runs"].append({"mutant": name} | tested(root, mutant.file, asked))
            yield results["runs"][-1]


def again(results: Results, folder: Path) -> Iterator[Row]:
    """The rows of survivors, each with what the code and the tests of today say of the same change
    as "after". Those whose change today's code has no place for stay as they are."""
    root = freeze(folder, head())
    asked = Asked(root)
    judged = json.loads((HERE / "verdicts.json").read_text(encoding="utf-8"))
    for row in results["runs"]:
        if row.get("after", row)["outcome"] == "survived" and row["mutant"] not in judged:
            mutant = found_again(root, row)
            if mutant is not None:
                row["after"] = tried(root, mutant, asked)
                yield row


def write_results(results: Results) -> None:
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in results["runs"])
    head = {key: value for key, value in results.items() if key != "runs"}
    text = json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n  {rows}\n ]\n}}\n'
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(RESULTS)


def head() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HOME, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", type=int, default=160)
    parser.add_argument("--proxies", type=int, default=90)
    parser.add_argument("--again", action="store_true", help="the survivors, with today's tests")
    parser.add_argument("--folder", type=Path, default=HOME / "build/mutation")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {"commit": head(), "seed": SEED, "made": {}, "runs": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    counts = {"quant": arguments.quant, "proxies": arguments.proxies}
    rows = again(results, folder) if arguments.again else first_time(results, folder, counts)
    for row in rows:
        write_results(results)
        found = row.get("after", row)
        print(row["mutant"], *(found[key] for key in ("outcome", "by", "cpu_s")), flush=True)
    import report  # imports adq, which a mutant's process must not inherit

    report.write(results)


if __name__ == "__main__":
    sys.exit(main())
