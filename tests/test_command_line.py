"""What holds for every command: examples that parse, completion, tables that fit, one line for an error."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nec_ray import printing
from nec_ray.cli import app
from tests.archive.make import filled_archive
from tests.command import nec_here


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_nothing_that_is_printed_steers_the_terminal(tmp_path: Path) -> None:
    archive = filled_archive(tmp_path).url
    red = "chr(27) || '[31m' || chr(155) || chr(7) AS \"a\u009b1m\""
    done = nec_here("query", archive, f"SELECT {red}")
    assert done.returncode == 0
    assert r"\x1b[31m\x9b\x07" in done.stdout
    wrong = nec_here("query", archive, "SELECT error(chr(27) || 'c')")
    assert r"\x1bc" in wrong.stderr
    assert not set(done.stdout + wrong.stderr) & {chr(n) for n in (*range(10), *range(11, 32), *range(127, 160))}


def test_there_are_commands() -> None:
    assert {("query",), ("archive", "gc"), ("tiles", "build"), ("bench", "pull")} <= COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_parses_and_fits(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    command = COMMANDS[path]
    start, example = command.epilog[:9], command.epilog[9:]
    assert start == "Example: "
    words = shlex.split(example.partition(" > ")[0])
    assert words[: len(path) + 1] == ["nec", *path]
    parsed = command.make_context(" ".join(path), words[len(path) + 1 :])  # an unknown option raises, and a missing one
    assert [value for value in parsed.params.values() if value]
    monkeypatch.setenv("COLUMNS", "60")
    shown = nec_here(*path, "--help")
    assert shown.returncode == 0
    assert "".join(example.split()) in "".join(shown.stdout.split())
    assert max(map(len, shown.stdout.splitlines())) <= 60


@pytest.mark.parametrize(
    ("words", "suggests"),
    [
        (["quer"], "Did you mean 'query'"),
        (["archive", "gcc"], "Did you mean 'gc'"),
        (["query", "a", "SELECT 1", "--formt", "json"], "--format"),
        (["query", "a", "SELECT 1", "--format", "jsn"], "'json'"),
        (["head", "a", "--out", "h", "--task", "clasification"], "'classification'"),
        (["pull", "a"], "--out"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_there_is(words: list[str], suggests: str) -> None:
    done = nec_here(*words)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("nec: error: ")
    assert suggests in line
    assert "--help` says more" in line


COMPLETIONS = {
    "nec arch": ["archive"],
    "nec archive re": ["restore", "rebuild"],
    "nec query x y --format ": ["table", "csv", "json", "parquet"],
    "nec head x --task seg": ["segmentation"],
    "nec query ": [],
}


@pytest.mark.parametrize(("typed", "offered"), COMPLETIONS.items())
def test_completion_in_bash_zsh_and_fish(typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("_NEC_COMPLETE", f"complete_{shell}")
        text = nec_here().stdout
        if shell == "zsh" and not offered:
            assert text.strip() == "_files"  # paths
            continue
        found = re.findall(
            r'^(?:_arguments \S* :\(\()?"([^"]+)"' if shell == "zsh" else r"^([^\t\n]+)", text, re.MULTILINE
        )
        assert found == offered, shell


@pytest.mark.slow
def test_bash_completes_with_the_script_that_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "nec"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from nec_ray.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    script = (
        "source <(nec --show-completion bash); COMP_WORDS=(nec archive hist); COMP_CWORD=2; _nec_completion nec; "
        'echo "${COMPREPLY[*]}"; complete -p nec'
    )
    bash = shutil.which("bash")
    assert bash
    path = f"{tmp_path}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HOME": str(tmp_path)}
    done = subprocess.run([bash, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["history", "complete -o default -F _nec_completion nec"], done.stderr


def test_scripts_for_zsh_and_fish_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_NEC_COMPLETE", "source_zsh")
    assert nec_here().stdout.strip().startswith("#compdef nec\n")
    monkeypatch.setenv("_NEC_COMPLETE", "source_fish")
    assert nec_here().stdout.strip().startswith("complete --command nec ")


WORDS = st.text("abcdefghij0123456789/_-", min_size=1, max_size=90)


@given(
    st.integers(20, 200),
    st.integers(1, 24).flatmap(
        lambda n: st.tuples(
            st.lists(WORDS.map(lambda word: word[:20]), min_size=n, max_size=n),
            st.lists(st.lists(WORDS, min_size=n, max_size=n), min_size=1, max_size=4),
        )
    ),
)
def test_a_table_fits_the_terminal_and_keeps_every_character(
    width: int, table: tuple[list[str], list[list[str]]]
) -> None:
    names, rows = table
    console = Console(width=width, highlight=False, soft_wrap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printing, "_OUT", console)
        fitting = printing._fitting(names, rows)
    with console.capture() as captured:
        console.print(fitting)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    if lines[0].startswith("┏"):
        body = [line.strip("│").split("│") for line in lines if line.startswith("│")]
        for number, column in enumerate(zip(*rows, strict=True)):
            assert "".join(line[number].strip() for line in body) == "".join(column)
    else:
        shown = "".join("".join(lines).split())
        assert sorted(shown) == sorted("".join("".join(names + row) for row in rows))


def test_a_row_of_many_columns_is_printed_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(printing, "_OUT", Console(highlight=False, soft_wrap=True))  # made when `nec` starts
    url = filled_archive(tmp_path).url
    wide, narrow = (
        nec_here("query", url, f"SELECT {columns} FROM embeddings WHERE tile_id = 't001'").stdout.splitlines()
        for columns in ("*", "tile_id, label, n_bytes")
    )
    assert max(map(len, wide + narrow)) <= 60
    shown = [line.split()[:2] for line in wide if line.startswith(("tile_id", "status"))]
    assert shown == [["tile_id", "t001"], ["status", "valid"]]
    assert narrow[0].startswith("┏")
    assert "│ t001" in narrow[3]


def test_every_table_is_printed_as_json_too(tmp_path: Path) -> None:
    url = filled_archive(tmp_path).url
    rows = [json.loads(line) for line in nec_here("archive", "history", url, "--format", "json").stdout.splitlines()]
    assert [(row["version"], row["operation"]) for row in rows] == [(1, "append"), (0, "create")]
    cells = list(csv.DictReader(nec_here("archive", "history", url, "--format", "csv").stdout.splitlines()))
    assert [row["time"] for row in cells] == [row["time"] for row in rows]
    printing_tables = [path for path, command in COMMANDS.items() if any(p.name == "format_" for p in command.params)]
    assert {("query",), ("archive", "history"), ("archive", "similar"), ("bench", "codec")} <= set(printing_tables)
    assert {path for path in COMMANDS if path[0] == "bench"} <= set(printing_tables)
