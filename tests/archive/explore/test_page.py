"""The explorer's page and its server: nothing from outside in, nothing to outside out."""

import base64
import hashlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nec_ray import open_archive
from nec_ray.archive.explore import Server, one_page, pack_columns
from nec_ray.cli import main
from nec_ray.errors import InputError
from tests.archive.explore.scenes import EVIL, small_archive
from tests.archive.make import Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_archive(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def packed(made: Made) -> bytes:
    return pack_columns(open_archive(made.url).select())


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in {"script", "style"} and data.strip():
            self.inside.append((self.found[-1][0], data))


def test_one_file_holds_all_and_its_policy_allows_nothing_else(packed: bytes) -> None:
    page = one_page(packed)
    elements = Elements(page)
    [policy] = [a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    assert "unsafe" not in policy
    [style, data, script] = elements.inside
    assert base64.b64decode(data[1]) == packed
    for kind, text in (style, script):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    outside = [a for _, a in elements.found for n, v in a.items() if n in {"src", "href", "action"} and v != "data:,"]
    assert outside == []
    assert not re.search(r"https?:", page.replace(data[1], ""))
    assert not any(evil in page for evil in EVIL)


def test_the_script_makes_no_html_of_texts() -> None:
    script = one_page(b"").split("<script>")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|setAttribute", script)


@pytest.fixture
def server(packed: bytes) -> Iterator[Server]:
    with Server(packed) as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def get(server: Server, path: str, host: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_server_gives_the_page_in_parts_to_who_knows_its_path(server: Server, packed: bytes) -> None:
    root = urlsplit(server.url).path
    assert len(root) > 20
    status, headers, page = get(server, root)
    assert status == 200
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    named = [a[n] for _, a in Elements(page.decode()).found for n in ("src", "href", "data-src") if n in a]
    assert sorted(map(str, named)) == ["data:,", "explore.css", "explore.js", "tiles.bin"]
    for name in ("explore.css", "explore.js", "tiles.bin"):
        assert get(server, root + name)[0] == 200
    assert get(server, f"{root}tiles.bin")[2] == packed
    assert get(server, f"{root}tiles.bin", method="HEAD")[2] == b""
    for path in ("/", "/explore.js", f"{root}../", f"{root}columns.py", f"{root}%2e%2e/columns.py"):
        assert get(server, path)[0] == 404
    assert get(server, root, method="POST")[0] == 501


def test_the_server_is_of_this_machine_and_answers_to_its_own_name_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    root = urlsplit(server.url).path
    port = server.server_port
    assert get(server, root, f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example"):
        status, _, body = get(server, root, host)
        assert status == 403
        assert b"tiles" not in body


def test_a_port_that_is_taken_is_said(server: Server) -> None:
    with pytest.raises(InputError, match=f"port {server.server_port}: .*--port"):
        Server(b"", server.server_port)


def test_the_command_writes_a_page_once(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    command = ["nec", "archive", "explore", made.url, "--where", "tile_id = 't03'", "--out", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out) == {"archive": made.url, "out": str(out), "bytes": out.stat().st_size}
    assert out.read_text() == one_page(pack_columns(open_archive(made.url).select("tile_id = 't03'")))
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "already there" in capsys.readouterr().err


def test_the_command_serves_until_it_is_stopped(made: Made, packed: bytes) -> None:
    command = [sys.executable, "-m", "nec_ray", "archive", "explore", made.url, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        url = json.loads(process.stdout.readline())["url"]
        with urllib.request.urlopen(f"{url}tiles.bin", timeout=10) as answer:
            assert answer.read() == packed
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
