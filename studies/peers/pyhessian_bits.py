"""PyHessian: the trace of each layer's Hessian, and a knapsack over Ω = trace/n · ‖Q(w) − w‖²
(HAWQ-V2, arXiv 1911.03852, equation 10). Q are the quantizers that the models get afterwards."""

import gc
import math
import warnings

import numpy as np
from pyhessian import hessian
from searching import BUDGET, Inputs, main
from torch.nn import functional as F

from adq.proxies.base import layer_errors
from adq.quant.scheme import Scheme
from adq.search.knapsack import solve, topped_up

IMAGES = 128  # more would not fit PyHessian's graphs of gradients into a laptop's memory


def search(inputs: Inputs) -> dict[str, int]:
    options = list(inputs.options.values())
    scores = [
        trace / n * np.array([error.square().sum().item() for error in errors])
        for trace, n, errors in zip(
            traces(inputs),
            inputs.sizes.values(),
            (layer_errors(inputs.model, [name], bits, Scheme())[0]
             for name, bits in inputs.options.items()),
            strict=True,
        )
    ]  # fmt: skip
    terms = [
        [{"bits": b * n} for b in bits]
        for bits, n in zip(options, inputs.sizes.values(), strict=True)
    ]
    limits = {"bits": math.floor(BUDGET * sum(inputs.sizes.values()))}
    choice = solve(scores, terms, limits)
    assert choice is not None  # two bits everywhere are within the budget
    choice = topped_up(scores, terms, limits, choice)
    return {name: bits[o] for (name, bits), o in zip(inputs.options.items(), choice, strict=True)}


def traces(inputs: Inputs) -> list[float]:
    """A run a layer, with its weight alone requiring a gradient; PyHessian's own rule ends it."""
    found = []
    batch = inputs.images[:IMAGES], inputs.labels[:IMAGES]
    inputs.model.requires_grad_(False)
    for name in inputs.sizes:
        weight = inputs.model.get_parameter(f"{name}.weight").requires_grad_()
        run = hessian(inputs.model, F.cross_entropy, data=batch, cuda=False)
        found.append(float(np.mean(run.trace())))
        weight.requires_grad_(False).grad = None
        del run
        gc.collect()
    return found


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a reference cycle, which is broken above
        main(search)
