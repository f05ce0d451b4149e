"""The study's proxies on its trained model, kept in its folder."""

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from adq.proxies.base import Proxy, Sensitivity, Subject
from adq.proxies.direct import Direct
from adq.proxies.gradient import SCORES, Gradients
from adq.proxies.pairwise import Pairwise
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.batches import micro_batches, take_samples
from adq.quant.calibrate import input_ranges
from adq.quant.errors import InputError
from adq.quant.files import read_json, write_json, write_text
from adq.search.config import WEIGHT_PROXIES
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
    checkpoints: bool = False,
) -> list[Plan]:
    """What each named score takes, for a model of `macs` MACs a sample and so many weights.

    Scores that come from the same passes are one plan. Small models get 256 samples; large ones
    get fewer of everything, so that a plan stays within EFFORT, but 16 samples at least.
    """
    found = []

    def samples_of(passes: float) -> int:
        return min(SAMPLES, max(FEWEST_SAMPLES, int(EFFORT / (passes * macs))))

    def add(names: tuple[str, ...], proxy: Proxy, passes: float) -> None:
        samples = samples_of(passes)
        batch = max(1, min(MICRO_BATCH_MACS // macs, samples // PARTS))
        found.append(Plan(names, proxy, samples, batch))

    if "hessian" in names:
        # a probe averages over more weights in a large model: fewer will do
        probes = 64 if samples_of(4 * 96) == SAMPLES else 8
        rank = 16 if 3 * 16 * weights <= VECTOR_WEIGHTS else 0
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
    devices = (here,)
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
    planned = plans(
        names,
        sum(layer.macs for layer in problem.layers),
        sum(layer.weight_numel for layer in problem.layers),
        len(problem.layers),
        len(subject.bits) + len(subject.act_bits),
        problem.config.gradient_checkpoints == "on",
    )
    path = folder.file("sensitivity.json")
    kept = _read(folder) if path.exists() else []
    if any(s.weight.layers != subject.names for _, s in kept):
        raise InputError(f"{path} is damaged: its layers are not those of the model")
    observer.stage("sensitivity", len(planned))
    found: list[tuple[str, Sensitivity]] = []
    refused: list[InputError] = []
    for plan in planned:
        data = micro_batches(take_samples(problem.calibration, plan.samples), plan.batch)
        of_plan = replace(subject, batches=list(data))
        key = of_plan.key((type(plan.proxy).__name__, plan.proxy))
        known = [s for k, s in kept if k == key]
        if known:
            observer.step(f"{', '.join(plan.names)}: done before")
        else:
            work = Work(folder.file("sensitivity") / f"{key}.jsonl", subject.devices)
            what = f"measuring sensitivities ({', '.join(plan.names)})"
            answer = problem.call(what, partial(_attempt, plan.proxy, of_plan, work))
            if isinstance(answer, InputError):
                refused.append(answer)
                observer.step(f"no {', '.join(plan.names)}")
                observer.message(f"{', '.join(plan.names)}: {answer}")
                continue
            known = answer
            observer.step(f"{', '.join(plan.names)}, {known[0].seconds:.1f} s")
        found += [(key, s) for s in known]
    if not found:
        raise refused[-1]
    scores = [s for _, s in found]
    if subject.act_bits and all(s.act is None for s in scores):
        raise InputError(f"no proxy could score this model's inputs: {refused[-1]}")
    if [key for key, _ in found] != [key for key, _ in kept]:
        write_text(folder.file("sensitivity.csv"), to_csv(scores))
        entries = [{"key": key, **s.to_json()} for key, s in found]
        write_json(path, {"schema": SCHEMA, "proxies": entries})
    shutil.rmtree(folder.file("sensitivity"), ignore_errors=True)
    return scores


def _attempt(proxy: Proxy, subject: Subject, work: Work) -> list[Sensitivity] | InputError:
    """What the proxy says, or why it cannot score this model."""
    try:
        return proxy.measure(subject, work)
    except InputError as error:
        return error


def load_sensitivities(folder: StudyFolder) -> list[Sensitivity]:
    return [s for _, s in _read(folder)]


def _read(folder: StudyFolder) -> list[tuple[str, Sensitivity]]:
    path = folder.file("sensitivity.json")
    data = read_json(path)
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
