"""The bit vector of a model: how many bits each layer's weights and inputs get."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adq.quant.errors import InputError

MIN_BITS, MAX_BITS = 2, 8
FP32_BITS = 32
SCHEMA = "adq-bits/1"


@dataclass(frozen=True)
class BitVector:
    """Bits per layer name.

    `weight` maps each quantized layer to 2..8 bits. `act` maps a layer to the bits of its *input*;
    a layer that is absent there keeps its input in FP32.

    Raises InputError on a bit-width outside 2..8, or on an input of a layer without weight bits.
    """

    weight: Mapping[str, int]
    act: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, bits_of in (("weight", self.weight), ("act", self.act)):
            for layer, bits in bits_of.items():
                if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
                    raise InputError(
                        f"{kind} bits of layer {layer!r}: expected a whole number from {MIN_BITS} "
                        f"to {MAX_BITS}, got {bits!r}"
                    )
        if unknown := sorted(set(self.act) - set(self.weight)):
            raise InputError(f"act bits name layers without weight bits: {', '.join(unknown)}")

    @property
    def key(self) -> str:
        """A string that two bit vectors share exactly when they are equal."""
        return json.dumps([sorted(self.weight.items()), sorted(self.act.items())])

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "weight_bits": dict(self.weight),
            "act_bits": dict(self.act),
        }

    @staticmethod
    def from_json(data: Any, where: str = "bit vector") -> "BitVector":
        """The inverse of `to_json`; `where` names the source in errors."""
        if not isinstance(data, dict) or not isinstance(data.get("weight_bits"), dict):
            raise InputError(
                f"{where}: expected a JSON object with 'weight_bits' (and 'act_bits'), each "
                "mapping layer names to bits"
            )
        if data.get("schema", SCHEMA) != SCHEMA:
            raise InputError(f"{where}: expected schema {SCHEMA!r}, got {data['schema']!r}")
        act = data.get("act_bits", {})
        if not isinstance(act, dict):
            raise InputError(f"{where}: 'act_bits' must map layer names to bits")
        return BitVector(dict(data["weight_bits"]), dict(act))

    @staticmethod
    def load(path: str | Path) -> "BitVector":
        """Read a bit-vector file (JSON); raises InputError if it is missing or damaged."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not a readable bit-vector file ({error})") from None
        return BitVector.from_json(data, str(path))
