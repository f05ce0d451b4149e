"""One look for page, charts and pictures: colours in the light and in the dark, and bit-widths.

Colours are told apart by readers of every colour vision: the marks are from the palette of Okabe
and Ito, ordered values run along viridis, light to dark on white and dark to light on black. Texts
stand out from what is behind them by 4.5 to 1 at least, marks by 3 to 1 (WCAG 2.2, AA).
"""

import re
from collections.abc import Mapping

from adq.quant.spec import FP32_BITS, MAX_BITS, MIN_BITS

LIGHT = {
    "bg": "#ffffff", "ink": "#222222", "grey": "#5f5f5f", "line": "#dddddd", "grid": "#ececec",
    "panel": "#f4f4f4", "accent": "#b04a00", "link": "#00588a", "faint": "#b9b9b9",
    "blue": "#0072b2", "orange": "#d55e00", "green": "#00855f", "purple": "#aa4499",
    "pink": "#b5568e", "sky": "#2f86b8", "yellow": "#b87a00",
}  # fmt: skip
DARK = {
    "bg": "#16181b", "ink": "#e8e8e8", "grey": "#b0b3b8", "line": "#3a3d42", "grid": "#2a2d31",
    "panel": "#212429", "accent": "#ffa95e", "link": "#7cc4f0", "faint": "#5a5e66",
    "blue": "#56b4e9", "orange": "#ff8c3b", "green": "#2fc59a", "purple": "#dd96d4",
    "pink": "#f0a3cf", "sky": "#a5d8f5", "yellow": "#f0c35a",
}  # fmt: skip
WIDTHS = (*range(MIN_BITS, MAX_BITS + 1), FP32_BITS)
RAMP = ("#a5db36", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#30073f", "#d0d0d0")
DARK_RAMP = ("#4a90d0", "#2fa7bb", "#34b89d", "#5bc97b", "#95d840", "#d0e11c", "#fff08a", "#8b9098")
"""One colour a bit-width of WIDTHS; the same steps show few to many of any other quantity."""
STEPS = MAX_BITS - MIN_BITS + 1
SERIES = ("blue", "orange", "green", "pink", "sky", "yellow", "purple")
"""As many studies beside each other as there are colours."""

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
"""The first is built into the PNG converter."""

SVG_RULES = """
text { fill: var(--ink); font-size: 12px; font-family: FONT; }
.quiet { fill: var(--grey); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.halo { stroke: var(--bg); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; }
.grid { stroke: var(--grid); } .axis { stroke: var(--faint); }
.dash { stroke-dasharray: 6 4; stroke: var(--grey); stroke-width: 1.5; }
.budget { stroke-dasharray: 2 3; stroke: var(--purple); stroke-width: 1.5; }
.trial { fill: var(--faint); stroke: var(--faint); } .step { stroke: var(--grey); }
.bar { stroke-width: 1.5; opacity: .6; }
.front { fill: var(--blue); stroke: var(--blue); }
.best { fill: var(--orange); stroke: var(--orange); }
.uniform { fill: var(--bg); stroke: var(--green); stroke-width: 2.2; }
.lost { fill: none; stroke: var(--orange); stroke-width: 2.5; }
.line { stroke: var(--blue); opacity: .7; }
.head { font-size: 15px; } .head, .strong { font-weight: bold; }
""".replace("FONT", FONT)
LAST_RULES = """
.curve { fill: none; stroke-width: 1.5; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.curve.trial { stroke-width: 1; }
.open { fill: var(--bg); stroke-width: 1.6; }
.ring { fill: none; stroke: none; }
.chosen .ring, [aria-checked="true"] .ring { stroke: var(--ink); stroke-width: 1.6; }
"""
"""How SVG classes look; `var` is the page's, or filled in for a picture."""


def variables(colours: Mapping[str, str], ramp: tuple[str, ...]) -> dict[str, str]:
    """CSS variables: the colours by name, `--bN` for N bits and `--tN` for a text on it."""
    found = dict(colours)
    for bits, colour in zip(WIDTHS, ramp, strict=True):
        found[f"b{bits}"] = colour
        found[f"t{bits}"] = max("#000000", "#ffffff", key=lambda text: contrast(text, colour))
    return found


def contrast(one: str, other: str) -> float:
    """(L₁ + 0.05) / (L₂ + 0.05) of the lighter and the darker colour, see WCAG 2.2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2): 0.2126 R + 0.7152 G + 0.0722 B, linear."""
    parts = [byte / 255 for byte in bytes.fromhex(colour[1:])]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def svg_rules() -> str:
    """The rules of charts, with those of bit-widths and of studies beside each other."""
    bits = [
        f".b{b} {{ fill: var(--b{b}); stroke: var(--b{b}); }} .t{b} {{ fill: var(--t{b}); }}"
        for b in WIDTHS
    ]
    series = [f".s{i} {{ fill: var(--{n}); stroke: var(--{n}); }}" for i, n in enumerate(SERIES)]
    return SVG_RULES + "\n".join(bits + series) + LAST_RULES


def picture_rules() -> str:
    """The rules for a picture on white, which knows no variables."""
    known = variables(LIGHT, RAMP)
    return re.sub(r"var\(--(\w+)\)", lambda match: known[match[1]], svg_rules())


def step_of(share: float) -> int:
    """The bit-width whose colour stands for a share of a range, 0 to 1."""
    return MIN_BITS + min(STEPS - 1, max(0, int(share * STEPS)))


def cut(name: str, longest: int) -> str:
    """A name that keeps its end, where names differ, `longest` characters in all."""
    return name if len(name) <= longest else "…" + name[1 - longest :]
