"""Charts as SVG: scales, axes and marks. One drawing serves the page and the picture.

In a page a plot is as wide as there is room: places across are percentages, texts keep their size,
and lines are drawn in a frame of their own that is stretched. In a picture it is `width` pixels.
Names and errors come from users; the element tree escapes them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

Element = ElementTree.Element
STRETCHED = 1000
"""Units across a plot that has no width of its own."""
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
SHAPES = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "square": "M-5-5h10v10h-10z",
    "diamond": "M0-7L7 0L0 7L-7 0z",
    "triangle": "M0-6L6 5H-6z",
    "down": "M0 6L6-5H-6z",
    "left": "M-5 0L4-5V5z",
    "right": "M5 0L-4-5V5z",
    "cross": "M-4-4L4 4M4-4L-4 4",
    "line": "M-8 0H8",
    "plus": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
}
"""Marks around their middle."""


def add(parent: Element | None, tag: str, text: str | None = None, **attributes: object) -> Element:
    """A new element, the parent's last child; `class_` is `class`, and `a_b` is `a-b`."""
    named = {
        name.rstrip("_").replace("_", "-"): NO_XML.sub("\ufffd", _text(value))
        for name, value in attributes.items()
        if value is not None
    }
    element = Element(tag, named)
    if text is not None:
        element.text = NO_XML.sub("\ufffd", text)
    if parent is not None:
        parent.append(element)
    return element


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def written(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode")


@dataclass(frozen=True)
class Scale:
    """A value as a share of the way from `low` to `high`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(place, text) of round numbers inside, at most `most` of them."""
        return self._powers(most) if self.log else self._steps(most)

    def _steps(self, most: int) -> list[tuple[float, str]]:
        step = _round_step((self.high - self.low) / most)
        step = max(1.0, step) if self.whole else step
        decimals = max(0, -math.floor(math.log10(step)))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        values = [i * step for i in range(first, last + 1)]
        return [(v, f"{v:,.{decimals}f}" if decimals < 7 else f"{v:.3g}") for v in values]

    def _powers(self, most: int) -> list[tuple[float, str]]:
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        values = [10.0**i for i in range(first, last + 1)]
        if len(values) < 2:
            decade = 10.0 ** (first - 1)
            values = [d * m for d in (decade, decade * 10) for m in (1, 2, 5)]
            values = [v for v in values if self.low <= v <= self.high] or [self.low]
        every = math.ceil(len(values) / most)
        return [(v, f"{v:g}".replace("e-0", "e-").replace("e+0", "e")) for v in values[::every]]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9))


class Plot:
    """A rectangle with two scales, `height` pixels high, `width` wide or as wide as its place."""

    def __init__(
        self,
        x: Scale,
        y: Scale,
        height: float,
        width: float | None = None,
        top: float = 22,
        bottom: float = 40,
    ) -> None:
        self.x, self.y, self.width, self.height, self.top = x, y, width, height, top
        self.svg = add(None, "svg", class_="plot", overflow="visible", height=top + height + bottom,
                       width="100%" if width is None else width)  # fmt: skip

    def across(self, share: float) -> str:
        return f"{100 * share:.4g}%" if self.width is None else f"{share * self.width:.5g}"

    def at_x(self, value: float) -> str:
        return self.across(self.x.share(value))

    def at_y(self, value: float) -> float:
        return round(self.top + self.height * (1 - self.y.share(value)), 2)

    def described(self, label: str, role: str = "img") -> Element:
        self.svg.set("role", role)
        self.svg.set("aria-label", label)
        return self.svg

    def axes(self, x_title: str, y_title: str, grid: bool = True, ticks: int = 5) -> None:
        """Grid, tick texts, and titles: that of the y axis stands above it, level."""
        bottom = self.top + self.height
        axes = add(self.svg, "g", class_="axes", aria_hidden="true")
        for value, text in self.y.ticks(ticks) if y_title else ():
            y = self.at_y(value)
            add(axes, "line", x1=0, x2=self.across(1), y1=y, y2=y, class_="grid")
            add(axes, "text", text, x=-6, y=y + 4, class_="end")
        for value, text in self.x.ticks(ticks if self.x.log else ticks + 3):
            x = self.at_x(value)
            if grid:
                add(axes, "line", x1=x, x2=x, y1=self.top, y2=bottom, class_="grid")
            add(axes, "text", text, x=x, y=bottom + 16, class_="middle")
        add(axes, "line", x1=0, x2=self.across(1), y1=bottom, y2=bottom, class_="axis")
        add(axes, "text", x_title, x=self.across(0.5), y=bottom + 34, class_="middle quiet")
        if y_title:
            add(axes, "text", y_title, x=-46, y=self.top - 9, class_="quiet")

    def frame(self) -> Element:
        """Where paths go: as wide as the plot, in units of `on_path`."""
        units = STRETCHED if self.width is None else self.width
        whole = self.top + self.height
        return add(
            self.svg, "svg", width=self.across(1), height=whole, viewBox=f"0 0 {units} {whole}",
            preserveAspectRatio="none", overflow="visible", aria_hidden="true",
        )  # fmt: skip

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """A line through (x, y) values, for a path of `frame`."""
        units = STRETCHED if self.width is None else self.width
        places = [f"{self.x.share(x) * units:.1f} {self.at_y(y):.1f}" for x, y in points]
        return "M" + "L".join(places) + ("h0" if len(places) == 1 else "")

    def mark(self, parent: Element, x: float, y: float, shape: str, class_: str) -> Element:
        """A shape at (x, y), and room around it for a finger; gives the element around both."""
        place = add(parent, "svg", x=self.at_x(x), y=self.at_y(y), overflow="visible")
        add(place, "path", d=SHAPES[shape], class_=class_)
        return place

    def bar(self, parent: Element, x: float, low: float, high: float, class_: str) -> None:
        """A vertical line from `low` to `high`, a standard error say."""
        place = self.at_x(x)
        add(parent, "line", x1=place, x2=place, y1=self.at_y(low), y2=self.at_y(high),
            class_=f"bar {class_}")  # fmt: skip


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    shape: str
    class_: str
    text: str

    @property
    def symbol(self) -> Markup:
        """The mark alone, as SVG."""
        svg = add(None, "svg", width=16, height=16, viewBox="-8 -8 16 16", aria_hidden="true")
        add(svg, "path", d=SHAPES[self.shape], class_=self.class_)
        return Markup(written(svg))


def key_line(parent: Element, keys: Sequence[Key], x: float, y: float) -> None:
    """A legend in a row, for a picture."""
    for key in keys:
        place = add(parent, "svg", x=x + 6, y=y - 4, overflow="visible")
        add(place, "path", d=SHAPES[key.shape], class_=key.class_)
        add(parent, "text", key.text, x=x + 18, y=y)
        x += 40 + 6.6 * len(key.text)
