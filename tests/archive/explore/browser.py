"""A headless Chromium for tests, spoken to by the DevTools protocol over a pipe; no library needed.

https://chromedevtools.github.io/devtools-protocol: JSON messages, each ended by a zero byte, on descriptors 3 and 4.
"""

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
_LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE_S = 60
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowRight": (39, ""), "Tab": (9, "")}


class Browser:
    """One tab.

    Attributes:
        said: what the page's console, exceptions and the browser's log said, such as breaches of the policy.
        asked: addresses of all requests, those refused too.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            read = os.read(self._answers, 1 << 20)
            assert read, "Chromium ended"
            self._rest += read
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.said.append(json.dumps(params))
        elif method == "Page.javascriptDialogOpening":
            self.said.append("a dialog opened")

    def open(self, url: str, width: int = 1280, height: int = 800, *, mobile: bool = False) -> None:
        """Open the explorer's page and wait until its tiles are there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        self.until("document.body && document.body.dataset.ready === 'yes'")
        self.settle()

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + _PATIENCE_S
        while not self.run(condition):
            assert time.monotonic() < until, f"{condition} stays false; {self.said}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def key(self, name: str) -> None:
        """Press a key."""
        code, text = _KEYS.get(name) or (ord(name.upper()), name)
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **typed)
        self.settle()

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def text(self, selector: str) -> str:
        """Text of an element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    def seen(self) -> npt.NDArray[np.uint8]:
        """What is seen: (rows, columns, 3) red, green and blue."""
        return np.asarray(Image.open(io.BytesIO(self._picture())).convert("RGB"))

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG file."""
        path.write_bytes(self._picture())

    def _picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A Chromium with a new profile in a folder."""
    assert CHROMIUM
    for_it, ours = os.pipe()
    answers, its = os.pipe()
    command = [sys.executable, "-c", _LAUNCH, str(for_it), str(its), CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"]
    with subprocess.Popen(
        [*command, "about:blank"], pass_fds=(for_it, its), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        os.close(for_it)
        os.close(its)
        try:
            yield Browser(ours, answers)
        finally:
            os.close(ours)  # on which it ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            os.close(answers)
