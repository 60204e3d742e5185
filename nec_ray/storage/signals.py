"""Signals that wait until a call is over which would not let their exception through."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_later() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended, and come then.

    For calls into compiled code that calls Python in turn: delta-rs makes a ValueError of the KeyboardInterrupt that a
    handler raises there. Handlers that are not Python's own, and threads beside the main one, are left as they are.
    """
    handlers = {stop: signal.getsignal(stop) for stop in _STOPS}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    came: list[tuple[int, FrameType | None]] = []
    for stop, handler in handlers.items():
        if callable(handler):
            signal.signal(stop, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            if callable(handler):
                signal.signal(stop, handler)
        for number, frame in came[:1]:
            handler = handlers[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)
