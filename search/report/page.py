"""report.html: one page that needs nothing but a browser."""

import base64
import hashlib
import platform
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from adq.search.config import IN_PYTHON
from adq.search.report import chosen
from adq.search.report.bits_chart import bits_maps
from adq.search.report.charts import page_charts, page_sensitivities, width_keys
from adq.search.report.command import command_line, options
from adq.search.report.facts import Facts
from adq.search.report.sensitivity_chart import Scores, all_scores
from adq.search.report.tables import (
    fp32_row,
    loss_rows,
    losses,
    model_row,
    shown_costs,
    trial_row,
)
from adq.search.report.theme import DARK, DARK_RAMP, LIGHT, RAMP, WIDTHS, svg_rules, variables
from adq.search.report.units import UNITS, reference_text

PACKAGES = ("adq-search", "torch", "optuna")
HERE = Path(__file__).parent
CONTENTS = {
    "result": "Found",
    "asked": "Asked",
    "front": "Front",
    "bits": "Bits",
    "sensitivity": "Sensitivity",
    "training": "Training",
    "search": "Search",
    "failed": "Failed",
    "again": "Again",
}


def page(facts: Facts) -> str:
    """The report as HTML, with its charts inside; its script only shows other models' numbers."""
    config, front = facts.config, facts.front
    costs, knee = shown_costs(facts), front.knee
    panels = chosen.panels(facts)
    panel = panels[front.best.id]
    fp32 = fp32_row(facts)
    inputs = facts.input_bits_vary
    return render(
        "report.html.jinja",
        front=front,
        config=config,
        contents=CONTENTS.items(),
        from_python=config.task == IN_PYTHON,
        options=options(config),
        command=command_line(config),
        budgets=[UNITS[cost].limit(limit) for cost, limit in front.budget.items()],
        asked=_asked(facts),
        best=model_row(facts, front.best),
        best_costs=[
            UNITS[name].text(getattr(front.best, name))
            + (_smaller(facts) if name == "size_bytes" else "")
            for name in costs
            if name not in ("average_bits_searched", "average_act_bits")
        ],
        knee=None if knee is None else model_row(facts, knee),
        hypervolume=f"{front.hypervolume():.4f}",
        reference=reference_text(front.metric_name, front.reference),
        points=[model_row(facts, point) for point in front.points],
        uniform=[model_row(facts, point) for point in front.uniform],
        fp32=fp32,
        cost_titles=[UNITS[name].title for name in costs],
        panels=panels,
        panel=panel,
        columns=chosen.columns(facts),
        layers=facts.layers,
        inputs=inputs,
        bars=chosen.bars(facts.layers, panel, inputs),
        data=chosen.data(facts, panels),
        maps=bits_maps(facts),
        width_keys=width_keys(_widths(facts)),
        charts=page_charts(facts),
        sensitivities=page_sensitivities(facts.proxies),
        score_tables=[_score_table(scores) for scores in all_scores(facts.proxies)],
        **_tables(facts),
        versions=[("Python", platform.python_version()), *((p, version(p)) for p in PACKAGES)],
    )


def _tables(facts: Facts) -> dict[str, Any]:
    """What the tables of losses, trials, failures and runs show."""
    trials = [trial_row(facts, record) for record in facts.trials]
    header = ["trial", facts.unit.title, f"validation {facts.front.metric_name}", "validation loss"]
    climbed = any(trial.rungs for trial in trials)
    header += ["after shorter trainings"] if climbed else []
    names = ["number", "cost", "metric", "loss", *(["rungs"] if climbed else []), "seconds"]
    curves = loss_rows(facts)
    return {
        "trial_header": [*header, "seconds", "state"],
        "trials": [[getattr(t, name) for name in (*names, "state")] for t in trials],
        "loss_header": ["model", *(f"epoch {i + 1}" for i in range(len(curves[0][1])))],
        "loss_rows": [[name, *cells] for name, cells in curves],
        "ends": _ends(facts),
        "failures": [[loss.what, loss.count, loss.which, loss.reason] for loss in losses(facts)],
        "runs": [
            [r.begun[:16].replace("T", " "), r.command, r.trials, r.device, r.threads, r.system,
             ", ".join(f"{name} {number}" for name, number in r.versions.items())]
            for r in facts.runs
        ],
        "run_header": ["begun", "command", "trials by then", "device", "threads of a training",
                       "system", "versions"],
        "resumed": _times(len(facts.runs) - 1),
        "seconds": None if facts.seconds is None else _duration(facts.seconds),
    }  # fmt: skip


def _asked(facts: Facts) -> list[tuple[str, str]]:
    """What the study was to do, as (term, text)."""
    config, scheme = facts.config, facts.config.scheme
    act = ["FP32" if bits == 0 else str(bits) for bits in config.act_bits]
    pinned = config.first_last_bits
    groups = f", a scale for {scheme.group_size} weights" if scheme.group_size else ""
    start = f" (codebooks from {scheme.init})" if scheme.weight == "adq" else ""
    shorter = f", the best of those after {_words(config.rungs)}" if config.rungs else ""
    ends = f"kept at {pinned} bits" if pinned else "searched like the others"
    trials = (
        f"{config.trials} by sampler {config.sampler}; epochs of each: {config.epochs}{shorter}"
    )
    limits = [UNITS[cost].limit(limit) for cost, limit in facts.front.budget.items()]
    samples = f"{facts.fp32_validation.samples:,} validation samples"
    if facts.front.split == "test":
        samples += f", {facts.fp32.samples:,} test samples"
    return [
        ("task", "given in Python" if config.task == IN_PYTHON else config.task),
        ("model", config.model or "the task's own"),
        ("data", samples),
        ("budget", f"at most {' and '.join(limits)}"),
        ("bits of the weights", _words(config.bits)),
        ("bits of the inputs", _words(act)),
        ("first and last layer", ends),
        ("quantizers", f"weights {scheme.weight}{start}{groups}; inputs {scheme.act}"),
        ("trials", trials),
        ("epochs of the final training", f"{config.final_epochs}, from FP32"),
        ("sensitivity", config.proxies.replace(",", ", ")),
        ("seed", str(config.seed)),
    ]


def _words(values: Any) -> str:
    """Like `2, 3 or 4`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _smaller(facts: Facts) -> str:
    """How many times smaller the best model is than FP32, where that is known."""
    known = facts.breakdown
    if known is None:
        return ""
    whole = known.rest.size_bytes + sum(layer.fp32.size_bytes for layer in known.layers)
    return f" ({whole / facts.front.best.size_bytes:.1f} times smaller than in FP32)"


def _ends(facts: Facts) -> str:
    """How many trials came to which end, as a sentence."""
    ends = Counter(
        "failed" if r.error is not None else "stopped early" if r.validation is None else "done"
        for r in facts.trials
    )
    parts = [f"{ends[end]} {end}" for end in ("done", "stopped early", "failed")]
    finals = sum(record.error is not None for record in facts.finals.values())
    failed = f"; of {len(facts.finals)} final trainings, {finals} failed" if facts.finals else ""
    return f"Of {len(facts.trials)} trials: {', '.join(parts)}{failed}."


def _times(count: int) -> str:
    return {0: "never resumed", 1: "resumed once"}.get(count, f"resumed {count} times")


def _duration(seconds: float) -> str:
    """Like `1 h 02 min`, `3 min 20 s` or `14 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _widths(facts: Facts) -> list[int]:
    """All bit-widths that the page shows of weights."""
    points = (*facts.front.points, *facts.front.uniform)
    used = {bits for point in points for bits in point.weight_bits.values()}
    return sorted(used | {b for proxy in facts.proxies for b in proxy.weight.bits})


def _score_table(scores: Scores) -> dict[str, Any]:
    table = scores.table
    rows = [
        [layer, *(f"{s:.3g} ± {e:.1g}" for s, e in zip(values, errors, strict=True))]
        for layer, values, errors in zip(table.layers, table.score, table.stderr, strict=True)
    ]
    header = ["layer", *(f"{bits} bits" for bits in table.bits)]
    return {"title": f"{scores.proxy}, {scores.kind}", "header": header, "rows": rows}


def render(name: str, **values: Any) -> str:
    """A page from a template of this folder: one file, which a browser runs only our script in."""
    style, script = _style(), Markup((HERE / "page.js").read_text(encoding="utf-8"))
    policy = "; ".join(
        ["default-src 'none'", f"style-src {_hash(style)}", f"script-src {_hash(script)}",
         "base-uri 'none'", "form-action 'none'"]
    )  # fmt: skip
    return _template(name).render(style=style, script=script, policy=policy, **values)


@cache
def _style() -> Markup:
    """The rules of the page and its charts, with colours for light and dark surroundings."""

    def root(colours: dict[str, str]) -> str:
        return ":root { " + " ".join(f"--{k}: {v};" for k, v in colours.items()) + " }"

    light, dark = root(variables(LIGHT, RAMP)), root(variables(DARK, DARK_RAMP))
    cells = [f".c{b} {{ background: var(--b{b}); color: var(--t{b}); }}" for b in WIDTHS]
    page_rules = (HERE / "page.css").read_text(encoding="utf-8")
    scheme = f"@media (prefers-color-scheme: dark) {{ {dark} }}"
    return Markup("\n".join([light, scheme, svg_rules(), page_rules, *cells]))


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
