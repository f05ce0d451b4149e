"""The report says what the records say: every number read back from the files and compared."""

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from PIL import Image
from written_study import (
    CONFIG,
    ERROR,
    LAYERS,
    SCORES,
    USUAL,
    Study,
    evaluation,
    make_study,
    record,
    usual,
)

from adq.proxies.base import Table
from adq.proxies.costs import Costs
from adq.quant.errors import InputError
from adq.quant.files import write_text
from adq.quant.spec import FP32_BITS
from adq.search.candidate import Rung
from adq.search.config import OPTIONS, StudyConfig, make_config, option_name
from adq.search.folder import FINAL
from adq.search.front import Point
from adq.search.report import FORMATS, render, write_report
from adq.search.report.bits_chart import bits_panels
from adq.search.report.charts import page_sensitivities
from adq.search.report.command import command_line
from adq.search.report.facts import Facts, read_facts
from adq.search.report.front_chart import front_chart, front_keys
from adq.search.report.history_chart import history_chart, running_best
from adq.search.report.sensitivity_chart import all_scores, log_axis, sensitivity_chart
from adq.search.report.svg import Scale
from adq.search.report.tables import loss_rows
from adq.search.report.theme import (
    DARK,
    DARK_RAMP,
    LIGHT,
    RAMP,
    SERIES,
    WIDTHS,
    contrast,
    variables,
)
from adq.search.report.units import UNITS, metric_format, padded

FILES = ("front.json", "front.csv", "front.png", "report.html")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = usual(tmp_path_factory.mktemp("study"))
    write_report(made.folder, made.front)
    return made


@pytest.fixture(scope="module")
def page(study: Study) -> "Page":
    return Page(study.folder.file("report.html").read_text(encoding="utf-8"))


def page_of(study: Study) -> "Page":
    return Page(render(study.folder, study.front, "html").decode())


class Page(HTMLParser):
    """What a browser would make of the page: elements, texts, tables."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.inside: list[str] = []
        self.in_cell = False
        self.feed(text)

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


@dataclass(frozen=True)
class Drawn:
    """A chart read back: what the places of its marks say by the texts of its axes."""

    svg: Element

    def value(self, axis: str, place: str, log: bool = False) -> float:
        """What a place says: a straight line through two ticks of the axis, in logarithms where
        those are even."""
        class_ = {"x": "middle", "y": "end"}[axis]
        ticks = [t for t in self.svg.find("g").findall("text") if t.get("class") == class_]
        places = [number(tick.get(axis)) - (4 if axis == "y" else 0) for tick in ticks]
        values = [float(str(tick.text).replace(",", "")) for tick in ticks]
        values = [math.log(value) for value in values] if log else values
        slope = (values[-1] - values[0]) / (places[-1] - places[0])
        found = values[0] + slope * (number(place) - places[0])
        return math.exp(found) if log else found

    def models(self) -> dict[str, Element]:
        return {m.get("data-point"): m for m in self.svg.iter("g") if m.get("role") == "radio"}


def number(place: str | None) -> float:
    """Percentages and pixels alike."""
    return float(str(place).removesuffix("%"))


def facts_of(study: Study) -> Facts:
    return read_facts(study.folder, study.front)


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
    assert tuple(bytes.fromhex(LIGHT["orange"][1:])) in colours
    assert len(colours) > 50


def test_the_page_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "data", "poster", "action", "style"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert not re.search(r"@import|url\(", page.texts["style"])
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_names_and_errors_stay_text(page: Page) -> None:
    assert page.count("script") == 2
    assert page.count("html") == page.count("body") == page.count("main") == 1
    assert page.count("b") == page.count("img") == 0
    assert page.row("2")[-1] == f"failed: {ERROR}"
    assert ["trial failed: non-finite", "1", "2", ERROR] in page.rows
    first = [row[0] for row in page.rows if row]
    assert all(first.count(layer) == 2 + 2 for layer in LAYERS), "costs, bits, two proxies"
    assert set(json.loads(page.texts["models-data"])["models"]) == set(USUAL)


def test_the_page_has_headings_captions_scopes_and_a_language(page: Page) -> None:
    assert ("html", {"lang": "en"}) in page.elements
    assert page.count("h1") == 1
    assert page.count("caption") == page.count("table")
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")
    plots = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "plot"]
    assert len(plots) == 1 + 1 + 2 + 1 + 1, "front, bars, two proxies, losses, history"
    assert all(len(plot["aria-label"] or "") > 20 for plot in plots)


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
    what = "final model not on the front"
    assert [what, "1", "t0003", "beaten by others"] in page.rows
    assert [what, "1", "t0005", ERROR] in page.rows
    front = study.front.within({"average_bits": 2.6})
    tighter = Page(render(study.folder, front, "html").decode())
    assert [what, "3", "t0003, t0004, t0008", "over the budget"] in tighter.rows
    dear = [str(int(t.id)) for t in study.trials if t.costs.average_bits > 2.6 and t.validation]
    (row,) = [row for row in tighter.rows if row and row[0] == "trial over the budget"]
    assert row[2].split(", ") == dear
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


def test_the_front_chart_holds_every_model_and_its_axes_hold_every_bar(study: Study) -> None:
    plot = front_chart(facts_of(study))
    drawn = Drawn(plot.svg)
    assert set(drawn.models()) == set(USUAL)
    for id, mark in drawn.models().items():
        cost, metric = USUAL[id]
        bar, place = mark.find("line"), mark.find("svg")
        assert drawn.value("x", place.get("x")) == pytest.approx(cost, abs=1e-3)
        assert drawn.value("y", place.get("y")) == pytest.approx(metric, abs=2e-5)
        for end, sign in (("y1", -1), ("y2", 1)):
            at = drawn.value("y", bar.get(end))
            assert at == pytest.approx(metric + sign * 0.0042, abs=2e-5)
            assert plot.top < number(bar.get(end)) < plot.top + plot.height
        assert 0 < number(place.get("x")) < 100
        assert mark.get("aria-checked") == ("true" if id == "t0008" else "false")
    lines = {e.get("class"): e for e in drawn.svg.iter("line")}
    assert drawn.value("y", lines["dash"].get("y1")) == pytest.approx(0.9876, abs=2e-5)
    assert drawn.value("x", lines["budget"].get("x1")) == pytest.approx(3.25, abs=1e-3)


def test_the_page_holds_the_bits_of_every_model_that_can_be_chosen(
    study: Study, page: Page
) -> None:
    """What the script shows; that it does is seen in a browser."""
    data = json.loads(page.texts["models-data"])
    assert data["best"] == "t0008"
    for point in (*study.front.points, *study.front.uniform):
        model = data["models"][point.id]
        assert dict(zip(LAYERS, model["weight"], strict=True)) == point.weight_bits
        assert [row[:2] for row in model["rows"]] == [
            [str(point.weight_bits[layer]), str(point.act_bits[layer])] for layer in LAYERS
        ]
    assert data["models"]["t0008"]["title"] == "t0008 (best)"
    assert "2.800 bits a weight, " in data["models"]["t0004"]["summary"]


def test_the_page_and_the_chart_name_the_knee_and_the_hypervolume(study: Study, page: Page) -> None:
    assert study.front.knee == study.front.points[1]
    texts = [key.text for key in front_keys(facts_of(study))]
    assert texts[:3] == ["front", "knee, t0004", "best by validation, t0008"]
    assert page.texts["p"].count("bends most") == 1
    volume = f"{study.front.hypervolume():.4f}"
    reference = "accuracy 0 and 3.575 bits a weight and 330 kB"
    assert f"Its hypervolume is {volume}, up to {reference}" in page.texts["/strong"]


def test_the_map_of_bits_holds_every_cell_in_model_order(study: Study, page: Page) -> None:
    header = page.rows.index(["layer", "t0001", "t0004", "t0008"])
    cells = page.rows[header + 1 : header + 1 + len(LAYERS)]
    assert cells == [
        [layer, *(str(point.weight_bits[layer]) for point in study.front.points)]
        for layer in LAYERS
    ]
    assert ["layer", "t0001", "t0004", "t0008"] not in page.rows[header + 1 :], "inputs: all 8"
    (panel,) = bits_panels(facts_of(study))
    texts = [text.text for text in panel.svg.iter("text")]
    assert texts.count("8") == 0
    assert [t for t in texts if t in "2345678"] == [cell for row in cells for cell in row[1:]]


def shown_input_bits(study: Study) -> list[int]:
    """The second map of bits, of a study with one point."""
    header = ["layer", study.front.points[0].id]
    rows = page_of(study).rows
    last = max(i for i, row in enumerate(rows) if row == header)
    assert rows.index(header) < last, "weights come first"
    return [int(row[1]) for row in rows[last + 1 : last + 1 + len(LAYERS)]]


def test_searched_input_bits_get_a_chart_of_their_own(tmp_path: Path) -> None:
    act = {LAYERS[0]: 4, LAYERS[1]: 8}  # the others keep FP32 inputs
    table = Table(LAYERS, (4, 8), SCORES[:, :2], SCORES[:, :2] / 9)
    finals = [record("t0000", [2, 2, 4, 2, 8], 0.9, 0.91, act=act)]
    config = replace(CONFIG, act_bits=(4, 8, 0))
    made = make_study(
        tmp_path, [record("0000", [2] * 5, 0.9)], finals, [], config=config, act_table=table
    )
    assert shown_input_bits(made) == [4, 8, FP32_BITS, FP32_BITS, FP32_BITS]
    assert len(bits_panels(facts_of(made))) == 2
    titles = [drawn.title for drawn in page_sensitivities(facts_of(made).proxies)]
    assert titles == ["hessian, weights", "fisher, weights", "fisher, inputs"]
    ticks = [a for tag, a in page_of(made).elements if tag == "line" and a.get("class") == "tick"]
    assert len(ticks) == len(LAYERS)


def test_input_bits_that_only_layers_are_given_are_drawn(tmp_path: Path) -> None:
    act = dict.fromkeys(LAYERS, 8) | {LAYERS[2]: 4}
    config = replace(CONFIG, act_bits=(8,), layers={LAYERS[4]: {"act-bits": [8, 4]}})
    trials = [record("0000", [2] * 5, 0.9, act=act)]
    made = make_study(
        tmp_path, trials, [record("t0000", [2] * 5, 0.9, 0.9, act=act)], [], config=config
    )
    assert shown_input_bits(made) == [act[layer] for layer in LAYERS]


def test_searched_input_bits_that_came_out_alike_are_drawn(tmp_path: Path) -> None:
    """Only a trial that is not on the front has other ones."""
    trials = [record("0000", [2] * 5, 0.9), record("0001", [2] * 5, 0.8, act={})]
    finals = [record("t0000", [2] * 5, 0.9, 0.9)]
    made = make_study(tmp_path, trials, finals, [], config=replace(CONFIG, act_bits=(8, 0)))
    assert shown_input_bits(made) == [8] * 5


def test_the_sensitivity_chart_holds_every_score_on_a_positive_axis(
    study: Study, page: Page
) -> None:
    panels = list(all_scores(facts_of(study).proxies))
    axis = log_axis([panel.table for panel in panels])
    assert [panel.proxy for panel in panels] == ["hessian", "fisher"]
    for panel in panels:
        drawn = Drawn(sensitivity_chart(panel, axis).svg)
        marks = [mark for mark in drawn.svg.iter("g") if mark.get("class") == "score"]
        assert len(marks) == SCORES.size
        for mark in marks:
            i, j = int(mark.get("data-layer")), (2, 4, 8).index(int(mark.get("data-bits")))
            place = mark.find("svg")
            assert 0 < number(place.get("x")) < 100
            if SCORES[i, j] < 1e-10:
                assert place.find("circle").get("class") == "ring", "a triangle at the left end"
                assert number(place.get("x")) < 6
                continue
            at = drawn.value("x", place.get("x"), log=True)
            assert at == pytest.approx(SCORES[i, j], rel=2e-2), "0.05 % of seven decades"
            low, high = (number(mark.find("line").get(end)) for end in ("x1", "x2"))
            assert 0 < low < number(place.get("x")) < high < 100
    ringed = json.loads(page.texts["models-data"])["models"]["t0008"]["weight"]
    assert ringed == [4, 4, 2, 4, 4]


def test_the_history_holds_every_trial_and_a_slow_running_best(study: Study) -> None:
    drawn = Drawn(history_chart(facts_of(study)).svg)
    metrics = [None if t.validation is None else t.validation.metric for t in study.trials]
    circles = [c for c in drawn.svg.iter("circle") if c.get("cx")]
    found = {
        round(drawn.value("x", c.get("cx")), 2): drawn.value("y", c.get("cy")) for c in circles
    }
    assert found == pytest.approx({i: m for i, m in enumerate(metrics) if m is not None}, abs=1e-4)
    (cross,) = [e for e in drawn.svg.iter("path") if e.get("class") == "lost"]
    assert ERROR in str(cross.find("title").text)
    best = dict(running_best(study.trials))
    for i in range(len(metrics)):
        slow = -math.inf
        for metric in metrics[: i + 1]:
            if metric is not None and metric > slow:
                slow = metric
        assert best[i] == slow
    (steps,) = [e for e in drawn.svg.iter("path") if e.get("class") == "curve step"]
    last = str(steps.get("d")).rpartition("L")[2].split()[1]
    assert drawn.value("y", last) == pytest.approx(best[11], abs=1e-3)


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
    page = page_of(made)
    assert "A partial front:" in page.texts["strong"]
    assert page.row("0001 (best)")[1:3] == ["0.9500 ± 0.0042", "2.800"]
    assert page.row("FP32")[1:3] == ["0.9911 ± 0.0042", "32"], "on validation, as the points are"
    assert not any("test" in cell for row in page.rows for cell in row)
    assert page.row("3")[2] == "0.8500 ± 0.0042"
    assert page.row("3")[-1] == "stopped after 1 epochs"
    curves = {n: [c for c in cells if c] for n, cells in loss_rows(facts_of(made))[1:]}
    own = {r.id: [f"{loss:.4g}" for loss in r.train_losses] for r in trials[:2]}
    assert curves == own
    assert all(curves.values()), "the trainings of the search, though there were no others"
    drawn = Drawn(history_chart(facts_of(made)).svg)
    (ring,) = [c for c in drawn.svg.iter("circle") if "open" in str(c.get("class"))]
    assert drawn.value("x", ring.get("cx")) == pytest.approx(3, abs=0.01)
    assert drawn.value("y", ring.get("cy")) == pytest.approx(0.85, abs=1e-4)
    assert "trial stopped early" in {row[0] for row in page.rows if row}


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
            storage="postgresql://u@h/db?x=1&y=2",
            out='quote"d',
        ),
    ],
)
def test_the_command_line_gives_the_configuration_back(config: StudyConfig) -> None:
    assert read_command(command_line(config)) == config


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    storage = {"storage": "postgresql://me:secret@db/studies"}
    assert "me:***@db" in command_line(replace(CONFIG, **storage))
    made = usual(tmp_path, config=replace(CONFIG, **storage))
    assert "secret" not in render(made.folder, made.front, "html").decode()
    behind = {"storage": "postgresql://db/studies?user=me&password=secret"}
    assert "secret" not in command_line(replace(CONFIG, **behind))


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
    front = front_chart(facts_of(made))
    assert front.x.low < 9.123 * 2 < 300 < front.x.high, "kB, with the budget of 0.3 MB"
    assert front.y.low < -1.5 < -0.75 < front.y.high
    history = history_chart(facts_of(made))
    assert history.y.low < -1.25 < history.y.high


def test_scores_that_are_all_zero_still_have_an_axis(tmp_path: Path) -> None:
    made = usual(tmp_path, scores=np.zeros_like(SCORES))
    left, right = log_axis([panel.table for panel in all_scores(facts_of(made).proxies)])
    assert 0 < left < right
    assert "triangles" in page_of(made).texts["p"]
    assert render(made.folder, made.front, "png").startswith(b"\x89PNG")


def test_a_latency_gets_a_column_and_a_uniform_twin_its_validation_metric(tmp_path: Path) -> None:
    made = usual(tmp_path)
    best = replace(made.front.best, latency_s=0.00123456)
    twin = replace(made.front.points[0], id="uniform-3")
    front = replace(made.front, points=(*made.front.points[:2], best), uniform=(twin,))
    page = page_of(replace(made, front=front))
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


def test_texts_and_marks_stand_out_in_the_light_and_in_the_dark() -> None:
    """Contrast as WCAG 2.2 asks for: 4.5 for texts, 3 for marks; black on white has 21."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    for colours, ramp in ((LIGHT, RAMP), (DARK, DARK_RAMP)):
        for text in ("ink", "grey", "accent", "link"):
            assert contrast(colours[text], colours["bg"]) >= 4.5
            assert contrast(colours[text], colours["panel"]) >= 4.5
        for mark in ("blue", "orange", "green", "purple", *SERIES):
            assert contrast(colours[mark], colours["bg"]) >= 3
        for bits, colour in zip(WIDTHS, ramp, strict=True):
            assert contrast(variables(colours, ramp)[f"t{bits}"], colour) >= 4.5


def test_ticks_are_round_and_inside() -> None:
    assert [text for _, text in Scale(2.1, 3.3).ticks(6)] == ["2.2", "2.4", "2.6", "2.8", "3.0",
                                                            "3.2"]  # fmt: skip
    assert [text for _, text in Scale(-0.5, 3.5, whole=True).ticks(9)] == ["0", "1", "2", "3"]
    assert [text for _, text in Scale(2e-6, 3e-2, log=True).ticks(9)] == ["1e-5", "0.0001",
                                                                      "0.001", "0.01"]  # fmt: skip
    assert [value for value, _ in Scale(0.15, 0.7, log=True).ticks(4)] == pytest.approx([0.2, 0.5])
    assert Scale(1, 100, log=True).share(10) == pytest.approx(0.5)


def test_every_cost_of_a_point_has_a_unit() -> None:
    assert set(UNITS) == set(Costs.__dataclass_fields__) & set(Point.__dataclass_fields__)
