"""Serves the explorer's page on this machine alone."""

import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nec_ray.archive.explore.page import PARTS_POLICY, page_of_parts, part
from nec_ray.errors import InputError

_HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """The page and its parts on loopback, below a path that nobody can guess.

    Other users of the machine reach its loopback too, and a site that the user visits may have its name resolved to
    loopback: they know neither the path, nor is their Host ours.

    Attributes:
        url: where the page is.
    """

    daemon_threads = True

    def __init__(self, packed: bytes, port: int = 0) -> None:
        """Listen; `serve_forever` answers.

        Args:
            packed: what `pack_columns` made.
            port: 0 for a free one.

        Raises:
            InputError: the port is taken.
        """
        try:
            super().__init__((_HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"port {port}: {why}; give another --port, or none for a free one") from None
        root = f"/{secrets.token_urlsafe(16)}/"
        self.url = f"http://{_HOST}:{self.server_port}{root}"
        self.hosts = {f"{_HOST}:{self.server_port}", f"localhost:{self.server_port}"}
        self.resources = {
            root: ("text/html; charset=utf-8", page_of_parts().encode()),
            f"{root}explore.css": ("text/css; charset=utf-8", part("explore.css").encode()),
            f"{root}explore.js": ("text/javascript; charset=utf-8", part("explore.js").encode()),
            f"{root}tiles.bin": ("application/octet-stream", packed),
        }


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def do_GET(self) -> None:
        """One of the resources."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Its length."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        kind, content = self.server.resources.get(self.path, ("", b""))
        if not kind:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", PARTS_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (http.server's name)
        """Say nothing: the terminal is the user's."""
