"""From scores to a front: `adq.search(task, budget=...)` runs a study.

    task         what a user brings; built-in ones in tasks/
    config       the options of a study
    budget       hard limits
    problem      layers, choices, costs and limits, before training
    space        the choices of every layer
    fp32         the FP32 model, trained or loaded once
    sensitivity  the proxies' scores
    knapsack, seeds   exact solutions along the budget range
    lattice, history  the space as arrays, and results in the order of telling
    samplers     what is tried next
    ladder       which candidates are worth a longer training
    study        ask, tell, resume
    candidate    one bit vector, fine-tuned and measured
    pareto, front     what is not beaten
    run          all of it in order
    folder       where everything lies
    report       JSON, CSV, PNG, HTML

The package is callable: `adq.search` is its name as well as the function's, and an import of any
module below would otherwise hide the function.
"""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from adq.search.api import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
