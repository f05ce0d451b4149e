"""What is installed is what lies in the folders."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"adq": "adq", "proxies": "adq.proxies", "quant": "adq.quant", "search": "adq.search"}


def packages_on_disk() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *parts]))
    return found


def modules_on_disk() -> set[str]:
    return {
        "/".join([*FOLDERS[folder].split("."), *path.relative_to(ROOT / folder).parts])
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".c", ".css", ".js", ".json", ".py", ".jinja"} or path.name == "py.typed"
    }


def test_the_package_list_names_every_folder_with_code() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == packages_on_disk()
    folders_with_code = {path.parent for f in FOLDERS for path in (ROOT / f).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders_with_code)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")  # a build in the tree would leave its own copy there
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source]
    subprocess.run(command, check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_module_template_and_marker(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("adq/")}
    compiled = {n for n in inside if n.startswith("adq/quant/kernels/_counting.")}
    assert inside - compiled == modules_on_disk()


def test_a_wheel_runs_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import adq, adq.search.knapsack as k; print(k.__file__); adq.Budget(bits=2.8); "
        "from adq.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "list"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0].startswith(str(site))
    assert "no studies in runs" in done.stdout


@pytest.mark.parametrize("folder", ["proxies", "quant", "search"])
def test_no_room_imports_a_higher_one(folder: str) -> None:
    rooms = ["quant", "proxies", "search"]
    allowed = {f"adq.{room}" for room in rooms[: rooms.index(folder) + 1]}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] == "adq":
                    assert ".".join(name.split(".")[:2]) in allowed, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("library", "home"), [("triton", "quant/kernels"), ("ray", "search/executors")]
)
def test_heavy_libraries_are_imported_in_one_place_only(library: str, home: str) -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.is_relative_to(ROOT / home):
                continue
            lines = [line.strip() for line in path.read_text().splitlines()]
            found = [
                line for line in lines if line.startswith((f"import {library}", f"from {library}"))
            ]
            assert not found, f"{path}: {found}"
