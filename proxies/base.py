"""What a proxy is asked, and what it answers.

Every proxy estimates the same quantity, S[layer, bits]: the increase of the mean loss when one
layer alone is quantized. `direct` measures it; the others take the second-order term of its Taylor
series, ½ δᵀ H δ with δ = Q_b(w) − w, and differ in what they put for H. The first-order term is
left out: at a trained minimum it vanishes on average, and its sign says nothing about sensitivity.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from adq.proxies.work import Work
from adq.quant.baselines import activation_quantizer_for, weight_quantizer_for
from adq.quant.batches import Batch, batch_size, micro_batches
from adq.quant.calibrate import Ranges
from adq.quant.digest import content_hash
from adq.quant.errors import InputError
from adq.quant.layers import LayerInfo
from adq.quant.qat import Loss
from adq.quant.rows import Rows, rows_of
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """`score[i, j]`: expected loss increase of `layers[i]` at `bits[j]`; `stderr`: its error."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    score: Array
    stderr: Array

    def monotone(self) -> Array:
        """The scores, made non-increasing in bits and never negative.

        Each score becomes the largest of itself and those of more bits: an estimate that says
        "more bits hurt" is noise, and an allocator would act on it.
        """
        order = np.argsort(self.bits)[::-1]
        raised = np.maximum.accumulate(np.maximum(self.score[:, order], 0.0), axis=1)
        return raised[:, np.argsort(order)]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "bits": list(self.bits),
            "score": self.score.tolist(),
            "stderr": self.stderr.tolist(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Table":
        """Raises ValueError for scores that are missing or not finite."""
        layers, bits = tuple(data["layers"]), tuple(data["bits"])
        return Table(layers, bits, *_numbers(data, "score", (len(layers), len(bits))))


@dataclass(frozen=True)
class Interactions:
    """What two layers lose together beyond the sum of what each loses alone (CLADO, arXiv
    2307.05657): `value[i, a, j, b]` = L(i at a, j at b) − L(i at a) − L(j at b) + L(neither), for
    `layers[i]` at `bits[a]` and `layers[j]` at `bits[b]`.

    Symmetric in (i, a) and (j, b), zero for i = j. `stderr` has the same shape.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    value: Array
    stderr: Array

    def significant(self) -> "Interactions":
        """The same with zeros for what is within two standard errors of zero."""
        return replace(self, value=np.where(abs(self.value) > 2 * self.stderr, self.value, 0.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "bits": list(self.bits),
            "value": self.value.tolist(),
            "stderr": self.stderr.tolist(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Interactions":
        layers, bits = tuple(data["layers"]), tuple(data["bits"])
        shape = (len(layers), len(bits)) * 2
        return Interactions(layers, bits, *_numbers(data, "value", shape))


def _numbers(data: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Finite values, and their standard errors, which may be unknown."""
    value, stderr = (np.array(data[key], dtype=np.float64) for key in (name, "stderr"))
    if value.shape != shape or stderr.shape != shape or not np.isfinite(value).all():
        raise ValueError(f"{name}: expected finite numbers of shape {shape}, got {value.shape}")
    return value, stderr


@dataclass(frozen=True)
class Sensitivity:
    """What one proxy says: a table for weights, one for layer inputs where it has one, and what
    pairs of layers add where it measures that.

    samples   what the standard errors average over (probes, data samples, batches)
    seconds   of the clock, in the process that ended the measurement
    passes    network passes over the scored samples: a forward pass counts one, a backward pass
              two, a Hessian-vector product four
    """

    proxy: str
    weight: Table
    act: Table | None
    samples: int
    seconds: float
    passes: float = 0.0
    pairs: Interactions | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "proxy": self.proxy,
            "unit": "expected loss increase",
            "samples": self.samples,
            "seconds": self.seconds,
            "passes": self.passes,
            "weight": self.weight.to_json(),
            "act": None if self.act is None else self.act.to_json(),
            "pairs": None if self.pairs is None else self.pairs.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Sensitivity":
        return Sensitivity(
            data["proxy"],
            Table.from_json(data["weight"]),
            None if data["act"] is None else Table.from_json(data["act"]),
            int(data["samples"]),
            float(data["seconds"]),
            float(data["passes"]),
            None if data["pairs"] is None else Interactions.from_json(data["pairs"]),
        )


@dataclass(frozen=True)
class Subject:
    """What a proxy scores: a trained FP32 model on some data.

    model        left as it was; BatchNorm runs on its stored statistics
    layers       those to score, as `adq.quant.layers.trace_layers` finds them
    bits         widths of weights to score
    act_bits     widths of layer inputs to score; none for a proxy of weights alone
    batches      (inputs, targets), as large as memory allows; one counts by its samples
    loss         (outputs, targets) -> mean loss over a batch
    scheme       the quantizers
    ranges       where input quantizers start, for every layer at each of `act_bits`
    seed         of everything random
    devices      where to measure, each with a copy of the model; where the model is if none
    say          called with a line that a user should read
    kept         what `errors` has worked out
    """

    model: nn.Module
    layers: tuple[LayerInfo, ...]
    bits: tuple[int, ...]
    batches: Sequence[Batch]
    loss: Loss
    act_bits: tuple[int, ...] = ()
    scheme: Scheme = Scheme()  # noqa: RUF009 (it is frozen)
    ranges: Ranges = field(default_factory=dict)
    seed: int = 0
    devices: tuple[torch.device, ...] = ()
    say: Callable[[str], None] = print
    kept: dict[Any, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def errors(self) -> list[Tensor]:
        """`layer_errors` of the layers at `bits`, worked out once for all proxies that are asked
        about this subject, or about a `dataclasses.replace` of it."""
        about = (id(self.model), self.names, self.bits, self.scheme)
        if about not in self.kept:
            self.kept[about] = layer_errors(self.model, self.names, self.bits, self.scheme)
        return self.kept[about]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def samples(self) -> int:
        return sum(batch_size(batch) for batch in self.batches)

    def input_quantizers(self, name: str) -> list[nn.Module]:
        """Input quantizers of a layer at each of `act_bits`, as a candidate would start with."""
        return [
            activation_quantizer_for(b, *self.ranges[name, b], self.scheme) for b in self.act_bits
        ]

    def key(self, settings: Any) -> str:
        """A hash of all that scores depend on: weights, data, what is scored, a proxy's
        `settings`. A loss function has no content to hash: a folder of scores is for one loss."""
        return content_hash(
            {
                "settings": settings,
                "model": repr(self.model),
                "weights": dict(self.model.state_dict()),
                "batches": list(self.batches),
                "layers": self.names,
                "bits": (self.bits, self.act_bits),
                "scheme": asdict(self.scheme),
                "ranges": sorted(self.ranges.items()),
                "seed": self.seed,
            }
        )


class Proxy(Protocol):
    """Settings, as a frozen dataclass, and a measurement; several scores where they come from the
    same passes over the data."""

    def measure(self, subject: Subject, work: Work) -> list[Sensitivity]:
        """Raises InputError for a model or data that it cannot score."""
        ...


def predicted(found: Sensitivity, bits: BitVector) -> float:
    """What a proxy expects a bit vector to lose: the sum of the monotone scores of all its layers,
    of their inputs, and of what pairs add."""
    total = _summed(found.weight, bits.weight)
    if found.act is not None:
        total += _summed(found.act, bits.act)
    if found.pairs is not None:
        columns = [found.pairs.bits.index(bits.weight[name]) for name in found.pairs.layers]
        rows = range(len(columns))
        total += float(found.pairs.value[rows, columns][:, rows, columns].sum()) / 2
    return total


def _summed(table: Table, bits: Mapping[str, int]) -> float:
    score = table.monotone()
    rows = enumerate(table.layers)
    return float(sum(score[i, table.bits.index(bits[name])] for i, name in rows if name in bits))


def aligned(found: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Several proxies on the same layers and bits, each scaled to their common size: the geometric
    mean of what they expect all layers at the fewest bits to lose. Proxies agree better on
    proportions than on sizes. One that expects nothing of weights stays as it is, and one without
    input scores gets the mean of the others'."""
    sizes = [float(s.weight.monotone()[:, np.argmin(s.weight.bits)].sum()) for s in found]
    positive = [size for size in sizes if size > 0]
    common = float(np.exp(np.mean(np.log(positive)))) if positive else 1.0
    scaled = [
        _times(s, common / size) if size > 0 else s for s, size in zip(found, sizes, strict=True)
    ]
    acts = [s.act for s in scaled if s.act is not None]
    act = _mean(acts) if acts else None
    return [s if s.act is not None else replace(s, act=act) for s in scaled]


def combined(found: Sequence[Sensitivity]) -> Sensitivity:
    """The mean of the proxies, `aligned`: of weights, of those that expect something of them. What
    pairs add is left out."""
    scaled = aligned(found)
    acts = [s.act for s in scaled if s.act is not None]
    return Sensitivity(
        "combined",
        _mean([s.weight for s in scaled if s.weight.monotone().any()] or [scaled[0].weight]),
        _mean(acts) if acts else None,
        min(s.samples for s in scaled),
        sum(s.seconds for s in scaled),
        sum(s.passes for s in scaled),
    )


def _times(s: Sensitivity, factor: float) -> Sensitivity:
    def table(t: Table) -> Table:
        return replace(t, score=factor * t.score, stderr=factor * t.stderr)

    pairs = s.pairs
    if pairs is not None:
        pairs = replace(pairs, value=factor * pairs.value, stderr=factor * pairs.stderr)
    return replace(
        s, weight=table(s.weight), act=None if s.act is None else table(s.act), pairs=pairs
    )


def _mean(tables: Sequence[Table]) -> Table:
    """Of the monotone tables; the errors of different proxies are taken as independent."""
    score = np.mean([t.monotone() for t in tables], axis=0)
    stderr = np.sqrt(np.sum([t.stderr**2 for t in tables], axis=0)) / len(tables)
    return replace(tables[0], score=score, stderr=stderr)


def in_parts(batches: Sequence[Batch]) -> list[Batch]:
    """The same samples in two parts or more, so that there is a spread between them.

    Raises InputError for fewer than two samples.
    """
    samples = sum(batch_size(batch) for batch in batches)
    if samples < 2:
        raise InputError(f"expected at least 2 samples, to know their spread; got {samples}")
    if len(batches) > 1:
        return list(batches)
    return list(micro_batches(batches, (samples + 1) // 2))


def mean_of_parts(values: Sequence[Array], counts: Sequence[int]) -> tuple[Array, Array]:
    """The mean over all samples from the means over parts of `counts` samples, and its standard
    error from the spread of the parts: √(Σ w_p² (v_p − v̄)² · P/(P − 1)), w_p the share of part p.

    Both have the shape of a part; a single part has no known spread, and the error is nan.
    """
    stacked, share = np.stack(values), np.asarray(counts) / np.sum(counts)
    share = share.reshape(-1, *[1] * (stacked.ndim - 1))
    mean = (share * stacked).sum(axis=0)
    parts = len(values)
    if parts < 2:
        return mean, np.full_like(mean, np.nan)
    squares = (share**2 * (stacked - mean) ** 2).sum(axis=0)
    return mean, np.sqrt(squares * parts / (parts - 1))


def quantization_errors(
    weight: Tensor,
    bits: Sequence[int],
    scheme: Scheme = Scheme(),  # noqa: B008 (it is frozen)
    rows: Rows | None = None,
) -> Tensor:
    """δ_b = Q_b(w) − w for each bit-width, before any training; shape (len(bits), *w.shape).

    Rows are the weight's first dimension if not given.
    """
    weight = weight.detach()
    rows = rows or Rows(tuple(weight.shape), weight[0].numel())
    quantizers = (weight_quantizer_for(weight, rows, b, scheme) for b in bits)
    with torch.no_grad():
        return torch.stack([quantizer(weight) - weight for quantizer in quantizers])


def layer_errors(
    model: nn.Module, layers: Sequence[str], bits: Sequence[int], scheme: Scheme
) -> list[Tensor]:
    """`quantization_errors` of each named layer of an FP32 model."""
    return [
        quantization_errors(
            layer.get_parameter("weight"), bits, scheme, rows_of(layer, scheme.group_size)
        )
        for layer in map(model.get_submodule, layers)
    ]
