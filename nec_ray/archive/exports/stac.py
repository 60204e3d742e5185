"""A static STAC catalog: a folder that says what is in the archive and where, without a copy of it.

    collection.json          extent, licence, codec, links to the parts
    items.parquet            all items as stac-geoparquet
    tiles-00000/             up to 1,000 neighbouring tiles: catalog.json, and a file an item
    payload.md               the format of the bytes that the assets point at
    payload_decoder.py       a decoder of it in plain Python
    licence.txt              licence and attribution

More than 100,000 tiles have no JSON files of their own, only items.parquet: a million files help nobody.
Links inside the folder are relative, those to the archive are absolute.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.exports.selection import Selection, edges, url_of
from nec_ray.archive.exports.stac_items import COLUMNS, EMB, STAC_VERSION, Item, instant
from nec_ray.archive.exports.stac_parquet import write_items
from nec_ray.codec import Codec
from nec_ray.contracts import contract_text

_MOST_FILES = 100_000
_ITEMS_A_PART = 1000
_BATCH = 4096
_SPDX = frozenset(
    (
        "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
        "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "CDLA-Sharing-1.0",
        "ODbL-1.0", "ODC-By-1.0", "PDDL-1.0", "etalab-2.0", "OGL-UK-3.0", "DL-DE-BY-2.0", "DL-DE-ZERO-2.0", "NLOD-2.0",
        "Apache-2.0", "MIT", "BSD-3-Clause",
    )
)  # fmt: skip
"""Identifiers of the SPDX list under which data are published; STAC calls anything else `other`."""


def write(selection: Selection, path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the folder; tiles without a footprint cannot be items of it and are counted as `skipped_unlocated`.

    Raises:
        CorruptIndex: a row names no pack of the archive, or its footprint is no polygon.
    """
    path.mkdir()
    collection = _collection(selection)
    items = _items(selection, collection["id"], progress)
    located = len(selection) - selection.rows["bbox"].null_count
    as_files = located <= _MOST_FILES
    if as_files:
        parts = range(-(-located // _ITEMS_A_PART))
        collection["links"] += [_link("child", f"./{_part(number)}/catalog.json") for number in parts]
        items = _written(items, path, collection["id"])
    write_items(items, collection, selection.rows["bbox"], path / "items.parquet")
    _write_json(path / "collection.json", collection)
    for name in ("payload.md", "payload_decoder.py"):
        (path / name).write_text(contract_text(name), encoding="utf-8")
    info = selection.archive.info
    licence = info.licence or "The archive states no licence."
    (path / "licence.txt").write_text(f"{licence}\n{info.attribution or ''}".strip() + "\n", encoding="utf-8")
    return {"items": located, "item_files": located if as_files else 0, "skipped_unlocated": len(selection) - located}


def _items(selection: Selection, collection: str, progress: Callable[[int, int], None]) -> Iterator[Item]:
    for start, part in selection.batches(_BATCH):
        for row in selection.index(part, COLUMNS).to_pylist():
            if row["bbox"] is not None:
                yield Item(row, selection, collection)
        progress(start + len(part), len(selection))


def _written(items: Iterator[Item], path: Path, collection: str) -> Iterator[Item]:
    """The items, each written to a file of its part on the way."""
    for number in itertools.count():
        some = list(itertools.islice(items, _ITEMS_A_PART))
        if not some:
            return
        folder = path / _part(number)
        folder.mkdir()
        links = [_link("root", "../collection.json"), _link("parent", "../collection.json")]
        for i, item in enumerate(some):
            document = item.json("..")
            document["links"].append(_link("parent", "./catalog.json"))
            file = _file_name(document["id"], i)
            _write_json(folder / file, document)
            links.append(_link("item", f"./{file}", "application/geo+json"))
        catalog = {
            "type": "Catalog",
            "stac_version": STAC_VERSION,
            "id": f"{collection}-{folder.name}",
            "description": f"{len(some)} neighbouring tiles",
            "links": links,
        }
        _write_json(folder / "catalog.json", catalog)
        yield from some


def _part(number: int) -> str:
    return f"tiles-{number:05}"


def _file_name(tile_id: str, number: int) -> str:
    """The tile's id where that is a safe name on every disk and in every URL, else a number."""
    return f"{tile_id}.json" if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", tile_id) else f"Item-{number:04}.json"


def _collection(selection: Selection) -> dict[str, Any]:
    info, codec = selection.archive.info, selection.codec
    name = re.sub(r"[^A-Za-z0-9._]+", "-", selection.archive.url.rpartition("/")[2]).strip("-") or "archive"
    rows, cols = selection.grid
    collection: dict[str, Any] = {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [EMB],
        "id": f"{name}-v{selection.archive.version}",
        "title": f"Compressed embeddings: {name}",
        "description": (
            f"Embeddings of {len(selection):,} tiles, {rows} x {cols} tokens of {selection.channels} channels each, "
            f"entropy-coded by codec {codec.id[:12]} (version {selection.archive.version} of the archive)."
        ),
        "license": info.licence if info.licence in _SPDX else "other",
        "extent": _extent(selection),
        "summaries": {
            "nec:codec_id": [one.id for one in selection.codecs],
            "nec:encoder_id": [codec.encoder_id],
            "nec:token_grid": [f"{rows}x{cols}"],
            "nec:bands": codec.spec.input.bands,
        },
        # emb:quantization stands in the items: the extension's schema allows it nowhere else.
        "emb:type": "chip",
        "emb:dimensions": selection.channels,
        "emb:chip_layout": {"layout_type": "regular_grid", "chip_size": selection.patch(), "stride": selection.patch()},
        "data_type": "int32",
        "item_assets": {
            "embeddings": {
                "type": "application/octet-stream",
                "title": "Entropy-coded embedding: a range of bytes of a pack",
                "roles": ["data"],
            }
        },
        "assets": {
            "items": {
                "href": "./items.parquet",
                "type": "application/vnd.apache.parquet",
                "title": "All items as stac-geoparquet",
                "roles": ["collection-mirror"],
            }
        },
        "links": [
            _link("root", "./collection.json"),
            _link("license", "./licence.txt", "text/plain"),
            *(link for one in selection.codecs for link in _codec_links(selection, one)),
            _link("emb:source-data", selection.source(), None, title="What was encoded"),
            _link("describedby", "./payload.md", "text/markdown", title="Format of the payloads"),
            _link("via", url_of(selection.archive.url), None, title="The archive"),
        ],
    }
    if info.attribution:
        collection["providers"] = [{"name": info.attribution}]
    return collection


def _codec_links(selection: Selection, codec: Codec) -> list[dict[str, str]]:
    binary = "application/octet-stream"
    model = f"Codec {codec.id[:12]}: model, input, layers, lineage"
    tables = f"Entropy tables, medians and transform of codec {codec.id[:12]}: payload.md says how they give embeddings"
    decoder = f"First decoder layer of codec {codec.id[:12]}, for heads that use it"
    return [
        _link("emb:model", selection.codec_url(codec), title=model),
        _link("emb:decoder", selection.codec_url(codec, "tables.safetensors"), binary, tables),
        _link("emb:decoder", selection.codec_url(codec, "decoder.safetensors"), binary, decoder),
    ]


def _extent(selection: Selection) -> dict[str, Any]:
    """Bounds of all tiles; times open at the start where a tile's time is not known."""
    rows = selection.rows
    bbox = [-180.0, -90.0, 180.0, 90.0]
    if rows["bbox"].null_count < len(selection):
        xmin, ymin, xmax, ymax = edges(rows["bbox"].filter(pc.is_valid(rows["bbox"])))
        bbox = [float(xmin.min()), float(ymin.min()), float(xmax.max()), float(ymax.max())]
    limits = pc.min_max(rows["acquired_at"].cast(pa.timestamp("us", tz="UTC"))).as_py()
    known = rows["acquired_at"].null_count == 0
    interval = [instant(limits["min"]) if known else None, instant(limits["max"]) if known else None]
    return {"spatial": {"bbox": [bbox]}, "temporal": {"interval": [interval]}}


def _link(rel: str, href: str, kind: str | None = "application/json", title: str | None = None) -> dict[str, str]:
    link = {"rel": rel, "href": href, "type": kind, "title": title}
    return {key: value for key, value in link.items() if value is not None}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")
