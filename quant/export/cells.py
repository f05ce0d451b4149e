"""The codes of an input, #{thresholds <= x}, in elementary operations and one look into a table.

Exchange formats have no search in sorted values. So the line is cut into C cells of one width,

    c(x) = floor(min(max((x − low)·inverse, 0), C − 1))
    code = top[c] − Σ_d [x < edges[d, c]]

where top[c] counts the thresholds of the cells up to c, and edges[:, c] are those inside, filled
up with −∞. NaN gets the top code. This is exact, however (x − low)·inverse is rounded: no
threshold is so near to a border that rounding moves it to another cell, and where no threshold is
near, either cell tells the same code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 4  # for each code, at most: tables stay small beside the weights
SHIFTS = 16
ROUNDING = 2.0**-20  # sixteen times what two operations in single precision lose
COMPARED = 3  # so few thresholds are compared one after the other


@dataclass(frozen=True)
class Cells:
    """`low` and `inverse` are float32 numbers, `top` is (C,), `edges` (depth, C), both float32."""

    low: float
    inverse: float
    top: Tensor
    edges: Tensor

    @property
    def count(self) -> int:
        return self.top.numel()


def cells_of(thresholds: Tensor) -> Cells:
    """The cells with the fewest thresholds in one, and the fewest such; thresholds (n,) ascend."""
    thresholds = thresholds.detach().cpu().float()
    n = thresholds.numel()
    best = Cells(0.0, 1.0, torch.full((1,), float(n)), thresholds[:, None])
    first, span = thresholds[0], (thresholds[-1] - thresholds[0]).item()
    count = n + 1
    while n > COMPARED and count <= CELLS * (n + 1) and len(best.edges) > 1:
        for i in range(SHIFTS if span > 0 else 0):
            shift = (i + 0.5) / SHIFTS  # of the first threshold from its cell's border, in cells
            inverse = torch.tensor((count - 1) / span)
            low = first - shift / inverse
            place = (thresholds - low) * inverse
            away = (place - place.round()).abs() > ROUNDING * place.clamp(min=1)
            cell = place.long()
            if not (away.all() and cell[0] == 0 and cell[-1] < count):
                continue
            inside = cell.bincount(minlength=count)
            if inside.max() < len(best.edges):
                best = Cells(low.item(), inverse.item(), *_tables(thresholds, cell, inside))
        count *= 2
    return best


def _tables(thresholds: Tensor, cell: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    top = inside.cumsum(0)
    edges = torch.full((int(inside.max()), inside.numel()), -torch.inf)
    order = torch.arange(len(cell)) - (top - inside)[cell]  # among those of the same cell
    edges[order, cell] = thresholds
    return top.float(), edges
