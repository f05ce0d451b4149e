"""The cluster files are what Ray and KubeRay take, and their commands are commands of ours."""

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

from adq.cli import app
from adq.search.config import OPTIONS, make_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "cluster"
SCHEMA = json.loads((ROOT / "tests" / "support" / "kuberay_rayjob.schema.json").read_text())


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def ray_up_takes(config: dict[str, Any]) -> None:
    """What `ray up` does with a file before it reaches for any machine."""
    validate_config(prepare_config(copy.deepcopy(config)))


def kuberay_takes(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, SCHEMA, jsonschema.Draft202012Validator)


def test_ray_up_takes_the_cluster_file() -> None:
    ray_up_takes(load("cluster.yaml"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(head_start_ray_comands=c.pop("head_start_ray_commands")),
        lambda c: c["auth"].update(ssh_usr="me"),
        lambda c: c["auth"].update(ssh_user=1000),
        lambda c: c["provider"].pop("type"),
    ],
    ids=["misspelt key", "misspelt key below", "wrong type", "missing key"],
)
def test_ray_up_takes_no_spoilt_cluster_file(spoil: Callable[[dict[str, Any]], Any]) -> None:
    config = load("cluster.yaml")
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, KeyError)):
        ray_up_takes(config)


def test_nodes_of_the_cluster_file_ask_for_a_token_and_carry_it() -> None:
    config = load("cluster.yaml")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for where in ("head", "worker"):
        start = config[f"{where}_start_ray_commands"][-1]
        before, _, _ = start.partition("ray start")
        assert "RAY_AUTH_MODE=token" in before
        assert "OMP_WAIT_POLICY=PASSIVE" in before


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_kuberay_takes_the_job() -> None:
    kuberay_takes(load("rayjob.yaml"))


def cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.update(apiVersion="ray.io/v1alpha1"),
        lambda m: m["spec"].update(entryPoint=m["spec"].pop("entrypoint")),
        lambda m: cluster(m)["authOptions"].update(mode="tokens"),
        lambda m: cluster(m).pop("headGroupSpec"),
        lambda m: cluster(m)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda m: cluster(m)["workerGroupSpecs"][0].update(replica=1),
        lambda m: cluster(m)["workerGroupSpecs"][0].pop("minReplicas"),
        lambda m: cluster(m)["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ].update(memory="8 GB"),
        lambda m: m["spec"].update(backoffLimit="3"),
    ],
    ids=[
        "version", "misspelt", "enum", "no head", "number for text", "misspelt in a group",
        "missing in a group", "quantity", "text for number",
    ],
)  # fmt: skip
def test_kuberay_takes_no_spoilt_job(spoil: Callable[[dict[str, Any]], Any]) -> None:
    manifest = load("rayjob.yaml")
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        kuberay_takes(manifest)


def test_volumes_that_pods_of_the_job_mount_are_there_and_hold_the_study() -> None:
    manifest = load("rayjob.yaml")
    groups = [cluster(manifest)["headGroupSpec"], *cluster(manifest)["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        mounted = {m["name"]: m["mountPath"] for c in spec["containers"] for m in c["volumeMounts"]}
        assert set(mounted) <= {volume["name"] for volume in spec["volumes"]}
        assert mounted["studies"] == "/studies"


def test_commands_of_the_job_are_ours_and_name_one_study() -> None:
    command = get_command(app)
    entrypoint = load("rayjob.yaml")["spec"]["entrypoint"]
    calls = [shlex.split(c) for c in re.findall(r"exec adq-search ([^;]*);", entrypoint)]
    resume, start = calls
    context = command.make_context("adq-search", start)
    given = {name: value for name, value in context.params.items() if name in OPTIONS}
    config = make_config(given)
    assert config.budget
    assert (config.executor, config.address, config.out) == ("ray", "auto", "/studies")
    name, resume_command, rest = command.resolve_command(context, resume)
    parsed = resume_command.make_context(name, rest).params
    assert name == "resume"
    assert (parsed["name"], parsed["out"]) == (config.study, config.out)
    assert f"-f {config.out}/{config.study}/study.toml" in entrypoint
