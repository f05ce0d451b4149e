"""The report in Chromium: what a reader sees, clicks, and hears read out."""

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from written_study import LAYERS, Study, evaluation, large, record, usual

from adq.quant.files import write_json
from adq.search.candidate import Rung
from adq.search.folder import TRIALS
from adq.search.report import write_report
from adq.search.report.compare import compare
from adq.search.report.compare_chart import compare_page
from adq.search.report.page import page
from adq.search.report.theme import DARK, LIGHT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)
PHONE, DESK = 360, 1200
TOUCH = 24
"""Pixels of a target for a finger at least, WCAG 2.2, AA."""


class Browser:
    """One session of headless Chromium, and what it has complained of."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{flag}")
        options.binary_location = str(CHROMIUM)
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))

    def open(self, path: Path, width: int = DESK, **media: str) -> None:
        """Show a page at a width; `media` are media features, like color_scheme="dark". Without
        motion unless that is asked for: clicks wait for none."""
        media = {"reduced_motion": "reduce"} | media
        self.device("Emulation.setDeviceMetricsOverride", width=width, height=800,
                    deviceScaleFactor=1, mobile=width == PHONE)  # fmt: skip
        features = [
            {"name": f"prefers-{k.replace('_', '-')}", "value": v} for k, v in media.items()
        ]
        self.device("Emulation.setEmulatedMedia", features=features)
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # empties it
        self.driver.get(path.as_uri())

    def device(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def requests(self) -> list[str]:
        """The addresses that were asked for since `open`."""
        events = [json.loads(entry["message"])["message"] for entry in
                  self.driver.get_log("performance")]  # fmt: skip
        return [event["params"]["request"]["url"] for event in events
                if event["method"] == "Network.requestWillBeSent"]  # fmt: skip

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def mark(self, id: str) -> WebElement:
        return self.find(f'.model[data-point="{id}"]')[0]

    def picture(self, path: Path) -> None:
        """The whole page, as a PNG."""
        size = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        taken = self.device("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def shown_bits(self) -> dict[str, int]:
        """Layer -> bits of its weights, as the table of the chosen model says."""
        rows = self.run(
            "return [...document.querySelectorAll('#layers tbody tr')].map("
            "row => [row.cells[0].textContent, Number(row.cells[1].textContent)])"
        )
        return dict(rows)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.driver.quit()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """All that a report may show: rungs, failures, costs of layers, runs."""
    made = usual(tmp_path_factory.mktemp("study"))
    short = replace(record("0012", [2] * 5, None), error=None, epochs=1, validation=None)
    short = replace(short, rungs=(Rung(1, evaluation(0.85), 2.5),))
    made.folder.write_record(TRIALS, short)
    rungs = (Rung(1, evaluation(0.9), 2.5), Rung(3, evaluation(0.965), 7.5))
    made.folder.write_record(TRIALS, replace(made.trials[11], rungs=rungs))
    layers = [
        {"name": name, "kind": "Conv2d", "weight_shape": [8, 1, 3, 3 + i], "weights": 24 * (3 + i),
         "macs": 1000 * (3 + i), "costs": [
             {"weight": bits, "act": 8, "size_bytes": 3 * (3 + i) * bits + 32,
              "bops": 8000 * (3 + i) * bits, "latency_s": None} for bits in (2, 3, 4, 8)]}
        for i, name in enumerate(LAYERS)
    ]  # fmt: skip
    rest = {"size_bytes": 1234, "bops": 0, "latency_s": None}
    write_json(made.folder.file("layers.json"),
               {"schema": "adq-layers/1", "layers": layers, "rest": rest})  # fmt: skip
    run = {"begun": "2026-01-02T03:04:05+00:00", "command": "adq-search --study nasty",
           "trials": 0, "device": "cpu: 2 × <b>", "threads": 1, "system": "Linux-6.1",
           "versions": {"python": "3.11.2", "torch": "2.9.0"}}  # fmt: skip
    again = run | {"command": "adq-search resume nasty --trials 13", "trials": 12}
    write_json(made.folder.file("runs.json"), {"schema": "adq-runs/1", "runs": [run, again]})
    write_json(made.folder.file("clock.json"), {"seconds": 200.4})
    write_report(made.folder, made.front)
    return made


@pytest.fixture(scope="module")
def report(study: Study) -> Path:
    return study.folder.file("report.html")


@pytest.fixture(scope="module")
def bits(study: Study) -> dict[str, dict[str, int]]:
    """Id -> bits of the weights, as front.json says."""
    data = json.loads(study.folder.file("front.json").read_text())
    return {point["id"]: point["weight_bits"] for point in data["points"] + data["uniform"]}


@pytest.fixture(scope="module")
def comparison(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = replace(study.front, study="</script><img src=x>", points=study.front.points[:2])
    path = tmp_path_factory.mktemp("compare") / "compare.html"
    fronts = [study.front, replace(other, folder="/x/other")]
    path.write_text(compare_page(compare(fronts)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_opens_alone_without_complaints_and_fits_its_width(
    browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, name: str, width: int
) -> None:
    path: Path = request.getfixturevalue(name)
    browser.open(path, width)
    assert browser.driver.get_log("browser") == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wide = browser.run(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, .tall, "
        ".skip, [role=img], .axes') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 99))"
    )
    assert wide == [], "also nothing that is cut off"
    browser.picture(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width
        assert image.height > 800
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_point_is_there_to_be_seen_and_touched(
    browser: Browser, report: Path, bits: dict[str, dict[str, int]], width: int
) -> None:
    browser.open(report, width)
    assert {mark.get_attribute("data-point") for mark in browser.find(".model")} == set(bits)
    for id in bits:
        mark = browser.mark(id)
        assert mark.is_displayed()
        touched = browser.run(
            "return arguments[0].querySelector('.touch').getBoundingClientRect().toJSON()", mark
        )
        assert min(touched["width"], touched["height"]) >= TOUCH
        assert 0 <= touched["left"] < touched["right"] <= width


def test_a_click_chooses_a_model_and_shows_its_bits_everywhere(
    browser: Browser, report: Path, bits: dict[str, dict[str, int]]
) -> None:
    browser.open(report)
    assert browser.shown_bits() == bits["t0008"], "the best one until another is chosen"
    for id in bits:
        browser.mark(id).find_element(By.CSS_SELECTOR, ".touch").click()
        assert browser.shown_bits() == bits[id]
        checked = browser.find('.model[aria-checked="true"]')
        assert [mark.get_attribute("data-point") for mark in checked] == [id]
        name = browser.find("#model-name")[0].text
        assert name.startswith(id)
        bars = [bar.get_attribute("class") for bar in browser.find("#bars rect")]
        assert bars == [f"b{bits[id][layer]}" for layer in LAYERS]
        ringed = {
            (mark.get_attribute("data-layer"), mark.get_attribute("data-bits"))
            for mark in browser.find(".score.chosen")
        }
        assert ringed == {(str(i), str(bits[id][layer])) for i, layer in enumerate(LAYERS)}
    link = browser.find('[data-choose="t0004"]')[0]
    link.click()
    assert browser.shown_bits() == bits["t0004"]
    assert link.get_attribute("aria-current") == "true"


def test_the_pointer_over_a_model_shows_it_for_as_long(
    browser: Browser, report: Path, bits: dict[str, dict[str, int]]
) -> None:
    browser.open(report)
    over = browser.mark("t0001").find_element(By.CSS_SELECTOR, ".touch")
    ActionChains(browser.driver).move_to_element(over).perform()
    assert browser.shown_bits() == bits["t0001"]
    away = browser.find("#front")[0]
    ActionChains(browser.driver).move_to_element(away).perform()
    assert browser.shown_bits() == bits["t0008"]


def test_the_arrow_keys_go_through_the_models_by_cost(
    browser: Browser, study: Study, report: Path, bits: dict[str, dict[str, int]]
) -> None:
    browser.open(report)
    points = (*study.front.points, *study.front.uniform)
    by_cost = [point.id for point in sorted(points, key=lambda point: point.average_bits)]
    start = browser.find('.model[tabindex="0"]')
    assert [mark.get_attribute("data-point") for mark in start] == ["t0008"]
    browser.run("document.querySelector('nav li:last-child a').focus()")
    for _ in range(9):  # summary of the options, then the chart
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        if browser.driver.switch_to.active_element.get_attribute("data-point"):
            break
    focused = browser.driver.switch_to.active_element
    assert focused.get_attribute("data-point") == "t0008", "by the tabulator key alone"
    ring = "return getComputedStyle(arguments[0].querySelector('.ring')).strokeWidth"
    assert browser.run(ring, focused) == "4px", "the focus is seen"
    at = by_cost.index("t0008")
    for key, step in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, -1),
                      (Keys.ARROW_UP, -1), (Keys.ARROW_DOWN, 1)):  # fmt: skip
        browser.driver.switch_to.active_element.send_keys(key)
        at = (at + step) % len(by_cost)
        focused = browser.driver.switch_to.active_element
        assert focused.get_attribute("data-point") == by_cost[at]
        assert browser.shown_bits() == bits[by_cost[at]]
    for key, id in ((Keys.HOME, by_cost[0]), (Keys.END, by_cost[-1])):
        browser.driver.switch_to.active_element.send_keys(key)
        assert browser.shown_bits() == bits[id]


def test_the_costs_of_layers_are_those_of_the_file(
    browser: Browser, study: Study, report: Path, bits: dict[str, dict[str, int]]
) -> None:
    layers = json.loads(study.folder.file("layers.json").read_text())["layers"]
    fp32 = sum(4 * layer["weights"] for layer in layers) + 1234
    browser.open(report)
    for point in (study.front.points[0], study.front.uniform[1]):
        browser.mark(point.id).find_element(By.CSS_SELECTOR, ".touch").click()
        rows = browser.run(
            "return [...document.querySelectorAll('#layers tr')].map("
            "row => [...row.cells].map(cell => cell.textContent))"
        )
        header, body, (rest, whole, in_fp32) = rows[0], rows[1:-3], rows[-3:]
        assert header[3:9] == ["weights", "kB", "% of kB", "kB in FP32", "GBOPs", "% of GBOPs"]
        for layer, row in zip(layers, body, strict=True):
            given = bits[point.id][layer["name"]]
            (cost,) = [each for each in layer["costs"] if each["weight"] == given]
            assert row[:5] == [
                layer["name"], str(given), "8", str(layer["weights"]),
                f"{cost['size_bytes'] / 1e3:.1f}",
            ]  # fmt: skip
            assert float(row[5]) == pytest.approx(
                100 * cost["size_bytes"] / point.size_bytes, abs=0.051
            )
            assert row[6] == f"{layer['weights'] * 4 / 1e3:.1f}"
            assert float(row[7]) == pytest.approx(cost["bops"] / 1e9, rel=1e-3)
            assert float(row[8]) == pytest.approx(100 * cost["bops"] / point.bops, abs=0.051)
        assert rest[0] == "all else"
        assert rest[4] == "1.2"
        assert whole[4:7] == [f"{point.size_bytes / 1e3:.1f}", "100.0", f"{fp32 / 1e3:.1f}"]
        assert in_fp32[4] == whole[6]
        drawn = browser.find("#layers tbody tr:first-child .share rect")
        shares = [float(bar.get_attribute("width").rstrip("%")) for bar in drawn]
        assert shares == [float(body[0][5]), float(body[0][8])]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("report", PHONE, "light"), ("report", DESK, "dark"), ("comparison", PHONE, "dark")],
)
def test_accessibility_rules_hold(
    browser: Browser, request: pytest.FixtureRequest, name: str, scheme: str, width: int
) -> None:
    """All rules of axe-core, with everything unfolded."""
    browser.open(request.getfixturevalue(name), width, color_scheme=scheme)
    colour = {"light": LIGHT, "dark": DARK}[scheme]["bg"]
    rgb = ", ".join(str(byte) for byte in bytes.fromhex(colour[1:]))
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == f"rgb({rgb})"
    browser.run("for (const e of document.querySelectorAll('details')) e.open = true")
    browser.run(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = browser.driver.execute_async_script(
        "const done = arguments[0];"
        "axe.run({resultTypes: ['violations']}).then(done, error => done({error: String(error)}))"
    )
    assert "error" not in found
    assert {"color-contrast", "landmark-unique"} <= {rule["id"] for rule in found["passes"]}
    assert [
        (rule["id"], rule["help"], [node["html"][:120] for node in rule["nodes"][:3]])
        for rule in found["violations"]
    ] == []


def test_a_large_study_stays_a_small_page_that_shows_every_point(
    browser: Browser, tmp_path: Path
) -> None:
    """2,000 trials of 100 layers, 40 points: in what it weighs, not in seconds."""
    facts = large(2000, 100, 40)
    path = tmp_path / "large.html"
    path.write_text(page(facts), encoding="utf-8")
    assert path.stat().st_size < 4e6
    browser.open(path, PHONE)
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE
    assert len(browser.find(".model")) == 40
    point = facts.front.points[7]
    browser.run("document.querySelector(`[data-choose=${arguments[0]}]`).click()", point.id)
    assert browser.shown_bits() == point.weight_bits


def test_nothing_moves_for_who_does_not_want_that(browser: Browser, report: Path) -> None:
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    browser.open(report, reduced_motion="reduce")
    assert browser.run(behaviour) == "auto"
    browser.open(report, reduced_motion="no-preference")
    assert browser.run(behaviour) == "smooth"


def test_names_are_texts_and_no_other_script_runs(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert [*browser.shown_bits()] == list(LAYERS)
    assert browser.find("b, img") == []
    assert "2 × <b>" in browser.find('[aria-label="Runs, table"]')[0].text
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        "document.body.append(script)"
    )
    assert browser.run("return window.ran") is None
    assert "Content Security Policy" in browser.driver.get_log("browser")[0]["message"]
