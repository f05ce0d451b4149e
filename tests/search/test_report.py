"""The report says what the records say: every number read back from the files and compared."""

import csv
import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adq.proxies.base import Sensitivity, Table
from adq.proxies.costs import Costs
from adq.quant.errors import InputError
from adq.quant.evaluate import Evaluation
from adq.quant.files import write_json, write_text
from adq.quant.spec import BitVector
from adq.search.candidate import Record, Rung
from adq.search.config import OPTIONS, StudyConfig, make_config, option_name
from adq.search.folder import FINAL, TRIALS, StudyFolder
from adq.search.front import Front, Point, point_of
from adq.search.report import FORMATS, render, write_report
from adq.search.report.command import command_line
from adq.search.report.front_chart import free_corner
from adq.search.report.theme import FP32_BITS, ORANGE
from adq.search.report.units import UNITS, metric_format, padded

LAYERS = (
    "</script><b>bold</b>",
    "blocks.0.attn/qkv:w[0]",
    "q'uo\"te & <!-- \\ {{ 7*7 }} \u2028",
    "a.name.of.many.parts.that.is.longer.than.any.label.may.be.conv1",
    "head",
)
FILES = ("front.json", "front.csv", "front.png", "report.html")
ERROR = "loss is nan <img src=http://example.org/x.png onerror=alert(1)>"
SCORES = np.array(
    [
        [3e-2, 1e-3, 1e-16],  # far below the axis
        [1e-2, 2e-3, 0.0],
        [5e-3, 1e-4, -2e-5],
        [1e-3, 9e-4, 4e-4],
        [2e-4, 1e-4, 3e-5],
    ]
)
CONFIG = StudyConfig(
    task="imagefolder:/data/two words/it's",
    model="resnet18",
    budget_bits=3.25,
    budget_size_mb=0.1 + 0.2,
    bits=(2, 4, 8),
    trials=12,
    lr=3e-4,
    study="nasty",
)


def evaluation(metric: float, stderr: float = 0.0042) -> Evaluation:
    return Evaluation(loss=1.5 - metric, metric=metric, metric_stderr=stderr, samples=450)


def record(
    id: str, bits: list[int], validation: float | None, test: float | None = None, **more: Any
) -> Record:
    weight = dict(zip(LAYERS, bits, strict=True))
    average = sum(bits) / len(bits)
    return Record(
        id=id,
        bits=BitVector(weight, more.pop("act", dict.fromkeys(LAYERS, 8))),
        seed=7,
        epochs=3,
        costs=Costs(average, average / 1.1, 8.0, int(9123 * average), int(1.7e7 * average), None),
        train_losses=(0.5, 0.25),
        flips=(0.1, 0.0),
        dead_levels=(2.0, 0.0),
        validation=None if validation is None else evaluation(validation),
        test=None if test is None else evaluation(test),
        seconds=12.34,
        weights=None if test is None else f"models/{id}.safetensors",
        error=ERROR if validation is None else None,
        **more,
    )


@dataclass(frozen=True)
class Study:
    folder: StudyFolder
    front: Front
    trials: list[Record]

    @property
    def page(self) -> "Page":
        return Page(render(self.folder, self.front, "html").decode())


def make_study(
    root: Path, trials: list[Record], finals: list[Record], uniform: list[Record], **more: Any
) -> Study:
    """A folder as it is when the report is written: final training done, no results.json yet."""
    folder = StudyFolder(root / "nasty")
    for part in (TRIALS, FINAL, "models"):
        (folder.path / part).mkdir(parents=True)
    write_text(folder.file("study.toml"), more.get("config", CONFIG).to_toml())
    fp32 = more.get("fp32", evaluation(0.9876, 0.0031))
    write_json(
        folder.file("fp32.json"),
        {"train_losses": [], "validation": asdict(evaluation(0.9911)), "test": asdict(fp32)},
    )
    scores = more.get("scores", SCORES)
    weight = Table(LAYERS, (2, 4, 8), scores, np.abs(scores) / 8)
    proxies = [Sensitivity("hessian", weight, None, 32, 1.0)]
    proxies.append(Sensitivity("fisher", weight, more.get("act_table"), 128, 1.0))
    write_json(
        folder.file("sensitivity.json"), {"proxies": [{"key": "k", **s.to_json()} for s in proxies]}
    )
    for kind, records in ((TRIALS, trials), (FINAL, finals + uniform)):
        for each in records:
            folder.write_record(kind, each)
    split = more.get("split", "test")
    points = tuple(point_of(r, split) for r in more.get("points", finals))
    front = Front(
        study="nasty",
        task=CONFIG.task,
        metric_name=more.get("metric_name", "accuracy"),
        fp32_metric=fp32.metric,
        budget=more.get("config", CONFIG).budget.limits(),
        objectives=more.get("config", CONFIG).budget.limits(),
        points=points,
        uniform=tuple(point_of(r) for r in uniform),
        split=split,
        folder=str(folder.path),
    )
    return Study(folder, front, trials)


USUAL = {
    "t0001": (2.4, 0.9234567),
    "t0004": (2.8, 0.9312345),
    "t0008": (3.6, 0.9298765),
    "uniform-2": (2.0, 0.9011111),
    "uniform-4": (4.0, 0.9611111),
}
"""id -> (average bits, test metric) of the models below."""


def usual(root: Path, **more: Any) -> Study:
    """Twelve trials, one failed; three points, two more final models; uniform 2 and 4 bits."""
    metrics = [0.91, 0.93, None, 0.92, 0.95, 0.94, 0.95, 0.9, 0.97, 0.96, 0.89, 0.965]
    trials = [
        record(f"{i:04d}", [2 + i % 3, 2, 4, 2 + (i == 4), 8], metric)
        for i, metric in enumerate(metrics)
    ]
    finals = [
        record("t0001", [2, 2, 2, 4, 2], 0.9312, 0.9234567),
        record("t0004", [2, 4, 4, 2, 2], 0.9512, 0.9312345),
        record("t0008", [4, 4, 2, 4, 4], 0.9712, 0.9298765),
    ]
    uniform = [
        record("uniform-2", [2] * 5, 0.9, 0.9011111),
        record("uniform-4", [4] * 5, 0.96, 0.9611111),
    ]
    made = make_study(root, trials, finals, uniform, **more)
    made.folder.write_record(FINAL, record("t0003", [2, 2, 2, 4, 4], 0.9, 0.91))  # dominated
    made.folder.write_record(FINAL, record("t0005", [4, 2, 2, 2, 2], None))
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = usual(tmp_path_factory.mktemp("study"))
    write_report(made.folder, made.front)
    return made


@pytest.fixture(scope="module")
def page(study: Study) -> "Page":
    return Page(study.folder.file("report.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a browser would make of the page: elements, texts, tables, chart specifications."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.in_cell = False
        self.feed(text)
        self.specs = {
            id: json.loads(text) for id, text in self.texts.items() if id.endswith("-spec")
        }

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(dict(attrs).get("id") or tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.inside.append(f"/{tag}")
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        at = self.inside[-1] if self.inside else ""
        self.texts[at] = self.texts.get(at, "") + data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The cells of the first table row that starts with `first`."""
        found = next(r for r in self.rows if r and r[0].strip() == first)
        return [cell.strip() for cell in found]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def data_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of data in a chart's specification."""
    return [row for rows in spec["datasets"].values() for row in rows]


def charts_in(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    for key in ("layer", "hconcat", "vconcat"):
        for part in spec.get(key, []):
            yield from charts_in(part)


def domains(spec: dict[str, Any], channel: str) -> set[tuple[Any, ...]]:
    """The different ranges or orders that a channel's scales have in a chart."""
    encodings = [chart.get("encoding", {}).get(channel, {}) for chart in charts_in(spec)]
    return {tuple(e["scale"]["domain"]) for e in encodings if "domain" in e.get("scale", {})}


def test_front_csv_read_back_is_the_points(study: Study) -> None:
    with open(study.folder.file("front.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    in_json = json.loads(study.folder.file("front.json").read_text())["points"]
    assert in_json == [asdict(point) for point in study.front.points]
    assert [row["id"] for row in rows] == ["t0001", "t0004", "t0008"]
    for row, point in zip(rows, in_json, strict=True):
        for name in ("metric", "metric_stderr", "average_bits", "average_bits_searched"):
            assert float(row.pop(name)) == point[name]
        for name in ("size_bytes", "bops", "seed", "samples"):
            assert row.pop(name) == str(point[name])
        for name in ("validation_metric", "validation_loss", "average_act_bits"):
            assert float(row.pop(name)) == point[name]
        assert (row.pop("latency_s"), row.pop("split")) == ("", "test")
        assert (row.pop("id"), row.pop("weights")) == (point["id"], point["weights"])
        wanted = {f"weight_bits:{layer}": str(b) for layer, b in point["weight_bits"].items()}
        assert row == wanted | {f"act_bits:{la}": str(b) for la, b in point["act_bits"].items()}


def test_front_csv_leaves_fp32_inputs_empty_and_writes_a_latency_with_all_digits(
    study: Study,
) -> None:
    point = replace(study.front.best, act_bits={LAYERS[0]: 4}, latency_s=0.1 + 0.2, weights=None)
    text = render(study.folder, replace(study.front, points=(point,)), "csv").decode()
    (row,) = csv.DictReader(io.StringIO(text))
    assert float(row["latency_s"]) == 0.1 + 0.2
    assert row["weights"] == ""
    assert [row[f"act_bits:{layer}"] for layer in LAYERS] == ["4", "", "", "", ""]


def test_render_gives_the_bytes_of_the_files(study: Study) -> None:
    assert len(FORMATS) == len(FILES)
    for format, name in zip(FORMATS, FILES, strict=True):
        assert render(study.folder, study.front, format) == study.folder.file(name).read_bytes()
    with pytest.raises(ValueError, match="expected one of json, csv, png, html, got 'pdf'"):
        render(study.folder, study.front, "pdf")


def test_the_picture_is_a_png_of_moderate_size_that_shows_the_best_point(study: Study) -> None:
    content = study.folder.file("front.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(content)) as image:
        assert 1200 <= image.width <= 2400
        assert 800 <= image.height <= 2400
        colours = {rgb for _, rgb in image.convert("RGB").getcolors(1 << 20) or []}
    assert tuple(bytes.fromhex(ORANGE[1:])) in colours
    assert len(colours) > 50


def test_the_page_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "poster", "action"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"@import|url\(", page.texts["style"])
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_names_and_errors_stay_text(page: Page) -> None:
    assert page.count("script") == 4 + 2
    assert page.count("html") == page.count("body") == page.count("main") == 1
    assert page.count("b") == page.count("img") == 0
    assert page.row("2")[-1] == f"failed: {ERROR}"
    for name in ("bits-spec", "sensitivity-spec"):
        assert {row["layer"] for row in data_of(page.specs[name])} == set(LAYERS)


def test_the_page_has_headings_captions_scopes_and_a_language(page: Page) -> None:
    assert ("html", {"lang": "en"}) in page.elements
    assert page.count("h1") == 1
    assert page.count("caption") == page.count("table")
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")
    assert all(len(spec["description"]) > 20 for spec in page.specs.values())


def test_every_model_is_in_the_table_with_its_numbers(study: Study, page: Page) -> None:
    models = [*study.front.points, *study.front.uniform]
    for point in models:
        name = point.id + (" (best)" if point.id == "t0008" else "")
        final = study.folder.read_record(FINAL, point.id)
        assert final is not None
        assert final.validation is not None
        assert page.row(name)[1:6] == [
            f"{point.metric:.4f} ± 0.0042",
            f"{final.validation.metric:.4f} ± 0.0042",
            f"{point.average_bits:.3f}",
            f"{point.average_bits_searched:.3f}",
            f"{point.size_bytes / 1000:.1f}",
        ]
        assert float(page.row(name)[6]) == pytest.approx(point.bops / 1e9, rel=5e-4)
    assert page.row("FP32")[1:4] == ["0.9876 ± 0.0031", "0.9911 ± 0.0042", "32"]


def test_final_models_that_are_not_on_the_front_are_named_with_the_reason(
    study: Study, page: Page
) -> None:
    assert "t0003 (beaten by others)" in page.texts["p"]
    assert f"t0005 ({ERROR})" in page.texts["p"]
    front = study.front.within({"average_bits": 2.6})
    tighter = Page(render(study.folder, front, "html").decode())
    assert "t0004 (over the budget)" in tighter.texts["p"]
    assert "with at most 2.6 bits a weight and 300 kB" in tighter.texts["p"]
    assert not [row for row in page.rows if row and row[0].startswith(("t0003", "t0005"))]


def test_every_trial_is_in_the_table_with_its_numbers(study: Study, page: Page) -> None:
    for number, trial in enumerate(study.trials):
        row = page.row(str(number))
        assert row[1] == f"{trial.costs.average_bits:.3f}"
        assert row[4] == "12.3"
        if trial.validation is None:
            assert row[2:4] == ["", ""]
        else:
            assert row[2] == f"{trial.validation.metric:.4f} ± 0.0042"
            assert float(row[3]) == pytest.approx(trial.validation.loss, rel=5e-4)
            assert row[5] == "done"


def test_the_front_chart_holds_every_model_and_its_axes_hold_every_bar(page: Page) -> None:
    spec = page.specs["front-spec"]
    above = spec["vconcat"][0]
    drawn = {row["point"]: row for row in data_of(spec) if "metric_text" in row}
    assert {id: (r["cost"], r["metric"]) for id, r in drawn.items()} == USUAL
    assert [id for id, r in drawn.items() if "best" in r["kind"]] == ["t0008"]
    assert {r["metric"] for r in data_of(spec) if "FP32" in str(r.get("name"))} == {0.9876}
    assert {r["cost"] for r in data_of(spec) if "budget" in str(r.get("name"))} == {3.25}
    ((left, right),) = domains(above, "x")
    ((low, high),) = domains(above, "y")
    assert left < min(2.0, 3.25)
    assert right > max(4.0, 3.25)
    for row in drawn.values():
        assert row["high"] - row["metric"] == pytest.approx(0.0042)
        assert row["metric"] - row["low"] == pytest.approx(0.0042)
        assert low < row["low"] < row["high"] < high
    assert low < 0.9876 < high


def test_the_model_under_the_pointer_shows_its_bits(study: Study, page: Page) -> None:
    """Without a browser: what is selected at first, on what, and the rows that it chooses from."""
    spec = page.specs["front-spec"]
    (pointed,) = spec["params"]
    assert pointed["value"] == [{"point": "t0008"}]
    assert pointed["select"]["fields"] == ["point"]
    assert pointed["select"]["on"].startswith("pointerover")
    models = next(c for c in charts_in(spec) if c.get("name") == pointed["views"][0])
    ids = [row["point"] for row in spec["datasets"][models["data"]["name"]]]
    assert ids == ["t0001", "t0004", "t0008"]
    filtered = [c for c in charts_in(spec["vconcat"][1]) if "transform" in c]
    assert all(c["transform"][0]["filter"]["param"] == pointed["name"] for c in filtered)
    bars, names = (spec["datasets"][c["data"]["name"]] for c in filtered)
    assert {(row["point"], row["layer"]): row["bits"] for row in bars} == {
        (point.id, layer): bits
        for point in (*study.front.points, *study.front.uniform)
        for layer, bits in point.weight_bits.items()
    }
    assert {row["point"]: row["name"] for row in names}["t0004"] == "t0004: 2.800 bits a weight"


def test_the_page_and_the_chart_name_the_knee_and_the_hypervolume(study: Study, page: Page) -> None:
    assert study.front.knee == study.front.points[1]
    kinds = {
        row["point"]: row["kind"] for row in data_of(page.specs["front-spec"]) if "kind" in row
    }
    assert kinds["t0004"] == "knee, t0004"
    assert kinds["t0001"] == "front"
    assert page.texts["p"].count("bends most") == 1
    volume = f"{study.front.hypervolume():.4f}"
    reference = "accuracy 0 and 3.575 bits a weight and 330 kB"
    assert f"Its hypervolume is {volume}, up to {reference}" in page.texts["/strong"]


def test_the_bits_chart_holds_every_cell_in_model_order(study: Study, page: Page) -> None:
    spec = page.specs["bits-spec"]
    assert len(spec["hconcat"]) == 1, "all inputs have 8 bits"
    drawn = {(row["point"], row["layer"]): row["bits"] for row in data_of(spec)}
    assert drawn == {
        (point.id, layer): bits
        for point in study.front.points
        for layer, bits in point.weight_bits.items()
    }
    assert domains(spec, "y") == {LAYERS}
    assert domains(spec, "x") == {("t0001", "t0004", "t0008")}


def test_searched_input_bits_get_a_chart_of_their_own(tmp_path: Path) -> None:
    act = {LAYERS[0]: 4, LAYERS[1]: 8}  # the others keep FP32 inputs
    table = Table(LAYERS, (4, 8), SCORES[:, :2], SCORES[:, :2] / 9)
    finals = [record("t0000", [2, 2, 4, 2, 8], 0.9, 0.91, act=act)]
    config = replace(CONFIG, act_bits=(4, 8, 0))
    made = make_study(
        tmp_path, [record("0000", [2] * 5, 0.9)], finals, [], config=config, act_table=table
    )
    page = made.page
    weights, inputs = page.specs["bits-spec"]["hconcat"]
    assert weights["title"]["text"] == "Bits of the weights"
    assert inputs["title"]["text"] == "Bits of the inputs"
    cells = page.specs["bits-spec"]["datasets"][inputs["data"]["name"]]
    assert [cell["bits"] for cell in cells] == [4, 8, FP32_BITS, FP32_BITS, FP32_BITS]
    titles = [panel["title"] for panel in page.specs["sensitivity-spec"]["hconcat"]]
    assert [(t["text"].split()[-1], t["subtitle"][0]) for t in titles] == [
        ("weights", "hessian"),
        ("weights", "fisher"),
        ("inputs", "fisher"),
    ]


def test_input_bits_that_only_layers_are_given_are_drawn(tmp_path: Path) -> None:
    act = dict.fromkeys(LAYERS, 8) | {LAYERS[2]: 4}
    config = replace(CONFIG, act_bits=(8,), layers={LAYERS[4]: {"act-bits": [8, 4]}})
    trials = [record("0000", [2] * 5, 0.9, act=act)]
    made = make_study(
        tmp_path, trials, [record("t0000", [2] * 5, 0.9, 0.9, act=act)], [], config=config
    )
    _, inputs = made.page.specs["bits-spec"]["hconcat"]
    cells = made.page.specs["bits-spec"]["datasets"][inputs["data"]["name"]]
    assert {cell["layer"]: cell["bits"] for cell in cells} == act


def test_searched_input_bits_that_came_out_alike_are_drawn(tmp_path: Path) -> None:
    """Only a trial that is not on the front has other ones."""
    trials = [record("0000", [2] * 5, 0.9), record("0001", [2] * 5, 0.8, act={})]
    finals = [record("t0000", [2] * 5, 0.9, 0.9)]
    made = make_study(tmp_path, trials, finals, [], config=replace(CONFIG, act_bits=(8, 0)))
    _, inputs = made.page.specs["bits-spec"]["hconcat"]
    cells = made.page.specs["bits-spec"]["datasets"][inputs["data"]["name"]]
    assert [cell["bits"] for cell in cells] == [8] * 5


def test_the_sensitivity_chart_holds_every_score_on_a_positive_axis(page: Page) -> None:
    spec = page.specs["sensitivity-spec"]
    ((left, right),) = domains(spec, "x")
    assert 0 < left < 3e-2 * (1 + 1 / 8) < right
    for panel in spec["hconcat"]:
        names = {chart["data"]["name"] for chart in panel["layer"]}
        marks = [row for name in names for row in spec["datasets"][name] if "value" in row]
        values = {(m["layer"], m["bits"]): m["value"] for m in marks}
        assert values == {
            (layer, bits): SCORES[i, j]
            for i, layer in enumerate(LAYERS)
            for j, bits in enumerate((2, 4, 8))
        }
        for mark in marks:
            assert left < mark["from"] <= mark["score"] <= mark["to"] < right
            assert mark["inside"] == (mark["value"] > 1e-10)
            if mark["inside"]:
                assert mark["score"] == mark["value"]
        chosen = {(m["layer"], m["bits"]) for m in marks if m["chosen"]}
        assert chosen == set(zip(LAYERS, (4, 4, 2, 4, 4), strict=True))
        assert "triangle" in panel["title"]["subtitle"][1]


def test_the_history_holds_every_trial_and_a_slow_running_best(study: Study, page: Page) -> None:
    drawn = data_of(page.specs["history-spec"])
    done = {r["trial"]: r["metric"] for r in drawn if "metric_text" in r}
    failed = {r["trial"]: r["error"] for r in drawn if "error" in r}
    best = {r["trial"]: r["metric"] for r in drawn if "metric" in r and "cost" not in r}
    metrics = [None if t.validation is None else t.validation.metric for t in study.trials]
    assert done == {i: m for i, m in enumerate(metrics) if m is not None}
    assert failed == {2: ERROR}
    for i in range(len(metrics)):
        slow = -math.inf
        for metric in metrics[: i + 1]:
            if metric is not None and metric > slow:
                slow = metric
        assert best[i] == slow
    ((low, high),) = domains(page.specs["history-spec"], "y")
    assert low < 0.89 < 0.97 < high


def test_a_partial_front_says_so_everywhere(tmp_path: Path) -> None:
    """A search that was stopped: validation metrics of trials, no final model, nothing packed."""
    short = replace(record("0003", [2] * 5, None), error=None, epochs=1)
    trials = [
        record("0000", [2, 2, 2, 4, 2], 0.90),
        record("0001", [2, 4, 4, 2, 2], 0.95),
        record("0002", [4, 4, 2, 4, 4], None),
        replace(short, rungs=(Rung(1, evaluation(0.85), 2.5),)),
    ]
    made = make_study(tmp_path, trials, [], [], points=trials[:2], split="validation")
    write_report(made.folder, made.front)
    data = json.loads(made.folder.file("front.json").read_text())
    assert (data["split"], data["best"]) == ("validation", "0001")
    (first, second) = csv.DictReader(io.StringIO(made.folder.file("front.csv").read_text()))
    assert (first["split"], first["weights"], second["metric"]) == ("validation", "", "0.95")
    assert made.folder.file("front.png").read_bytes().startswith(b"\x89PNG")
    page = made.page
    assert "A partial front:" in page.texts["strong"]
    assert page.row("0001 (best)")[1:3] == ["0.9500 ± 0.0042", "2.800"]
    assert page.row("FP32")[1:3] == ["0.9911 ± 0.0042", "32"], "on validation, as the points are"
    assert not any("test" in cell for row in page.rows for cell in row)
    assert page.row("3")[2] == "0.8500 ± 0.0042"
    assert page.row("3")[-1] == "stopped after 1 epochs"
    drawn = data_of(page.specs["history-spec"])
    assert [(r["trial"], r["metric"]) for r in drawn if "state" in r] == [(3, 0.85)]
    assert [r["trial"] for r in drawn if "error" in r] == [2]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        StudyConfig(budget_bits=2.8),
        StudyConfig(
            task="my.module:make_task",
            weights="$HOME/a b;c.pt",
            budget_gbops=1 / 3,
            bits=(3,),
            act_bits=(4, 8, 0),
            first_last_bits=0,
            epochs=0,
            fp32_epochs=0,
            lr=0.1 + 0.2,
            seed=11,
            device="cuda:1",
            study="*",
            storage="postgresql://u:p@h/db?x=1&y=2",
            out='quote"d',
        ),
    ],
)
def test_the_command_line_gives_the_configuration_back(config: StudyConfig) -> None:
    assert read_command(command_line(config)) == config


def test_the_page_shows_the_command_line(study: Study, page: Page) -> None:
    shown = page.texts["command"]
    assert read_command(shown) == study.folder.config
    assert "--seed" not in shown, "a default is not repeated"


def read_command(line: str) -> StudyConfig:
    """The configuration of a command line, read as the command line's own parser does."""
    program, *words = shlex.split(line)
    assert program == "adq-search"
    fields = {f"--{option_name(f)}": (name, f) for name, f in OPTIONS.items()}
    values = {}
    for option, text in zip(words[::2], words[1::2], strict=True):
        name, field = fields[option]
        values[name] = {"whole": int, "number": float}.get(field.metadata["kind"], str)(text)
    return make_config(values)


def test_a_single_point_without_uniform_models_is_a_whole_report(tmp_path: Path) -> None:
    """Also a metric below zero, exact (no standard error), and one trial only."""
    made = make_study(
        tmp_path,
        [record("0000", [2] * 5, -1.25)],
        [replace(record("t0000", [2] * 5, -1.25, -1.5), test=evaluation(-1.5, 0.0))],
        [],
        fp32=evaluation(-0.75, 0.0),
        metric_name="log-likelihood <x>",
        config=replace(CONFIG, budget_bits=None),
    )
    old = tmp_path / "old"
    old.mkdir()
    for name in FILES:
        (old / name).write_bytes(b"old")
        os.link(old / name, made.folder.file(name))
    write_report(made.folder, made.front)
    assert {(old / name).read_bytes() for name in FILES} == {b"old"}, "replaced, not overwritten"
    page = Page(made.folder.file("report.html").read_text(encoding="utf-8"))
    assert page.row("t0000 (best)")[1] == "-1.5 ± 0"
    assert "uniform" not in page.texts["p"]
    assert ["model", "test log-likelihood <x>"] in [row[:2] for row in page.rows]
    above = page.specs["front-spec"]["vconcat"][0]
    ((left, right),) = domains(above, "x")
    ((low, high),) = domains(above, "y")
    assert left < 9.123 * 2 < 300 < right, "kB, with the budget of 0.3 MB"
    assert low < -1.5 < -0.75 < high
    ((low, high),) = domains(page.specs["history-spec"], "y")
    assert low < -1.25 < high


def test_scores_that_are_all_zero_still_have_an_axis(tmp_path: Path) -> None:
    made = usual(tmp_path, scores=np.zeros_like(SCORES))
    ((left, right),) = domains(made.page.specs["sensitivity-spec"], "x")
    assert 0 < left < right
    assert render(made.folder, made.front, "png").startswith(b"\x89PNG")


def test_a_latency_gets_a_column_and_a_uniform_twin_its_validation_metric(tmp_path: Path) -> None:
    made = usual(tmp_path)
    best = replace(made.front.best, latency_s=0.00123456)
    twin = replace(made.front.points[0], id="uniform-3")
    front = replace(made.front, points=(*made.front.points[:2], best), uniform=(twin,))
    page = replace(made, front=front).page
    assert page.row("t0008 (best)")[-1] == "1.235"
    assert page.row("uniform-3")[2] == page.row("t0001")[2] == "0.9312 ± 0.0042"


def test_a_damaged_record_leaves_the_old_files_and_no_halves(tmp_path: Path) -> None:
    made = usual(tmp_path)
    made.folder.file("front.png").write_bytes(b"old")
    write_text(made.folder.file("fp32.json"), "{}")
    with pytest.raises(InputError, match=r"fp32\.json is damaged: KeyError 'test'"):
        write_report(made.folder, made.front)
    assert made.folder.file("front.png").read_bytes() == b"old"
    assert not list(made.folder.path.glob(".*"))


def test_numbers_are_shown_in_readers_units() -> None:
    assert UNITS["size_bytes"].text(21_128) == "21.1 kB"
    assert UNITS["bops"].number(3_330_048) == "0.003330"
    assert UNITS["bops"].number(262.44e9) == "262.4"
    assert UNITS["bops"].number(123_456e9) == "123,456"
    assert UNITS["average_bits"].limit(2.8) == "2.8 bits a weight"
    assert metric_format([0.0079, 0.02]) == ".4f"
    assert metric_format([12.0]) == ".0f"
    assert metric_format([0.0, 0.0]) == ".4g"
    assert padded([1.0, 3.0], 0.1) == [0.8, 3.2]
    for alone in (5.0, -5.0, 0.0):
        low, high = padded([alone])
        assert low < alone < high


def test_a_name_goes_where_no_mark_is() -> None:
    here = (300.0, 100.0)
    assert free_corner(here, 60, [here], 640) == (1, 1)
    assert free_corner(here, 60, [here, (330.0, 112.0)], 640) == (1, -1)
    assert free_corner(here, 60, [here, (330.0, 112.0), (330.0, 88.0)], 640) == (-1, 1)
    assert free_corner((620.0, 100.0), 60, [], 640)[0] == -1
    assert free_corner((5.0, 100.0), 60, [(40.0, 100.0)], 640)[0] == 1


def test_every_cost_of_a_point_has_a_unit() -> None:
    assert set(UNITS) == set(Costs.__dataclass_fields__) & set(Point.__dataclass_fields__)
