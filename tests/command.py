"""The `nec` command for tests: in a process of its own, or in this one."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from nec_ray.cli import main


def nec(*arguments: str | Path, text: bool = True) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from nec_ray.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=text, check=False, timeout=600)


def nec_here(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """The same in this process: dozens of starts of Python take minutes."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["nec", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    text = out.buffer.getvalue().decode()
    return subprocess.CompletedProcess(list(arguments), int(stop.value.code or 0), text, err.getvalue())
