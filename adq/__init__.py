"""ADQ: mixed-precision search for PyTorch.

    front = adq.search("digits", budget=adq.Budget(bits=2.8))
    model = adq.load(front.folder)

The names below are imported when they are first used, so that `import adq` is light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adq import search
    from adq.loading import load
    from adq.quant.apply import quantize
    from adq.quant.errors import InputError
    from adq.quant.evaluate import accuracy
    from adq.quant.flat import update_codebooks
    from adq.quant.scheme import Scheme
    from adq.quant.spec import BitVector
    from adq.search.api import resume
    from adq.search.budget import Budget
    from adq.search.front import Front, Point
    from adq.search.observer import Observer
    from adq.search.task import Task

_HOME = {
    "BitVector": "adq.quant.spec",
    "Budget": "adq.search.budget",
    "Front": "adq.search.front",
    "InputError": "adq.quant.errors",
    "Observer": "adq.search.observer",
    "Point": "adq.search.front",
    "Scheme": "adq.quant.scheme",
    "Task": "adq.search.task",
    "accuracy": "adq.quant.evaluate",
    "load": "adq.loading",
    "quantize": "adq.quant.apply",
    "resume": "adq.search.api",
    "update_codebooks": "adq.quant.flat",
}

__all__ = [
    "search",
    "resume",
    "quantize",
    "update_codebooks",
    "load",
    "accuracy",
    "Task",
    "Budget",
    "BitVector",
    "Scheme",
    "Front",
    "Point",
    "Observer",
    "InputError",
]


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("adq.search")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'adq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
