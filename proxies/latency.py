"""How long a layer runs at given bits: one protocol, three models.

    Roofline       computed from a device's data sheet: a lower bound that no kernel beats
    LatencyTable   measured by `adq.proxies.profile`: (layer shape, bits) -> seconds
    from_callable  a function of the user's own

All give seconds per sample at one batch size, batch seconds / batch size. A network's latency is
the sum over its layers, and `rest_seconds` for what runs between them (activations, pooling), which
only a measured table knows. An input that keeps its precision has `act_bits` None.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from adq.quant.errors import InputError
from adq.quant.export.packed import weight_bytes
from adq.quant.files import read_json, write_json
from adq.quant.layers import LayerInfo
from adq.quant.spec import FP32_BITS, MAX_BITS, MIN_BITS, BitVector

DEVICE_SCHEMA = "adq-device/1"
TABLE_SCHEMA = "adq-latency/2"
DEVICES = Path(__file__).parent / "devices"

INTEGERS = {"int4": 4, "int8": 8}
FLOATS = {"fp16": 16, "bf16": 16, "tf32": 32, "fp32": 32}
"""Arithmetic -> bits that one operand takes in memory (TF32 is stored as FP32)."""


class LatencyModel(Protocol):
    @property
    def rest_seconds(self) -> float:
        """Seconds per sample of all that is no layer, whatever the bits."""
        ...

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        """Seconds per sample of one layer; InputError where the model does not know."""
        ...


def network_seconds(model: LatencyModel, layers: Sequence[LayerInfo], bits: BitVector) -> float:
    """rest + Σ_l seconds(l, b_l, a_l), per sample; InputError when a layer has no bits."""
    if missing := [layer.name for layer in layers if layer.name not in bits.weight]:
        raise InputError(f"the bit vector names no bits for layer {missing[0]!r}")
    return model.rest_seconds + math.fsum(
        model.seconds(layer, bits.weight[layer.name], bits.act.get(layer.name)) for layer in layers
    )


@dataclass(frozen=True)
class DeviceDescription:
    """What a data sheet says of a device, in its units.

    peak_tops           arithmetic -> dense peak, 10¹² operations a second (a multiply-accumulate
                        is two); `int4`, `int8` with integer accumulation, or a float format
    float_format        the arithmetic of layers that are not integers on both sides
    bandwidth_gb_per_s  memory, 10⁹ bytes a second
    launch_us           microseconds that a kernel costs before it computes
    sources             where each number comes from

    Raises InputError for an unknown arithmetic, a number out of range (which is how a wrong unit
    shows), a missing source, or a narrower arithmetic that is slower than a wider one: it would
    never be used, and leaving it out says so.
    """

    name: str
    peak_tops: Mapping[str, float]
    float_format: str
    bandwidth_gb_per_s: float
    launch_us: float
    sources: Mapping[str, str]
    notes: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "float_format", "notes"):
            _expect(isinstance(getattr(self, key), str), key, "a text", getattr(self, key))
        known = INTEGERS | FLOATS
        _expect(
            isinstance(self.peak_tops, Mapping)
            and set(self.peak_tops) <= set(known)
            and self.float_format in FLOATS
            and self.float_format in self.peak_tops,
            "peak_tops",
            f"rates of {', '.join(known)}, one of them float_format's",
            self.peak_tops,
        )
        for arithmetic, rate in self.peak_tops.items():
            _number(rate, f"peak_tops: {arithmetic}", 1e-4, 1e6)
        _number(self.bandwidth_gb_per_s, "bandwidth_gb_per_s", 1e-2, 1e6)
        _number(self.launch_us, "launch_us", 0, 1e5)
        wanted = {"peak_tops", "bandwidth_gb_per_s", "launch_us"}
        _expect(
            isinstance(self.sources, Mapping)
            and set(self.sources) == wanted
            and all(isinstance(text, str) and text for text in self.sources.values()),
            "sources",
            f"a text for each of {', '.join(sorted(wanted))}",
            self.sources,
        )
        used = [a for a in (*INTEGERS, self.float_format) if a in self.peak_tops]
        for narrow, wide in pairwise(used):
            if self.peak_tops[narrow] < self.peak_tops[wide]:
                raise InputError(f"peak_tops: {narrow} is slower than {wide}: leave it out")

    def arithmetic(self, weight_bits: int, act_bits: int | None, codebook: bool = False) -> str:
        """The narrowest integer arithmetic that holds both operands; `float_format` where there is
        none, where the input is no integer, or where the weights are levels of a codebook."""
        if act_bits is not None and not codebook:
            for name, bits in INTEGERS.items():
                if name in self.peak_tops and bits >= max(weight_bits, act_bits):
                    return name
        return self.float_format

    @staticmethod
    def load(name_or_path: str | Path) -> "DeviceDescription":
        """A bundled description by name, like `nvidia-t4`, or a JSON file of one.

        The file holds the fields above and `schema`, "adq-device/1". Raises InputError for an
        unknown name, and for a damaged file or one with other keys.
        """
        text, names = str(name_or_path), device_names()
        if text not in names and not text.endswith(".json"):
            raise InputError(
                f"unknown device {text!r}; known are {', '.join(names)}, or a JSON file like them"
            )
        path = DEVICES / f"{text}.json" if text in names else Path(text)
        data = read_json(path)
        with _naming(path):
            optional = {"notes"}
            return DeviceDescription(**_record(data, DeviceDescription, DEVICE_SCHEMA, optional))


def device_names() -> list[str]:
    """The descriptions that come with the package."""
    return sorted(path.stem for path in DEVICES.glob("*.json"))


class Parts(NamedTuple):
    """Seconds of a whole batch."""

    compute: float
    memory: float
    launch: float


@dataclass(frozen=True)
class Roofline:
    """Latency from a data sheet (Williams, Waterman and Patterson, CACM 52(4), 2009):

        seconds = (max(compute, memory) + launch) / batch
        compute = 2 · MACs · batch / peak[arithmetic of both widths]
        memory  = (weight + batch · (input + output)) / bandwidth
        weight  = bytes in the packed file: codes, codebook and scales
        input   = ⌈elements · act_bits / 8⌉, at the float format's width if act_bits is None
        output  = elements at the float format's width

    Everything moves between memory and chip once, and peaks are reached: a lower bound, by a
    factor of two or more on small layers. Arithmetic follows `DeviceDescription.arithmetic`, with
    `codebook` for weights on levels without a common step, which integers cannot multiply.

    Elements come from what LayerInfo has. A convolution called several times counts its input
    once, every layer one launch. A transposed convolution's output is taken as if kernels did not
    overlap (its stride at least the kernel), which is too much where they do.
    """

    rest_seconds: ClassVar[float] = 0.0
    device: DeviceDescription
    batch: int = 1
    group_size: int | None = None
    codebook: bool = False

    def __post_init__(self) -> None:
        _expect(type(self.batch) is int and self.batch >= 1, "batch", "at least 1", self.batch)

    def parts(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> Parts:
        arithmetic = self.device.arithmetic(weight_bits, act_bits, self.codebook)
        operations = 2 * layer.macs * self.batch
        float_bits = FLOATS[self.device.float_format]
        inputs, outputs = _elements(layer)
        moved = weight_bytes(layer.weight_numel, layer.scales(self.group_size), weight_bits)
        moved += self.batch * (_bytes(inputs, act_bits or float_bits) + _bytes(outputs, float_bits))
        return Parts(
            operations / (self.device.peak_tops[arithmetic] * 1e12),
            moved / (self.device.bandwidth_gb_per_s * 1e9),
            self.device.launch_us * 1e-6,
        )

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        parts = self.parts(layer, weight_bits, act_bits)
        return (max(parts.compute, parts.memory) + parts.launch) / self.batch


def _elements(layer: LayerInfo) -> tuple[int, int]:
    """Elements of a layer's input and output, per sample. MACs / weights is the number of positions
    that the weight meets: of the output, or of a transposed convolution's input."""
    positions = layer.macs // layer.weight_numel
    if layer.kind.startswith("ConvTranspose"):
        kernel = prod(layer.weight_shape[2:])
        return positions * layer.weight_shape[0], positions * kernel * layer.out_channels
    if layer.kind == "Linear":  # whose input may have been traced with the batch elsewhere
        return positions * layer.weight_shape[1], positions * layer.out_channels
    return prod(layer.input_shape), positions * layer.out_channels


def _bytes(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)


Shape = tuple[str, tuple[int, ...], tuple[int, ...], int, int]


def shape_of(layer: LayerInfo) -> Shape:
    """What of a layer its time depends on: all that LayerInfo has, but the name. MACs stand for
    stride, padding and the number of calls."""
    return layer.kind, layer.weight_shape, layer.input_shape, layer.macs, layer.out_channels


@dataclass(frozen=True)
class Entry:
    """One measurement: median seconds per sample and its standard error.

    16 or 32 weight bits with `act_bits` None are the layer in FP16 or FP32, for comparison: no
    interpolation ends there.
    """

    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    macs: int
    out_channels: int
    weight_bits: int
    act_bits: int | None
    seconds: float
    stderr: float

    def __post_init__(self) -> None:
        _expect(isinstance(self.kind, str), "kind", "a text", self.kind)
        for name in ("weight_shape", "input_shape"):
            shape = getattr(self, name)
            whole = isinstance(shape, list | tuple) and all(type(n) is int for n in shape)
            _expect(whole, name, "whole numbers", shape)
            object.__setattr__(self, name, tuple(shape))
        for name in ("macs", "out_channels"):
            value = getattr(self, name)
            _expect(type(value) is int and value > 0, name, "a positive whole number", value)
        w, a = self.weight_bits, self.act_bits
        widths = range(MIN_BITS, MAX_BITS + 1)
        float_layer = w in (16, FP32_BITS) and a is None
        low_bit = w in widths and (a is None or (type(a) is int and a in widths))
        _expect(type(w) is int and (low_bit or float_layer), "bits", "2 to 8", (w, a))
        _number(self.seconds, "seconds", 0, math.inf)
        _number(self.stderr, "stderr", 0, math.inf)

    @property
    def shape(self) -> Shape:
        return self.kind, self.weight_shape, self.input_shape, self.macs, self.out_channels


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds per sample at a batch size, on one device.

    Between measured widths the time is linear in the weight bits, then in the input bits; outside
    it is not known, nor across the step from an integer input to one that keeps its precision.
    `rest_seconds` is the whole FP32 model's time, BatchNorms folded, less that of its layers, and
    at least zero. `notes` say what was not measured, and why. Raises InputError when a layer has
    two entries for the same bits.
    """

    device: str
    versions: Mapping[str, str]
    threads: int
    batch: int
    repeats: int
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    rest_seconds: float = 0.0

    def __post_init__(self) -> None:
        _expect(isinstance(self.device, str), "device", "a text", self.device)
        _number(self.rest_seconds, "rest_seconds", 0, math.inf)
        for name in ("threads", "batch", "repeats"):
            value = getattr(self, name)
            _expect(type(value) is int and value > 0, name, "a positive whole number", value)
        seen = set()
        for entry in self.entries:
            key = entry.shape, entry.weight_bits, entry.act_bits
            if key in seen:
                raise InputError(
                    f"two entries for {_said(entry.shape)} at {_width(*key[1:])}: keep one"
                )
            seen.add(key)

    @cached_property
    def _measured(self) -> dict[Shape, dict[int | None, dict[int, float]]]:
        """shape -> input bits -> weight bits -> seconds."""
        found: dict[Shape, dict[int | None, dict[int, float]]] = {}
        for e in self.entries:
            found.setdefault(e.shape, {}).setdefault(e.act_bits, {})[e.weight_bits] = e.seconds
        return found

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        """The measured time, or the line between the nearest measured widths on both sides.

        Raises InputError for a shape or a width that the measurements do not enclose.
        """
        rows = self._measured.get(shape_of(layer))
        if rows is None:
            raise InputError(
                f"layer {layer.name!r}, {_said(shape_of(layer))}, is not in the latency table of "
                f"{self.device}: measure this model with 'adq-search profile'"
            )

        def at(act: int | None) -> float | None:
            return _between(rows.get(act, {}), weight_bits)

        found = at(act_bits)
        if found is None and act_bits is not None:
            columns = {a: at(a) for a in rows if a is not None}
            found = _between({a: s for a, s in columns.items() if s is not None}, act_bits)
        if found is None:
            measured = [_width(w, a) for a, row in rows.items() for w in sorted(row)]
            raise InputError(
                f"layer {layer.name!r} at {_width(weight_bits, act_bits)}: the latency table of "
                f"{self.device} has {', '.join(measured)}, and a guess outside is no measurement"
            )
        return found

    def save(self, path: str | Path) -> None:
        write_json(Path(path), {"schema": TABLE_SCHEMA, **asdict(self)})

    @staticmethod
    def load(path: str | Path) -> "LatencyTable":
        """Read what `save` wrote; InputError with one line when it is damaged."""
        data = read_json(Path(path))
        with _naming(path):
            values = _record(data, LatencyTable, TABLE_SCHEMA, set())
            versions, notes = values["versions"], values["notes"]
            for name, items in (("versions", versions), ("notes", notes)):
                kind = dict if name == "versions" else list
                texts = list(items.values()) if isinstance(items, dict) else items
                whole = isinstance(items, kind) and all(isinstance(text, str) for text in texts)
                _expect(whole, name, "texts", items)
            _expect(isinstance(values["entries"], list), "entries", "a list", values["entries"])
            entries = []
            for i, entry in enumerate(values["entries"]):
                with _naming(f"entry {i}"):
                    entries.append(Entry(**_record(entry, Entry, None, set())))
            return LatencyTable(**{**values, "entries": tuple(entries), "notes": tuple(notes)})


def _between(measured: Mapping[int, float], bits: int) -> float | None:
    """The value at `bits`, linear between the nearest widths of at most 8; None outside."""
    if bits in measured:
        return measured[bits]
    below = max((b for b in measured if b < bits), default=None)
    above = min((b for b in measured if bits < b <= MAX_BITS), default=None)
    if below is None or above is None:
        return None
    share = (bits - below) / (above - below)
    return (1 - share) * measured[below] + share * measured[above]


def _said(shape: Shape) -> str:
    kind, weight, inputs, macs, _ = shape
    sizes = ("×".join(map(str, s)) or "scalar" for s in (weight, inputs))
    return "{}, weight {}, input {}".format(kind, *sizes) + f", {macs:,} MACs"


def _width(weight_bits: int, act_bits: int | None) -> str:
    return f"{weight_bits}/{'float' if act_bits is None else act_bits} bits"


@dataclass(frozen=True)
class _Callable:
    rest_seconds: ClassVar[float] = 0.0
    function: Callable[[LayerInfo, int, int | None], Any]

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        where = f"the latency of layer {layer.name!r} at {_width(weight_bits, act_bits)}"
        try:
            value = self.function(layer, weight_bits, act_bits)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{where} failed: {type(error).__name__} {error}") from error
        try:  # NumPy's and torch's numbers too
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        _expect(
            math.isfinite(number) and number >= 0, where, "seconds per sample, 0 or more", value
        )
        return number


def from_callable(function: Callable[[LayerInfo, int, int | None], Any]) -> LatencyModel:
    """A model that asks `function(layer, weight_bits, act_bits)` for seconds per sample.

    InputError where it fails, or gives anything but a finite number of at least 0.
    """
    return _Callable(function)


@dataclass(frozen=True)
class RunWider:
    """A model under which fewer bits never take longer: each layer runs the fastest kernel that
    holds its operands, among the kernels of its options,

        seconds(w, a) = min { model.seconds(w', a') : w' >= w, a' >= a },

    since a b-bit integer is also a wider one (a float input is the widest). `options` lists the
    (weight bits, act bits) of each layer by name. What a search relies on: the point of the fewest
    bits is within a budget if any is.
    """

    model: LatencyModel
    options: Mapping[str, Sequence[tuple[int, int | None]]]

    @property
    def rest_seconds(self) -> float:
        return self.model.rest_seconds

    def seconds(self, layer: LayerInfo, weight_bits: int, act_bits: int | None) -> float:
        act = act_bits or FP32_BITS
        return min(
            self.model.seconds(layer, w, a)
            for w, a in [(weight_bits, act_bits), *self.options.get(layer.name, ())]
            if w >= weight_bits and (a or FP32_BITS) >= act
        )


def _expect(condition: bool, where: str, wanted: str, value: object) -> None:
    if not condition:
        text = repr(value)
        raise InputError(
            f"{where}: expected {wanted}, got {text if len(text) < 80 else text[:76] + '...'}"
        )


def _number(value: object, where: str, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else "")
    _expect(ok and low <= value <= high and value < math.inf, where, wanted, value)  # type: ignore[operator]


def _record(data: Any, kind: Any, schema: str | None, optional: set[str]) -> dict[str, Any]:
    """A JSON object as keyword arguments of a dataclass, with just its keys (and `schema`)."""
    _expect(isinstance(data, dict), "content", "a JSON object", data)
    data = dict(data)
    if schema is not None:
        found = data.pop("schema", None)
        _expect(found == schema, "schema", repr(schema), found)
    allowed = [f.name for f in fields(kind)]
    if unknown := [key for key in data if key not in allowed]:
        raise InputError(f"unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
    if missing := [key for key in allowed if key not in data and key not in optional]:
        raise InputError(f"key {missing[0]!r} is missing")
    return data


@contextmanager
def _naming(where: str | Path) -> Iterator[None]:
    """Put where it happened before an error."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
