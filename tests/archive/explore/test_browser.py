"""The explorer in a headless Chromium: what a click, a key and a choice do, and that nothing else happens."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nec_ray import open_archive
from nec_ray.archive import Archive
from nec_ray.archive.explore import Server, one_page, pack_columns
from tests.archive.explore.browser import CHROMIUM, Browser, browser
from tests.archive.explore.scenes import EVIL, large_archive, small_archive

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)")

SCREENSHOTS = os.environ.get("NEC_SCREENSHOTS")
"""A folder for pictures to look at; none are kept where it is not given."""
BLUE, YELLOW, VERMILLION, BACKGROUND, DARK = [0, 114, 178], [240, 228, 66], [213, 94, 0], [228, 231, 235], [30, 34, 40]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return open_archive(small_archive(tmp_path_factory.mktemp("browser")).url)


@pytest.fixture(scope="module")
def page(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(one_page(pack_columns(archive.select())))
    return path.as_uri()


@pytest.fixture(autouse=True)
def quiet(tab: Browser) -> Iterator[None]:
    """Whatever a test does, the console stays silent, and nothing outside the page is asked for."""
    tab.said.clear()
    tab.asked.clear()
    yield
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith(("file://", "data:", "http://127.0.0.1:"))] == []


def keep(tab: Browser, name: str) -> None:
    if SCREENSHOTS:
        tab.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def place(tab: Browser, lon: float, lat: float) -> tuple[int, int]:
    """Pixel of the window near a place: off it, since a line of the graticule may go through it."""
    x, y = tab.run(
        f"""(() => {{ const {{ x, y }} = explorer.canvas.getBoundingClientRect();
        return [x + explorer.view.x({lon}), y + explorer.view.y({lat})]; }})()"""
    )
    return round(x) + 8, round(y) + 7


def middle(tab: Browser, tile_id: str) -> tuple[int, int]:
    """Pixel of the window near a tile's middle."""
    west, south, east, north = tab.run(
        f"""(() => {{ const {{ tiles }} = explorer;
        return tiles.footprints[tiles.footprint[tiles.columns.tile_id.indexOf({json.dumps(tile_id)})]]; }})()"""
    )
    return place(tab, (west + east) / 2, (south + north) / 2)


def colour_by(tab: Browser, mode: str) -> None:
    tab.run(
        f"(() => {{ const m = document.getElementById('mode'); m.value = '{mode}'; "
        "m.dispatchEvent(new Event('change')); })()"
    )
    tab.settle()


def test_a_click_shows_the_tile_and_its_similar_ones(tab: Browser, page: str, archive: Archive) -> None:
    tab.open(page)
    tab.click(*middle(tab, "t10"))
    assert tab.text("#chosen") == "t10"
    similar = archive.similar("t10", 10)["tile_id"].to_pylist()
    shown = tab.run("[...document.querySelectorAll('#similar .text')].map((one) => one.textContent)")
    assert shown == similar
    assert shown[0] == "t20"
    facts = tab.text("#tile dl")
    assert "2020-05-11T00:00:00Z" in facts
    assert "https://***@store/scene.tif?sig=***" in facts
    keep(tab, "chosen")
    tab.run("document.querySelector('#similar button').focus()")
    tab.key("Enter")
    assert tab.text("#chosen") == "t20"
    assert tab.run("document.activeElement.id") == "chosen"  # and not lost with the button
    [row] = archive.sql(tab.text("#sql")).to_arrow_table().to_pylist()
    assert row["tile_id"] == "t20"


def test_each_status_has_its_colour_and_its_shape(tab: Browser, page: str) -> None:
    tab.open(page)
    seen = tab.seen()
    x, y = middle(tab, "t11")
    assert seen[y, x].tolist() == BLUE
    x, y = place(tab, 0.85, 0.45)
    assert seen[y, x].tolist() == BACKGROUND
    for tile_id, colour, least, most in (("zfailed", VERMILLION, 0.15, 0.25), ("znodata", YELLOW, 0.04, 0.08)):
        x, y = middle(tab, tile_id)
        pixels = seen[y : y + 8, x : x + 10].reshape(-1, 3)
        is_colour, is_dark = ((pixels == one).all(axis=1) for one in (colour, DARK))
        assert (is_colour | is_dark).all()
        assert least <= is_dark.mean() <= most
    keep(tab, "status")


def test_what_is_not_wanted_is_not_shown(tab: Browser, page: str) -> None:
    tab.open(page)
    assert tab.text("#shown") == "49 of 49 tiles shown; below one acquired later: 1; without a place: 1"
    x, y = middle(tab, "zfailed")
    tab.run("document.getElementById('show-failed').click()")
    tab.settle()
    assert tab.seen()[y, x].tolist() == BACKGROUND
    for name, day in (("from", "2020-05-03"), ("to", "2020-05-05")):
        tab.run(
            f"(() => {{ const d = document.getElementById('{name}'); d.value = '{day}'; "
            "d.dispatchEvent(new Event('change')); })()"
        )
    tab.settle()
    assert tab.text("#shown") == "3 of 49 tiles shown"
    seen = tab.seen()
    points = [middle(tab, name) for name in ("t01", "t02", "t04", "t05")]
    assert [seen[y, x].tolist() for x, y in points] == [BACKGROUND, BLUE, BLUE, BACKGROUND]


def test_everything_can_be_done_by_keys(tab: Browser, page: str) -> None:
    tab.open(page)
    for _ in range(20):
        tab.key("Tab")
        if tab.run("document.activeElement === explorer.canvas"):
            break
    assert tab.run("document.activeElement === explorer.canvas")
    tab.run("(explorer.view.lon = 0.05, explorer.view.lat = 0.05)")
    for key in ("+", "+"):
        tab.key(key)
    scale = tab.run("explorer.view.scale")
    tab.key("Enter")
    assert tab.text("#chosen") == "twin"
    assert "valid tile twin" in tab.text("#said")
    tab.key("n")
    assert tab.text("#chosen") == "t00"
    tab.key("n")
    assert tab.text("#chosen") == "twin"
    before = tab.run("explorer.view.lon")
    tab.key("ArrowRight")
    assert tab.run("explorer.view.lon") > before
    tab.key("0")
    assert tab.run("explorer.view.scale") < scale
    keep(tab, "keys")
    tab.key("Escape")
    assert not tab.run("document.getElementById('chosen')")


def test_a_tile_is_found_by_its_id(tab: Browser, page: str) -> None:
    tab.open(page)
    tab.run("document.getElementById('wanted').focus()")
    for sign in ("t", "3"):
        tab.key(sign)
    tab.key("Enter")
    assert tab.run("[...document.querySelectorAll('#found button')].map((b) => b.textContent)") == [
        f"t3{n}" for n in range(10)
    ]
    tab.key("1")
    tab.key("Enter")
    assert tab.text("#chosen") == "t31"
    tab.key("x")
    tab.key("Enter")
    assert tab.text("#found") == "No tile has this in its id."


def test_what_an_archive_names_is_text(tab: Browser, page: str) -> None:
    tab.open(page)
    title = tab.run("document.title")
    elements = tab.run("document.querySelectorAll('script, img, svg, iframe').length")
    for tile_id in [*EVIL, "zfailed"]:
        tab.run(f"explorer.goTo(explorer.tiles.columns.tile_id.indexOf({json.dumps(tile_id)}))")
        tab.settle()
        assert tab.text("#chosen") == tile_id
    assert EVIL[0] in tab.text("#tile dl")  # the reason
    keep(tab, "evil")
    tab.run("(explorer.find('<'), 0)")
    assert tab.run("document.querySelectorAll('#found button').length") == 2
    assert tab.run("document.title") == title
    assert tab.run("document.querySelectorAll('script, img, svg, iframe').length") == elements


def test_the_policy_stops_what_would_get_in_or_out(tab: Browser, page: str) -> None:
    tab.open(page)
    tab.run(
        """(() => { const s = document.createElement('script'); s.textContent = 'window.broken = 1';
        document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);
        fetch('http://127.0.0.1:9/').catch(() => {}); document.body.insertAdjacentHTML('beforeend',
        '<p onclick="window.broken = 2" id="bad" style="color: red">'); document.getElementById('bad').click(); })()"""
    )
    tab.settle()
    assert tab.run("window.broken") is None
    refused = [said for said in tab.said if "Content Security Policy" in said]
    assert len(refused) >= 4
    tab.said.clear()


@pytest.mark.parametrize("width", [320, 390, 1280, 1920])
def test_the_page_fits_phones_and_desktops(tab: Browser, page: str, width: int) -> None:
    tab.open(page, width, 844, mobile=width < 900)
    assert tab.run("document.documentElement.scrollWidth") <= width
    left, right, high = tab.run("(({x, right, height}) => [x, right, height])(explorer.canvas.getBoundingClientRect())")
    assert 0 <= left < right <= width
    assert high > 300
    tab.run("explorer.goTo(40)")
    tab.settle()
    assert tab.run("document.documentElement.scrollWidth") <= width
    keep(tab, f"width_{width}")


def test_the_page_that_is_served_is_the_same(tab: Browser, archive: Archive) -> None:
    with Server(pack_columns(archive.select())) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            tab.open(server.url)
            tab.click(*middle(tab, "t10"))
            assert tab.text("#similar .text") == "t20"
            assert {url.removeprefix(server.url) for url in tab.asked if url.startswith("http")} == {
                "",
                "explore.css",
                "explore.js",
                "tiles.bin",
            }
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_200_000_tiles(tab: Browser, tmp_path: Path) -> None:
    archive = open_archive(large_archive(tmp_path).url)
    out = tmp_path / "page.html"
    out.write_text(one_page(pack_columns(archive.select())))
    assert out.stat().st_size < 20_000_000
    tab.open(out.as_uri())
    assert tab.text("#shown") == "200,000 of 200,000 tiles shown"
    for mode in ("status", "time", "bytes", "false", "component"):
        colour_by(tab, mode)
        keep(tab, f"large_{mode}")
    took = []
    for _ in range(5):
        tab.run("explorer.zoom(1.5)")
        tab.settle()
        took.append(float(tab.run("explorer.canvas.dataset.milliseconds")))
    assert sorted(took)[2] < 1500  # some 30 on an idle core; a machine that tests is busy
    tab.run("explorer.showAll()")
    tab.click(*place(tab, 4, 44))
    colour_by(tab, "similarity")
    keep(tab, "large_similarity")
    shown = tab.run("[...document.querySelectorAll('#similar .text')].map((one) => one.textContent)")
    assert shown == archive.similar(tab.text("#chosen"), 10)["tile_id"].to_pylist()
