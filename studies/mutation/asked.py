"""Which tests are asked about a file: its mirror's first, then those that import it."""

import ast
from collections.abc import Iterator
from pathlib import Path

FARTHEST = 1
"""A test that imports a module which imports the file is still asked."""


class Asked:
    """Of the repository at `root`: of each source file the test files, the mirror apart."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = {
            _module(root, path): path
            for package in ("quant", "proxies")
            for path in (root / package).rglob("*.py")
        }
        reads = {module: self._imports(path) for module, path in self.sources.items()}
        self.read_by: dict[str, set[str]] = {module: set() for module in self.sources}
        for module, imported in reads.items():
            for other in imported:
                self.read_by[other].add(module)
        support = {p.stem: self._imports(p) for p in (root / "tests/support").glob("*.py")}
        self.tests: dict[str, set[str]] = {}
        for package in ("quant", "proxies"):
            for path in sorted((root / "tests" / package).rglob("test_*.py")):
                more = (support[name] for name in _names(path) if name in support)
                found = self._imports(path).union(*more)
                self.tests[str(path.relative_to(root))] = found

    def mirror(self, file: str) -> list[str]:
        """tests/quant/test_x.py for quant/x.py, if there is one."""
        source = Path(file)
        mirror = str(Path("tests") / source.parent / f"test_{source.name}")
        return [mirror] if mirror in self.tests else []

    def others(self, file: str) -> list[str]:
        """The nearest first: those that import the file, then those that import who imports it."""
        near = {_module(self.root, self.root / file)}
        found: dict[str, None] = {}
        for _ in range(FARTHEST + 1):
            found |= dict.fromkeys(test for test, reads in self.tests.items() if reads & near)
            near = set().union(*(self.read_by[module] for module in near))
        return [test for test in found if test not in self.mirror(file)]

    def _imports(self, path: Path) -> set[str]:
        return _names(path) & self.sources.keys()


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(("adq", *parts)).removesuffix(".__init__")


def _names(path: Path) -> set[str]:
    """All that a file imports, by full name."""
    return set(_imported(ast.parse(path.read_text(encoding="utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
