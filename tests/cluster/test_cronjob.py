"""The CronJob's own command, as it stands in the manifest, against a real job server that asks for a token."""

import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ray_head import RayHead, ray_head

MANIFEST = Path(__file__).resolve().parents[2] / "cluster" / "kuberay" / "cronjob.yaml"
TOKEN = "of this test alone, 0123456789"
JOB = """
import sys, ray
ray.init()
assert not ray.cluster_resources().get("CPU")
with open(sys.argv[1] + ".runs", "a") as runs:
    runs.write("run ")
print("the policy is read")
sys.exit(int(open(sys.argv[1]).read()))
"""


@pytest.fixture
def head() -> Iterator[RayHead]:
    """A head without cores, as that of the manifests, that refuses whoever has no token."""
    with ray_head(0, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as head:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=5)
        yield head


@pytest.mark.slow
def test_it_submits_once_follows_and_tells_failure(head: RayHead, tmp_path: Path) -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    [container] = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    *shell, script = container["command"]
    script = script.replace("/opt/nec-ray", str(tmp_path)).replace("/etc/nec-ray", str(tmp_path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "reencode.py").write_text(JOB)

    def pod(submission_id: str, exit_code: int) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "reencode.toml").write_text(str(exit_code))
        environment = head.environment | {"SUBMISSION_ID": submission_id}
        return subprocess.run(
            [*shell, script], env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    first = pod("nec-reencode-1", 0)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "the policy is read" in first.stdout
    again = pod("nec-reencode-1", 0)  # the pod of a node that was taken away, on another one
    assert again.returncode == 0, again.stderr
    assert "the policy is read" in again.stdout
    assert (tmp_path / "reencode.toml.runs").read_text() == "run "

    [rule] = manifest["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    final = rule["onExitCodes"]["values"]
    assert pod("nec-reencode-2", 75).returncode not in {0, *final}
    assert (tmp_path / "reencode.toml.runs").read_text() == "run run "
    retried = pod("nec-reencode-2", 0)  # what the pod's retry is for: an attempt of its own
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert (tmp_path / "reencode.toml.runs").read_text() == "run run run "

    assert pod("nec-reencode-3", 1).returncode in final
