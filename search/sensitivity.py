"""Every proxy on one trained model, kept in the study's folder."""

import csv
import io
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adq.proxies.base import Sensitivity
from adq.proxies.gradient import gradient_sensitivity
from adq.proxies.trace import trace_sensitivity
from adq.quant.batches import micro_batches, take_samples
from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json, write_text
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem
from adq.search.space import FP32

SCHEMA = "adq-sensitivity/1"
GRADIENT_SAMPLES = 128
TRACE_MACS = 10**12  # samples · probes · MACs: a minute or two on two cores
MICRO_BATCH_MACS = 4 * 10**9  # bounds what the graph of a gradient holds in memory


def trace_effort(macs: int) -> tuple[int, int, int]:
    """(samples, probes, micro-batch) of the Hessian trace for a model of `macs` MACs a sample.

    Small models get 256 samples and 32 probes. A large one gets fewer probes first, since each
    averages over more weights, then fewer samples, down to 16.
    """
    probes = 32 if macs * 32 * 256 <= TRACE_MACS else 8
    samples = min(256, max(16, TRACE_MACS // (probes * macs)))
    return samples, probes, min(samples, max(1, MICRO_BATCH_MACS // macs))


def measure(problem: Problem, model: nn.Module, observer: Observer) -> list[Sensitivity]:
    """Both proxies on the FP32 model, on the leading training samples of the study's seed.

    The gradient score alone, with a message, for a model that PyTorch cannot differentiate twice.
    """
    config, loss = problem.config, problem.task.loss
    bits = sorted({b for layer in problem.space.layers for b in layer.weight})
    act_bits = sorted({b for layer in problem.space.layers for b in layer.act} - {FP32})
    if all(len(layer.act) == 1 for layer in problem.space.layers):
        act_bits = []  # nothing to choose, nothing to score
    observer.stage("sensitivity", 2)
    samples, probes, micro_batch = trace_effort(sum(layer.macs for layer in problem.layers))
    trace_data = list(micro_batches(take_samples(problem.calibration, samples), micro_batch))
    found = []
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            found.append(
                trace_sensitivity(
                    model,
                    problem.layers,
                    bits,
                    trace_data,
                    loss,
                    probes,
                    config.seed,
                    config.scheme,
                )
            )
        observer.step(f"Hessian trace, {found[0].seconds:.1f} s")
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        observer.step("no Hessian trace")
        observer.message(
            "this model has no second derivative in PyTorch "
            f"({' '.join(str(error).split())[:80]}): seeds come from the gradient score alone"
        )
    gradient_data = take_samples(problem.calibration, GRADIENT_SAMPLES)
    gradient = gradient_sensitivity(
        model, problem.layers, bits, act_bits, gradient_data, loss, config.scheme
    )
    observer.step(f"gradients, {gradient.seconds:.1f} s")
    return [*found, gradient]


def sensitivities(
    problem: Problem, model: nn.Module, folder: StudyFolder, observer: Observer
) -> list[Sensitivity]:
    """`measure`, once per study: later calls read sensitivity.json.

    Raises InputError when that file is damaged, or is not about this model's layers.
    """
    path = folder.file("sensitivity.json")
    if path.exists():
        kept = load_sensitivities(folder)
        names = tuple(layer.name for layer in problem.layers)
        if any(s.weight.layers != names for s in kept):
            raise InputError(f"{path} is damaged: its layers are not those of the model")
        return kept
    found = problem.call("measuring sensitivities", lambda: measure(problem, model, observer))
    write_text(folder.file("sensitivity.csv"), to_csv(found))
    write_json(path, {"schema": SCHEMA, "proxies": [s.to_json() for s in found]})
    return found


def load_sensitivities(folder: StudyFolder) -> list[Sensitivity]:
    path = folder.file("sensitivity.json")
    data = read_json(path)
    try:
        found = [Sensitivity.from_json(entry) for entry in data["proxies"]]
        if not found:
            raise ValueError("it holds no proxy")
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


Row = tuple[str, str, str, int, float, float]


def rows(found: Sequence[Sensitivity]) -> Iterator[Row]:
    """(proxy, "weight" or "act", layer, bits, score, stderr) of every entry."""
    for s in found:
        for kind, table in (("weight", s.weight), ("act", s.act)):
            if table is not None:
                for i, layer in enumerate(table.layers):
                    for j, bits in enumerate(table.bits):
                        score, stderr = float(table.score[i, j]), float(table.stderr[i, j])
                        yield s.proxy, kind, layer, bits, score, stderr


def to_csv(found: Sequence[Sensitivity]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["proxy", "kind", "layer", "bits", "score", "stderr"])
    writer.writerows(rows(found))
    return out.getvalue()
