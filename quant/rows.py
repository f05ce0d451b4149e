"""How a layer's weight is cut into the rows that each have one scale."""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Rows:
    """A weight of `shape` as a matrix of `count` rows of `size` weights.

    A row is an output channel, or `size` weights next to each other in one. `groups` is None but
    for a transposed convolution, whose weight has the shape (in, out/groups, ...): output channel
    g·(out/groups) + j is made of weight[g·(in/groups):(g+1)·(in/groups), j].
    """

    shape: tuple[int, ...]
    size: int
    groups: int | None = None

    @property
    def count(self) -> int:
        return prod(self.shape) // self.size

    @property
    def channels(self) -> int:
        return self.shape[0] if self.groups is None else self.shape[1] * self.groups

    def split(self, weight: Tensor) -> Tensor:
        """The rows of a weight, (count, size)."""
        if self.groups is not None:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return weight.reshape(self.count, self.size)

    def join(self, rows: Tensor) -> Tensor:
        """The weight whose rows these are: the inverse of `split`."""
        if self.groups is None:
            return rows.reshape(self.shape)
        inputs, outputs, *kernel = self.shape
        parts = rows.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return parts.transpose(1, 2).reshape(self.shape)


def rows_of(layer: nn.Module, group_size: int | None = None) -> Rows:
    """The rows of a layer's weight: its output channels, or groups of `group_size` weights there.

    Channels that `group_size` does not divide (27 weights of a first convolution, 9 of a
    depthwise one) stay whole.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape)
    groups = layer.groups if isinstance(layer, TRANSPOSED) else None
    whole = Rows(shape, weight.numel() // Rows(shape, 1, groups).channels, groups)
    if group_size is None or whole.size % group_size:
        return whole
    return Rows(shape, group_size, groups)
