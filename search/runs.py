"""Who worked on a study, when, with what: one entry for each time that it was begun or resumed."""

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json
from adq.search.folder import TRIALS, StudyFolder

SCHEMA = "adq-runs/1"
RUNS = "runs.json"
PACKAGES = ("adq-search", "torch", "optuna", "ray")


@dataclass(frozen=True)
class Run:
    """One process that worked on a study.

    `begun` is in UTC, to the second; `command` as a command line gives it; `trials` how many
    trials had a record by then; `threads` what a training uses of the CPU.
    """

    begun: str
    command: str
    trials: int
    device: str
    threads: int
    system: str
    versions: dict[str, str]


def note_run(folder: StudyFolder, command: str, device: torch.device, threads: int) -> None:
    """Add this process to the study's runs; whoever calls holds the study's lock."""
    run = Run(
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        trials=len(list((folder.path / TRIALS).glob("*.json"))),
        device=device_name(device),
        threads=threads,
        system=platform.platform(),
        versions={"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    )
    runs = [asdict(each) for each in (*read_runs(folder), run)]
    write_json(folder.file(RUNS), {"schema": SCHEMA, "runs": runs})


def read_runs(folder: StudyFolder) -> tuple[Run, ...]:
    """The runs, oldest first; none for a study of a version that kept none.

    Raises InputError when the file is damaged.
    """
    path = folder.file(RUNS)
    if not path.exists():
        return ()
    data: Any = read_json(path)
    try:
        return tuple(Run(**run) for run in data["runs"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None


def device_name(device: torch.device) -> str:
    """Like `cuda: NVIDIA H200`, or `cpu: 2 × AMD EPYC 9R14`."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {os.cpu_count()} × {_processor()}"


def _processor() -> str:
    """The processor's name, which Python's platform module does not know on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
