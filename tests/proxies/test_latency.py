"""Latencies against arithmetic by hand; what is not known is refused, never guessed."""

import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adq.proxies.latency import (
    DEVICES,
    DeviceDescription,
    Entry,
    LatencyModel,
    LatencyTable,
    Roofline,
    RunWider,
    device_names,
    from_callable,
    network_seconds,
)
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo, trace_layers
from adq.quant.spec import BitVector

CONV = LayerInfo("conv", "Conv2d", (3, 2, 3, 3), (2, 6, 6), 864, 3)
FC = LayerInfo("fc", "Linear", (5, 48), (48,), 240, 5)
BIG = LayerInfo("big", "Linear", (4096, 4096), (4096,), 4096 * 4096, 4096)

SOURCES = {"peak_tops": "made up", "bandwidth_gb_per_s": "made up", "launch_us": "made up"}
TOY: dict[str, Any] = {
    "name": "toy",
    "peak_tops": {"int8": 2.0, "fp16": 0.5},
    "float_format": "fp16",
    "bandwidth_gb_per_s": 1.0,
    "launch_us": 3.0,
    "sources": SOURCES,
}
toy = DeviceDescription(**TOY)


def test_a_roofline_by_hand() -> None:
    # conv: 54 weights, 72 inputs, 864/54 = 16 positions of 3 channels: 48 outputs in FP16
    weight = 21 + 4 * 8 + 4 * 3  # 162 bits, 8 levels, 3 scales
    parts = Roofline(toy, batch=10).parts(CONV, 3, 4)
    assert parts.compute == pytest.approx(2 * 864 * 10 / 2e12)
    assert parts.memory == pytest.approx((weight + 10 * (36 + 96)) / 1e9)
    assert parts.launch == pytest.approx(3e-6)
    assert Roofline(toy, 10).seconds(CONV, 3, 4) == pytest.approx((parts.memory + 3e-6) / 10)
    # an input that is not quantized: FP16 arithmetic, two bytes an element
    parts = Roofline(toy, batch=10).parts(CONV, 3, None)
    assert parts.compute == pytest.approx(2 * 864 * 10 / 0.5e12)
    assert parts.memory == pytest.approx((weight + 10 * (144 + 96)) / 1e9)


def test_odd_bits_of_an_input_end_in_a_whole_byte() -> None:
    one = Roofline(toy).parts(FC, 8, 3).memory  # 144 bits are 18 bytes
    assert one == pytest.approx((240 + 4 * 256 + 4 * 5 + 18 + 10) / 1e9)
    short = LayerInfo("s", "Linear", (5, 3), (3,), 15, 5)  # 9 bits are 2 bytes
    assert Roofline(toy).parts(short, 8, 3).memory == pytest.approx((15 + 1024 + 20 + 2 + 10) / 1e9)


def test_a_transposed_convolution_counts_a_kernel_of_outputs_for_each_input() -> None:
    model = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        torch.nn.Conv2d(6, 2, 1),
        torch.nn.Conv2d(2, 1, 1),
    )
    up = trace_layers(model, torch.randn(2, 4, 5, 5))[0]
    moved = up.weight_numel + 1024 + 4 * 6 + 4 * 25 + 2 * 6 * 100  # 10x10 outputs
    assert Roofline(toy).parts(up, 8, 8).memory == pytest.approx(moved / 1e9)


def test_groups_of_weights_move_more_scales() -> None:
    more = Roofline(toy, group_size=6).parts(CONV, 4, 8).memory
    assert more - Roofline(toy).parts(CONV, 4, 8).memory == pytest.approx(4 * (9 - 3) / 1e9)


def test_the_ridge_is_where_computing_takes_as_long_as_moving() -> None:
    """Per sample BIG computes 2·4096² operations and moves 4096·(1 + 2) bytes; its weight once."""
    weight = 4096 * 4096 + 4 * 256 + 4 * 4096
    device = DeviceDescription(**{**TOY, "bandwidth_gb_per_s": 10.0, "launch_us": 0})
    ridge = weight / 10e9 / (2 * 4096 * 4096 / 2e12 - 4096 * 3 / 10e9)
    below, above = math.floor(ridge), math.ceil(ridge)
    assert below > 1
    parts = Roofline(device, below).parts(BIG, 8, 8)
    assert parts.memory > parts.compute
    parts = Roofline(device, above).parts(BIG, 8, 8)
    assert parts.compute > parts.memory
    # beyond the ridge a sample costs its operations, whatever the batch
    for batch in (above, 10 * above):
        seconds = Roofline(device, batch).seconds(BIG, 8, 8)
        assert seconds == pytest.approx(2 * 4096 * 4096 / 2e12)


@pytest.mark.parametrize(
    ("rates", "weight", "act", "codebook", "expected"),
    [
        ({"int4": 4, "int8": 2, "fp16": 1}, 4, 4, False, "int4"),
        ({"int4": 4, "int8": 2, "fp16": 1}, 3, 2, False, "int4"),
        ({"int4": 4, "int8": 2, "fp16": 1}, 4, 8, False, "int8"),
        ({"int4": 4, "int8": 2, "fp16": 1}, 5, 4, False, "int8"),
        ({"int4": 4, "int8": 2, "fp16": 1}, 4, None, False, "fp16"),
        ({"int4": 4, "int8": 2, "fp16": 1}, 4, 4, True, "fp16"),
        ({"int8": 2, "fp16": 1}, 2, 2, False, "int8"),
        ({"int4": 4, "fp16": 1}, 4, 8, False, "fp16"),
        ({"fp16": 1}, 2, 2, False, "fp16"),
    ],
)
def test_the_narrowest_arithmetic_that_holds_both_operands(
    rates: dict[str, float], weight: int, act: int | None, codebook: bool, expected: str
) -> None:
    device = DeviceDescription(**{**TOY, "peak_tops": rates})
    assert device.arithmetic(weight, act, codebook) == expected


@pytest.mark.parametrize("name", device_names())
@pytest.mark.parametrize("batch", [1, 64])
def test_more_bits_never_take_less_time(name: str, batch: int) -> None:
    model = Roofline(DeviceDescription.load(name), batch)
    for layer in (CONV, FC, BIG):
        grid = [[model.seconds(layer, w, a) for a in (*range(2, 9), None)] for w in range(2, 9)]
        for row in (*grid, *zip(*grid, strict=True)):
            assert all(fewer <= more for fewer, more in pairwise(row))


def test_the_bundled_devices_say_what_their_data_sheets_say() -> None:
    rates = {
        "nvidia-h100-sxm": ({"int8": 1978.9, "fp16": 989.4, "fp32": 66.9}, 3350),
        "nvidia-a100-sxm": ({"int4": 1248, "int8": 624, "fp16": 312, "fp32": 19.5}, 2039),
        "nvidia-t4": ({"int4": 260, "int8": 130, "fp16": 65, "fp32": 8.1}, 320),
        "amd-mi300x": ({"int8": 2614.9, "fp16": 1307.4, "fp32": 163.4}, 5300),
        "x86-avx2-core": ({"int8": 0.192, "fp32": 0.096}, 25.6),
    }
    assert set(rates) == set(device_names())
    for name, (peaks, bandwidth) in rates.items():
        device = DeviceDescription.load(name)
        assert {k: v for k, v in device.peak_tops.items() if k in {"int4", *peaks}} == peaks
        assert device.bandwidth_gb_per_s == bandwidth


def test_an_h100_is_faster_than_an_a100_which_alone_gains_from_four_bits() -> None:
    names = ("nvidia-h100-sxm", "nvidia-a100-sxm")
    h100, a100 = (Roofline(DeviceDescription.load(name), 4096) for name in names)
    for bits in ((4, 4), (8, 8), (8, None)):
        assert h100.seconds(BIG, *bits) < a100.seconds(BIG, *bits)
    assert a100.parts(BIG, 4, 4).compute == a100.parts(BIG, 8, 8).compute / 2
    assert h100.parts(BIG, 4, 4).compute == h100.parts(BIG, 8, 8).compute


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_tops": {"int8": 2.0}}, "one of them float_format's"),
        ({"peak_tops": {"int7": 2.0, "fp16": 1.0}}, "peak_tops: expected rates of int4, int8"),
        ({"peak_tops": {"fp16": 989.4e12}}, "peak_tops: fp16: expected a number from 0.0001"),
        ({"peak_tops": {"fp16": True}}, "peak_tops: fp16: expected a number"),
        ({"peak_tops": {"fp16": -1.0}}, "peak_tops: fp16: expected a number"),
        ({"peak_tops": {"int8": 0.4, "fp16": 0.5}}, "int8 is slower than fp16: leave it out"),
        ({"float_format": "int8"}, "one of them float_format's"),
        ({"bandwidth_gb_per_s": 3.35e12}, "bandwidth_gb_per_s: expected a number"),
        ({"bandwidth_gb_per_s": 0}, "bandwidth_gb_per_s: expected a number"),
        ({"bandwidth_gb_per_s": math.nan}, "bandwidth_gb_per_s: expected a number"),
        ({"launch_us": -1}, "launch_us: expected a number from 0"),
        ({"launch_us": 10**400}, "launch_us: expected a number from 0"),
        ({"sources": {}}, "sources: expected a text for each of"),
        ({"sources": {**SOURCES, "launch_us": ""}}, "sources: expected a text"),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"peak_flops": 3}, "unknown key 'peak_flops'; allowed: name, peak_tops"),
        ({"schema": "adq-device/9"}, "schema: expected 'adq-device/1', got 'adq-device/9'"),
    ],
)
def test_a_wrong_description_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema": "adq-device/1", **TOY}))
    assert DeviceDescription.load(path) == toy
    path.write_text(json.dumps({"schema": "adq-device/1", **TOY, **change}))
    with pytest.raises(InputError, match=r"mine\.json: ") as error:
        DeviceDescription.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'gtx'; known are amd-mi300x, nvidia-a100"):
        DeviceDescription.load("gtx")
    with pytest.raises(InputError, match="is missing or damaged"):
        DeviceDescription.load(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list.json: content: expected a JSON object, got \[1\]"):
        DeviceDescription.load(tmp_path / "list.json")
    data = json.loads((DEVICES / "nvidia-t4.json").read_text())
    del data["launch_us"]
    (tmp_path / "short.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="key 'launch_us' is missing"):
        DeviceDescription.load(tmp_path / "short.json")


@pytest.mark.parametrize("batch", [0, 2.0, True])
def test_a_batch_is_a_positive_whole_number(batch: Any) -> None:
    with pytest.raises(InputError, match="batch: expected at least 1"):
        Roofline(toy, batch)


def entry(layer: LayerInfo, weight: int, act: int | None, seconds: float) -> Entry:
    shape = (layer.kind, layer.weight_shape, layer.input_shape, layer.macs, layer.out_channels)
    return Entry(*shape, weight, act, seconds, 0.25)


def table(*entries: Entry) -> LatencyTable:
    return LatencyTable("toy", {"torch": "2"}, 1, 8, 30, entries, ("a note",))


def test_measured_times_come_back_exactly_and_by_shape_alone() -> None:
    model = table(entry(CONV, 4, 8, 0.1), entry(CONV, 4, None, 0.3), entry(FC, 4, 8, 0.2))
    assert model.seconds(CONV, 4, 8) == 0.1
    assert model.seconds(CONV, 4, None) == 0.3
    assert model.seconds(replace(FC, name="other"), 4, 8) == 0.2


def test_between_measured_widths_the_time_is_linear() -> None:
    model = table(*(entry(CONV, w, a, w + 10.0 * a) for w, a in product((2, 4, 8), (4, 8))))
    assert model.seconds(CONV, 3, 8) == pytest.approx(83)
    assert model.seconds(CONV, 5, 4) == pytest.approx(45)  # between 4 and 8, not 2 and 8
    assert model.seconds(CONV, 4, 6) == pytest.approx(64)
    assert model.seconds(CONV, 7, 5) == pytest.approx(57)  # f is bilinear: exact


def test_only_the_nearest_widths_count() -> None:
    model = table(entry(CONV, 2, 8, 0.0), entry(CONV, 4, 8, 10.0), entry(CONV, 8, 8, 11.0))
    assert [model.seconds(CONV, w, 8) for w in (3, 5, 6, 7)] == [5.0, 10.25, 10.5, 10.75]


@pytest.mark.parametrize(
    ("weight", "act"),
    [(3, 8), (2, 8), (6, 2), (6, 3), (6, None), (4, None), (2, 2)],
)
def test_outside_the_measured_widths_it_raises(weight: int, act: int | None) -> None:
    model = table(
        *(entry(CONV, w, a, 1.0) for w, a in product((4, 8), (4, 8))),
        entry(CONV, 8, None, 2.0),
        entry(CONV, 32, None, 9.0),  # FP32 is no end of an interpolation
    )
    with pytest.raises(InputError, match=r"layer 'conv' at \d/(\d|float) bits.*toy has 4/4 bits"):
        model.seconds(CONV, weight, act)


def test_a_hole_in_the_measured_grid_is_bridged_only_if_both_sides_are_known() -> None:
    model = table(entry(CONV, 4, 4, 1.0), entry(CONV, 8, 8, 3.0))
    with pytest.raises(InputError, match="a guess outside is no measurement"):
        model.seconds(CONV, 6, 6)
    with pytest.raises(InputError, match="a guess outside is no measurement"):
        model.seconds(CONV, 4, 8)


def test_an_unknown_shape_is_named_with_what_to_do() -> None:
    wanted = "layer 'fc', Linear, weight 5×48, input 48, 240 MACs, is not in .*adq-search profile'"
    with pytest.raises(InputError, match=wanted):
        table(entry(CONV, 8, 8, 1.0)).seconds(FC, 8, 8)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    model = table(entry(CONV, 4, 8, 0.1 + 0.2), entry(FC, 8, None, 1e-9), entry(FC, 32, None, 0.0))
    model = replace(model, rest_seconds=0.3)
    model.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json") == model
    assert json.loads((tmp_path / "t.json").read_text())["schema"] == "adq-latency/2"
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_two_entries_for_one_thing_are_refused() -> None:
    with pytest.raises(InputError, match=r"two entries for Conv2d, weight 3×2×3×3.* at 4/8 bits"):
        table(entry(CONV, 4, 8, 1.0), entry(CONV, 8, 8, 1.0), entry(CONV, 4, 8, 1.0))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema",), "adq-bits/1", "schema: expected 'adq-latency/2'"),
        (("device",), None, "device: expected a text"),
        (("rest_seconds",), -1.0, "rest_seconds: expected a number from 0, got -1"),
        (("batch",), 0, "batch: expected a positive whole number, got 0"),
        (("entries",), {}, "entries: expected a list"),
        (("entries",), [3], "entry 0: content: expected a JSON object"),
        (("notes",), [3], "notes: expected texts"),
        (("versions",), {"torch": 2}, "versions: expected texts"),
        (("more",), 1, "unknown key 'more'"),
        (("entries", 0, "seconds"), -1.0, "entry 0: seconds: expected a number from 0"),
        (("entries", 0, "seconds"), "fast", "entry 0: seconds: expected a number from 0"),
        (("entries", 0, "stderr"), math.inf, "entry 0: stderr: expected a number from 0"),
        (("entries", 0, "weight_bits"), 9, "entry 0: bits: expected 2 to 8, got (9, 8)"),
        (("entries", 0, "weight_bits"), 32, "entry 0: bits: expected 2 to 8, got (32, 8)"),
        (("entries", 0, "act_bits"), 8.0, "entry 0: bits: expected 2 to 8"),
        (("entries", 0, "weight_shape"), [3, "2"], "entry 0: weight_shape: expected whole numbers"),
        (("entries", 0, "macs"), 0, "entry 0: macs: expected a positive whole number"),
        (("entries", 0, "name"), "conv", "entry 0: unknown key 'name'"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(
    tmp_path: Path, where: tuple[Any, ...], value: Any, message: str
) -> None:
    path = tmp_path / "t.json"
    table(entry(CONV, 4, 8, 1.0)).save(path)
    data = json.loads(path.read_text())
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as error:
        LatencyTable.load(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_table_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table(entry(CONV, 4, 8, 1.0)).save(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="is missing or damaged"):
        LatencyTable.load(path)


def test_a_function_is_asked_and_its_numbers_are_taken() -> None:
    model = from_callable(lambda layer, w, a: layer.macs * w * (a or 32) * 1e-12)
    assert model.seconds(FC, 3, None) == 240 * 3 * 32 * 1e-12
    for number in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert from_callable(lambda *_, number=number: number).seconds(FC, 2, 2) == 0.5
    assert from_callable(lambda *_: 0).seconds(FC, 2, 2) == 0


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, None, "1", True, [1.0], 1j])
def test_a_function_that_gives_no_time_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="layer 'fc' at 3/float bits: expected seconds per sample"):
        from_callable(lambda *_: value).seconds(FC, 3, None)


def test_a_function_that_fails_is_named() -> None:
    def broken(layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        raise KeyError("shape")

    with pytest.raises(InputError, match="layer 'fc' at 3/8 bits failed: KeyError 'shape'"):
        from_callable(broken).seconds(FC, 3, 8)


def test_a_network_is_the_sum_of_its_layers() -> None:
    model = from_callable(lambda layer, w, a: {"conv": 100, "fc": 200}[layer.name] + w + (a or 32))
    bits = BitVector({"conv": 3, "fc": 8}, {"fc": 4})
    assert network_seconds(model, (CONV, FC), bits) == (100 + 3 + 32) + (200 + 8 + 4)
    with pytest.raises(InputError, match="no bits for layer 'big'"):
        network_seconds(model, (CONV, BIG), bits)


def test_what_runs_between_layers_is_added_once() -> None:
    measured = replace(table(entry(CONV, 4, 8, 2.0), entry(FC, 4, 8, 3.0)), rest_seconds=0.5)
    bits = BitVector({"conv": 4, "fc": 4}, {"conv": 8, "fc": 8})
    for model in (measured, RunWider(measured, {})):
        assert network_seconds(model, (CONV, FC), bits) == 5.5


def test_a_layer_runs_the_fastest_kernel_that_holds_it() -> None:
    times: dict[tuple[int, int | None], float] = {
        (2, 4): 9.0, (4, 4): 5.0, (8, 4): 6.0,
        (2, 8): 3.0, (4, 8): 7.0, (8, 8): 6.5,
        (2, None): 8.0, (4, None): 8.0, (8, None): 4.0,
    }  # fmt: skip
    model = RunWider(from_callable(lambda _, w, a: times[w, a]), {"fc": list(times)})
    for (w, a), found in {k: model.seconds(FC, *k) for k in times}.items():
        wider = [t for (w2, a2), t in times.items() if w2 >= w and (a2 or 99) >= (a or 99)]
        assert found == min(wider)
    assert model.seconds(FC, 2, 4) == 3.0
    assert model.seconds(FC, 4, 8) == 4.0
    assert model.seconds(FC, 2, None) == 4.0


def test_every_model_keeps_the_protocol() -> None:
    models: list[LatencyModel] = [
        Roofline(toy), table(entry(FC, 8, 8, 1.0)), from_callable(lambda *_: 1.0),
        RunWider(from_callable(lambda *_: 1.0), {}),
    ]  # fmt: skip
    assert all(model.seconds(FC, 8, 8) > 0 for model in models)
