"""This package: the default proxies and the exact knapsack that a search starts from."""

import tempfile
from pathlib import Path

from searching import BUDGET, CHOICES, PINNED, Inputs, main
from torch.nn import functional as F

from adq.search.config import StudyConfig
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import make_problem
from adq.search.seeds import make_seeds
from adq.search.sensitivity import sensitivities
from adq.search.task import Task


def search(inputs: Inputs) -> dict[str, int]:
    batches = inputs.batches()
    config = StudyConfig(
        budget_bits=BUDGET, bits=CHOICES, act_bits=(0,), first_last_bits=PINNED, device="cpu"
    )
    task = Task(lambda: inputs.model, F.cross_entropy, batches, batches, batches)
    problem = make_problem(config, task)
    with tempfile.TemporaryDirectory() as folder:
        found = sensitivities(problem, inputs.model, StudyFolder(Path(folder)), Observer())
    limits = problem.costs.limits(problem.limits)
    best, *_ = make_seeds(problem.space, problem.costs, limits, found, count=1)
    return dict(problem.space.bit_vector(best).weight)


if __name__ == "__main__":
    main(search)
