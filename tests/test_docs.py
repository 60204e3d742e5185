"""The tutorials' commands and Python, run as they stand there, one after the other in one folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyarrow.parquet as pq
import pytest

from nec_ray.runtime.recipe import read_recipe
from tests.command import nec_here
from tests.runtime.make import random_codec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "nec_ray" / "docs"
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the page's code blocks, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like a clone, in which the process is; the consumer goes on with the provider's files."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "nec_ray").mkdir()
    (folder / "nec_ray" / "data").symlink_to(ROOT / "nec_ray" / "data")
    mpl.use("agg")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def run(command: str) -> str:
    """A line of a block of commands; those that are not `nec`'s alone by a shell."""
    words = shlex.split(command)
    if words[:2] == ["nec", "train"]:  # what it writes; test_train.py covers the training
        read_recipe(Path(words[2]), [words[words.index("--set") + 1]])
        random_codec(Path(words[words.index("--out") + 1]) / "codec")
        return ""
    if words[0] == "nec" and ">" not in words:
        done = nec_here(*words[1:])
    else:
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PATH": PROGRAMS, "PYTHONPATH": modules}
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=False, env=environment, timeout=120
        )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def work_through(page: str) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """What each command of a page printed, the names that its Python left, and what could not be run here."""
    printed, names, left_out = {}, {"__name__": page}, []
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
            continue
        assert language == "", f"{page}: a block of {language}, which no test runs"
        for command in text.strip().splitlines():
            if command.startswith("duckdb ") and not shutil.which("duckdb", path=PROGRAMS):
                left_out.append(command)
            else:
                printed[command] = run(command)
    return printed, names, left_out


def test_the_provider_makes_an_archive(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed, names, _ = work_through("provider.md")
    assert "870 tiles" in capsys.readouterr().out
    assert names["coverage"].absent == 0
    assert len(names["archive"]) == 870 == names["coverage"].tiles.num_rows
    [dry] = [text for command, text in printed.items() if command.endswith("--dry-run")]
    assert "to encode: 870" in dry
    assert len(names["archive"].pull()) == pq.read_metadata(workplace / "embeddings.parquet").num_rows


def test_the_consumer_reads_it_with_any_tool(workplace: Path) -> None:
    printed, names, left_out = work_through("consumer.md")
    [(valid, northern)] = (
        names["archive"]
        .sql("SELECT count(*), count(*) FILTER (bbox.ymin > -25.3) FROM embeddings WHERE status = 'valid'")
        .fetchall()
    )
    assert len(names["pull"]) == northern
    assert (names["index"].height, len(names["decoded"])) == (870, valid)
    assert len(names["place"]) == len(names["frame"]) > 20
    assert names["cube"].sizes["tile"] == len(names["place"].pull())
    assert (len(names["point"]), len(names["near"]), names["table"].num_rows) == (1, 3, 2)
    if left_out:
        pytest.skip(f"not in this environment: {left_out}")
    [counts] = [text for command, text in printed.items() if command.startswith("duckdb")]
    assert str(valid) in counts


def test_the_operator_looks_after_it(workplace: Path) -> None:
    printed, _, _ = work_through("operator.md")
    assert "tiles: 870" in printed["nec archive info my-archive"]
    dropped = [text for command, text in printed.items() if "delete" in command and "--dry-run" not in command]
    assert dropped
    assert "870 tiles" in printed["nec archive restore my-archive --version 1"]


@pytest.mark.parametrize("page", ["README.md", *(f"nec_ray/docs/{path.name}" for path in sorted(DOCS.glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|src(?:set)?=\"([^\":]+)\"", text)
    missing = [link for link in map("".join, links) if not ((ROOT / page).parent / link).exists()]
    assert missing == []
