"""What the package's proxies expect of the space's layers: scores.json, measured once."""

import json
from dataclasses import replace
from pathlib import Path

from ground import HERE, SPACE, calibration, fp32, load
from table import SCHEME
from torch.nn import functional as F

from adq.proxies.base import Sensitivity, Subject
from adq.proxies.direct import Direct
from adq.proxies.gradient import Gradients
from adq.proxies.work import Work
from adq.quant.batches import micro_batches, take_samples
from adq.quant.calibrate import input_ranges
from adq.quant.files import write_json
from adq.quant.layers import trace_layers

SAMPLES = 256
SCORES = HERE / "scores.json"


def scores(folder: Path) -> list[Sensitivity]:
    """Those that a study takes by default, on 256 training images."""
    if not SCORES.exists():
        data = load(folder)
        model = fp32(data)
        layers = trace_layers(model, data.train[0][:2])
        weight = tuple(sorted({b for group in SPACE.groups for b in group.weight}))
        act = tuple(sorted({b for group in SPACE.groups for b in group.act}))
        batches = calibration(data)
        ranges = input_ranges(model, dict.fromkeys(SPACE.layers, act), batches, SCHEME.act)
        subject = Subject(model, layers, weight, batches, F.cross_entropy, act, SCHEME, ranges)
        found = []
        for proxy, size in ((Direct("kl"), 32), (Gradients(("gauss-newton-trace",)), 16)):
            samples = list(micro_batches(take_samples(batches, SAMPLES), size))
            found += proxy.measure(replace(subject, batches=samples), Work())
        write_json(SCORES, [s.to_json() for s in found])
    return [Sensitivity.from_json(entry) for entry in json.loads(SCORES.read_text())]
