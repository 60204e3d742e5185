"""STAC items: one tile's footprint and time, and where the bytes of its embedding are.

The embedding extension is a proposal, version 0.0.1: README.md and json-schema/schema.json of
github.com/geo-embeddings/embeddings-stac-specification. Its schema asks that the asset is called `embeddings`; it
knows `emb:quantization` only in an item's properties, with no keys of others' inside; and no `emb:` field in an asset.
So what it has no word for is called `nec:`. It refers to STAC 1.0.0; we write 1.1.0, where `item_assets` and
`data_type` belong to the core, as its other users do.

`file:checksum` is that of the whole file behind `href`, the pack, whose name is its hash; the payload's own is
`nec:checksum`, as multihash too.
"""

import math
import re
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nec_ray.archive.exports.selection import EDGES, Selection, is_absolute, url_of
from nec_ray.archive.layout import pack_codec
from nec_ray.errors import CorruptIndex

STAC_VERSION = "1.1.0"
EMB = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"
FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"
PROJ = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"

COLUMNS = (
    *("tile_id", "source", "acquired_at", "sensor", "geometry", "bbox", "crs", "transform", "label", "nodata_share"),
    *("codec_id", "payload", "sha256", "encoded_at", "encoded_from"),
)
_SHA256 = "1220"
"""Multihash's prefix: SHA-256, 32 bytes."""
_POLYGON = 3
_FIRST_AERIAL_PHOTOGRAPH = datetime(1858, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Item:
    """The item of an index row that has a footprint."""

    row: dict[str, Any]
    """With `COLUMNS`."""
    selection: Selection
    collection: str
    """The collection's id."""

    def json(self, base: str) -> dict[str, Any]:
        """The item as GeoJSON.

        Args:
            base: way from the item's file to the collection's folder.

        Raises:
            CorruptIndex: the row names no pack of the archive, or its footprint is no polygon.
        """
        row = self.row
        return {
            "type": "Feature",
            "stac_version": STAC_VERSION,
            "stac_extensions": [EMB, FILE, PROJ],
            "id": row["tile_id"],
            "collection": self.collection,
            "geometry": {"type": "Polygon", "coordinates": _rings(row["geometry"], row["tile_id"])},
            "bbox": [row["bbox"][edge] for edge in EDGES],
            "properties": _properties(row, self.selection, base),
            "links": [
                {"rel": "root", "href": f"{base}/collection.json", "type": "application/json"},
                {"rel": "collection", "href": f"{base}/collection.json", "type": "application/json"},
                *([{"rel": "emb:source-data", "href": url_of(row["source"])}] if is_absolute(row["source"]) else []),
            ],
            "assets": {"embeddings": _asset(row, self.selection)},
        }


def instant(time: datetime) -> str:
    """RFC 3339 in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _properties(row: dict[str, Any], selection: Selection, base: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"datetime": None}
    if row["acquired_at"] is not None:
        properties["datetime"] = instant(row["acquired_at"])
    else:
        # STAC wants a range then. All that is known: a picture from above, taken before it was encoded.
        properties["start_datetime"] = instant(_FIRST_AERIAL_PHOTOGRAPH)
        properties["end_datetime"] = instant(row["encoded_at"])
    properties["emb:quantization"] = {
        "method": "rounding, entropy-coded (rANS)",
        "original_dtype": "float32",
        "quantized_dtype": "int32",
        # No `offset`: a number a channel, in every item, would outweigh the payloads. The codec's tables have them.
        "link": {
            "rel": "about",
            "href": f"{base}/payload.md",
            "type": "text/markdown",
            "title": "Payload format: how decoded symbols give embeddings",
        },
    }
    properties["nec:codec_id"] = row["codec_id"]
    properties["nec:encoded_from"] = row["encoded_from"]
    for name in ("sensor", "label", "nodata_share"):
        if row[name] is not None:
            properties[f"nec:{name}"] = row[name]
    if row["crs"] and re.fullmatch(r"[A-Z]+:[0-9A-Za-z]+", row["crs"]) and row["transform"]:
        properties["proj:code"] = row["crs"]
        properties["proj:transform"] = row["transform"]
        properties["proj:shape"] = list(selection.grid)
    return properties


def _asset(row: dict[str, Any], selection: Selection) -> dict[str, Any]:
    payload = row["payload"]
    if payload is None or not payload["pack"] or not payload["layer_lengths"] or payload["offset"] is None:
        raise CorruptIndex(f"tile {row['tile_id']}: valid, but the index names no payload")
    pack_codec(payload["pack"])  # a hostile index must not make a catalog point outside the archive
    lengths = payload["layer_lengths"][: selection.layers]
    asset = {
        "href": f"{url_of(selection.archive.url)}/{payload['pack']}",
        "type": "application/octet-stream",
        "title": "Entropy-coded embedding: bytes nec:offset to nec:offset + nec:length of the pack",
        "roles": ["data"],
        "created": instant(row["encoded_at"]),
        "nec:offset": payload["offset"],
        "nec:length": sum(lengths),
        "nec:layer_lengths": lengths,
        "file:checksum": _SHA256 + payload["pack"].rpartition("/")[2].removesuffix(".pack"),
    }
    if len(lengths) == len(payload["layer_lengths"]) and row["sha256"]:  # the checksum is the whole payload's
        asset["nec:checksum"] = _SHA256 + row["sha256"].hex()
    return asset


def _rings(wkb: bytes | None, tile_id: str) -> list[list[list[float]]]:
    """Rings of a two-dimensional WKB polygon as GeoJSON's lists of positions."""
    try:
        return _read_polygon(wkb or b"")
    except (ValueError, IndexError, struct.error) as error:
        raise CorruptIndex(f"tile {tile_id}: its footprint does not read ({error}); encode it again") from None


def _read_polygon(wkb: bytes) -> list[list[list[float]]]:
    order = "<" if wkb[0] == 1 else ">"
    kind, count = struct.unpack_from(f"{order}II", wkb, 1)
    if kind != _POLYGON:
        raise ValueError(f"WKB geometry type {kind} is no polygon")
    rings, at = [], 9
    for _ in range(count):
        (points,) = struct.unpack_from(f"{order}I", wkb, at)
        if 16 * points > len(wkb):
            raise ValueError("a ring is cut short")
        numbers = struct.unpack_from(f"{order}{2 * points}d", wkb, at + 4)
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a position is no number")
        rings.append([list(position) for position in zip(numbers[::2], numbers[1::2], strict=True)])
        at += 4 + 16 * points
    return rings
