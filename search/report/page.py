"""report.html: one page that needs nothing but a browser."""

import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import vl_convert
from altair import SCHEMA_VERSION
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from adq.quant.evaluate import Evaluation
from adq.search.candidate import Record
from adq.search.config import IN_PYTHON
from adq.search.front import Point
from adq.search.report.charts import page_charts
from adq.search.report.command import command_line, options
from adq.search.report.facts import Facts
from adq.search.report.units import UNITS

BUNDLE = "window.vegaEmbed = vegaEmbed;"
PACKAGES = ("adq-search", "torch", "optuna", "altair")


@dataclass(frozen=True)
class Model:
    """A row of the table of models: cells as text, empty where there is nothing to say.

    `at` is the first cost with its unit.
    """

    id: str
    at: str
    test: str
    validation: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A row of the table of trials, in the same way; `error` says why a trial failed."""

    number: int
    cost: str
    metric: str
    loss: str
    seconds: str
    error: str


def page(facts: Facts) -> str:
    """The report as HTML, with its charts and the code that draws them inside."""
    config, front = facts.config, facts.front
    costs = [name for name in UNITS if getattr(front.best, name) is not None]
    points = {p.id for p in (*front.points, *front.uniform)}
    return _template().render(
        front=front,
        config=config,
        from_python=config.task == IN_PYTHON,
        options=options(config),
        command=command_line(config),
        budgets=[UNITS[cost].limit(limit) for cost, limit in config.budget.limits().items()],
        best=_model(facts, front.best, costs),
        best_costs=[
            UNITS[name].text(getattr(front.best, name))
            for name in costs
            if name != "average_bits_searched"
        ],
        points=[_model(facts, point, costs) for point in front.points],
        uniform=[_model(facts, point, costs) for point in front.uniform],
        fp32=_fp32(facts, costs),
        cost_titles=[UNITS[name].title for name in costs],
        left_out=[record for id, record in facts.finals.items() if id not in points],
        first_cost=facts.unit,
        trials=[_trial(facts, record) for record in facts.trials],
        charts=page_charts(facts),
        script=_script(),
        versions=[("Python", platform.python_version()), *((p, version(p)) for p in PACKAGES)],
    )


def _model(facts: Facts, point: Point, costs: list[str]) -> Model:
    final = facts.final_of(point)
    values = [getattr(point, name) for name in costs]
    return Model(
        id=point.id,
        at=facts.unit.text(facts.cost_of(point)),
        test=facts.metric_text(point.metric, point.metric_stderr),
        validation="" if final is None else _evaluation(facts, final.validation),
        costs=tuple(
            "" if value is None else UNITS[name].number(value)
            for name, value in zip(costs, values, strict=True)
        ),
    )


def _fp32(facts: Facts, costs: list[str]) -> Model:
    bits = {"average_bits": "32", "average_bits_searched": "32"}
    return Model(
        "FP32",
        "32 bits a weight",
        _evaluation(facts, facts.fp32),
        _evaluation(facts, facts.fp32_validation),
        tuple(bits.get(name, "") for name in costs),
    )


def _trial(facts: Facts, record: Record) -> Trial:
    found = record.validation
    return Trial(
        number=int(record.id),
        cost=facts.unit.number(facts.cost_of(record.costs)),
        metric=_evaluation(facts, found),
        loss="" if found is None else f"{found.loss:#.4g}",
        seconds=f"{record.seconds:.1f}",
        error=record.error or "",
    )


def _evaluation(facts: Facts, found: Evaluation | None) -> str:
    return "" if found is None else facts.metric_text(found.metric, found.metric_stderr)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


@cache
def _script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed, ready to stand in a <script>."""
    vega_lite = ".".join(SCHEMA_VERSION.split(".")[:2])
    code = vl_convert.javascript_bundle(BUNDLE, vega_lite)
    return Markup(code.replace("</script", "<\\/script"))
