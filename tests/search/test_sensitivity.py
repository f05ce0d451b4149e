"""Sensitivities of a study: measured once, kept exactly, the same in JSON and CSV."""

import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_task
import torch
from torch import nn

from adq.proxies.base import Subject
from adq.proxies.direct import Direct
from adq.proxies.ensemble import fit_ensemble
from adq.proxies.gradient import Gradients
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.batches import take_samples
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation, accuracy, evaluate
from adq.search import sensitivity
from adq.search.candidate import Record
from adq.search.config import PROXIES, WEIGHT_PROXIES, StudyConfig
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem, make_problem
from adq.search.sensitivity import (
    EFFORT,
    ENSEMBLE_TRIALS,
    FEWEST_SAMPLES,
    MICRO_BATCH_MACS,
    ensemble_of,
    load_sensitivities,
    plans,
    rows,
    sensitivities,
    subject_of,
    to_csv,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sensitivity, "SAMPLES", 32)
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


def measure(problem: Problem, model: nn.Module, observer: Observer) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return sensitivities(problem, model, StudyFolder(Path(folder)), observer)


@pytest.mark.parametrize("macs", [1, 10**5, 4 * 10**7, 2 * 10**9, 10**12])
def test_the_effort_of_every_proxy_is_bounded_in_time_and_memory(
    macs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "SAMPLES", 256)
    planned = plans(PROXIES, macs, 10**6, 20, 5)
    assert sorted(name for plan in planned for name in plan.names) == sorted(PROXIES)
    for plan in planned:
        assert FEWEST_SAMPLES <= plan.samples <= 256
        assert 1 <= plan.batch <= plan.samples
        assert plan.batch == 1 or plan.batch * macs <= MICRO_BATCH_MACS
        if isinstance(plan.proxy, HessianTrace):
            passes = 4 * (plan.proxy.probes + 2 * plan.proxy.rank)
        elif isinstance(plan.proxy, Gradients):
            passes = 8
        elif isinstance(plan.proxy, Direct):
            passes = 50
        else:
            passes = 50 + 28 * 25  # every pair of 8 layers, at 5 x 5 bits
        assert plan.samples == FEWEST_SAMPLES or plan.samples * passes * macs <= EFFORT
        if macs <= 10**5:
            assert plan.samples == 256
    at_once = {plan.names for plan in planned}
    assert ("gauss-newton", "fisher", "gauss-newton-trace") in at_once
    assert ("empirical-fisher", "output-gradient") in at_once


def test_a_large_model_gets_a_smaller_sketch_or_none() -> None:
    ranks = []
    for weights in (10**6, 11_678_912, 10**8):  # the second is ResNet-18's
        (plan,) = plans(["hessian"], 10**9, weights, 20, 5)
        assert isinstance(plan.proxy, HessianTrace)
        ranks.append(plan.proxy.rank)
    assert ranks == [16, 5, 0]


def test_gradient_checkpoints_are_the_users_choice() -> None:
    for switch in ("off", "on"):
        problem = problem_of(proxies="hessian", gradient_checkpoints=switch)
        seen = []

        def spy(self: HessianTrace, *args: Any, seen: list[bool] = seen) -> Any:
            seen.append(self.checkpoints)
            raise InputError("seen enough")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HessianTrace, "measure", spy)
            with pytest.raises(InputError, match="seen enough"):
                measure(problem, problem.initial_model, Observer())
        assert seen == [switch == "on"]


def test_tables_have_a_row_a_layer_and_a_column_for_each_width_in_use() -> None:
    problem = problem_of(proxies="hessian,fisher,kl")
    trace, fisher, kl = measure(problem, problem.initial_model, Observer())
    assert [s.proxy for s in (trace, fisher, kl)] == ["hessian", "fisher", "kl"]
    assert (fisher.samples, kl.samples) == (32, 32)
    for found in (trace, fisher, kl):
        assert found.weight.layers == ("conv1", "conv2", "conv3", "hidden", "out")
        assert found.weight.bits == (2, 3, 4, 8)  # 8 is the pinned layers'
        assert found.weight.score.shape == found.weight.stderr.shape == (5, 4)
        assert found.act is None  # every input has 8 bits: there is nothing to choose


def test_inputs_are_scored_where_there_is_a_choice_and_fp32_needs_no_score() -> None:
    problem = problem_of(act_bits=(0, 4, 8), proxies="hessian,fisher")
    trace, fisher = measure(problem, problem.initial_model, Observer())
    assert trace.act is None
    assert fisher.act is not None
    assert fisher.act.bits == (4, 8)
    assert fisher.act.score.shape == (5, 2)
    fp32 = problem_of(act_bits=(0,), proxies="fisher")
    assert measure(fp32, problem.initial_model, Observer())[0].act is None


def test_searched_inputs_need_a_proxy_that_scores_them() -> None:
    for name in WEIGHT_PROXIES:
        problem = problem_of(act_bits=(4, 8), proxies=name)
        with pytest.raises(InputError, match=f"proxies: {name} score weights alone.*add one"):
            measure(problem, problem.initial_model, Observer())


def test_one_seed_measures_the_same_and_another_does_not() -> None:
    def scores(seed: int) -> list[np.ndarray]:
        problem = problem_of(seed=seed, proxies="hessian,loss")
        model = problem_of().initial_model
        return [s.weight.score for s in measure(problem, model, Observer())]

    first = scores(0)
    assert all(map(np.array_equal, first, scores(0)))
    assert not any(map(np.array_equal, first, scores(1)))
    # on the same samples the seed decides the probes of the trace, and the loss draws nothing
    problem = problem_of(proxies="hessian,loss")
    reseeded = replace(problem, config=replace(problem.config, seed=1))
    trace, loss = measure(reseeded, problem.initial_model, Observer())
    assert not np.array_equal(trace.weight.score, first[0])
    assert np.array_equal(loss.weight.score, first[1])


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


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("measured twice")

    for proxy in (HessianTrace, Gradients, Direct):
        monkeypatch.setattr(proxy, "measure", never)


def test_they_are_measured_once_a_study_and_read_back_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, problem = StudyFolder(tmp_path), problem_of(act_bits=(4, 8))
    first = sensitivities(problem, problem.initial_model, folder, Observer())
    assert json.loads((tmp_path / "sensitivity.json").read_text())["schema"] == "adq-sensitivity/2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sensitivity.csv",
        "sensitivity.json",
    ]
    refuse(monkeypatch)
    again = sensitivities(problem, problem.initial_model, folder, Observer())
    assert equal(first, again)
    assert equal(first, load_sensitivities(folder))


def test_one_more_proxy_measures_that_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, problem = StudyFolder(tmp_path), problem_of(proxies="fisher,hessian")
    first = sensitivities(problem, problem.initial_model, folder, Observer())
    monkeypatch.setattr(HessianTrace, "measure", None)
    more = replace(problem, config=replace(problem.config, proxies="hessian,kl"))
    (trace, kl) = sensitivities(more, problem.initial_model, folder, Observer())
    assert equal([trace], [s for s in first if s.proxy == "hessian"])
    assert kl.proxy == "kl"


def test_other_weights_or_data_are_measured_anew(tmp_path: Path) -> None:
    folder, problem = StudyFolder(tmp_path), problem_of(proxies="fisher")
    model = problem.initial_model
    (first,) = sensitivities(problem, model, folder, Observer())
    with torch.no_grad():
        model.hidden.weight.mul_(1.01)
    (second,) = sensitivities(problem, model, folder, Observer())
    assert not np.array_equal(first.weight.score, second.weight.score)
    other = replace(problem, calibration=problem.calibration[::-1])
    (third,) = sensitivities(other, model, folder, Observer())
    assert not np.array_equal(second.weight.score, third.weight.score)


def test_an_interrupted_measurement_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, problem = StudyFolder(tmp_path), problem_of(proxies="loss")
    plain = measure(problem, problem.initial_model, Observer())
    calls: list[int] = []
    real = Work._keep

    def dying(self: Work, part: int, result: Any) -> Any:
        calls.append(part)
        kept = real(self, part, result)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept

    monkeypatch.setattr(Work, "_keep", dying)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(problem, problem.initial_model, folder, Observer())
    assert not folder.file("sensitivity.json").exists()
    resumed = sensitivities(problem, problem.initial_model, folder, Observer())
    assert sorted(calls) == list(range(8))  # each part once, over both runs
    assert np.array_equal(resumed[0].weight.score, plain[0].weight.score)
    assert resumed[0].passes == plain[0].passes


def test_several_devices_score_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(proxies="hessian,fisher,loss")
    one = measure(problem, problem.initial_model, Observer())
    real = subject_of

    def on_two(*args: Any) -> Subject:
        return replace(real(*args), devices=(torch.device("cpu"),) * 2)

    monkeypatch.setattr(sensitivity, "subject_of", on_two)
    two = measure(problem, problem.initial_model, Observer())
    assert all(
        np.array_equal(a.weight.score, b.weight.score) for a, b in zip(one, two, strict=True)
    )


def test_the_csv_has_a_row_for_every_entry(tmp_path: Path) -> None:
    problem = problem_of(act_bits=(4, 8))
    found = sensitivities(problem, problem.initial_model, StudyFolder(tmp_path), Observer())
    text = (tmp_path / "sensitivity.csv").read_text()
    assert text == to_csv(found)
    lines = list(csv.DictReader(text.splitlines()))
    entries = sum(s.weight.score.size + (0 if s.act is None else s.act.score.size) for s in found)
    assert len(lines) == len(list(rows(found))) == entries
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
    with pytest.raises(InputError, match=r"task 't', the loss of a batch .*Run.*cannot do that"):
        sensitivities(problem, problem.initial_model, StudyFolder(tmp_path), Observer())
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_a_number_is_one_line_and_leaves_no_scores(tmp_path: Path) -> None:
    def kinked(outputs: Any, targets: Any) -> Any:
        zero = (outputs - outputs.detach()).square().sum().sqrt()  # its derivative there is 0/0
        return nn.functional.cross_entropy(outputs, targets) + zero

    problem = problem_of(proxies="empirical-fisher")
    problem = replace(problem, task=replace(problem.task, loss=kinked))
    with pytest.raises(InputError, match=r"empirical-fisher of layer .* is no finite number"):
        sensitivities(problem, problem.initial_model, StudyFolder(tmp_path), Observer())
    assert not (tmp_path / "sensitivity.json").exists()


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
    config = StudyConfig(
        task="t",
        budget_bits=3.0,
        bits=(2, 4),
        first_last_bits=0,
        act_bits=(4, 8),
        proxies="hessian,fisher",
    )
    return make_problem(config, task)


def test_fused_attention_gets_its_hessian_trace_all_the_same() -> None:
    problem, told = problem_of_model(Attention()), Told()
    trace, _ = measure(problem, problem.initial_model, told)
    assert trace.proxy == "hessian"
    assert np.isfinite(trace.weight.score).all()
    assert (trace.weight.score > 0).any()
    assert told.messages == []


def without_second_derivative() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 9), nn.Hardsigmoid(), nn.Linear(9, 9), nn.Linear(9, 10)]
    return nn.Sequential(*layers)


def test_a_proxy_that_cannot_score_the_model_is_left_out_and_says_so() -> None:
    problem, told = problem_of_model(without_second_derivative()), Told()
    found = measure(problem, problem.initial_model, told)
    assert [s.proxy for s in found] == ["fisher"]
    assert found[0].act is not None
    (message,) = told.messages
    assert message.startswith("hessian: this model has no second derivative")


def test_where_no_proxy_can_score_the_model_the_study_ends() -> None:
    problem = problem_of_model(without_second_derivative())
    alone = replace(problem.config, proxies="hessian", act_bits=(8,))
    problem = make_problem(alone, replace(problem.task, model=without_second_derivative))
    with pytest.raises(InputError, match="no second derivative"):
        measure(problem, problem.initial_model, Observer())


def test_a_table_of_other_layers_is_damage(tmp_path: Path) -> None:
    problem, folder = problem_of(), StudyFolder(tmp_path)
    sensitivities(problem, problem.initial_model, folder, Observer())
    text = folder.file("sensitivity.json").read_text()
    folder.file("sensitivity.json").write_text(text.replace('"conv2"', '"conv9"'))
    with pytest.raises(InputError, match="its layers and bits are not those of the model"):
        sensitivities(problem, problem.initial_model, folder, Observer())
    folder.file("sensitivity.json").write_text('{"proxies": []}')
    with pytest.raises(InputError, match=r"sensitivity\.json is damaged: it holds no proxy"):
        load_sensitivities(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: e["weight"]["bits"].pop(),
        lambda e: e["weight"].update(bits=[2, 3, 4, 9]),
        lambda e: [row.pop() for row in e["weight"]["score"]],
        lambda e: e["weight"]["score"][1].__setitem__(0, None),
        lambda e: e.update(samples="many"),
        lambda e: e.pop("key"),
    ],
)
def test_whatever_is_wrong_with_the_scores_is_one_line(tmp_path: Path, damage: Any) -> None:
    problem, folder = problem_of(proxies="fisher"), StudyFolder(tmp_path)
    sensitivities(problem, problem.initial_model, folder, Observer())
    data = json.loads(folder.file("sensitivity.json").read_text())
    damage(data["proxies"][0])
    folder.file("sensitivity.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"sensitivity\.json is damaged"):
        sensitivities(problem, problem.initial_model, folder, Observer())


def test_scores_of_another_version_say_so(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    folder.file("sensitivity.json").write_text('{"schema": "adq-sensitivity/1", "proxies": []}')
    with pytest.raises(InputError, match=r"another version .*remove it"):
        load_sensitivities(folder)


def test_a_missing_csv_is_written_again(tmp_path: Path) -> None:
    problem, folder = problem_of(proxies="fisher"), StudyFolder(tmp_path)
    found = sensitivities(problem, problem.initial_model, folder, Observer())
    folder.file("sensitivity.csv").unlink()
    sensitivities(problem, problem.initial_model, folder, Observer())
    assert folder.file("sensitivity.csv").read_text() == to_csv(found)


class Named(nn.Module):
    """A model whose outputs are a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 9))
        self.head = nn.Linear(9, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.body(x))}


def named_task() -> Any:
    return replace(
        tiny_task.make_task(),
        model=Named,
        loss=lambda o, t: nn.functional.cross_entropy(o["logits"], t),
        metric=lambda o, t: accuracy(o["logits"], t),
    )


def test_where_the_default_proxies_cannot_score_a_model_the_loss_does() -> None:
    settings: dict[str, Any] = {"budget_bits": 4.0, "bits": (2, 3, 4), "first_last_bits": 0}
    problem, told = make_problem(StudyConfig(task="t", **settings), named_task()), Told()
    (found,) = measure(problem, problem.initial_model, told)
    assert found.proxy == "loss"
    assert any("taking loss instead" in message for message in told.messages)
    asked = make_problem(StudyConfig(task="t", proxies="kl", **settings), named_task())
    with pytest.raises(InputError, match="kl needs outputs"):
        measure(asked, asked.initial_model, told)


def test_few_samples_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SAMPLES", 256)
    problem = problem_of(proxies="hessian,gauss-newton-trace,kl")
    few = [tuple(part[:6] for part in problem.calibration[0])]
    found = measure(replace(problem, calibration=few), problem.initial_model, Observer())
    assert [s.proxy for s in found] == ["hessian", "gauss-newton-trace", "kl"]
    assert all(np.isfinite(s.weight.stderr).all() for s in found)


def test_a_loss_that_is_a_sum_is_pointed_out() -> None:
    problem, told = problem_of(proxies="loss"), Told()
    mean = problem.task.loss
    measure(problem, problem.initial_model, told)
    assert told.messages == []
    summed = replace(problem.task, loss=lambda o, t: len(t) * mean(o, t))
    measure(replace(problem, task=summed), problem.initial_model, told)
    assert any("looks like a sum" in message for message in told.messages)


def test_the_ensemble_is_fitted_on_the_trials_that_ended_well() -> None:
    problem = problem_of(proxies="fisher,kl")
    scores = measure(problem, problem.initial_model, Observer())
    rng = np.random.default_rng(0)
    records = []
    for number in range(ENSEMBLE_TRIALS + 2):
        point = [g.options[rng.integers(len(g.options))] for g in problem.space.groups]
        bits = problem.space.bit_vector(point)
        found = None if number < 2 else Evaluation(float(rng.uniform(1, 2)), 0.5, 0.1, 8)
        costs = problem.costs.costs(bits)
        some: Any = ("", bits, 0, 1, costs, (), (), (), found, None, 1.0)
        records.append(Record(*some))
    assert ensemble_of(scores, records[:-1]) is None  # eleven that ended well
    ensemble = ensemble_of(scores, records)
    assert ensemble is not None
    done = records[2:]
    losses = [r.validation.loss for r in done]  # type: ignore[union-attr]
    expected = fit_ensemble(scores, [r.bits for r in done], losses).sensitivity
    assert (ensemble.proxy, ensemble.samples) == ("ensemble", ENSEMBLE_TRIALS)
    assert np.array_equal(ensemble.weight.score, expected.weight.score)
