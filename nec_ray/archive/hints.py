"""What an archive does hold, said where nothing fits what was asked for; and what was likely meant."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nec_ray.contracts import arrow_schema
from nec_ray.errors import InputError, NotFound

if TYPE_CHECKING:
    from nec_ray.archive.archive import Archive

_SHOWN = 120
_MOST_NAMES = 8
_COLUMN = re.compile(r'Referenced column "([^"]{1,80})" not found')
_CANDIDATES = re.compile(r"Candidate bindings: (.*)")
_FUNCTION = re.compile(r"Function with name (\w{1,80}) does not exist!")
_TABLE = re.compile(r"Table with name (\w{1,80}) does not exist!")
_FUNCTIONS = ("nec_decode", "nec_pool", "nec_intersects")


def nothing_fits(archive: "Archive", condition: str, to_do: str, tile_ids: Sequence[str] | None = None) -> InputError:
    """The error of a condition that no valid tile meets: with what the columns that it names do hold.

    Args:
        archive: where.
        condition: SQL, as asked; `true` where nothing was.
        to_do: what was to be done.
        tile_ids: the tiles that were asked for by name.
    """
    said = [
        *([extent(archive)] if "bbox" in condition or "geometry" in condition else []),
        *([_times(archive)] if "acquired_at" in condition else []),
        *(_names(archive, column) for column in ("codec_id", "label", "sensor") if column in condition),
    ]
    hint = "".join(f"; {one}" for one in said if one)
    shown = f" {shortened(condition)}" if condition != "true" else ""
    if tile_ids is not None:
        shown += (
            f" of the tiles {', '.join(map(repr, tile_ids[:_MOST_NAMES]))}{', ...' * (len(tile_ids) > _MOST_NAMES)}"
        )
    return InputError(f"{archive.url}: no valid tile fits{shown}; nothing to {to_do}{hint}")


def shortened(condition: str) -> str:
    """A condition as an error shows it: without the brackets around it, and a region by what was given."""
    text, of_region, region = " ".join(condition.split()).partition("/* within ")
    text = text.removesuffix(" AND ") if of_region else text
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if of_region:
        text = " AND ".join(filter(None, [text, f"within {region.partition(' */')[0]}"]))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def extent(archive: "Archive") -> str:
    """Where an archive's valid tiles lie, as part of a sentence."""
    edges = "min(bbox.xmin), min(bbox.ymin), max(bbox.xmax), max(bbox.ymax)"
    [box] = archive.sql(f"SELECT {edges} FROM embeddings WHERE status = 'valid'").fetchall()
    if box[0] is None:
        return "no tile of it has a footprint"
    west, south, east, north = (f"{edge:.5g}" for edge in box)
    return f"its tiles lie between longitudes {west} and {east}, latitudes {south} and {north}"


def _times(archive: "Archive") -> str:
    query = "SELECT min(acquired_at), max(acquired_at) FROM embeddings WHERE status = 'valid'"
    [(first, last)] = archive.sql(query).fetchall()
    return f"its times are {first:%Y-%m-%d} to {last:%Y-%m-%d}" if first else "no tile of it has a time"


def _names(archive: "Archive", column: str) -> str:
    query = f"SELECT DISTINCT {column} FROM embeddings WHERE status = 'valid' AND {column} IS NOT NULL ORDER BY 1"
    names = [name for (name,) in archive.sql(f"{query} LIMIT {_MOST_NAMES + 1}").fetchall()]
    shown = ", ".join(name[:64] for name in names[:_MOST_NAMES]) or "null"
    return f"{column} is {shown}{', ...' if len(names) > _MOST_NAMES else ''}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no name is like it."""
    near = difflib.get_close_matches(name.lower(), {one.lower(): one for one in names}, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def sql_hint(text: str) -> str:
    """DuckDB's one-line error as one that suggests names of this archive's."""
    if found := _COLUMN.search(text):
        there = _CANDIDATES.search(text)
        names = [*arrow_schema("index.json").names, *re.findall(r'"([^"]+)"', there[1] if there else "")]
        return f"no column {found[1]!r}{did_you_mean(found[1], names)}"
    if found := _FUNCTION.search(text):
        meant = did_you_mean(found[1], _FUNCTIONS)
        return f"no function {found[1]!r}{meant}" if meant else text
    if found := _TABLE.search(text):
        return f"no table {found[1]!r}; an archive has one, `embeddings`"
    return text


def codec_named(archive: "Archive", prefix: str) -> str:
    """The id of the one codec of the archive's tiles that starts with some digits.

    Raises:
        NotFound: none does.
        InputError: several do.
    """
    found = [codec_id for codec_id in _codec_ids(archive) if prefix and codec_id.startswith(prefix)]
    if len(found) > 1:
        raise InputError(f"{archive.url}: {len(found)} codecs start with {prefix!r}; give more digits")
    if not found:
        raise no_codec(archive, prefix)
    return found[0]


def no_codec(archive: "Archive", name: str) -> NotFound:
    """The error of a codec that is not there."""
    ids = _codec_ids(archive)
    there = ", ".join(codec_id[:12] for codec_id in ids[:_MOST_NAMES]) or "none"
    near = did_you_mean(name[:12], [codec_id[:12] for codec_id in ids])
    return NotFound(f"{archive.url}: no codec {name[:64]!r}{near or f'; there are: {there}'}")


def _codec_ids(archive: "Archive") -> list[str]:
    query = "SELECT DISTINCT codec_id FROM embeddings ORDER BY codec_id"
    return [codec_id for (codec_id,) in archive.sql(query).fetchall()]
