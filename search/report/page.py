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
from adq.search.front import TOLERANCE, Point
from adq.search.report.charts import page_charts
from adq.search.report.command import command_line, options
from adq.search.report.facts import Facts
from adq.search.report.history_chart import reached
from adq.search.report.units import UNITS, reference_text

BUNDLE = "window.vegaEmbed = vegaEmbed;"
PACKAGES = ("adq-search", "torch", "optuna", "altair")


@dataclass(frozen=True)
class Model:
    """A row of the table of models: cells as text, empty where there is nothing to say.

    `metric` was measured on the front's split, `at` is the first cost with its unit.
    """

    id: str
    at: str
    metric: str
    validation: str
    costs: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A row of the table of trials, in the same way; `state` says how it ended."""

    number: int
    cost: str
    metric: str
    loss: str
    seconds: str
    state: str


def page(facts: Facts) -> str:
    """The report as HTML, with its charts and the code that draws them inside."""
    config, front = facts.config, facts.front
    costs = [name for name in UNITS if getattr(front.best, name) is not None]
    knee = front.knee
    return template("report.html.jinja").render(
        front=front,
        config=config,
        from_python=config.task == IN_PYTHON,
        options=options(config),
        command=command_line(config),
        budgets=[UNITS[cost].limit(limit) for cost, limit in front.budget.items()],
        best=_model(facts, front.best, costs),
        best_costs=[
            UNITS[name].text(getattr(front.best, name))
            for name in costs
            if name not in ("average_bits_searched", "average_act_bits")
        ],
        knee=None if knee is None else _model(facts, knee, costs),
        hypervolume=f"{front.hypervolume():.4f}",
        reference=reference_text(front.metric_name, front.reference),
        points=[_model(facts, point, costs) for point in front.points],
        uniform=[_model(facts, point, costs) for point in front.uniform],
        fp32=_fp32(facts, costs),
        cost_titles=[UNITS[name].title for name in costs],
        left_out=_left_out(facts),
        first_cost=facts.unit,
        any_stopped=any(r.validation is None and r.error is None for r in facts.trials),
        trials=[_trial(facts, record) for record in facts.trials],
        charts=page_charts(facts),
        script=script(),
        versions=[("Python", platform.python_version()), *((p, version(p)) for p in PACKAGES)],
    )


def _model(facts: Facts, point: Point, costs: list[str]) -> Model:
    final = facts.final_of(point)
    values = [getattr(point, name) for name in costs]
    return Model(
        id=point.id,
        at=facts.unit.text(facts.cost_of(point)),
        metric=facts.metric_text(point.metric, point.metric_stderr),
        validation="" if final is None else _evaluation(facts, final.validation),
        costs=tuple(
            "" if value is None else UNITS[name].number(value)
            for name, value in zip(costs, values, strict=True)
        ),
    )


def _left_out(facts: Facts) -> list[tuple[str, str]]:
    """(id, why) of each final model that is not on the front."""
    front = facts.front
    if front.split != "test":
        return []
    shown = {p.id for p in (*front.points, *front.uniform)}

    def why(record: Record) -> str:
        if record.error is not None:
            return record.error
        over = any(
            getattr(record.costs, n) > limit * (1 + TOLERANCE) for n, limit in front.budget.items()
        )
        return "over the budget" if over else "beaten by others"

    return [(id, why(record)) for id, record in facts.finals.items() if id not in shown]


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
    found = reached(record)
    return Trial(
        number=int(record.id),
        cost=facts.unit.number(facts.cost_of(record.costs)),
        metric=_evaluation(facts, found),
        loss="" if found is None else f"{found.loss:#.4g}",
        seconds=f"{record.seconds:.1f}",
        state=record.state,
    )


def _evaluation(facts: Facts, found: Evaluation | None) -> str:
    return "" if found is None else facts.metric_text(found.metric, found.metric_stderr)


@cache
def template(name: str) -> Template:
    """A template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@cache
def script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed, ready to stand in a <script>."""
    vega_lite = ".".join(SCHEMA_VERSION.split(".")[:2])
    code = vl_convert.javascript_bundle(BUNDLE, vega_lite)
    return Markup(code.replace("</script", "<\\/script"))
