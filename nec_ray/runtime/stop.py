"""A request to stop that is not lost: Python drops an exception that a signal handler raises within a finaliser."""

import signal
import threading
from types import FrameType

_asked = threading.Event()
_ours = threading.Event()


def stop_on_sigterm() -> None:
    """Let SIGTERM, as `ray job stop` and Kubernetes send it, stop this process as Ctrl-C does."""
    _asked.clear()
    _ours.set()
    signal.signal(signal.SIGTERM, _stop)


def take_sigterm_back() -> None:
    """After Ray has connected, which puts a handler of its own there."""
    if _ours.is_set() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def check_stop() -> None:
    """Raise KeyboardInterrupt where a request to stop has come and was dropped."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt


def _stop(_: int, __: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
