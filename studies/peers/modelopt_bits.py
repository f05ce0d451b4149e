"""NVIDIA ModelOpt: `auto_quantize`, gradient method, weights alone.

The loss may be multiplied by a number, which multiplies all scores by its square: scores of a small
network are so small that ModelOpt's solver takes them for zeros.
"""

from typing import Any

import modelopt.torch.quantization as mtq
from searching import BUDGET, CHOICES, PINNED, Inputs, main
from torch.nn import functional as F


def search(inputs: Inputs, loss_scale: str = "1") -> dict[str, int]:
    """A format a width (symmetric, a scale an output channel, inputs in FP32), no layer left FP32.

    Pinned layers are a search space of one format, and count in the budget."""
    formats = {bits: weight_format(bits) for bits in CHOICES}
    spaces = [
        search_space(inputs.pinned, [formats[PINNED]]),
        search_space([name for name in inputs.sizes if name not in inputs.pinned], formats),
    ]
    batches = inputs.batches()
    _, state = mtq.auto_quantize(
        inputs.model,
        {"effective_bits": BUDGET},
        quantization_formats=list(formats.values()),
        data_loader=batches,
        forward_step=lambda model, batch: model(batch[0]),
        loss_func=lambda output, batch: float(loss_scale) * F.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        module_search_spaces=spaces,
    )
    recipes = state["best"]["recipe"]
    return {name.removesuffix(".quant_recipe"): recipes[name].num_bits for name in recipes}


def weight_format(bits: int) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }


def search_space(names: Any, formats: Any) -> dict[str, Any]:
    values = list(formats.values()) if isinstance(formats, dict) else formats
    return {
        "module_name_patterns": list(names),
        "quantization_formats": values,
        "allow_no_quant": False,
    }


if __name__ == "__main__":
    main(search)
