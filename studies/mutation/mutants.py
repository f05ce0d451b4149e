"""The mutants of a file: mutmut's operators, applied one at a time by libcst.

mutmut itself neither mutates decorated functions (here every `@torch.no_grad()`) nor module
level, and swaps functions at run time, which `torch.compile` and pickling notice; so only its
operators are taken, and a mutant is a whole file.
"""

import difflib
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

TABLES = {"__all__"}
NO_CALLS = {"len", "isinstance", "TypeVar", "cast"}
"""Calls left alone: a type's; len's and isinstance's, as in mutmut, which would only crash."""
SAYING = {"warn", "print", "say", "_expect"}
"""Whose strings are texts for people."""


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    number: int
    """Among the mutants of its line."""
    function: str
    operator: str
    module: cst.Module
    before: cst.CSTNode
    after: cst.CSTNode

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}#{self.number}"

    def code(self) -> str:
        return self.module.deep_replace(self.before, self.after).code  # type: ignore[union-attr]

    def change(self) -> str:
        """The lines taken out and put in, without their indent."""
        old, new = self.module.code.splitlines(), self.code().splitlines()
        found = {"-": [], "+": []}
        for line in difflib.unified_diff(old, new, n=0, lineterm=""):
            if line[0] in found and not line.startswith(("---", "+++")):
                found[line[0]].append(line[1:].strip())
        return " ".join(found["-"]) + "  →  " + " ".join(found["+"])

    def viable(self) -> bool:
        """Python takes it."""
        try:
            compile(self.code(), self.file, "exec")
        except SyntaxError:
            return False
        return True


@lru_cache(maxsize=4)
def mutants_of(root: Path, file: str) -> list[Mutant]:
    module = cst.parse_module((root / file).read_text(encoding="utf-8"))
    wrapper = MetadataWrapper(module, unsafe_skip_copy=True)
    visitor = _Visitor(file, module)
    wrapper.visit(visitor)
    return visitor.mutants


def named(root: Path, name: str) -> Mutant:
    file = name.partition(":")[0]
    return next(mutant for mutant in mutants_of(root, file) if mutant.name == name)


def found_again(root: Path, row: dict[str, str]) -> Mutant | None:
    """The mutant with a row's function, operator and change in code that may have moved since."""
    file = row["mutant"].partition(":")[0]
    for mutant in mutants_of(root, file) if (root / file).exists() else ():
        alike = (mutant.function, mutant.operator) == (row["function"], row["operator"])
        if alike and mutant.change() == row["change"]:
            return mutant
    return None


def sample(names: list[str], count: int, seed: int) -> list[str]:
    """`count`, uniformly without replacement; a larger count begins with the same."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order[:count]


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, file: str, module: cst.Module) -> None:
        super().__init__()
        self.file = file
        self.module = module
        self.mutants: list[Mutant] = []
        self._above: list[cst.CSTNode] = []
        self._on_line: dict[int, int] = {}

    def on_visit(self, node: cst.CSTNode) -> bool:
        wanted = not _left_alone(node)
        if wanted:
            for kind, operator in mutation_operators:
                if isinstance(node, kind):
                    name = operator.__name__.removeprefix("operator_")
                    for after in operator(node):
                        if self._telling(name, node, after):
                            self._add(node, after, name)
        self._above.append(node)
        return wanted

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._above.pop()

    def _telling(self, operator: str, node: cst.CSTNode, after: cst.CSTNode) -> bool:
        """Not one of the many that can only crash, and would raise the score for nothing: of an
        argument made None or dropped, a dropped keyword or last argument stays; of what is None in
        place of its value, attributes and items; of a string's three mutants, one."""
        if operator == "arg_removal":
            assert isinstance(node, cst.Call)
            assert isinstance(after, cst.Call)
            gone = next(arg for arg in node.args if not any(arg is one for one in after.args))
            optional = gone.keyword is not None or gone is node.args[-1]
            return len(after.args) < len(node.args) and optional and not _is_strict(gone)
        if operator == "assignment":
            targets = node.targets if isinstance(node, cst.Assign) else [node]
            return not any(isinstance(one.target, cst.Name | cst.Tuple) for one in targets)
        if operator == "string":
            calls = (one for one in self._above if isinstance(one, cst.Call))
            saying = any(_called(call) in SAYING for call in calls)
            return "XX" in _code(after) and not saying
        return True

    def _add(self, node: cst.CSTNode, after: cst.CSTNode, operator: str) -> None:
        line = self._line(node)
        number = self._on_line[line] = self._on_line.get(line, 0) + 1
        names = [n.name.value for n in self._above if isinstance(n, cst.FunctionDef | cst.ClassDef)]
        self.mutants.append(
            Mutant(self.file, line, number, ".".join(names), operator, self.module, node, after)
        )

    def _line(self, node: cst.CSTNode) -> int:
        """Operators like `is` may have no position: then what holds them has."""
        for one in (node, *reversed(self._above)):
            place = self.get_metadata(PositionProvider, one, None)
            if place is not None:
                return place.start.line
        raise ValueError(f"{self.file}: a node without a position")


def _left_alone(node: cst.CSTNode) -> bool:
    """Neither this node nor what it holds changes what the program does, or it is a text."""
    match node:
        case cst.Annotation() | cst.Decorator() | cst.Raise() | cst.Import() | cst.ImportFrom():
            return True
        case cst.Assert():  # of what can't happen, as zip's strict
            return True
        case cst.Arg():
            return _is_strict(node)
        case cst.Expr(value=cst.SimpleString() | cst.ConcatenatedString()):
            return True
        case cst.If():
            return _code(node.test) == "TYPE_CHECKING"
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
            return name in TABLES or _code(node.value).startswith(("Literal[", "TypeVar("))
        case cst.Call():
            return _called(node) in NO_CALLS or _called(node).endswith(("Error", "Warning"))
    return False


def _is_strict(argument: cst.Arg) -> bool:
    return argument.keyword is not None and argument.keyword.value == "strict"


def _called(call: cst.Call) -> str:
    return _code(call.func).rpartition(".")[2]


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)
