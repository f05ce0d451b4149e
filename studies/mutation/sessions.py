"""pytest in a process of its own, forked from one that has imported torch (3 s) but no adq."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    *("torch", "torchvision", "scipy.optimize", "sklearn.linear_model", "safetensors.torch"),
    *("pytest", "hypothesis.strategies", "numpy.testing", "torch.testing"),
]
CASES = 3
"""Of a parametrized test, evenly spaced."""
MORE_CPU_S, WALL_S = 60.0, 1800.0
"""A session may take so much processor time more than its tests are given, and so long in all."""
MEMORY_BYTES = 16 * 2**30  # addresses; a mutant that asks for more has failed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass
class Report:
    code: int | None = None
    """pytest's exit status; None when it ran out of time."""
    failed: list[str] = field(default_factory=list)
    """Tests, or files that could not be collected."""
    passed: int = 0
    cpu_s: float = 0.0


def run(root: Path, files: list[str], cpu_s: float) -> Report:
    """The first case of each test in `files`, then the second, then the third; after `cpu_s` of
    processor time no further test is begun. Ends at the first failure."""
    found = root / "report.json"
    found.unlink(missing_ok=True)
    process = _context.Process(target=_pytest, args=(root, files, cpu_s, found, root / "log.txt"))
    process.start()
    try:
        process.join(WALL_S)
    finally:
        code = process.exitcode
        _end(process)
    report = Report(None if code in (None, -signal.SIGXCPU, -signal.SIGKILL) else code)
    with suppress(OSError, json.JSONDecodeError):
        data = json.loads(found.read_text(encoding="utf-8"))
        report.cpu_s = data["cpu_s"]
        report.failed = [test for test, outcome in data["tests"].items() if outcome == "failed"]
        report.passed = sum(outcome == "passed" for outcome in data["tests"].values())
    return report


def _end(process: BaseProcess) -> None:
    """With all that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()


def _pytest(root: Path, files: list[str], cpu_s: float, found: Path, log: Path) -> None:
    os.setsid()
    limit = int(cpu_s + MORE_CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    site = str(root / "site")
    os.chdir(root)
    sys.path.insert(0, site)
    sys.dont_write_bytecode = True
    os.environ.update(
        PYTHONPATH=site,
        PYTHONDONTWRITEBYTECODE="1",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        CI="1",  # hypothesis draws the same examples each time and keeps no database
    )
    import pytest

    plugin = _Watcher(root, found, cpu_s)
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files], [plugin])
    plugin.write()
    sys.stdout.flush()
    os._exit(int(code))  # no wait for threads that a mutant may have left


class _Watcher:
    def __init__(self, root: Path, found: Path, cpu_s: float) -> None:
        self.root = root
        self.found = found
        self.cpu_s = cpu_s
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        functions: dict[str, list[Any]] = {}
        for item in items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        spaced = [_spaced(group) for group in functions.values()]
        items[:] = [group[at] for at in range(CASES) for group in spaced if at < len(group)]

    def pytest_collection_finish(self) -> None:
        import adq.proxies
        import adq.quant

        for package in (adq.quant, adq.proxies):
            file = Path(str(package.__file__)).resolve()
            assert file.is_relative_to(self.root), f"{file} is not of the frozen copy"

    def pytest_runtest_setup(self) -> None:
        if time.process_time() > self.cpu_s:
            import pytest

            pytest.skip("the time is over")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed" or report.nodeid not in self.outcomes:
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            self.write()

    def write(self) -> None:
        what = {"cpu_s": time.process_time(), "tests": self.outcomes}
        self.found.write_text(json.dumps(what), encoding="utf-8")


def _spaced(group: list[Any]) -> list[Any]:
    count = min(CASES, len(group))
    return [group[len(group) * i // count] for i in range(count)]
