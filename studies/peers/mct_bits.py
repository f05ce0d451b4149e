"""Sony's Model Compression Toolkit: post-training quantization in mixed precision, its distances
between activations weighted by Hessians."""

from collections.abc import Iterator

import model_compression_toolkit as mct
import torch
from mct_quantizers import PytorchQuantizationWrapper
from model_compression_toolkit.core.common.network_editors import NodeNameFilter
from model_compression_toolkit.target_platform_capabilities.constants import (
    KERNEL_ATTR,
    WEIGHTS_N_BITS,
)
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc
from searching import BUDGET, CHOICES, PINNED, Inputs, main
from torch import nn


def search(inputs: Inputs) -> dict[str, int]:
    """Its IMX500 platform with all our widths, activations in FP32."""
    model = inputs.model

    def representative() -> Iterator[list[torch.Tensor]]:
        for images, _ in inputs.batches():
            yield [images]

    config = mct.core.CoreConfig(
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(
            use_hessian_based_scores=True
        ),
        bit_width_config=mct.core.BitWidthConfig(),
    )
    nodes = {node_name(name, model): name for name in inputs.sizes}
    for node, name in nodes.items():
        if name in inputs.pinned:
            config.bit_width_config.set_manual_weights_bit_width(
                NodeNameFilter(node), PINNED, "weight"
            )
    budget = mct.core.ResourceUtilization(weights_memory=BUDGET / 8 * sum(inputs.sizes.values()))
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        model, representative, budget, config, platform()
    )
    return {
        nodes[node]: layer.weights_quantizers["weight"].num_bits
        for node, layer in quantized.named_modules()
        if isinstance(layer, PytorchQuantizationWrapper)
    }


def node_name(layer: str, model: nn.Module) -> str:
    """What MCT calls a layer: a name without dots, and a mark where a BatchNorm was folded in."""
    folded = isinstance(model.get_submodule(layer), nn.Conv2d)
    return layer.replace(".", "_") + ("_bn" if folded else "")


def platform() -> mct.target_platform_capabilities.TargetPlatformCapabilities:
    base, _, other = (
        one if isinstance(one, list) else one.clone_and_edit(enable_activation_quantization=False)
        for one in tpc.get_op_quantization_configs()
    )
    widths = [
        base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: bits}})
        for bits in sorted(CHOICES, reverse=True)
    ]
    return tpc.generate_tpc(other, base, widths, "weights_alone")


if __name__ == "__main__":
    main(search)
