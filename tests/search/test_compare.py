"""Fronts beside each other: one reference for all, and what can't be compared is refused."""

import csv
import html
import io
import json
import re
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from adq.quant.errors import InputError
from adq.search.front import Front, Point
from adq.search.report.compare import FORMATS, compare, render

POINT = Point(
    id="a",
    metric=0.5,
    metric_stderr=0.125,
    samples=60,
    validation_metric=0.5,
    validation_loss=1.0,
    average_bits=2.0,
    average_bits_searched=2.0,
    average_act_bits=8.0,
    size_bytes=1000,
    bops=10,
    latency_s=None,
    weight_bits={"l": 2},
    act_bits={"l": 8},
    seed=3,
    weights="models/a.safetensors",
)


def front(study: str, *models: tuple[float, float], **more: Any) -> Front:
    """A point for each (average bits, metric)."""
    points = tuple(
        replace(POINT, id=f"t{i}", average_bits=bits, metric=metric, validation_metric=metric)
        for i, (bits, metric) in enumerate(models)
    )
    usual = {"fp32_metric": 0.875, "budget": {"average_bits": 4.0}, "folder": f"/x/{study}"}
    given = usual | more
    given.setdefault("objectives", given["budget"])
    return Front(study, "digits", "accuracy", points=points, **given)


CHEAP = front("cheap", (2.0, 0.5), (2.5, 0.75), (3.0, 0.8), budget={"average_bits": 3.0})
DEAR = front("</script>", (3.5, 0.8), (4.0, 0.9), fp32_metric=0.9)
BOTH = compare([CHEAP, DEAR])


def test_one_reference_holds_for_all_and_loses_no_model() -> None:
    assert BOTH.reference == {"metric": 0.0, "average_bits": pytest.approx(4.4)}
    expected = {
        "cheap": 0.5 * 0.5 + 0.75 * 0.5 + 0.8 * 1.4,
        "</script>": 0.8 * 0.5 + 0.9 * 0.4,
    }
    volumes = {name: volume * 4.4 for name, volume in BOTH.hypervolumes.items()}
    assert volumes == pytest.approx(expected)
    assert compare([DEAR, CHEAP]).hypervolumes == BOTH.hypervolumes


def test_a_front_that_another_one_beats_everywhere_has_less() -> None:
    worse = replace(CHEAP, study="worse", points=CHEAP.points[:2], folder="/x/worse")
    volumes = compare([CHEAP, worse]).hypervolumes
    assert volumes["worse"] < volumes["cheap"]


def test_costs_are_those_that_all_minimised() -> None:
    size = {"size_bytes": 2000.0}
    more = replace(DEAR, objectives=size | {"average_bits": 4.0})
    assert compare([CHEAP, more]).costs == ("average_bits",)
    both = compare([more, replace(more, study="other", folder="/y")])
    assert both.costs == ("average_bits", "size_bytes")
    assert both.reference == pytest.approx({"metric": 0, "average_bits": 4.4, "size_bytes": 2200})


def test_the_table_has_a_row_a_study() -> None:
    header, rows = BOTH.table()
    assert header == [
        "study", "models", "hypervolume", "best", "test accuracy", "average bits a weight", "knee"
    ]  # fmt: skip
    volumes = {name: f"{volume:.4f}" for name, volume in BOTH.hypervolumes.items()}
    assert rows == [
        ["cheap", "3", volumes["cheap"], "t2", "0.80 ± 0.12", "3.000", "t1"],
        ["</script>", "2", volumes["</script>"], "t1", "0.90 ± 0.12", "4.000", "none"],
    ]


def test_every_format_holds_every_model() -> None:
    assert set(FORMATS) == {"json", "csv", "png", "html"}
    data = json.loads(render(BOTH, "json"))
    assert data["schema"] == "adq-comparison/1"
    assert data["reference"] == BOTH.reference
    for study, given in zip(data["studies"], (CHEAP, DEAR), strict=True):
        assert study["points"] == [asdict(point) for point in given.points]
        assert study["hypervolume"] == BOTH.hypervolumes[given.study]
        assert study["best"] == given.best.id
    rows = list(csv.DictReader(io.StringIO(render(BOTH, "csv").decode())))
    models = [("cheap", p) for p in CHEAP.points] + [("</script>", p) for p in DEAR.points]
    assert [(r["study"], r["id"], float(r["metric"])) for r in rows] == [
        (study, point.id, point.metric) for study, point in models
    ]
    assert render(BOTH, "png").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected one of json, csv, png, html, got 'pdf'"):
        render(BOTH, "pdf")


def test_the_page_loads_nothing_and_keeps_names_as_text() -> None:
    text = render(BOTH, "html").decode()
    assert "default-src 'none'" in html.unescape(text)
    svg = ElementTree.fromstring(
        re.findall(r"<svg class=\"plot\".*?</svg>(?=\s*<figcaption)", text, re.S)[0]
    )
    marks = [mark for mark in svg.iter("g") if mark.get("data-study")]
    assert [(mark.get("data-study"), mark.get("data-point")) for mark in marks] == [
        (given.study, point.id) for given in (CHEAP, DEAR) for point in given.points
    ]
    best = {mark.get("data-point") for mark in marks if "chosen" in str(mark.get("class"))}
    assert best == {"t2", "t1"}
    across = [float(mark.find("svg").get("x", "").removesuffix("%")) for mark in marks]
    costs = [point.average_bits for given in (CHEAP, DEAR) for point in given.points]
    slopes = [
        (b - a) / (d - c) for (a, b), (c, d) in zip(pairwise(across), pairwise(costs), strict=True)
    ]
    assert slopes == pytest.approx([slopes[0]] * 4, rel=1e-3), "evenly, in the cost's unit"
    body = text.partition('<main id="content">')[2]
    assert '<th scope="row">&lt;/script&gt;</th><td>2</td>' in body
    assert '<th scope="row">&lt;/script&gt;</th><td>t1</td><td>0.90 ± 0.12</td>' in body
    assert "Hypervolumes are up to accuracy 0 and 4.4 bits a weight" in body


def test_studies_of_one_name_are_told_apart_by_their_folders() -> None:
    twin = replace(DEAR, study="cheap")
    assert list(compare([CHEAP, twin]).fronts) == ["/x/cheap", "/x/</script>"]


@pytest.mark.parametrize(
    ("fronts", "message"),
    [
        ([CHEAP], "expected 2 to 7 studies, got 1"),
        ([front(str(i), (2, 0.5)) for i in range(8)], "expected 2 to 7 studies, got 8"),
        ([CHEAP, CHEAP], "expected each study once, got /x/cheap, /x/cheap"),
        ([CHEAP, DEAR, replace(DEAR, study="d", task="cifar10:x")], "their task differs, digits"),
        ([CHEAP, replace(DEAR, metric_name="mAP")], "metric differs, accuracy and mAP"),
        ([CHEAP, replace(DEAR, split="validation")], "split differs, test and validation"),
        ([CHEAP, replace(DEAR, objectives={"bops": 5.0})], "minimised no cost in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(fronts: list[Front], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(fronts)


def test_partial_fronts_may_be_compared_with_each_other() -> None:
    both = compare([replace(front, split="validation") for front in (CHEAP, DEAR)])
    assert both.table()[0][4] == "validation accuracy"
    assert "They are partial" in render(both, "html").decode()
