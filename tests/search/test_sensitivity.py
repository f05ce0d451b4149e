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
