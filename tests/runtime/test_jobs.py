"""The entry points of jobs/ through a real job server: results, log lines, exit codes, metrics, a clean stop."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from ray.job_submission import JobSubmissionClient

from nec_ray import open_archive
from nec_ray.contracts import contract
from nec_ray.errors import BadRecipe
from nec_ray.runtime.encode import encode
from nec_ray.runtime.encode_job import encode_job_schema, read_encode_job
from nec_ray.tiles import build_catalog, builtin_labels, builtin_scene, write_catalog
from tests.ray_head import RayHead, ray_head
from tests.runtime.cluster import ROOT
from tests.runtime.make import random_codec
from tests.runtime.test_encode import hashes


def test_the_schema_is_that_of_the_job() -> None:
    assert contract("encode_job.schema.json") == encode_job_schema()


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        ('archive = "a"', [], "catalog: must be given"),
        ('catalog = "c"\narchive = "a"\nworker = 3', [], "worker: no such key in this encode job"),
        ('catalog = "c"\narchive = "a"\nworkers = 0', [], "workers: Input should be greater"),
        ('catalog = "c"\narchive = "a"\nworkers = true', [], "workers: Input should be a valid integer"),
        ('catalog = "c"\narchive = "a"\nretry_failed = "yes"', [], "retry_failed: Input should be a valid boolean"),
        ('catalog = "c"\narchive = "a"\ncommit_seconds = inf', [], "commit_seconds: "),
        ('catalog = "c"\narchive = "a"\ncommit_seconds = 1e9', [], "commit_seconds: "),
        ('catalog = "c"\narchive = "a"\nwait_seconds = inf', [], "wait_seconds: "),
        ('catalog = "c"\narchive = ""', [], "archive: is blank"),
        ('catalog = ""\narchive = "a"', [], "catalog: is blank"),
        ('catalog = "c"\narchive = "a"\nwhere = ""', [], "where: is blank"),
        ('catalog = "c"\narchive = "a"', ["where= "], "where: is blank"),
        ('catalog = "c"\narchive = "a"', ["workers=many"], "workers: Input should be a valid integer"),
        ('catalog = "c"\narchive = "a"', ["workers"], "write it as key=value"),
        ("catalog = ", [], "no TOML"),
    ],
)
def test_what_is_no_job_is_refused_in_one_line(lines: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(lines)
    with pytest.raises(BadRecipe, match=message) as caught:
        read_encode_job(path, overrides)
    assert "\n" not in str(caught.value)


def test_what_overrides_a_job_has_the_type_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('catalog = "c"\narchive = "a"')
    asked = read_encode_job(path, ["workers=4", "retry_failed=true", "wait_seconds=5", "codec=12345678", "where=true"])
    assert (asked.workers, asked.retry_failed, asked.wait_seconds) == (4, True, 5.0)
    assert (asked.codec, asked.where) == ("12345678", "true")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("OSError(28, 'No space left on device')", 1),
        ("MemoryError()", 1),
        ("ValueError('two\\nlines of s3://user:secret@bucket')", 1),
        ("ConnectionResetError(104, 'Connection reset by peer')", 75),
        ("TimeoutError('no answer')", 75),
    ],
)
def test_an_error_of_no_type_of_ours_is_one_json_line_too(error: str, code: int) -> None:
    script = f"from nec_ray.runtime.job import run_job\ndef work(): raise {error}\nraise SystemExit(run_job(work))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    [line] = [json.loads(text) for text in done.stderr.splitlines()]
    assert (line["level"], line["error"], line["retry"]) == ("error", error.partition("(")[0], code == 75)
    assert line["event"].startswith(f"{line['error']}: ")
    assert "\n" not in line["event"]
    assert line["traceback"].startswith("Traceback")
    assert "in work" in line["traceback"]
    assert "secret" not in done.stderr


@pytest.mark.parametrize("workers", ["0", "-3", "many"])
def test_a_re_encoding_has_a_worker_at_least(workers: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "reencode.py"), str(tmp_path / "none.toml"), "--workers", workers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "argument --workers: " in done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    codec = random_codec(folder / "codec")
    write_catalog(build_catalog(builtin_scene(), tile_size=32), folder / "catalog.parquet")
    encode(folder / "catalog.parquet", folder / "whole", codec_url=codec._store.url, local=True, shard_tiles=8)
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    variables = {
        "PYTHONPATH": str(ROOT),
        "RAY_metrics_report_interval_ms": "500",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # as in cluster/: 3 s are few for a commit
    }
    with ray_head(3, variables) as head:
        yield head


def submit(head: RayHead, *words: str) -> "subprocess.CompletedProcess[str]":
    """`ray job submit WORDS`."""
    command = ["ray", "job", "submit", *words]
    return subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=600, check=False)


def finish(head: RayHead, job: str) -> tuple[int | None, list[dict[str, object]]]:
    """Exit code and log lines of a job, when it has ended."""
    client = JobSubmissionClient(head.url)
    deadline = time.monotonic() + 600
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.2)
    logs = client.get_job_logs(job)
    assert "Traceback" not in logs
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    return client.get_job_info(job).driver_exit_code, lines


def job(work: Path, name: str, **changes: object) -> str:
    """The command of a job with this configuration."""
    plain = {"catalog": str(work / "catalog.parquet"), "archive": str(work / name), "codec": str(work / "codec")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in (plain | changes).items()]
    (work / f"{name}.toml").write_text("\n".join(lines))
    return f"{sys.executable} {ROOT / 'jobs' / 'encode.py'} {work / name}.toml"


@pytest.mark.slow
def test_an_encoding_job_logs_and_counts_and_ends_with_its_account(work: Path, head: RayHead) -> None:
    command = job(work, "archive", shard_tiles=8, commit_seconds=0.5, workers=2)
    submitted = submit(head, "--no-wait", "--submission-id", "encode-1", "--", *command.split())
    assert submitted.returncode == 0, submitted.stderr
    found: dict[str, float] = {}
    client = JobSubmissionClient(head.url)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not client.get_job_status("encode-1").is_terminal():
        with urllib.request.urlopen(head.metrics_url, timeout=5) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^ray_(nec_\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
            which = re.search(r'(?:status|queue)="(\w+)"', labels)
            found[f"{name}:{which[1]}" if which else name] = float(value)
        time.sleep(0.1)
    code, lines = finish(head, "encode-1")
    account = lines[-1]
    assert (code, account["missing"], account["failed"]) == (0, 0, 0), lines
    assert hashes(work / "archive") == hashes(work / "whole")
    assert lines[0]["event"] == "planned"
    commits = [line for line in lines if line.get("event") == "committed"]
    assert len(commits) >= 2
    assert sum(int(str(line["tiles"])) for line in commits) == account["tiles"]
    assert 0 < found["nec_tiles_total:valid"] <= float(str(account["valid"])), found
    assert found["nec_payload_bytes_total"] > 0
    assert found["nec_bits_per_symbol"] > 0
    assert {"nec_shards:to_encode", "nec_shards:to_commit", "nec_commit_seconds_count"} <= found.keys()
    again = submit(head, "--submission-id", "encode-1", "--", *command.split())
    assert again.returncode != 0, "a submission id guards against running a job twice"


@pytest.mark.slow
def test_nodes_that_are_asked_for_come_and_go(work: Path) -> None:
    """Ray's autoscaler, with its own stand-in for a cloud: none but the head before the job and after it."""
    count = "import ray; ray.init(log_to_driver=False); print(int(ray.cluster_resources().get('CPU', 0)), 'cores')"
    with ray_head(0, {"PYTHONPATH": str(ROOT)}, autoscale=2) as head:
        client = JobSubmissionClient(head.url)

        def cores() -> int:
            counted = client.submit_job(entrypoint=f'{sys.executable} -c "{count}"')
            finish(head, counted)
            found = re.search(r"^(\d+) cores$", client.get_job_logs(counted), re.MULTILINE)
            assert found
            return int(found[1])

        assert cores() == 0
        code, lines = finish(head, client.submit_job(entrypoint=job(work, "none", shard_tiles=8)))
        assert (code, lines[-1]["error"]) == (75, "RunError")
        asked = job(work, "grown", shard_tiles=8, cores=2, wait_seconds=300)
        code, lines = finish(head, client.submit_job(entrypoint=asked))
        assert (code, lines[-1]["missing"]) == (0, 0), lines
        assert [line["cores"] for line in lines if line.get("event") == "nodes came"] == [2]
        assert hashes(work / "grown") == hashes(work / "whole")
        deadline = time.monotonic() + 120
        while cores():
            assert time.monotonic() < deadline, "idle nodes stay"


@pytest.mark.slow
def test_exit_codes_tell_what_running_again_would_do(work: Path, head: RayHead) -> None:
    client = JobSubmissionClient(head.url)
    final = client.submit_job(entrypoint=job(work, "final", catalog=str(work / "none.parquet")))
    retry = client.submit_job(entrypoint=job(work, "retry", workers=99))
    for submitted, code, error, again in ((final, 1, "NotFound", False), (retry, 75, "RunError", True)):
        exit_code, lines = finish(head, submitted)
        assert exit_code == code, lines
        assert (lines[-1]["level"], lines[-1]["error"], lines[-1]["retry"]) == ("error", error, again)


@pytest.mark.slow
def test_a_stopped_job_commits_what_is_finished(work: Path, head: RayHead) -> None:
    client = JobSubmissionClient(head.url)
    stopped = client.submit_job(entrypoint=job(work, "stopped", shard_tiles=1, commit_seconds=2, workers=1))
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(list((work / "stopped").glob("index/*.parquet"))) < 2:
        time.sleep(0.1)
    assert client.stop_job(stopped)
    _, lines = finish(head, stopped)
    assert "again to go on" in str(lines[-1]["event"])
    assert lines[-1]["retry"] is True
    assert 0 < len(open_archive(work / "stopped")) < len(hashes(work / "whole"))


@pytest.mark.slow
def test_a_re_encoding_as_a_job_leaves_what_encoding_would(work: Path, head: RayHead) -> None:
    random_codec(work / "other", seed=1)
    encode(work / "catalog.parquet", work / "expected", codec_url=str(work / "other"), local=True)
    shutil.copytree(work / "whole", work / "old")
    rule = f'[[rules]]\nname = "new"\ncodec = "{work / "other"}"\ntiles = "{work / "catalog.parquet"}"\n'
    (work / "policy.toml").write_text(f'archive = "{work / "old"}"\n{rule}')
    client = JobSubmissionClient(head.url)
    command = f"{sys.executable} {ROOT / 'jobs' / 'reencode.py'} {work / 'policy.toml'}"
    for swapped in (len(hashes(work / "whole")), 0):  # the second time nothing is left to do
        code, lines = finish(head, client.submit_job(entrypoint=command))
        assert (code, lines[-1]["swapped"]) == (0, swapped), lines
        cells = [line for line in lines if line.get("event") == "cell swapped"]
        assert sum(int(str(line["tiles"])) for line in cells) == swapped
        assert hashes(work / "old") == hashes(work / "expected")


@pytest.mark.slow
def test_a_training_as_a_job_leaves_a_codec(work: Path, head: RayHead) -> None:
    (work / "recipe.toml").write_text(
        f"""
data = {{catalog = "{work / "catalog.parquet"}", size = 32, max_tiles = 64}}
model = {{size = "micro", patch = 8, depth = 2}}
train = {{pretrain_epochs = 1, adapt_epochs = 1, batch_size = 32}}
"""
    )
    client = JobSubmissionClient(head.url)
    command = f"{sys.executable} {ROOT / 'jobs' / 'train.py'} {work / 'recipe.toml'} --out {work / 'run'}"
    code, lines = finish(head, client.submit_job(entrypoint=command))
    assert (code, lines[-1]) == (0, {"result": str(work / "run" / "codec")}), lines
    assert str(lines[-2]["event"]).startswith("epoch 2 of 2 (adapt)")
    encode(
        work / "catalog.parquet",
        work / "trained",
        codec_url=str(work / "run" / "codec"),
        where="x_off < 64",
        local=True,
    )
    assert open_archive(work / "trained").pull().embeddings.shape[2] == 128


@pytest.mark.slow
def test_an_evaluation_as_a_job_leaves_its_results(work: Path, head: RayHead) -> None:
    config = work / "evaluation.toml"
    config.write_text(
        f"""
title = "the scene"
labels = "{builtin_labels()}"
seeds = [1]
epochs = 1
[[methods]]
kind = "nec"
name = "all"
archive = "{work / "whole"}"
"""
    )
    out = work / "evaluation"
    client = JobSubmissionClient(head.url)
    code, lines = finish(head, client.submit_job(entrypoint=f"python {ROOT}/jobs/evaluate.py {config} --out {out}"))
    assert code == 0, lines
    assert lines[-1]["summary"] == json.loads((out / "results.json").read_text())["summary"]
    assert [line["event"] for line in lines[:-1]] == ["head trained"]
    with Image.open(out / "rate_accuracy.png") as picture:
        assert picture.size[0] > 400
