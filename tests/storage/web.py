"""A plain web server over a folder, which fails as it is told to."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOREVER = 1 << 30


@dataclass
class Web:
    """What the server does: tests change it while it runs."""

    url: str = ""
    status: int = 503
    """What a failing request is answered with."""
    failures: Counter[str] = field(default_factory=Counter)
    """How many more requests fail, by a part of their path."""


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """The folder over http; it knows no ranges."""
    web = Web()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def send_head(self) -> object:  # type: ignore[override]
            for part in [part for part in web.failures if part in self.path and web.failures[part] > 0]:
                web.failures[part] -= 1
                self.send_error(web.status)
                return None
            return super().send_head()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
