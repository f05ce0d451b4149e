"""Which proxy foretells what a short fine-tuning makes of a bit vector?

    python studies/proxy_fidelity/run.py --cifar FOLDER [--fashion FOLDER] [--workers 2]

Trains 64 random bit vectors in each setting of `truth.SETTINGS` (truth_NAME.json), scores every
layer with every proxy (scores_NAME.json), and compares: Spearman's and Kendall's rank correlation
of what a proxy expects a vector to lose with the loss after fine-tuning. Writes summary.json and
the tables of README.md. What is in the files is not made again: remove them to start anew. About
two hours of one core.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from grounds import fashion
from grounds.report import table, write_between
from scipy.stats import kendalltau, spearmanr
from torch.nn import functional as F
from truth import CHOICES, PINNED, SCHEME, SETTINGS, Ground, ground, measure

from adq.proxies.base import Proxy, Sensitivity, Subject, Table, combined, layer_errors, predicted
from adq.proxies.direct import Direct
from adq.proxies.ensemble import fit_ensemble
from adq.proxies.gradient import Gradients
from adq.proxies.pairwise import Pairwise
from adq.proxies.trace import HessianTrace
from adq.proxies.work import Work
from adq.quant.batches import micro_batches, take_samples
from adq.quant.calibrate import input_ranges
from adq.quant.files import write_json
from adq.quant.layers import trace_layers
from adq.quant.spec import BitVector
from adq.search.config import StudyConfig
from adq.search.seeds import INPUT_WEIGHT

HERE = Path(__file__).parent

SAMPLES = 256
ALL_PAIRS = 99
PROXIES: dict[str, tuple[Proxy, int]] = {
    "hessian": (HessianTrace(rank=8, probes=64, target=0.1), 64),
    "model": (Gradients(("gauss-newton", "fisher", "gauss-newton-trace"), pairs=ALL_PAIRS), 16),
    "given": (Gradients(("empirical-fisher", "output-gradient")), 16),
    "loss": (Direct("loss"), 32),
    "kl": (Direct("kl"), 32),
    "pairwise": (Pairwise(8), 64),
}
"""Name in the file -> a proxy and its batch size. All see the same 256 training images."""

ENSEMBLE_OF = ("gauss-newton", "gauss-newton-trace", "loss", "kl")
FACTORS = 2.0 ** np.arange(-4, 9)
"""By how much inputs may weigh more than weights; see `inputs_weighed`."""
FITTED_ON, SPLITS = 16, 40
RESAMPLES = 2000
DEFAULT = tuple(StudyConfig().proxy_names)
Truth = list[dict[str, Any]]


def score(name: str, folder: Path) -> dict[str, Sensitivity]:
    """Every proxy on a setting, from scores_NAME.json or measured now."""
    path = HERE / f"scores_{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if set(kept) != set(PROXIES):
        torch.set_num_threads(1)
        subject = subject_of(ground(name, folder))
        for proxy_name, (proxy, size) in PROXIES.items():
            if proxy_name not in kept:
                data = micro_batches(take_samples(subject.batches, SAMPLES), size)
                of_proxy = replace(subject, batches=list(data))
                found = proxy.measure(of_proxy, Work())
                kept[proxy_name] = [s.to_json() for s in found]
                write_json(path, kept)
                print(name, proxy_name, f"{found[0].seconds:.1f} s", flush=True)
    found = [Sensitivity.from_json(entry) for entries in kept.values() for entry in entries]
    return {s.proxy: s for s in found}


def subject_of(here: Ground) -> Subject:
    layers = trace_layers(here.model, here.data.train[0][:2])
    bits = (*CHOICES, PINNED)
    act_bits = bits if here.setting.act else ()
    wanted = dict.fromkeys(here.layers, act_bits) if act_bits else {}
    return Subject(
        here.model,
        layers,
        bits,
        here.calibration,
        F.cross_entropy,
        act_bits,
        SCHEME,
        input_ranges(here.model, wanted, here.calibration, SCHEME.act),
    )


def contenders(found: dict[str, Sensitivity], here: Ground) -> dict[str, Sensitivity]:
    """What is compared: each score alone, what pairs add, the package's default, two yardsticks."""
    alone = {n: replace(s, pairs=None) for n, s in found.items() if n != "pairwise"}
    layers, bits = found["loss"].weight.layers, found["loss"].weight.bits
    errors = layer_errors(here.model, layers, bits, SCHEME)
    powers = np.array([e.double().square().flatten(1).sum(dim=1).tolist() for e in errors])
    zero = np.zeros_like(powers)
    squared = Table(layers, bits, powers, zero)
    return {
        "squared error": Sensitivity("squared error", squared, None, 0, 0.0),
        **alone,
        "gauss-newton, all pairs": found["gauss-newton"],
        "pairwise": found["pairwise"],
        "default": _inputs_times(combined([alone[name] for name in DEFAULT]), INPUT_WEIGHT),
    }


def _inputs_times(s: Sensitivity, factor: float) -> Sensitivity:
    return replace(s, act=s.act and replace(s.act, score=factor * s.act.score))


def inputs_weighed(
    singles: dict[str, Sensitivity], vectors: list[BitVector], truth: Truth
) -> tuple[str, dict[str, float]]:
    """How the correlation changes with the weight of inputs against weights: a table, and for each
    score the factor that is best on validation, with the correlation on test there."""
    rows, best = [], {}
    for name, s in singles.items():
        if s.act is None:
            continue
        expected = {
            k: np.array([predicted(_inputs_times(s, k), v) for v in vectors]) for k in FACTORS
        }
        of_split = {
            split: {k: spearmanr(x, losses(truth, split)).statistic for k, x in expected.items()}
            for split in ("validation", "test")
        }
        factor = max(FACTORS, key=lambda k: of_split["validation"][k])
        best[f"best_input_weight_{_key(name)}"] = factor
        best[f"spearman_at_best_input_weight_{_key(name)}"] = of_split["test"][factor]
        rows.append([name, *(f"{of_split['test'][k]:.3f}" for k in FACTORS), f"{factor:g}"])
    header = ["score", *(f"x {k:g}" for k in FACTORS), "best on validation"]
    return table(header, rows), best


def losses(truth: Truth, split: str, seed: int | None = None) -> np.ndarray:
    """Of each vector, in their order: the mean over the seeds it was trained under, or one seed's;
    that one then has fewer vectors where not all were repeated."""
    runs: dict[int, list[float]] = {}
    for r in sorted(truth, key=lambda r: r["vector"]):
        if r["vector"] >= 0 and seed in (None, r["seed"]):
            runs.setdefault(r["vector"], []).append(r[f"{split}_loss"])
    return np.array([np.mean(found) for found in runs.values()])


def interval(x: np.ndarray, y: np.ndarray, rank: Callable[..., Any]) -> tuple[float, float, float]:
    """A rank correlation and the ends of its 95 % bootstrap interval over vectors."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    values = [rank(x[i], y[i]).statistic for i in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(rank(x, y).statistic), float(low), float(high)


def ensemble(
    found: dict[str, Sensitivity], vectors: list[BitVector], truth: Truth
) -> tuple[np.ndarray, np.ndarray, float]:
    """Spearman's and Kendall's correlation on the vectors that an ensemble was not fitted on, over
    random splits, and the share of them whose loss is within two of its standard errors."""
    rng = np.random.default_rng(0)
    fit_to, judged = losses(truth, "validation"), losses(truth, "test")
    members = [replace(found[name], pairs=None) for name in ENSEMBLE_OF]
    spearman, kendall, within = [], [], []
    for split in range(SPLITS):
        order = rng.permutation(len(vectors))
        fitted, rest = order[:FITTED_ON], order[FITTED_ON:]
        model = fit_ensemble(members, [vectors[i] for i in fitted], fit_to[fitted], seed=split)
        mean, stderr = model.predict([vectors[i] for i in rest])
        spearman.append(spearmanr(mean, judged[rest]).statistic)
        kendall.append(kendalltau(mean, judged[rest]).statistic)
        within.append(np.mean(np.abs(mean - fit_to[rest]) <= 2 * stderr))
    return np.array(spearman), np.array(kendall), float(np.mean(within))


def report(
    truths: dict[str, Truth], scores: dict[str, dict[str, Sensitivity]], folders: Any
) -> None:
    """summary.json, and the tables between the marks in README.md."""
    summary: dict[str, float] = {}
    tables: dict[str, str] = {}
    for name, truth in truths.items():
        here = ground(name, folders[name])
        vectors = here.vectors()
        validation, test = losses(truth, "validation"), losses(truth, "test")
        rows, of_validation, of_test = [], {}, {}
        bits = [-np.mean([*v.weight.values(), *v.act.values()]) for v in vectors]
        compared = contenders(scores[name], here)
        expected = {
            "fewer bits": np.array(bits),
            **{n: np.array([predicted(s, v) for v in vectors]) for n, s in compared.items()},
        }
        for proxy, x in expected.items():
            s, k = interval(x, test, spearmanr), interval(x, test, kendalltau)
            of_validation[proxy] = float(spearmanr(x, validation).statistic)
            of_test[proxy] = s[0]
            cost = compared.get(proxy)
            rows.append(
                [
                    proxy,
                    "{:.3f} ({:.2f} to {:.2f})".format(*s),
                    "{:.3f} ({:.2f} to {:.2f})".format(*k),
                    f"{of_validation[proxy]:.3f}",
                    f"{cost.seconds:.1f}" if cost and cost.seconds else "",
                    f"{cost.passes:.0f}" if cost and cost.passes else "",
                ]
            )
        spearman, kendall, within = ensemble(scores[name], vectors, truth)
        rows.append(
            [
                f"ensemble, fitted on {FITTED_ON}",
                f"{spearman.mean():.3f} (splits: ± {spearman.std(ddof=1):.3f})",
                f"{kendall.mean():.3f} (splits: ± {kendall.std(ddof=1):.3f})",
                "",
                "",
                "",
            ]
        )
        header = ["score", "Spearman, test", "Kendall, test", "Spearman, validation", "s", "passes"]
        tables[name] = table(header, rows)
        singles = [n for n in scores[name] if n != "pairwise"]
        best = max(singles, key=lambda n: of_test[n])
        once, again = (losses(truth, "test", seed) for seed in (0, 1))
        summary |= {
            f"spearman_default_{name}": of_test["default"],
            f"spearman_best_single_{name}": of_test[best],
            f"spearman_fewer_bits_{name}": of_test["fewer bits"],
            f"spearman_ensemble_{name}": float(spearman.mean()),
            f"ensemble_within_two_errors_{name}": within,
            f"spearman_of_another_seed_{name}": float(
                spearmanr(once[: len(again)], again).statistic
            ),
        }
        summary |= {f"spearman_{_key(n)}_{name}": v for n, v in of_test.items()}
        if here.setting.act:
            weighed = inputs_weighed({n: compared[n] for n in singles}, vectors, truth)
            tables["inputs"], best_factors = weighed
            summary |= best_factors
    write_between(HERE / "README.md", tables)
    write_json(HERE / "summary.json", {name: round(value, 4) for name, value in summary.items()})


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cifar",
        dest="cifar10",
        type=Path,
        required=True,
        help="the folder of CIFAR-10's images",
    )
    parser.add_argument("--fashion", type=Path, default=fashion.FOLDER, help="of the IDX files")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    arguments = parser.parse_args()
    folders = {n: getattr(arguments, n.partition("_")[0]) for n in SETTINGS}
    truths, scores = {}, {}
    for name, folder in folders.items():
        truths[name] = measure(name, folder, HERE / f"truth_{name}.json", arguments.workers)
        scores[name] = score(name, folder)
    report(truths, scores, folders)


if __name__ == "__main__":
    main()
