"""The latency model that a configuration names, and the costs and searches that follow from it."""

import json
from pathlib import Path

import pytest
import tiny_task
from torch import nn

from adq.proxies.costs import CostModel
from adq.proxies.latency import DeviceDescription, Entry, LatencyTable, Roofline
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.spec import BitVector
from adq.search.config import StudyConfig
from adq.search.latency import latency_model
from adq.search.problem import make_problem

FC = LayerInfo("fc", "Linear", (5, 48), (48,), 240, 5)
LAST = LayerInfo("last", "Linear", (3, 5), (5,), 15, 3)


def by_bits(layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
    return 1e-6 * weight_bits * len(layer.name)


def table(batch: int = 4) -> LatencyTable:
    entries = tuple(
        Entry("Linear", (5, 48), (48,), 240, 5, bits, 8, 1e-6 * bits, 1e-8) for bits in (4, 8)
    )
    return LatencyTable("a machine", {"torch": "2"}, 1, batch, 30, entries)


def test_a_device_is_a_roofline_at_the_batch_asked_for() -> None:
    found = latency_model(StudyConfig(latency="nvidia-t4", latency_batch=16, group_size=32))
    assert found == Roofline(DeviceDescription.load("nvidia-t4"), 16, 32, codebook=True)
    uniform = latency_model(StudyConfig(latency="nvidia-t4", weight_quantizer="lsq"))
    assert uniform == Roofline(DeviceDescription.load("nvidia-t4"), 1, None, codebook=False)
    assert latency_model(StudyConfig()) is None


def test_a_table_is_read_and_its_batch_holds(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    table().save(path)
    for batch in (None, 4):
        found = latency_model(StudyConfig(latency=str(path), latency_batch=batch))
        assert found is not None
        assert found.seconds(FC, 6, 8) == pytest.approx(6e-6)  # between 4 and 8 bits
    with pytest.raises(InputError, match=r"was measured at 4 samples, got 2"):
        latency_model(StudyConfig(latency=str(path), latency_batch=2))


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": "adq-bits/1"}))
    with pytest.raises(InputError, match=r"expected 'adq-latency/2' or 'adq-device/1' in"):
        latency_model(StudyConfig(latency=str(path)))
    with pytest.raises(InputError, match=r"missing\.json"):
        latency_model(StudyConfig(latency=str(tmp_path / "missing.json")))


def test_a_function_is_imported_by_name() -> None:
    found = latency_model(StudyConfig(latency="operator:countOf"))
    assert found is not None
    for spec, text in (("operator:nothing", "has no 'nothing'"), ("no_such:f", "no module")):
        with pytest.raises(InputError, match=f"latency '{spec}': .*{text}"):
            latency_model(StudyConfig(latency=spec))


class ByBits:
    rest_seconds = 5e-6

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        return by_bits(layer, weight_bits, act_bits)


def test_latencies_add_up_over_layers_and_a_limit_holds_to_the_picosecond() -> None:
    model = nn.Sequential()
    costs = CostModel(model, (FC, LAST), ["fc"], latency=ByBits())
    bits = BitVector({"fc": 3, "last": 8})
    assert costs.layer_terms("last", 8, None)["latency_s"] == 32_000_000
    assert costs.costs(bits).latency_s == pytest.approx(3 * 2e-6 + 8 * 4e-6 + 5e-6, rel=1e-12)
    assert costs.limits({"latency_s": 43e-6})["latency_s"] == 38_000_000
    assert costs.totals(bits)["latency_s"] == 38_000_000
    assert CostModel(model, (FC, LAST), ["fc"]).costs(bits).latency_s is None


def test_a_latency_budget_needs_a_model_and_bounds_every_choice() -> None:
    with pytest.raises(InputError, match=r"budget-latency-ms: nothing says how long"):
        StudyConfig(budget_latency_ms=1.0).budget  # noqa: B018 (a property that checks)
    config = StudyConfig(
        budget_latency_ms=1.0, latency="nvidia-t4", bits=(2, 8), device="cpu", latency_batch=64
    )
    with pytest.raises(InputError, match=r"budget-latency-ms"):
        # a network of a few thousand weights takes microseconds: this budget binds nothing
        make_problem(config, tiny_task.make_task())
    problem = make_problem(
        StudyConfig(budget_bits=3.0, latency="nvidia-t4", bits=(2, 4), device="cpu"),
        tiny_task.make_task(),
    )
    point = problem.space.bit_vector(problem.space.uniform(2))
    assert problem.costs.costs(point).latency_s > 0
