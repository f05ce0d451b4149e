"""What is worked out before training: layers, limits, objectives, and every way to refuse."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_task
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from toy_space import largest, smallest

from adq.quant.apply import quantize
from adq.quant.errors import InputError
from adq.quant.export.packed import save_packed
from adq.search.budget import OPTION_OF
from adq.search.config import StudyConfig
from adq.search.problem import Problem, make_problem, pick_device
from adq.search.space import cost_range
from adq.search.task import Task

NAMES = ["conv1", "conv2", "conv3", "hidden", "out"]
WEIGHTS = [6 * 9, 6 * 8 * 9, 8 * 12 * 9, 12 * 13, 13 * 10]
MACS = [54 * 64, 432 * 9, 864, 156, 130]  # 8x8 and 3x3 positions, then one
CHANNELS = [6, 8, 12, 13, 10]


def problem_of(task: Task | None = None, **options: Any) -> Problem:
    settings = {"budget_bits": 4.0, "bits": (2, 3, 4)} | options
    config = StudyConfig(task="tiny_task:make_task", **settings)
    return make_problem(config, task or tiny_task.make_task())


def refused(task: Task | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        problem_of(task, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layers_and_costs_are_those_of_the_net_by_hand(tmp_path: Path) -> None:
    problem = problem_of(act_bits=(4, 0), first_last_bits=6)
    assert [la.name for la in problem.layers] == NAMES
    assert [la.weight_numel for la in problem.layers] == WEIGHTS
    assert [la.macs for la in problem.layers] == MACS
    bits = problem.space.bit_vector([(6, 6), (2, 4), (3, 0), (4, 4), (6, 6)])
    costs = problem.costs.costs(bits)
    weight, act = [6, 2, 3, 4, 6], [6, 4, 32, 4, 6]
    assert costs.average_bits == sum(map(lambda n, b: n * b, WEIGHTS, weight)) / sum(WEIGHTS)
    searched = slice(1, 4)
    assert costs.average_bits_searched == (
        sum(map(lambda n, b: n * b, WEIGHTS[searched], weight[searched])) / sum(WEIGHTS[searched])
    )
    assert costs.bops == sum(map(lambda m, w, a: m * w * a, MACS, weight, act))
    inputs = sum(4 * (2**a - 1 + 2) for a in act if a != 32)
    packed = sum(
        math.ceil(n * b / 8) + 4 * (2**b + c)
        for n, b, c in zip(WEIGHTS, weight, CHANNELS, strict=True)
    )
    rest = 4 * (6 + 8 + 12 + 13 + 10)  # five biases, two of them of folded BatchNorms
    model = quantize(problem.initial_model, bits, problem.calibration, problem.config.scheme)
    save_packed(model, tmp_path / "m", problem.model_metadata("uniform-4"))
    stored = load_file(tmp_path / "m").values()
    assert sum(t.nbytes for t in stored) == packed + inputs + rest
    assert costs.size_bytes == (tmp_path / "m").stat().st_size


def test_limits_and_objectives_follow_the_budgets() -> None:
    problem = problem_of(budget_size_mb=0.0128, budget_gbops=0.00035)
    assert problem.limits == {"average_bits": 4.0, "size_bytes": 12_800.0, "bops": 350_000.0}
    assert problem.objectives == ("average_bits", "size_bytes", "bops")
    assert problem_of().objectives == ("average_bits",)


def test_a_choice_of_input_bits_makes_bit_operations_an_objective() -> None:
    assert problem_of(act_bits=(4, 8)).objectives == ("average_bits", "bops")
    both = problem_of(act_bits=(4, 8), budget_gbops=0.0003)
    assert both.objectives == ("average_bits", "bops")
    alone = problem_of(budget_bits=None, act_bits=(4, 8), budget_gbops=0.0003)
    assert alone.objectives == ("bops",)


class Residual(tiny_task.TinyNet):
    """The same layers, with conv2 beside conv3 on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(6, 12, 1, stride=2)
        self.conv3 = nn.Conv2d(6, 12, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + self.conv3(x)).mean((2, 3))
        return self.out(F.relu(self.hidden(x)))


def groups(**options: Any) -> list[tuple[str, ...]]:
    task = replace(tiny_task.make_task(), model=Residual)
    return [group.names for group in problem_of(task, **options).space.groups]


def test_ties_are_traced_given_or_none() -> None:
    alone = [(name,) for name in NAMES]
    assert groups() == [("conv1",), ("conv2", "conv3"), ("hidden",), ("out",)]
    assert groups(ties="none") == alone
    given = [("conv1",), ("conv2",), ("conv3", "hidden"), ("out",)]
    assert groups(ties="hidden=conv3") == given  # instead of those traced
    assert groups(ties=[["hidden", "conv3"]]) == given
    pinned = [("conv1",), ("conv2",), ("conv3", "hidden"), ("out",)]
    assert groups(ties="conv1=conv2,conv3=hidden=out") == pinned
    unpinned = [("conv1", "conv2"), ("conv3", "hidden", "out")]
    assert groups(ties="conv1=conv2,conv3=hidden=out", first_last_bits=0) == unpinned
    assert [group.names for group in problem_of().space.groups] == alone  # a chain ties nothing


def test_ties_of_a_layer_that_is_not_there_are_refused() -> None:
    text = refused(ties="conv2=conv33")
    assert text == "ties: 'conv33' is not a layer that can be quantized; did you mean 'conv3'?"
    assert "ties: 'bn1' is not a layer that can be quantized" in refused(ties="bn1=conv2")


def test_layers_are_given_bits_of_their_own() -> None:
    problem = problem_of(
        layers="conv2=3,h*=2+4/8", act_bits=(4, 8), first_last_bits=6, budget_bits=3.5
    )
    assert [g.weight for g in problem.space.groups] == [(6,), (3,), (2, 3, 4), (2, 4), (6,)]
    assert [g.act for g in problem.space.groups] == [(6,), (4, 8), (4, 8), (8,), (6,)]
    text = refused(layers="convv2=3")
    assert text.startswith("layers: 'convv2' matches no layer that can be quantized; did you mean")
    assert "leaves nothing to search" in refused(layers="*=4")


def test_tied_inputs_start_from_ranges_of_their_own() -> None:
    task = replace(tiny_task.make_task(), model=Residual)
    problem = problem_of(task, act_bits=(4, 0), ties="conv3=hidden", first_last_bits=0)
    ranges = problem.input_ranges(problem.initial_model)
    assert sorted(ranges) == sorted((name, 4) for name in NAMES)
    assert ranges["conv3", 4] != ranges["hidden", 4]


def test_measuring_alone_needs_no_budget() -> None:
    config = StudyConfig(task="tiny_task:make_task")
    with pytest.raises(InputError, match="no budget"):
        make_problem(config, tiny_task.make_task())
    assert make_problem(config, tiny_task.make_task(), budgeted=False).limits == {}


def test_a_group_size_that_divides_no_row_is_refused() -> None:
    # rows of 9, 54, 72, 12 and 13 weights
    assert refused(group_size=7) == (
        "group-size 7 divides no layer's rows, which have 9, 12, 13, 54, 72 weights: "
        "give a divisor of one of them"
    )
    assert problem_of(group_size=13).costs.group_size == 13


@pytest.mark.parametrize("name", list(OPTION_OF))
@pytest.mark.parametrize("first_last", [0, 8])
@pytest.mark.parametrize("act_bits", [(8,), (4, 8)])
def test_the_printed_ends_of_a_range_can_be_searched(
    name: str, first_last: int, act_bits: tuple[int, ...]
) -> None:
    option, _ = OPTION_OF[name]
    field = option.replace("-", "_")
    common = {"budget_bits": None, "first_last_bits": first_last, "act_bits": act_bits}
    if name == "latency_s":
        common["latency"] = "x86-avx2-core"
    texts = [refused(**common | {field: value}) for value in (1e-9, 1e9)]
    assert texts[0].startswith(f"{option} 1e-09 is below the smallest reachable: ")
    assert texts[1].startswith(f"{option} 1e+09 is above the largest reachable: ")
    ends = re.search(r"reaches (\S+) to (\S+)$", texts[0])
    assert ends is not None
    assert texts[1].endswith(ends[0])
    low, high = (problem_of(**common | {field: float(end)}) for end in ends.groups())
    space = low.space
    low_end, high_end = (
        low.costs.totals(space.bit_vector(p)) for p in (smallest(space), largest(space))
    )
    assert low_end[name] <= low.costs.limits(low.limits)[name] <= low_end[name] * 1.002
    assert high_end[name] * 0.998 <= high.costs.limits(high.limits)[name] <= high_end[name]


def test_one_seed_gives_one_model_and_one_set_of_samples() -> None:
    def start(seed: int) -> list[torch.Tensor]:
        problem = problem_of(seed=seed)
        batches = [part for batch in problem.calibration for part in batch]
        return [*problem.initial_model.state_dict().values(), *batches]

    torch.manual_seed(1)
    first = start(3)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, start(3)))
    different = [not torch.equal(a, b) for a, b in zip(first, start(4), strict=True)]
    assert different[0]  # the first layer's weights
    assert different[-1]  # the last batch's labels


def test_building_a_problem_leaves_the_callers_random_state_and_the_model_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    built = tiny_task.TinyNet()
    before = copy.deepcopy(built.state_dict())
    torch.manual_seed(9)
    problem = problem_of(replace(tiny_task.make_task(), model=lambda: built))
    assert torch.equal(torch.rand(2), expected)
    after = problem.initial_model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)  # BatchNorm's too
    assert all(module.training for module in problem.initial_model.modules())
    assert not any(m._forward_hooks for m in problem.initial_model.modules())


def test_calibration_takes_the_leading_samples_and_no_more() -> None:
    problem = problem_of()
    # 8 batches of 60 fit into 512; the rest of the ninth would weigh as much as a whole one
    assert [len(y) for _, y in problem.calibration] == [60] * 8
    batch = (torch.zeros(400, 1, 8, 8), torch.zeros(400, dtype=torch.long))
    many = problem_of(replace(tiny_task.make_task(), train=[batch] * 4))
    assert [len(y) for _, y in many.calibration] == [400]
    once = problem_of(replace(tiny_task.make_task(), train=[(batch[0][:7], batch[1][:7])]))
    assert [len(y) for _, y in once.calibration] == [7]
    used_up = replace(tiny_task.make_task(), train=iter([batch]))
    with pytest.raises(InputError, match="iterated again and again"):
        problem_of(used_up)


def test_a_single_choice_is_refused() -> None:
    assert "leaves nothing to search" in refused(bits=(4,), budget_bits=4.0, first_last_bits=0)
    inputs_alone = problem_of(bits=(3,), act_bits=(4, 8), budget_bits=None, budget_gbops=3e-4)
    assert inputs_alone.space.size == 8
    # with no weights to search, the average over the searched layers is that over all
    costs = inputs_alone.costs.costs(inputs_alone.space.bit_vector(smallest(inputs_alone.space)))
    assert costs.average_bits_searched == costs.average_bits


def test_a_model_that_is_none_is_refused() -> None:
    text = refused(replace(tiny_task.make_task(), model=lambda: "a net"))  # type: ignore[arg-type, return-value]
    assert text.endswith("model() must give a torch.nn.Module, gave str")


def test_an_error_in_the_users_model_or_data_says_where() -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no weights\nhere")

    text = refused(replace(tiny_task.make_task(), model=broken))
    assert text.startswith("task 'tiny_task:make_task', building the model and first batches: ")
    assert f"RuntimeError: no weights here ({__file__}:" in text
    wide = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]
    text = refused(replace(tiny_task.make_task(), train=wide))
    assert text.startswith("task 'tiny_task:make_task', a forward pass: RuntimeError: ")


def test_empty_training_batches_are_refused() -> None:
    assert "the training batches are empty" in refused(replace(tiny_task.make_task(), train=[]))


def test_a_model_of_too_few_layers_is_refused() -> None:
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 10))
    text = refused(replace(tiny_task.make_task(), model=lambda: small))
    assert "needs at least 3" in text


def test_a_small_batch_gets_one_thread_and_a_large_one_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    task = tiny_task.make_task()
    assert problem_of(task).threads == 1  # 60 samples of 8494 MACs
    batch = (torch.zeros(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.long))
    large = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 2000), nn.Linear(2000, 3000), nn.Linear(3000, 10)
    )
    wide = replace(task, model=lambda: large, train=[batch])
    assert problem_of(wide).threads == 6  # 1000 samples of 6,158,000 MACs


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "mps", "", "cpu:x"):
        with pytest.raises(InputError, match=r"device: expected cpu, cuda, cuda:N or auto, got"):
            pick_device(name)


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match=r"device cuda:1: no CUDA device .*--device cpu or auto"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda")
    with pytest.raises(InputError, match=r"device cuda:2: there are 2 CUDA devices"):
        pick_device("cuda:2")


def test_inputs_in_fp32_widen_what_sizes_are_in_reach() -> None:
    """They take no bytes for thresholds, and the most bit operations."""
    sizes = {}
    for act in ((0,), (8,), (0, 8)):
        costs = problem_of(act_bits=act, budget_bits=4.0, first_last_bits=0)
        sizes[act] = cost_range(costs.space, costs.costs)
    (least, _), (_, most), (both_least, both_most) = (sizes[act] for act in ((0,), (8,), (0, 8)))
    assert both_least["size_bytes"] == least["size_bytes"]
    assert both_most["size_bytes"] == most["size_bytes"]
    assert both_most["bops"] == sizes[(0,)][1]["bops"]


def test_budgets_that_can_be_met_one_by_one_but_not_together_are_refused() -> None:
    both = problem_of(act_bits=(0, 8), budget_bits=4.0, first_last_bits=0)
    (least, _) = cost_range(both.space, both.costs)
    ends = both.costs.in_units(least)
    options = {"budget_size_mb": ends["size_bytes"] / 1e6, "budget_gbops": ends["bops"] / 1e9}
    for name, value in options.items():
        problem_of(act_bits=(0, 8), first_last_bits=0, budget_bits=None, **{name: value})
    with pytest.raises(InputError, match="can be met one by one, but not together"):
        problem_of(act_bits=(0, 8), first_last_bits=0, budget_bits=None, **options)
