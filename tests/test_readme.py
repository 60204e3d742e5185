"""The README's commands and Python, run as they stand there, on the results of the demo."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == kind]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, so that the README's relative paths hold."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "nec_ray").mkdir()
    shutil.copytree(ROOT / "nec_ray" / "data", folder / "nec_ray" / "data")
    return folder


def run(command: str, folder: Path) -> str:
    words = shlex.split(command.removeprefix("uv run "))
    into = folder / words.pop() if ">" in words else None
    program = {
        "nec": [sys.executable, "-c", "from nec_ray.cli import main; main()"],
        "duckdb": [str(Path(sys.executable).with_name("duckdb"))],
    }[words.pop(0)]
    program += [word for word in words if word != ">"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False, timeout=1200)
    if into:
        into.write_text(done.stdout)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def interrupt_the_demo(folder: Path) -> None:
    """Start clean over an earlier demo's folder, and press Ctrl-C in the middle of the training."""
    out = folder / "nec-demo"
    out.mkdir()
    (out / "nec-demo.json").write_text("{}")
    (out / "stale.txt").write_text("of an earlier demo")
    program = [sys.executable, "-c", "from nec_ray.cli import main; main()", "demo", "--restart"]
    demo = subprocess.Popen(
        program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = out / "train" / "metrics.csv"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.1)
    os.killpg(demo.pid, signal.SIGINT)
    _, problems = demo.communicate(timeout=60)
    assert demo.returncode == 130, problems
    assert "Traceback" not in problems
    assert "again without --restart" in problems.splitlines()[-1]
    assert not (out / "stale.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_command_and_the_python_of_the_readme(workplace: Path) -> None:
    demo, road, tools = blocks("")
    assert demo.strip() == "uv run nec demo"
    interrupt_the_demo(workplace)
    run(demo.strip() + " --json", workplace)
    summary = json.loads((workplace / "nec-demo" / "summary.json").read_text())
    account = summary["archive"]
    assert account["tiles"] == account["valid"] + account["nodata"] + account["failed"]
    assert account["failed"] == account["missing"] == 0
    assert summary["head"]["accuracy"] > summary["head"]["majority"]
    measured = json.loads((workplace / "nec-demo" / "head" / "metrics.json").read_text())
    assert measured["accuracy_uncompressed"] > measured["majority"]
    info = json.loads((workplace / "nec-demo" / "archive" / "archive.json").read_text())
    assert (info["licence"], info["attribution"]) == ("public domain", "U.S. Geological Survey")
    for picture in summary["pictures"]:
        assert Path(picture).stat().st_size > 10_000
    again = json.loads(run("nec demo --json", workplace))
    assert again["archive"]["encoded"] == 0
    # The codec of the demo stands in for a second training run: test_train.py covers `nec train`.
    for command in road.strip().splitlines():
        if command.startswith("nec train"):
            shutil.copytree(workplace / "nec-demo" / "train", workplace / "my-codec")
        else:
            run(command, workplace)
    ours, theirs = blocks("python")
    assert "valid" in python(ours, workplace)
    printed = [run(command, workplace) for command in tools.strip().splitlines()]
    assert str(account["valid"]) in printed[1]
    tiles, valid = str(account["tiles"]), str(account["valid"])
    version_and_rows, bounds, items, sizes = python(theirs, workplace).splitlines()
    assert tiles in version_and_rows
    assert bounds.startswith("[-54.")
    assert valid in items
    assert valid in sizes


def python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
