"""What is searched, worked out before anything is trained: layers, choices, costs, limits."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adq.proxies.costs import CostModel
from adq.proxies.latency import RunWider
from adq.proxies.ties import trace_ties
from adq.quant.attention import expose_attention_
from adq.quant.batches import Batch, batch_size, seeded, take_samples, to_device
from adq.quant.calibrate import Ranges, input_ranges
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers
from adq.search.budget import OPTION_OF, check_reachable
from adq.search.config import StudyConfig, layer_bits, tie_groups
from adq.search.knapsack import solve
from adq.search.latency import latency_model
from adq.search.space import Space, cost_range, make_space, objectives, option_terms
from adq.search.task import Task, task_call

CALIBRATION_SAMPLES = 512
SMALL_BATCH_MACS = 10**9


@dataclass(frozen=True)
class Problem:
    """A task under a configuration: everything that follows from them without training.

    `limits` are the budgets (cost name -> limit); `objectives` the costs that the study minimises
    beside maximising the metric; `calibration` training batches that stay the same throughout.
    """

    config: StudyConfig
    task: Task
    device: torch.device
    initial_model: nn.Module
    layers: tuple[LayerInfo, ...]
    space: Space
    costs: CostModel
    limits: dict[str, float]
    objectives: tuple[str, ...]
    calibration: list[Batch]

    @property
    def threads(self) -> int:
        """How many CPU threads one training step is worth.

        Waking a second thread that does not spin costs more than it saves on small batches. Ratio
        of a training step's time with two threads to that with one, on two cores: 2.9 at 1.2·10⁷
        MACs a batch, 1.8 at 10⁸, 1.2 at 6.5·10⁸, 0.7 at 5·10⁹. The rule follows from the problem
        alone, never from a timing, since the number of threads changes the last bits of sums.
        """
        macs = sum(layer.macs for layer in self.layers) * batch_size(self.calibration[0])
        given = self.config.cpus_per_trial or torch.get_num_threads()
        return 1 if macs < SMALL_BATCH_MACS else given

    @property
    def ends(self) -> dict[str, float]:
        """Each objective -> its limit, or the largest cost that the choices of bits reach."""
        _, largest = cost_range(self.space, self.costs)
        reached = self.costs.in_units(largest)
        return {name: self.limits.get(name, reached[name]) for name in self.objectives}

    def input_ranges(self, fp32: nn.Module) -> Ranges:
        """Where the input quantizers of every choice start, from the FP32 model's inputs."""
        options = self.space.bit_options.items()
        act = {name: sorted({a for _, a in pairs if a is not None}) for name, pairs in options}
        wanted = {name: bits for name, bits in act.items() if bits}
        return input_ranges(fp32, wanted, self.calibration, self.config.scheme.act)

    def model_metadata(self, point: str) -> dict[str, Any]:
        """What a packed file says of itself beside its bits."""
        return {"task": self.config.task, "model": self.config.model, "point": point}

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """Run a step that calls the user's code; its errors become one line."""
        return task_call(self.config.task, what, function)


def make_problem(config: StudyConfig, task: Task, *, budgeted: bool = True) -> Problem:
    """Build the model, trace it, and check that every budget can be met.

    A study must have a budget; measuring alone (`budgeted=False`) needs none.

    Raises InputError for a device that is not there, a task whose code fails, ties or bits of
    layers that are not there, or a budget outside the reachable range.
    """
    device = pick_device(config.device)
    limits = config.budget.limits() if budgeted else {}

    for split in (task.train, task.validation, task.test):
        if isinstance(split, Iterator):
            raise InputError(
                f"task {config.task!r}: expected batches that can be iterated again and again "
                f"(a list, a DataLoader), got a {type(split).__name__} that is used up by one pass"
            )

    def build() -> tuple[nn.Module, list[Batch]]:
        with seeded(config.seed):
            model = task.model()
            if not isinstance(model, nn.Module):
                raise InputError(
                    f"task {config.task!r}: model() must give a torch.nn.Module, gave "
                    f"{type(model).__name__}"
                )
            expose_attention_(model)
            return model.to(device), _whole(take_samples(task.train, CALIBRATION_SAMPLES))

    model, calibration = task_call(config.task, "building the model and first batches", build)
    if not calibration:
        raise InputError(f"task {config.task!r}: the training batches are empty")

    def inputs() -> Any:
        return to_device(take_samples(calibration, 2)[0][0], device)

    layers = task_call(config.task, "a forward pass", lambda: trace_layers(model, inputs()))
    if config.ties == "auto":
        ties = task_call(
            config.task,
            "tracing tied layers (not with --ties none)",
            lambda: trace_ties(model, inputs(), layers),
        )
    else:
        ties = given_ties(config.ties, [layer.name for layer in layers])
    space = make_space(
        layers,
        config.bits,
        config.act_bits,
        config.first_last_bits,
        ties,
        layer_bits(config.layers) if config.layers else (),
    )
    if space.size == 1 and config.trials > 1:
        raise InputError(
            "bits, act-bits, layers: a single choice leaves nothing to search; --trials 1 trains it"
        )
    searched = space.searched or tuple(layer.name for layer in layers)
    latency = latency_model(config) if budgeted else None
    if latency is not None:
        latency = RunWider(latency, space.bit_options)
    costs = CostModel(model, layers, searched, config.group_size, latency)
    smallest, largest = (costs.in_units(ends) for ends in cost_range(space, costs))
    if space.size == 1:  # nothing is given up, whatever the budget
        largest = dict.fromkeys(largest, math.inf)
    check_reachable(limits, smallest, largest)
    if len(limits) > 1:
        terms = option_terms(space, costs)
        indifferent = [np.zeros(len(group)) for group in terms]
        if solve(indifferent, terms, costs.limits(limits)) is None:
            raise InputError(
                f"the budgets of {' and '.join(OPTION_OF[name][0] for name in limits)} can be met "
                "one by one, but not together: give one of them more room"
            )
    return Problem(
        config,
        task,
        device,
        model,
        layers,
        space,
        costs,
        limits,
        objectives(space, limits),
        calibration,
    )


def given_ties(text: str, layers: Sequence[str]) -> list[list[str]]:
    """The groups of `--ties`; InputError for a name that is none of the layers'."""
    groups = [] if text == "none" else tie_groups(text)
    for name in (name for group in groups for name in group):
        if name not in layers:
            near = difflib.get_close_matches(name, layers, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"ties: {name!r} is not a layer that can be quantized{hint}")
    return groups


def _whole(batches: list[Batch]) -> list[Batch]:
    """The batches without a short last one, which would count as much as a full one in an average
    over batches."""
    if len(batches) > 1 and batch_size(batches[-1]) < batch_size(batches[0]):
        return batches[:-1]
    return batches


def pick_device(name: str) -> torch.device:
    """The torch device of `cpu`, `cuda`, `cuda:N` or `auto`; InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"device {name}: no CUDA device is available here; use --device cpu or auto"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device
