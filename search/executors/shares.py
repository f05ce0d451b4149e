"""How a training's CPUs and GPUs are shared out, and how many trainings nodes have room for."""

from collections.abc import Mapping, Sequence

from adq.quant.errors import InputError
from adq.search.config import StudyConfig


def ranks_of(config: StudyConfig) -> int:
    """How many processes train a candidate together: one for each of its GPUs, unless said."""
    return config.ranks or max(1, int(config.gpus_per_trial or 1))


def shares(config: StudyConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[int, int, float]:
    """(ranks, CPUs of each, GPUs of each) of a training.

    cpus-per-trial and gpus-per-trial are shared out among the ranks. Each gets whole CPUs, and at
    least one: 3 ranks with 2 CPUs take 3.

    Raises InputError where the nodes have no room for one.
    """
    most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
    ranks = ranks_of(config)
    together = config.gpus_per_trial or float(ranks if most["GPU"] else 0)
    if config.device == "cpu":
        together = 0.0
    cpus, gpus = max(1, (config.cpus_per_trial or 1) // ranks), together / ranks
    if gpus > 1 and gpus != int(gpus):
        raise InputError(
            f"gpus-per-trial: expected whole GPUs, or a share of one, for each of {ranks} "
            f"processes, got {together:g}"
        )
    if config.device.startswith("cuda") and not gpus:
        raise InputError(f"device {config.device}: no node of the Ray cluster has a GPU")
    if room(nodes, cpus, gpus) < ranks:
        wanted = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        many = f" for each of its {ranks} processes" if ranks > 1 else ""
        raise InputError(
            f"the Ray cluster has no room for a training with {wanted}{many}: its largest node has "
            f"{most['CPU']:g} CPUs and {most['GPU']:g} GPUs; lower --cpus-per-trial, "
            "--gpus-per-trial or --ranks, or add nodes"
        )
    return ranks, cpus, gpus


def room(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many processes with so many CPUs and GPUs fit into nodes with such resources."""
    return sum(
        min(
            int(node.get("CPU", 0) // cpus),
            int(node.get("GPU", 0) / gpus + 1e-9) if gpus else 2**31,
        )
        for node in nodes
    )
