"""The configuration of a study: the one list of options, for TOML, command line and Python."""

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from adq.quant.errors import InputError
from adq.quant.scheme import (
    ACT_METHODS,
    INITIALISATIONS,
    OPTIMIZERS,
    WEIGHT_METHODS,
    ActMethod,
    Amp,
    Initialisation,
    Optimizer,
    Scheme,
    WeightMethod,
)
from adq.quant.spec import MAX_BITS, MIN_BITS, BitVector
from adq.search.budget import Budget

if TYPE_CHECKING:
    from adq.quant.qat import TrainingConfig

IN_PYTHON = "python"
"""What a configuration calls a task that was given as an object."""

AMPS = ("auto", "off", "bf16", "fp16")
BATCHNORM = ("reestimate", "keep")
SWITCH = ("off", "on")
PROXIES = (
    "gauss-newton",
    "hessian",
    "fisher",
    "gauss-newton-trace",
    "empirical-fisher",
    "output-gradient",
    "loss",
    "kl",
    "pairwise",
)
WEIGHT_PROXIES = ("hessian",)
"""Those that say nothing of inputs."""

EXECUTORS = ("auto", "local", "ray")
EXECUTION = ("executor", "workers", "gpus_per_trial", "cpus_per_trial", "address", "checkpoints")
"""Options that say how and where trainings run: a study may be resumed with others."""

SAMPLERS = ("adq", "tpe", "nsga2", "nsga3", "gp", "random")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}

Kind = Literal[
    "text",
    "whole",
    "number",
    "share",
    "weight-bits",
    "act-bits",
    "ties",
    "layers",
    "epochs",
    "duration",
]


def _option(default: Any, kind: Kind, text: str, low: float = -math.inf) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text, "low": low})


@dataclass(frozen=True)
class StudyConfig:
    """Every option of a study. A field `a_b` is the option `--a-b` and the TOML key `a-b`."""

    task: str = _option(
        "digits",
        "text",
        "digits, imagefolder:PATH, webdataset:PATH, cifar10:PATH, or mymodule:make_task; behind a "
        "path options, like photos,size=160,batch=256,workers=8",
    )
    model: str | None = _option(None, "text", "a torchvision model's name, for image tasks")
    weights: str | None = _option(
        None, "text", "a state dict (.safetensors, .pt) to start the FP32 model from"
    )
    budget_bits: float | None = _option(None, "number", "average bits a weight, at most")
    budget_size_mb: float | None = _option(None, "number", "10^6 bytes of the packed file, at most")
    budget_gbops: float | None = _option(None, "number", "10^9 bit operations a sample, at most")
    budget_latency_ms: float | None = _option(
        None, "number", "milliseconds a sample by --latency, at most"
    )
    latency: str | None = _option(
        None,
        "text",
        "what says how long a layer runs: a device (nvidia-t4, or a JSON file like it), a table "
        "of adq-search profile, or mymodule:function",
    )
    latency_batch: int | None = _option(
        None, "whole", "samples that --latency NAME and profile run at once; 1 if not given", 1
    )
    bits: tuple[int, ...] = _option((2, 3, 4, 6, 8), "weight-bits", "weight bits to choose from")
    act_bits: tuple[int, ...] = _option(
        (8,), "act-bits", "input bits to choose from; 0 keeps an input in FP32"
    )
    first_last_bits: int = _option(
        8, "whole", "bits of the first and last layer; 0 searches them like the others", 0
    )
    ties: str = _option(
        "auto",
        "ties",
        "layers that share their bits: auto (found where outputs are added or joined, and where "
        "Linear layers read one input), none, or groups like a.conv=a.shortcut,b=c=d",
    )
    layers: str | None = _option(
        None,
        "layers",
        "other choices for some layers, by name or pattern: conv1=8,layer4.*=2+3,fc=4+8/8 (weight "
        "bits, and after a slash input bits; a single number pins), or a file like a study's "
        "best.bits.json, which pins all layers",
    )
    proxies: str = _option(
        "kl,gauss-newton-trace", "text", f"scores to start the search from: {', '.join(PROXIES)}"
    )
    gradient_checkpoints: str = _option(
        "off", "text", "off, or on: the hessian proxy takes less memory and more time"
    )
    sampler: str = _option("adq", "text", f"what proposes candidates: {', '.join(SAMPLERS)}")
    trials: int = _option(24, "whole", "candidates to train", 1)
    time_budget: float | None = _option(
        None,
        "duration",
        "end the search early enough that final training, all but the report, is done within this "
        "time, like 90s, 30m or 1.5h",
    )
    epochs: int = _option(3, "whole", "epochs of each candidate's fine-tuning", 0)
    rungs: tuple[int, ...] | None = _option(
        None,
        "epochs",
        "shorter fine-tunings before --epochs, like 0,1: only the best candidates go on to the "
        "next one; 0 calibrates without training",
    )
    reduction: int = _option(3, "whole", "with --rungs, one candidate in so many goes on", 2)
    warm_start: str = _option(
        "off", "text", "off, or on: start from the weights of the most similar finished candidate"
    )
    final_epochs: int = _option(10, "whole", "epochs of the front's final fine-tuning", 0)
    fp32_epochs: int | None = _option(
        None, "whole", "epochs of FP32 training before the search; the task's own if not given", 0
    )
    lr: float = _option(1e-3, "number", "peak learning rate of the fine-tuning", 0)
    start_bits: tuple[int, ...] | None = _option(
        None, "weight-bits", "train at these bits first where a layer has fewer, like 4,3"
    )
    optimizer: str = _option("adamw", "text", "adamw or sgd")
    distillation: float = _option(
        0.5, "share", "share of the FP32 model's class scores in the fine-tuning's loss, 0 to 1"
    )
    amp: str = _option("auto", "text", "auto (bf16 on GPUs), off, bf16 or fp16")
    dampening: float | None = _option(
        None, "number", "weight of the penalty on the distance between weights and their levels"
    )
    freeze_above: float | None = _option(
        None,
        "number",
        "freeze weights that change level back and forth more often a step, 0.01 say; codebooks "
        "then stay still",
    )
    weights_average: float | None = _option(
        None,
        "share",
        "decay of a moving average of the weights, 0.9999 say, which fine-tuning then ends with",
    )
    batchnorm: str = _option(
        "reestimate", "text", "reestimate or keep its statistics after fine-tuning"
    )
    weight_quantizer: str = _option("adq", "text", ", ".join(WEIGHT_METHODS))
    act_quantizer: str = _option("n2uq", "text", ", ".join(ACT_METHODS))
    codebook_start: str = _option("quantile-lloyd", "text", ", ".join(INITIALISATIONS))
    group_size: int | None = _option(
        None, "whole", "weights that share a scale; an output channel if not given", 2
    )
    seed: int = _option(0, "whole", "seed of everything random", 0)
    device: str = _option("auto", "text", "cpu, cuda, cuda:N, or auto (cuda where there is one)")
    executor: str = _option(
        "auto",
        "text",
        "local (in this process), ray (Ray Tune), or auto: ray where several workers or a cluster "
        "are asked for, or this machine has several GPUs",
    )
    workers: int | None = _option(
        None, "whole", "with ray, trainings at once; as many as there is room for if not given", 1
    )
    gpus_per_trial: float | None = _option(
        None,
        "number",
        "with ray, GPUs of a training: a share, like 0.5, or several; 1 where there are any",
        0,
    )
    cpus_per_trial: int | None = _option(
        None, "whole", "CPU threads of a training; all of them locally, 1 with ray", 1
    )
    ranks: int | None = _option(
        None,
        "whole",
        "with ray, processes that train a candidate together, on batches cut among them; one for "
        "each of its GPUs if not given",
        1,
    )
    window: int | None = _option(
        None,
        "whole",
        "trainings that may be under way at once: each is chosen by the results of all but so many "
        "before it, so that results do not depend on which worker is fast; 1 locally and with "
        "ray twice --workers, three times those above 64",
        1,
    )
    address: str | None = _option(
        None,
        "text",
        "the Ray cluster: auto, HOST:PORT, or local: one on this machine, the default",
    )
    checkpoints: str | None = _option(
        None,
        "text",
        "folder or URL (s3://...) for checkpoints of running trainings; the study's folder if not "
        "given",
    )
    study: str | None = _option(None, "text", "the study's name; TASK-1, TASK-2, ... if not given")
    storage: str | None = _option(
        None,
        "text",
        "where trials are kept: sqlite:///FILE, postgresql://..., or journal:FILE; a file in the "
        "study's folder if not given",
    )
    out: str = _option("runs", "text", "the folder that holds the studies")

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name), option_name(f)))
        self.scheme  # noqa: B018 (its own checks)
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        names = self.proxy_names
        if unknown := [name for name in names if name not in PROXIES]:
            raise InputError(f"proxies: expected some of {', '.join(PROXIES)}, got {unknown[0]!r}")
        if len(set(names)) < len(names):
            raise InputError(f"proxies: expected each once, got {self.proxies!r}")
        words_of = {
            "amp": AMPS,
            "batchnorm": BATCHNORM,
            "executor": EXECUTORS,
            "gradient_checkpoints": SWITCH,
            "sampler": SAMPLERS,
            "warm_start": SWITCH,
        }
        for name, words in words_of.items():
            value = getattr(self, name)
            if value not in words:
                option = name.replace("_", "-")
                raise InputError(f"{option}: expected one of {', '.join(words)}, got {value!r}")
        if self.rungs is not None and self.rungs[-1] >= self.epochs:
            raise InputError(
                f"rungs: expected fewer epochs than --epochs {self.epochs}, got {self.rungs[-1]}"
            )
        if self.first_last_bits and not MIN_BITS <= self.first_last_bits <= MAX_BITS:
            raise InputError(
                f"first-last-bits: expected 0 or {MIN_BITS} to {MAX_BITS}, got "
                f"{self.first_last_bits}"
            )
        if self.seed >= 2**32:  # numpy's limit; torch's is not far off for seed · 10,007 + epoch
            raise InputError(f"seed: expected less than 2^32, got {self.seed}")
        if self.study is not None and (
            not self.study
            or self.study.startswith(".")
            or "/" in self.study
            or not self.study.isprintable()
        ):
            raise InputError(
                f"study: expected a plain name without '/' or leading '.', got {self.study!r}"
            )

    @property
    def budget(self) -> Budget:
        if self.budget_latency_ms is not None and self.latency is None:
            raise InputError(
                "budget-latency-ms: nothing says how long a layer runs; give --latency a device, a "
                "table or a function"
            )
        return Budget(
            self.budget_bits, self.budget_size_mb, self.budget_gbops, self.budget_latency_ms
        )

    @property
    def proxy_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.proxies.split(","))

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            cast(WeightMethod, self.weight_quantizer),
            cast(ActMethod, self.act_quantizer),
            cast(Initialisation, self.codebook_start),
            group_size=self.group_size,
        )

    def training(self, epochs: int, device: str) -> "TrainingConfig":
        """How a candidate is fine-tuned on a device of this type."""
        from adq.quant.qat import TrainingConfig

        kinds: dict[str, Amp | None] = {"off": None, "bf16": "bf16", "fp16": "fp16"}
        kinds["auto"] = "bf16" if device == "cuda" else None
        return TrainingConfig(
            epochs,
            self.lr,
            optimizer=cast(Optimizer, self.optimizer),
            amp=kinds[self.amp],
            distillation=self.distillation,
            # a frozen weight is held at the number of its level: levels must keep theirs
            codebook_decay=None if self.freeze_above else TrainingConfig.codebook_decay,
            dampening=self.dampening or 0.0,
            freeze_above=self.freeze_above,
            weights_average=self.weights_average,
        )

    def to_toml(self) -> str:
        import tomli_w

        values = {k.replace("_", "-"): v for k, v in asdict(self).items() if v is not None}
        return tomli_w.dumps(values)


OPTIONS: dict[str, "Field[Any]"] = {f.name: f for f in fields(StudyConfig)}


def option_name(f: "Field[Any]") -> str:
    return f.name.replace("_", "-")


def read_toml(path: str | Path) -> dict[str, Any]:
    """A study file as keyword arguments of StudyConfig, each value checked.

    Raises InputError that names the file, the key and what is allowed.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read study file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"study file {path} is not valid TOML: {error}") from None
    known = {option_name(f): f for f in OPTIONS.values()}
    values = {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(f"{path}: unknown key '{key}'; {hint}allowed: {', '.join(known)}")
        values[known[key].name] = _checked(known[key], value, f"{path}: key '{key}'")
    return values


def make_config(*layers: Mapping[str, Any]) -> StudyConfig:
    """The configuration from values in rising precedence (study file, then command line).

    None means "not given". Raises InputError for values that do not fit.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {name: value for name, value in layer.items() if value is not None}
    if unknown := sorted(set(merged) - set(OPTIONS)):
        raise InputError(f"unknown option {unknown[0]!r}; allowed: {', '.join(OPTIONS)}")
    return StudyConfig(**merged)


def _checked(f: "Field[Any]", value: Any, where: str) -> Any:
    """`value` in the field's type; `where` opens the error."""
    kind, low = f.metadata["kind"], f.metadata["low"]
    if value is None and f.default is None:
        return None
    if kind == "text":
        if isinstance(value, str):
            return value
        wanted = "a text"
    elif kind == "whole":
        if type(value) is int and value >= low:
            return value
        wanted = "a whole number" + (f" of at least {low:g}" if low > -math.inf else "")
    elif kind == "number":
        if type(value) in (int, float) and math.isfinite(value) and value > max(low, 0):
            return float(value)
        wanted = "a positive number"
    elif kind == "ties":
        text, wanted = _ties(value)
        if not wanted:
            return text
    elif kind == "layers":
        given = _layers(value)
        if given is not None:
            return given or None
        wanted = (
            f"each layer or pattern once with bits from {MIN_BITS} to {MAX_BITS} (inputs also 0, "
            "FP32), like conv1=8,layer4.*=2+3,fc=4+8/8, or in a table [layers] like "
            '"conv1" = 8, "layer4.*" = [2, 3], "fc" = { bits = [4, 8], act-bits = 8 }'
        )
    elif kind == "epochs":
        epochs = _whole_numbers(value)
        if epochs and list(epochs) == sorted(set(epochs)) and epochs[0] >= 0:
            return epochs
        wanted = "rising whole numbers of epochs, like 0,1"
    elif kind == "duration":
        seconds = _seconds(value)
        if seconds is not None:
            return seconds
        wanted = "a time like 90s, 30m or 1.5h"
    elif kind == "share":
        if type(value) in (int, float) and 0 <= value <= 1:
            return float(value)
        wanted = "a number from 0 to 1"
    else:
        bits = _whole_numbers(value)
        zero = {0} if kind == "act-bits" else set()
        allowed = zero | set(range(MIN_BITS, MAX_BITS + 1))
        if bits and set(bits) <= allowed and len(set(bits)) == len(bits):
            return bits
        wanted = (
            f"different whole numbers from {MIN_BITS} to {MAX_BITS}"
            + (" (or 0 for FP32)" if zero else "")
            + ", like 2,4,8"
        )
    raise InputError(f"{where}: expected {wanted}, got {value!r}")


def tie_groups(text: str) -> list[list[str]]:
    """The layer names of `a=b,c=d=e`, group by group."""
    return [[name.strip() for name in group.split("=")] for group in text.split(",")]


def _ties(value: Any) -> tuple[str, str]:
    """(`auto`, `none` or groups as text, what was expected instead: nothing if all is well)."""
    if value in ("auto", "none"):
        return value, ""
    wanted = "auto, none, or groups of layers, like a.conv=a.shortcut,b=c=d"
    groups = tie_groups(value) if isinstance(value, str) else value
    if not isinstance(groups, list | tuple):
        return "", wanted
    if not all(isinstance(g, list | tuple) and all(type(n) is str for n in g) for g in groups):
        return "", wanted
    if not groups:
        return "none", ""
    text = ",".join("=".join(group) for group in groups)
    # an empty name, or one that the text cannot hold
    if not all(map(all, groups)) or tie_groups(text) != [list(group) for group in groups]:
        return "", wanted
    names = [name for group in groups for name in group]
    if alone := next((group for group in groups if len(group) < 2), None):
        return "", f"at least two layers in a group ({alone[0]!r} is alone)"
    if twice := next((name for name in names if names.count(name) > 1), None):
        return "", f"each layer once ({twice!r} is there twice)"
    return text, ""


@dataclass(frozen=True)
class LayerBits:
    """What the layers of a name or pattern may get; None leaves it as it is for the others."""

    pattern: str
    weight: tuple[int, ...] | None
    act: tuple[int, ...] | None


def layer_bits(text: str) -> list[LayerBits]:
    """The entries of `conv1=8,layer4.*=2+3,fc=4+8/8`. Raises ValueError for another form."""
    found = []
    for entry in text.split(","):
        pattern, _, bits = entry.partition("=")
        weight, slash, act = bits.partition("/")
        found.append(
            LayerBits(
                pattern.strip(),
                _sum_of_bits(weight) if weight.strip() or not slash else None,
                _sum_of_bits(act, fp32=True) if slash else None,
            )
        )
    patterns = [one.pattern for one in found]
    if not all(patterns) or len(set(patterns)) < len(patterns):
        raise ValueError
    return found


def _sum_of_bits(text: str, fp32: bool = False) -> tuple[int, ...]:
    bits = tuple(sorted(int(part) for part in text.split("+")))
    allowed = set(range(MIN_BITS, MAX_BITS + 1)) | ({0} if fp32 else set())
    if not set(bits) <= allowed or len(set(bits)) < len(bits):
        raise ValueError
    return bits


def _layers(value: Any) -> str | None:
    """Each form as text, in one spelling; None for anything else.

    Raises InputError for a file that is no bit vector.
    """

    def text_of(entry: Any) -> str:
        numbers = _whole_numbers(entry)
        if isinstance(entry, str) or not numbers:
            raise ValueError
        return "+".join(map(str, numbers))

    def entry_of(name: Any, entry: Any) -> str:
        if not isinstance(name, str) or {*name} & {*",="}:
            raise ValueError
        if not isinstance(entry, Mapping):
            return f"{name}={text_of(entry)}"
        if not entry or not entry.keys() <= {"bits", "act-bits"}:
            raise ValueError
        weight = text_of(entry["bits"]) if "bits" in entry else ""
        act = "/" + text_of(entry["act-bits"]) if "act-bits" in entry else ""
        return f"{name}={weight}{act}"

    if isinstance(value, str) and value.endswith(".json"):
        pinned = BitVector.load(value)
        return ",".join(f"{n}={b}/{pinned.act.get(n, 0)}" for n, b in pinned.weight.items())
    try:
        if isinstance(value, Mapping):
            value = ",".join(entry_of(name, entry) for name, entry in value.items())
            if not value:
                return ""
        if not isinstance(value, str):
            return None
        entries = layer_bits(value)
    except ValueError:
        return None
    return ",".join(
        f"{one.pattern}={'+'.join(map(str, one.weight or ()))}"
        + ("" if one.act is None else f"/{'+'.join(map(str, one.act))}")
        for one in entries
    )


def _seconds(value: Any) -> float | None:
    """`90s`, `30m`, `1.5h`, or seconds as a number; None for anything else."""
    if isinstance(value, str):
        number = value.rstrip("smh")
        unit = SECONDS.get(value[len(number) :])
        try:
            value = float(number) * unit if unit is not None else None
        except ValueError:
            return None
    if type(value) in (int, float) and math.isfinite(value) and value > 0:
        return float(value)
    return None


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    """`2,3,4`, `[2, 3, 4]` or `4` as a tuple; None for anything else."""
    if type(value) is int:
        return (value,)
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else None
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    return None
