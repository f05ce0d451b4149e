"""Every proxy and every cost on torchvision's models, without a word of code for any of them.

Random weights and small images: what is tested is that the models run, and that what comes out
has the right shape and sign. The numbers are tested on small models, in the files beside this.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from adq.proxies.base import Proxy, Subject
from adq.proxies.costs import CostModel
from adq.proxies.direct import Direct
from adq.proxies.gradient import Gradients
from adq.proxies.ties import trace_ties
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.attention import expose_attention_
from adq.quant.calibrate import input_ranges, reestimate_batchnorm_
from adq.quant.layers import trace_layers
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector

BITS, ACT_BITS = (2, 4), (4,)
SCHEME = Scheme(
    "minmax", "minmax"
)  # the quickest: a codebook for 86 million weights takes a minute

# name -> options, pixels, layers, groups of tied layers
MODELS = {
    "resnet18": ({}, 64, 21, 3),
    "resnet50": ({}, 64, 54, 4),
    "mobilenet_v2": ({}, 64, 53, None),
    "efficientnet_b0": ({}, 64, 82, None),
    "vit_b_16": ({"image_size": 32}, 32, 50, 0),
    "convnext_tiny": ({}, 64, 59, None),
}

PROXIES: list[Proxy] = [
    HessianTrace(rank=0, probes=2, block=2),
    Gradients(("gauss-newton", "fisher", "gauss-newton-trace"), pairs=3),
    Gradients(("empirical-fisher", "output-gradient")),
    Direct("loss"),
]


def built(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    options, pixels, *_ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.get_model(name, weights=None, num_classes=4, **options)
        for p in model.parameters():
            if p.dim() > 1 and not p.any():  # a head of zeros would hide all other layers
                nn.init.normal_(p, std=0.1)
        images = torch.randn(4, 3, pixels, pixels)
    labels = torch.arange(4)
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    reestimate_batchnorm_(model, [(images, labels)])  # else random weights let nothing through
    return expose_attention_(model.eval()), batches


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_scored_and_costed(name: str) -> None:
    *_, count, groups = MODELS[name]
    model, batches = built(name)
    layers = trace_layers(model, batches[0][0])
    assert len(layers) == count
    ties = trace_ties(model, batches[0][0], layers)
    if groups is not None:
        assert len(ties) == groups

    names = [layer.name for layer in layers]
    costs = CostModel(model, layers, names)
    low, high = (costs.costs(BitVector(dict.fromkeys(names, b))) for b in (2, 8))
    assert (low.average_bits, high.average_bits) == (2, 8)
    assert high.bops == 4 * low.bops == 8 * 32 * sum(layer.macs for layer in layers)
    assert low.size_bytes < high.size_bytes

    # a few layers of all kinds: the others differ in size alone
    kinds = {(layer.kind, layer.weight_shape[1:]): layer for layer in reversed(layers)}
    some = tuple(layer for layer in layers if layer in kinds.values())[:6]
    chosen = [layer.name for layer in some]
    ranges = input_ranges(model, dict.fromkeys(chosen, ACT_BITS), batches, "minmax")
    weights_only = Subject(model, some, BITS, batches, F.cross_entropy, scheme=SCHEME)
    subject = replace(weights_only, act_bits=ACT_BITS, ranges=ranges)
    for proxy in PROXIES:
        for found in proxy.measure(subject, Work()):
            tables = [found.weight] if found.act is None else [found.weight, found.act]
            for table in tables:
                assert table.layers == tuple(chosen)
                assert np.isfinite(table.score).all()
                assert np.isfinite(table.stderr).all()
                assert table.score.any()
            if found.proxy != "loss":
                assert (found.weight.score >= 0).all()
