"""A proxy in front of an S3 server that fails as stores do: busy, broken, slow, cut off, answers lost."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("busy", "error", "reset", "lost answer", "slow", "cut off")
_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We met an error.</Message></Error>"
_HOP = {"connection", "keep-alive", "transfer-encoding"}


class FaultyProxy:
    """Forwards to `endpoint`; a share of the requests meets one of `kinds` of faults, drawn from a seed."""

    def __init__(self, endpoint: str, share: float, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> None:
        self.share = share
        self.met: Counter[str] = Counter()
        rng = random.Random(seed)
        lock = threading.Lock()
        proxy = self

        def draw() -> str:
            with lock:
                kind = rng.choice(kinds) if rng.random() < proxy.share else ""
                proxy.met[kind] += 1
                return kind

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Says nothing."""

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    self.close_connection = True

            def forward(self) -> None:
                kind = draw()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if kind == "busy":
                    return self.answer(503, [], _BUSY)
                if kind == "error":
                    return self.answer(500, [], _ERROR)
                if kind == "reset":
                    return self.reset()
                if kind == "slow":
                    time.sleep(0.5)
                target = urlsplit(endpoint)
                connection = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP:
                        connection.putheader(name, value)
                connection.endheaders(body)
                found = connection.getresponse()
                data = found.read()
                connection.close()
                if kind == "lost answer":
                    return self.reset()
                headers = [(name, value) for name, value in found.getheaders() if name.lower() not in _HOP]
                return self.answer(found.status, headers, data, cut=kind == "cut off")

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

            def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if cut and len(data) > 1:
                    self.wfile.write(data[: len(data) // 2])
                    self.reset()
                else:
                    self.wfile.write(data)

            def reset(self) -> None:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
