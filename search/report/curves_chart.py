"""Training curves: the loss of each epoch, and what trials reached on each rung."""

import math
from collections.abc import Iterable, Sequence

from adq.search.report.facts import Facts
from adq.search.report.front_chart import kind_of
from adq.search.report.svg import Element, Key, Plot, Scale, add
from adq.search.report.units import padded

HEIGHT = 230
MANY = 100
"""More lines than this, and they are pale."""


def loss_keys(facts: Facts) -> list[Key]:
    """The legend of `loss_chart`."""
    keys = [Key("circle", "front", "models of the front")]
    if facts.front.uniform:
        keys.append(Key("diamond", "uniform", "the same bits in every searched layer"))
    return [*keys, Key("line", "trial", "trials"), Key("line", "step", "FP32")]


def _drawn(losses: Sequence[float]) -> list[tuple[float, float]]:
    """(epoch, loss) of what a logarithmic axis can show."""
    return [(i + 1, loss) for i, loss in enumerate(losses) if math.isfinite(loss) and loss > 0]


def loss_chart(facts: Facts) -> Plot | None:
    """Training loss after each epoch, from FP32's first one on; None where nothing was trained.

    Models of the chart of the front carry `data-curve`, their id.
    """
    trials = [_drawn(record.train_losses) for record in facts.trials]
    models = [
        (point, _drawn(record.train_losses))
        for point in (*facts.front.points, *facts.front.uniform)
        if (record := facts.record_of(point)) is not None
    ]
    fp32 = _drawn(facts.fp32_losses)
    every = [*trials, *(curve for _, curve in models), fp32]
    losses = [loss for curve in every for _, loss in curve]
    if not losses:
        return None
    longest = max(epoch for curve in every for epoch, _ in curve)
    x = Scale(0.5, longest + 0.5, whole=True)
    plot = Plot(x, Scale(min(losses) / 1.3, max(losses) * 1.3, log=True), HEIGHT)
    plot.axes("epoch", "training loss")
    frame = plot.frame()
    _curves(plot, frame, trials, "trial")
    _curves(plot, frame, [fp32], "step")
    for point, curve in models:
        if curve:
            class_ = kind_of(facts, point)[1]
            add(frame, "path", d=plot.path(curve), class_=f"curve {class_}", data_curve=point.id)
            plot.mark(plot.svg, *curve[-1], kind_of(facts, point)[0], class_)
    plot.described(
        f"Training loss after each epoch, of {len(facts.trials)} trials, of {len(models)} final "
        "models and of FP32. A table follows."
    )
    return plot


def _curves(
    plot: Plot, frame: Element, curves: Iterable[list[tuple[float, float]]], class_: str
) -> None:
    """Many lines as one element."""
    paths = [plot.path(curve) for curve in curves if curve]
    if len(paths) > MANY:
        plot.svg.set("class", "plot many")
    if paths:
        add(frame, "path", d="".join(paths), class_=f"curve {class_}")


def rung_chart(facts: Facts) -> Plot | None:
    """Validation metric after each rung that a trial reached; None where there is one rung."""
    climbs = [
        [
            (float(rung.epochs), rung.validation.metric)
            for rung in r.rungs
            if rung.validation is not None
        ]
        for r in facts.trials
    ]
    epochs = {epochs for climb in climbs for epochs, _ in climb}
    if len(epochs) < 2:
        return None
    up = padded(metric for climb in climbs for _, metric in climb)
    across = padded(epochs)
    plot = Plot(Scale(across[0], across[1], whole=True), Scale(up[0], up[1]), HEIGHT)
    plot.axes("epochs of the training", f"validation {facts.front.metric_name}")
    frame = plot.frame()
    ended = [climb for r, climb in zip(facts.trials, climbs, strict=True) if r.validation is None]
    done = [climb for r, climb in zip(facts.trials, climbs, strict=True) if r.validation]
    _curves(plot, frame, ended, "trial")
    _curves(plot, frame, done, "line")
    for climbed, class_ in ((ended, "trial"), (done, "front")):
        for epochs_, metric in (place for climb in climbed for place in climb):
            x, y = plot.at_x(epochs_), plot.at_y(metric)
            add(plot.svg, "circle", cx=x, cy=y, r=2.5, class_=class_)
    plot.described(
        f"Validation {facts.front.metric_name} after each rung, a line a trial. The table of "
        "trials has the same numbers."
    )
    return plot
