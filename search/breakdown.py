"""What each layer costs at each choice of its bits, kept for whoever reads the study later."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adq.proxies.costs import PER_SECOND
from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json
from adq.quant.spec import FP32_BITS
from adq.search.folder import StudyFolder
from adq.search.problem import Problem

SCHEMA = "adq-layers/1"
LAYERS = "layers.json"
FP32_BYTES = 4


@dataclass(frozen=True)
class LayerCost:
    """A layer's share of a model's costs.

    size_bytes  its part of the packed file, scales and codebooks included
    bops        MACs · weight bits · input bits per sample, an FP32 input counts 32
    latency_s   seconds per sample; None where the study has no latency model
    """

    size_bytes: int
    bops: int
    latency_s: float | None = None


@dataclass(frozen=True)
class Layer:
    """A quantized layer; `costs` maps (weight bits, input bits or None) to what it costs there."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    weights: int
    macs: int
    costs: Mapping[tuple[int, int | None], LayerCost]

    @property
    def fp32(self) -> LayerCost:
        """The same layer in FP32; its latency is not known."""
        return LayerCost(self.weights * FP32_BYTES, self.macs * FP32_BITS * FP32_BITS)


@dataclass(frozen=True)
class Breakdown:
    """Layers in model order, and `rest`, what a packed model costs whatever their bits."""

    layers: tuple[Layer, ...]
    rest: LayerCost


def keep_breakdown(folder: StudyFolder, problem: Problem) -> None:
    """Write the file, unless it is there."""
    if folder.file(LAYERS).exists():
        return
    options, model = problem.space.bit_options, problem.costs
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "weight_shape": list(layer.weight_shape),
            "weights": layer.weight_numel,
            "macs": layer.macs,
            "costs": [
                {"weight": weight, "act": act, **_cost(model.layer_terms(layer.name, weight, act))}
                for weight, act in options[layer.name]
            ],
        }
        for layer in problem.layers
    ]
    write_json(
        folder.file(LAYERS), {"schema": SCHEMA, "layers": layers, "rest": _cost(model.fixed)}
    )


def _cost(terms: Mapping[str, int]) -> dict[str, Any]:
    latency = terms.get("latency_s")
    return {
        "size_bytes": terms["size_bytes"],
        "bops": terms["bops"],
        "latency_s": None if latency is None else latency / PER_SECOND,
    }


def read_breakdown(folder: StudyFolder) -> Breakdown | None:
    """What was kept; None for a study of a version that kept nothing.

    Raises InputError when the file is damaged.
    """
    path = folder.file(LAYERS)
    if not path.exists():
        return None
    data: Any = read_json(path)
    try:
        layers = tuple(
            Layer(
                name=layer["name"],
                kind=layer["kind"],
                weight_shape=tuple(layer["weight_shape"]),
                weights=layer["weights"],
                macs=layer["macs"],
                costs={(c.pop("weight"), c.pop("act")): LayerCost(**c) for c in layer["costs"]},
            )
            for layer in data["layers"]
        )
        return Breakdown(layers, LayerCost(**data["rest"]))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {error}") from None
