"""Sensitivities of a study: measured once, kept exactly, the same in JSON and CSV."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_task
import torch
from torch import nn

from adq.quant.batches import take_samples
from adq.quant.errors import InputError
from adq.quant.evaluate import accuracy, evaluate
from adq.search import sensitivity
from adq.search.config import StudyConfig
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.sensitivity import (
    load_sensitivities,
    measure,
    rows,
    sensitivities,
    to_csv,
    trace_effort,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sensitivity, "trace_effort", lambda macs: (64, 4, 25))
    monkeypatch.setattr(sensitivity, "GRADIENT_SAMPLES", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem_of(**options: Any) -> Problem:
    settings = {"budget_bits": 4.0, "bits": (4, 2, 3)} | options
    return make_problem(StudyConfig(task="t", **settings), tiny_task.make_task())


def equal(a: Any, b: Any) -> bool:
    """Every field of two lists of sensitivities, seconds too."""
    return [x.to_json() for x in a] == [x.to_json() for x in b]


@pytest.mark.parametrize("macs", [1, 10**5, 4 * 10**7, 2 * 10**9, 10**12])
def test_the_effort_of_a_trace_is_bounded_in_time_and_memory(macs: int) -> None:
    samples, probes, micro_batch = trace_effort(macs)
    assert 16 <= samples <= 256
    assert probes in (8, 32)
    assert 1 <= micro_batch <= samples
    assert samples == 16 or samples * probes * macs <= 10**12
    assert micro_batch == 1 or micro_batch * macs <= 4 * 10**9
    if macs <= 10**8:  # the digits, and CIFAR-10's ResNet-20
        assert (samples, probes) == (256, 32)


def test_tables_have_a_row_a_layer_and_a_column_for_each_width_in_use() -> None:
    problem = problem_of()
    trace, fisher = measure(problem, problem.initial_model, Observer())
    assert (trace.proxy, trace.samples) == ("hessian-trace", 4)
    assert (fisher.proxy, fisher.samples) == ("fisher", 16)
    for found in (trace, fisher):
        assert found.weight.layers == ("conv1", "conv2", "conv3", "hidden", "out")
        assert found.weight.bits == (2, 3, 4, 8)  # 8 is the pinned layers'
        assert found.weight.score.shape == found.weight.stderr.shape == (5, 4)
        assert found.act is None  # every input has 8 bits: there is nothing to choose


def test_inputs_are_scored_where_there_is_a_choice_and_fp32_needs_no_score() -> None:
    problem = problem_of(act_bits=(0, 4, 8))
    trace, fisher = measure(problem, problem.initial_model, Observer())
    assert trace.act is None
    assert fisher.act is not None
    assert fisher.act.bits == (4, 8)
    assert fisher.act.score.shape == (5, 2)
    assert measure(problem_of(act_bits=(0,)), problem.initial_model, Observer())[1].act is None


def test_one_seed_measures_the_same_and_another_does_not() -> None:
    def scores(seed: int) -> list[np.ndarray]:
        problem = problem_of(seed=seed)
        model = problem_of().initial_model
        return [s.weight.score for s in measure(problem, model, Observer())]

    first = scores(0)
    assert all(map(np.array_equal, first, scores(0)))
    assert not any(map(np.array_equal, first, scores(1)))
    # on the same samples the seed decides the probes of the trace, and Fisher draws nothing
    problem = problem_of()
    reseeded = replace(problem, config=replace(problem.config, seed=1))
    trace, fisher = measure(reseeded, problem.initial_model, Observer())
    assert not np.array_equal(trace.weight.score, first[0])
    assert np.array_equal(fisher.weight.score, first[1])


def test_a_layer_scored_sensitive_is_sensitive() -> None:
    """A layer whose weights are zero loses nothing by quantization, whatever its bits."""
    problem = problem_of()
    model = problem.initial_model
    with torch.no_grad():
        model.hidden.weight.zero_()
    for found in measure(problem, model, Observer()):
        row = found.weight.layers.index("hidden")
        assert (found.weight.score[row] == 0).all()
        assert (found.weight.score[[0, 1]] >= 0).all()
    data = take_samples(problem.calibration, 8)
    assert evaluate(model, data, problem.task.loss, accuracy).samples == 8  # it still runs


def test_they_are_measured_once_a_study_and_read_back_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, problem = StudyFolder(tmp_path), problem_of(act_bits=(4, 8))
    first = sensitivities(problem, problem.initial_model, folder, Observer())
    assert json.loads((tmp_path / "sensitivity.json").read_text())["schema"] == "adq-sensitivity/1"

    def never(*args: Any) -> Any:
        raise AssertionError("measured twice")

    monkeypatch.setattr(sensitivity, "measure", never)
    again = sensitivities(problem, problem.initial_model, folder, Observer())
    assert equal(first, again)
    assert equal(first, load_sensitivities(folder))
    assert again[1].act is not None
    assert again[1].act.score.dtype == np.float64


def test_the_csv_has_a_row_for_every_entry(tmp_path: Path) -> None:
    problem = problem_of(act_bits=(4, 8))
    found = sensitivities(problem, problem.initial_model, StudyFolder(tmp_path), Observer())
    text = (tmp_path / "sensitivity.csv").read_text()
    assert text == to_csv(found)
    lines = list(csv.DictReader(text.splitlines()))
    assert len(lines) == len(list(rows(found))) == 5 * 4 + 5 * 4 + 5 * 2
    for line in lines:
        (s,) = (s for s in found if s.proxy == line["proxy"])
        table = s.weight if line["kind"] == "weight" else s.act
        assert table is not None
        i, j = table.layers.index(line["layer"]), table.bits.index(int(line["bits"]))
        assert float(line["score"]) == table.score[i, j]
        assert float(line["stderr"]) == table.stderr[i, j]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"proxies": 3}', '{"proxies": [{"proxy": "x"}]}', "null"]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "sensitivity.json").write_text(text)
    with pytest.raises(InputError, match=r"sensitivity\.json is .*damaged") as error:
        load_sensitivities(StudyFolder(tmp_path))
    assert "\n" not in str(error.value)


def test_an_error_of_the_users_loss_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    def broken(outputs: Any, targets: Any) -> Any:
        raise RuntimeError("cannot\ndo that")

    problem = problem_of()
    problem = replace(problem, task=replace(problem.task, loss=broken))
    with pytest.raises(InputError, match=r"task 't', measuring sensitivities: Run.*cannot do that"):
        sensitivities(problem, problem.initial_model, StudyFolder(tmp_path), Observer())
    assert list(tmp_path.iterdir()) == []


class Attention(nn.Module):
    """Linear layers around PyTorch's fused attention, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[:, 0]
        q, k, v = (f(rows)[:, None] for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.flatten(1))  # type: ignore[no-any-return]


class Told(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def problem_of_model(model: nn.Module) -> Problem:
    task = replace(tiny_task.make_task(), model=lambda: model)
    config = StudyConfig(task="t", budget_bits=3.0, bits=(2, 4), first_last_bits=0, act_bits=(4, 8))
    return make_problem(config, task)


def test_fused_attention_gets_its_hessian_trace_all_the_same() -> None:
    problem, told = problem_of_model(Attention()), Told()
    trace, _ = measure(problem, problem.initial_model, told)
    assert trace.proxy == "hessian-trace"
    assert np.isfinite(trace.weight.score).all()
    assert (trace.weight.score > 0).any()
    assert told.messages == []


def test_a_model_without_second_derivative_is_scored_by_gradients_and_says_so() -> None:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 9), nn.Hardsigmoid(), nn.Linear(9, 9), nn.Linear(9, 10)]
    problem, told = problem_of_model(nn.Sequential(*layers)), Told()
    found = measure(problem, problem.initial_model, told)
    assert [s.proxy for s in found] == ["fisher"]
    assert found[0].act is not None
    (message,) = told.messages
    assert "no second derivative" in message
    assert "gradient score alone" in message


def test_another_runtime_error_is_not_taken_for_a_missing_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sensitivity, "trace_sensitivity", broken)
    problem = problem_of()
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(problem, problem.initial_model, Observer())


def test_a_table_of_other_layers_is_damage(tmp_path: Path) -> None:
    problem, folder = problem_of(), StudyFolder(tmp_path)
    sensitivities(problem, problem.initial_model, folder, Observer())
    text = folder.file("sensitivity.json").read_text()
    folder.file("sensitivity.json").write_text(text.replace('"conv2"', '"conv9"'))
    with pytest.raises(InputError, match="its layers are not those of the model"):
        sensitivities(problem, problem.initial_model, folder, Observer())
    folder.file("sensitivity.json").write_text('{"proxies": []}')
    with pytest.raises(InputError, match=r"sensitivity\.json is damaged: it holds no proxy"):
        load_sensitivities(folder)
