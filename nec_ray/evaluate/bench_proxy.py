"""A forwarding HTTP proxy that counts what is asked of an object store, whichever client asks."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

_PIECE = 1 << 18


@dataclass(frozen=True)
class Request:
    """A request that was answered."""

    method: str
    path: str
    """Bucket and key; for a listing, bucket and prefix."""
    start: int
    """First byte of the object that came."""
    size: int
    """Bytes of the answer's body."""


class Proxy:
    """Forwards to `target` (http://host:port) and keeps every request."""

    def __init__(self, target: str) -> None:
        where = urlsplit(target)
        self._target = (where.hostname or "127.0.0.1", where.port or 80)
        self._seen: list[Request] = []
        self._unanswered = 0
        self._change = threading.Condition()
        self.endpoint = ""

    def take(self) -> list[Request]:
        """The requests since the last call; of those that are being answered, their ends are waited for."""
        with self._change:
            self._change.wait_for(lambda: not self._unanswered)
            seen, self._seen = self._seen, []
        return seen

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """While it listens on a port of its own on loopback."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), loop).result()
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(_close(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_store, to_store = await asyncio.open_connection(*self._target)
        # A client that hangs up in the middle of an answer ends its connection, nothing else.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                with self._change:
                    self._unanswered += 1
                request = None
                try:
                    request = await _exchange(head, (reader, writer), (from_store, to_store))
                finally:
                    with self._change:
                        self._unanswered -= 1
                        self._seen += [request] if request else []
                        self._change.notify_all()
        to_store.close()
        writer.close()


async def _exchange(
    head: bytes,
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    store: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> Request:
    """Pass a request on, and its answer back."""
    (from_client, to_client), (from_store, to_store) = client, store
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    to_store.write(head)
    await _body(from_client, to_store, _headers(head), empty=False)
    answer = await from_store.readuntil(b"\r\n\r\n")
    to_client.write(answer)
    headers = _headers(answer)
    empty = method == "HEAD" or answer.split(b" ", 2)[1] in {b"204", b"304"}
    size = await _body(from_store, to_client, headers, empty=empty)
    start = headers.get("content-range", "bytes 0-").removeprefix("bytes ").partition("-")[0]
    return Request(method, _name(target), int(start) if start.isdigit() else 0, size)


async def _close(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = [line.partition(":") for line in lines if line]
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, headers: dict[str, str], *, empty: bool
) -> int:
    """Pass a body on; its bytes."""
    size = 0
    if empty:
        pass
    elif headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = await source.readuntil(b"\r\n")
            piece = int(line.split(b";")[0], 16)
            sink.write(line + await source.readexactly(piece + 2))
            await sink.drain()
            size += piece
            if not piece:
                break
    else:
        left = int(headers.get("content-length", "0"))
        while left:
            data = await source.read(min(left, _PIECE))
            if not data:
                raise ConnectionError("the body was cut off")
            sink.write(data)
            await sink.drain()
            left, size = left - len(data), size + len(data)
    await sink.drain()
    return size


def _name(target: str) -> str:
    where = urlsplit(target)
    path = unquote(where.path).strip("/")
    prefix = parse_qs(where.query).get("prefix")
    return f"{path}/{prefix[0]}" if prefix else path
