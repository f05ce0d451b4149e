"""The study's proxies on its trained model, kept in its folder."""

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from adq.proxies.base import Proxy, Sensitivity, Subject
from adq.proxies.direct import Direct
from adq.proxies.ensemble import fit_ensemble
from adq.proxies.gradient import SCORES, Gradients
from adq.proxies.pairwise import Pairwise
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.batches import (
    batch_size,
    device_of,
    evaluating,
    forward,
    micro_batches,
    take_samples,
    to_device,
)
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json, write_text
from adq.search.candidate import Record
from adq.search.config import WEIGHT_PROXIES, StudyConfig
from adq.search.folder import StudyFolder
from adq.search.observer import Observer
from adq.search.problem import Problem
from adq.search.space import FP32

SCHEMA = "adq-sensitivity/2"
EFFORT = 10**12
"""MACs of the passes that a proxy may make: a minute or two on two cores."""
MICRO_BATCH_MACS = 4 * 10**9  # bounds what the graph of a gradient holds in memory
SAMPLES, FEWEST_SAMPLES = 256, 16
PARTS = 8  # at least as many batches, where the standard error is their spread
VECTOR_WEIGHTS = 2 * 10**8  # numbers in the vectors that a Hessian's sketch keeps
PAIRED_LAYERS = 8
ENSEMBLE_TRIALS = 12


@dataclass(frozen=True)
class Plan:
    """A proxy and the names of its scores, the samples that it looks at, and how many at a time."""

    names: tuple[str, ...]
    proxy: Proxy
    samples: int
    batch: int


def plans(
    names: Sequence[str],
    macs: int,
    weights: int,
    layers: int,
    widths: int,
    available: int = SAMPLES,
    checkpoints: bool = False,
) -> list[Plan]:
    """What each named score takes, for a model of `macs` MACs a sample and so many weights.

    Scores that come from the same passes are one plan. Small models get 256 samples; large ones
    get fewer of everything, so that a plan stays within EFFORT, but 16 samples at least.
    """
    found = []

    def samples_of(passes: float) -> int:
        affordable = max(FEWEST_SAMPLES, int(EFFORT / (passes * macs)))
        return min(SAMPLES, available, affordable)

    def add(names: tuple[str, ...], proxy: Proxy, passes: float) -> None:
        samples = samples_of(passes)
        batch = max(1, min(MICRO_BATCH_MACS // macs, samples // PARTS))
        found.append(Plan(names, proxy, samples, batch))

    if "hessian" in names:
        # a probe averages over more weights in a large model: fewer will do
        probes = 64 if 4 * 96 * SAMPLES * macs <= EFFORT else 8
        rank = min(16, VECTOR_WEIGHTS // (3 * weights))
        proxy = HessianTrace(rank, probes, checkpoints=checkpoints)
        samples = samples_of(4.0 * (probes + 2 * rank))
        batch = max(1, min(MICRO_BATCH_MACS // macs, samples))
        found.append(Plan(("hessian",), proxy, samples, batch))
    for labels in ("model", "given"):
        scores = tuple(name for name in names if SCORES.get(name) == labels)
        if scores:
            add(scores, Gradients(scores), 3.0 + widths)
    for name in ("loss", "kl"):
        if name in names:
            add((name,), Direct(name), layers * widths / 2)  # half a pass each, by replay
    if "pairwise" in names:
        paired = min(PAIRED_LAYERS, layers)
        pairs = paired * (paired - 1) / 2 * widths**2
        add(("pairwise",), Pairwise(paired), layers * widths / 2 + pairs)
    return found


def subject_of(problem: Problem, model: nn.Module, observer: Observer) -> Subject:
    """The study's model and choices, on the leading training samples of its seed."""
    groups = problem.space.groups
    act_bits: set[int] = set()
    if any(len(group.act) > 1 for group in groups):  # else there is nothing to choose
        act_bits = {b for group in groups for b in group.act} - {FP32}
    wanted = dict.fromkeys(problem.space.layers, sorted(act_bits)) if act_bits else {}
    ranges = input_ranges(model, wanted, problem.calibration, problem.config.scheme.act)
    here = problem.device
    devices: tuple[torch.device, ...] = ()  # where the model is
    if here.type == "cuda" and here.index is None:
        devices = tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    return Subject(
        model,
        problem.layers,
        tuple(sorted({b for group in groups for b in group.weight})),
        problem.calibration,
        problem.task.loss,
        tuple(sorted(act_bits)),
        problem.config.scheme,
        ranges,
        problem.config.seed,
        devices,
        observer.message,
    )


def sensitivities(
    problem: Problem, model: nn.Module, folder: StudyFolder, observer: Observer
) -> list[Sensitivity]:
    """The scores of every proxy that the study names, on its FP32 model.

    sensitivity.json keeps each under a key of all that it depends on (weights, data, settings):
    what is there is not measured again, and a measurement that was interrupted goes on where it
    was. A proxy that cannot score this model is left out, with a message.

    Raises InputError when the file is damaged, when no proxy can score the model, and when input
    bits are searched and none of them scores inputs.
    """
    subject = subject_of(problem, model, observer)
    names = problem.config.proxy_names
    if subject.act_bits and set(names) <= set(WEIGHT_PROXIES):
        raise InputError(
            f"proxies: {', '.join(names)} score weights alone, and input bits are searched too; "
            "add one that scores inputs, like fisher"
        )
    path, csv_file = folder.file("sensitivity.json"), folder.file("sensitivity.csv")
    kept = _read(folder) if path.exists() else []
    if any(s.weight.layers != subject.names or s.weight.bits != subject.bits for _, s in kept):
        raise InputError(f"{path} is damaged: its layers and bits are not those of the model")
    problem.call("the loss of a batch and of its halves", partial(_warn_of_a_sum, subject))
    found, refused = _measured(names, problem, subject, kept, folder, observer)
    if not found and names == StudyConfig().proxy_names:
        observer.message("none of the default proxies can score this model: taking loss instead")
        found, refused = _measured(("loss",), problem, subject, kept, folder, observer)
    if not found:
        raise refused[-1]
    scores = [s for _, s in found]
    if subject.act_bits and all(s.act is None for s in scores):
        raise InputError(f"no proxy could score this model's inputs: {refused[-1]}")
    if [key for key, _ in found] != [key for key, _ in kept] or not csv_file.exists():
        write_text(csv_file, to_csv(scores))
        entries = [{"key": key, **s.to_json()} for key, s in found]
        write_json(path, {"schema": SCHEMA, "proxies": entries})
    shutil.rmtree(folder.file("sensitivity"), ignore_errors=True)
    return scores


Keyed = list[tuple[str, Sensitivity]]


def _measured(
    names: Sequence[str],
    problem: Problem,
    subject: Subject,
    kept: Keyed,
    folder: StudyFolder,
    observer: Observer,
) -> tuple[Keyed, list[InputError]]:
    """The scores by name, each with its key, measured where they are not kept; and why some
    proxies cannot score this model."""
    planned = plans(
        names,
        sum(layer.macs for layer in problem.layers),
        sum(layer.weight_numel for layer in problem.layers),
        len(problem.layers),
        len(subject.bits) + len(subject.act_bits),
        subject.samples,
        problem.config.gradient_checkpoints == "on",
    )
    observer.stage("sensitivity", len(planned))
    found: Keyed = []
    refused: list[InputError] = []
    for plan in planned:
        what = ", ".join(plan.names)
        data = micro_batches(take_samples(problem.calibration, plan.samples), plan.batch)
        of_plan = replace(subject, batches=list(data))
        key = of_plan.key((type(plan.proxy).__name__, plan.proxy))
        known = [s for k, s in kept if k == key]
        if known:
            observer.step(f"{what}: done before")
        else:
            work = Work(folder.file("sensitivity") / f"{key}.jsonl", subject.devices)
            measuring = partial(_attempt, plan.proxy, of_plan, work)
            answer = problem.call(f"measuring sensitivities ({what})", measuring)
            if isinstance(answer, InputError):
                refused.append(answer)
                observer.step(f"no {what}")
                observer.message(f"{what}: {answer}")
                continue
            known = answer
            observer.step(f"{what}, {known[0].seconds:.1f} s")
        found += [(key, s) for s in known]
    return found, refused


@torch.no_grad()
def _warn_of_a_sum(subject: Subject) -> None:
    """Say so where the loss of a batch is the sum of its halves': scores take it to be the mean,
    and would depend on how many samples are looked at together."""
    half = batch_size(subject.batches[0]) // 2
    if half < 1:
        return
    (pair,) = take_samples(subject.batches[:1], 2 * half)
    with evaluating(subject.model):
        whole, *halves = (
            subject.loss(forward(subject.model, inputs), targets).item()
            for inputs, targets in (
                to_device(batch, device_of(subject.model))
                for batch in (pair, *micro_batches([pair], half))
            )
        )
    if 0 < 1.5 * sum(halves) / 2 < whole:
        subject.say(
            "the loss looks like a sum over the samples of a batch: give their mean, or scores are "
            "in units of a batch"
        )


def _attempt(proxy: Proxy, subject: Subject, work: Work) -> list[Sensitivity] | InputError:
    """What the proxy says, or why it cannot score this model."""
    try:
        found = proxy.measure(subject, work)
    except InputError as error:
        return error
    for s in found:
        for table in (s.weight, *([] if s.act is None else [s.act])):
            bad = ~np.isfinite(table.score).all(axis=1)
            if bad.any():
                return InputError(
                    f"{s.proxy} of layer {table.layers[bad.argmax()]!r} is no finite number: look "
                    "at the loss of the training batches and its gradient, in eval mode"
                )
    return found


def ensemble_of(scores: Sequence[Sensitivity], records: Sequence[Record]) -> Sensitivity | None:
    """What the study's own trials say of each layer: the proxies' scores, weighted so that they
    explain the validation losses after fine-tuning. None for fewer than ENSEMBLE_TRIALS."""
    done = [r for r in records if r.validation is not None]
    if len(done) < ENSEMBLE_TRIALS:
        return None
    losses = [r.validation.loss for r in done if r.validation is not None]
    return fit_ensemble(scores, [r.bits for r in done], losses).sensitivity


def load_sensitivities(folder: StudyFolder) -> list[Sensitivity]:
    return [s for _, s in _read(folder)]


def _read(folder: StudyFolder) -> list[tuple[str, Sensitivity]]:
    path = folder.file("sensitivity.json")
    data = read_json(path)
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{path} is of another version ({data['schema']!r}, expected {SCHEMA!r}): remove it, "
            "and the scores are measured again"
        )
    try:
        found = [(entry["key"], Sensitivity.from_json(entry)) for entry in data["proxies"]]
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
