"""The cluster's files say the same thing: closed schemas, one Ray version, one image, entry points that exist.

Nothing is built or started here; the command of the CronJob is run in test_cronjob.py.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from ray.autoscaler._private.util import validate_config

from nec_ray.runtime.cluster import NODE_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))}
AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "manifests.schema.json").read_text())
CONFIG = "/etc/nec-ray/"
ENTRY_POINT = re.compile(r"\bpython /opt/nec-ray/(jobs/\w+\.py)([^\n]*)")


def inside(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects of a document."""
    if isinstance(tree, dict):
        yield tree
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from inside(value)


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_manifests_fit_the_closed_schema(name: str) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(KUBERAY[name])


def test_the_images_nodes_are_set_as_those_of_a_cluster_of_our_own() -> None:
    [words] = re.findall(r"^ENV (RAY_JOB_STOP\S+ .*)$", DOCKERFILE, re.MULTILINE)
    assert NODE_ENVIRONMENT.items() <= dict(word.split("=") for word in words.split()).items()


def test_the_schema_is_closed_all_the_way_down() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    objects = [one for one in inside(SCHEMA["$defs"]) if one.get("type") == "object"]
    assert len(objects) > 20
    assert all(one.get("additionalProperties") is False for one in objects)
    check = jsonschema.Draft202012Validator(SCHEMA)
    for name, manifest in KUBERAY.items():
        for number, _ in enumerate(inside(manifest)):
            broken = deepcopy(manifest)
            list(inside(broken))[number]["unknownField"] = 1
            assert not check.is_valid(broken), f"{name}: {list(inside(manifest))[number]}"


def test_ray_up_takes_the_aws_file() -> None:
    validate_config(AWS)  # Ray's own schema, which leaves node_config open
    ec2 = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in AWS["available_node_types"].items():
        request = {key: value for key, value in kind["node_config"].items() if key != "SubnetIds"}  # which is Ray's own
        found = ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, ec2)
        assert not found.has_errors(), f"{name}: {found.generate_report()}"


def test_heads_work_for_nobody_and_are_not_spot() -> None:
    types = AWS["available_node_types"]
    head = types[AWS["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    workers = {name: kind for name, kind in types.items() if name != AWS["head_node_type"]}
    for kind in workers.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["node_config"]["IamInstanceProfile"] != head["node_config"]["IamInstanceProfile"]
    assert AWS["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert (workers["gpu"]["min_workers"], workers["cpu"]["min_workers"]) == (0, 1)
    for spec in clusters():
        select = spec["headGroupSpec"]["template"]["spec"]["nodeSelector"]
        assert select == {"eks.amazonaws.com/capacityType": "ON_DEMAND"}
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert spec.get("enableInTreeAutoscaling") or group["minReplicas"] == group["maxReplicas"]
            pod = group["template"]["spec"]
            assert pod["nodeSelector"] == {"eks.amazonaws.com/capacityType": "SPOT"}
            gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
            wanted = {"spot"} | ({"nvidia.com/gpu"} if gpus else set())
            assert {one["key"] for one in pod["tolerations"]} == wanted
    assert any(spec["workerGroupSpecs"][0]["minReplicas"] for spec in clusters())


def test_nobody_gets_in_without_a_token() -> None:
    assert "\nENV RAY_AUTH_MODE=token\n" in DOCKERFILE
    assert "~/.ray/auth_token" in AWS["file_mounts"]
    assert AWS["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    text = " ".join(AWS["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in text
    assert "0.0.0.0" not in json.dumps(AWS) + json.dumps(KUBERAY)
    assert "disabled" not in json.dumps(AWS) + json.dumps(KUBERAY)
    assert [spec["authOptions"] for spec in clusters()] == [{"mode": "token"}] * 3


def clusters() -> list[dict[str, Any]]:
    """The three Ray cluster specs."""
    return [one for name in KUBERAY for one in inside(KUBERAY[name]) if "headGroupSpec" in one]


def test_one_ray_version() -> None:
    [wanted] = [
        requirement
        for requirement in map(Requirement, PYPROJECT["project"]["optional-dependencies"]["ray"])
        if requirement.name == "ray"
    ]
    [image] = re.findall(r"^ARG RAY=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert '"ray==${RAY}"' in DOCKERFILE
    assert image in wanted.specifier
    assert {"default", "data", "train"} <= wanted.extras  # `default` holds the job server
    assert [spec["rayVersion"] for spec in clusters()] == [image] * 3


def test_one_image() -> None:
    named = {AWS["docker"]["image"]} | {
        one["image"] for name in KUBERAY for one in inside(KUBERAY[name]) if "image" in one
    }
    assert named == {f"registry.example/nec-ray:{PYPROJECT['project']['version']}"}
    assert re.findall(r"docker build .* -t (\S+) \.", DOCKERFILE) == list(named)


def test_dockerfile_copies_what_is_there() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    names = {name for line in copied for name in line}
    assert {"pyproject.toml", "nec_ray", "schemas", "jobs"} <= names
    assert all((ROOT / name).exists() for name in names)
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*included["packages"], *included["force-include"], PYPROJECT["project"]["readme"]}
    assert needed | set(PYPROJECT["project"]["license-files"]) <= names
    assert "\nWORKDIR /opt/nec-ray\n" in DOCKERFILE


def test_what_the_dockerfile_installs_has_ray_and_a_supported_python() -> None:
    [extras] = re.findall(r'"\.\[(\w+)\]"', DOCKERFILE)
    optional = PYPROJECT["project"]["optional-dependencies"]
    found: set[str] = set()

    def follow(extra: str) -> None:
        for requirement in map(Requirement, optional[extra]):
            found.add(requirement.name)
            if requirement.name == PYPROJECT["project"]["name"]:
                for one in requirement.extras:
                    follow(one)

    follow(extras)
    assert {"ray", "torch", "timm", "rasterio"} <= found
    [python] = re.findall(r"^FROM python:(\d+\.\d+)-slim", DOCKERFILE, re.MULTILINE)
    assert f"{python}.0" in Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier


def test_the_image_runs_as_the_user_whom_the_manifests_name() -> None:
    [uid] = re.findall(r"useradd .*--uid (\d+)", DOCKERFILE)
    users = re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE)
    assert users
    assert users[-1] == "ray"
    assert {one["runAsUser"] for name in KUBERAY for one in inside(KUBERAY[name]) if "runAsUser" in one} == {int(uid)}
    installed = DOCKERFILE[DOCKERFILE.index("apt-get install") : DOCKERFILE.index("/var/lib/apt")]
    assert {"wget", "rsync", "openssh-client", "libexpat1"} <= set(installed.split())


def entry_points() -> list[tuple[str, list[str]]]:
    """(job, its arguments) of every place that names one, comments too."""
    texts = [path.read_text() for path in sorted(CLUSTER.rglob("*")) if path.suffix in {".yaml", ".md"}]
    return [(job, shlex.split(rest)) for text in texts for job, rest in ENTRY_POINT.findall(text)]


def test_entry_points_exist_and_take_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    named = entry_points()
    assert {job for job, _ in named} == {"jobs/encode.py", "jobs/reencode.py"}
    for job, arguments in named:
        assert (ROOT / job).is_file(), job
        assert _takes(job, arguments, monkeypatch), f"{job} {shlex.join(arguments)}"


def test_the_check_of_arguments_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _takes("jobs/train.py", ["recipe.toml", "--out", "x"], monkeypatch)
    assert not _takes("jobs/train.py", ["recipe.toml"], monkeypatch)


class _Parsed(Exception):
    """The arguments were taken."""


def _takes(job: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the job's own parser takes these arguments; nothing of the job runs."""
    spec = importlib.util.spec_from_file_location("job", ROOT / job)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [job, *arguments])
        try:
            module.main()
        except _Parsed:
            return True
        except SystemExit:
            return False
    raise AssertionError(f"{job} parsed nothing")


def test_what_jobs_read_is_mounted_where_their_driver_runs() -> None:
    """Drivers run on the head, so the configuration has to be there."""
    for job, arguments in entry_points():
        assert len(arguments) == 1, job
    for spec in clusters():
        pod = spec["headGroupSpec"]["template"]["spec"]
        [mount] = pod["containers"][0]["volumeMounts"]
        [volume] = pod["volumes"]
        assert mount["mountPath"] + "/" == CONFIG
        assert (mount["name"], volume["configMap"]["name"]) == (volume["name"], "nec-ray")
    for name in ("rayjob", "raycronjob", "cronjob"):
        assert CONFIG in (CLUSTER / "kuberay" / f"{name}.yaml").read_text()


def test_the_cron_job_talks_to_the_ray_cluster() -> None:
    cluster = KUBERAY["raycluster"]["metadata"]["name"]
    [container] = KUBERAY["cronjob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    env = {one["name"]: one for one in container["env"]}
    assert env["RAY_ADDRESS"]["value"] == f"http://{cluster}-head-svc:8265"  # KubeRay's name of the service
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster  # and of the token's Secret
    accounts = {
        one["serviceAccountName"] for name in KUBERAY for one in inside(KUBERAY[name]) if "serviceAccountName" in one
    }
    assert accounts == {KUBERAY["serviceaccount"]["metadata"]["name"]}


def test_schedules_agree_and_no_run_outlives_its_week() -> None:
    plain, alpha = KUBERAY["cronjob"]["spec"], KUBERAY["raycronjob"]["spec"]
    assert (plain["schedule"], plain["timeZone"]) == (alpha["schedule"], alpha["timeZone"])
    assert plain["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 7 * 86400
    assert alpha["jobTemplate"]["activeDeadlineSeconds"] < 7 * 86400
    text = (CLUSTER / "kuberay" / "raycronjob.yaml").read_text()
    assert "ALPHA" in text
    assert "--feature-gates=RayCronJob=true" in text


def test_retries_are_few_where_each_is_a_cluster() -> None:
    assert KUBERAY["rayjob"]["spec"]["backoffLimit"] <= 1
    assert KUBERAY["raycronjob"]["spec"]["jobTemplate"]["backoffLimit"] <= 1
    plain = KUBERAY["cronjob"]["spec"]["jobTemplate"]["spec"]
    [container] = plain["template"]["spec"]["containers"]
    assert [rule["onExitCodes"]["containerName"] for rule in plain["podFailurePolicy"]["rules"]] == [container["name"]]
    assert plain["template"]["spec"]["restartPolicy"] == "Never"  # which a failure policy asks for


def test_runtime_environments_name_known_fields() -> None:
    from ray.runtime_env import RuntimeEnv

    texts = [one["runtimeEnvYAML"] for name in KUBERAY for one in inside(KUBERAY[name]) if "runtimeEnvYAML" in one]
    assert len(texts) == 2
    for text in texts:
        wanted = yaml.safe_load(text)
        assert set(wanted) == {"env_vars"}
        RuntimeEnv(**wanted)  # refuses values that are no strings
