"""The front as CSV: one row a point, one column a fact."""

import csv
import io

from adq.search.front import Front, Point

COLUMNS = (
    "id",
    "split",
    "metric",
    "metric_stderr",
    "samples",
    "validation_metric",
    "validation_loss",
    "average_bits",
    "average_bits_searched",
    "average_act_bits",
    "size_bytes",
    "bops",
    "latency_s",
    "seed",
    "weights",
)


def front_csv(front: Front) -> str:
    """The points from cheap to dear, with all their digits.

    After the columns above come `weight_bits:LAYER` and `act_bits:LAYER` for each layer in model
    order. What is not there is empty: a latency that was not measured, an input kept in FP32,
    weights that were not packed. `split` is where `metric` was measured, see `Front`.
    """
    layers = list(front.points[0].weight_bits)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *COLUMNS,
            *(f"weight_bits:{layer}" for layer in layers),
            *(f"act_bits:{layer}" for layer in layers),
        ]
    )
    writer.writerows(_row(front.split, point, layers) for point in front.points)
    return out.getvalue()


def _row(split: str, point: Point, layers: list[str]) -> list[object]:
    facts = {"split": split, **vars(point)}
    return [
        *(facts[name] for name in COLUMNS),
        *(point.weight_bits[layer] for layer in layers),
        *(point.act_bits.get(layer) for layer in layers),
    ]
