"""What an archive does hold, said where nothing fits what was asked for."""

from typing import TYPE_CHECKING

from nec_ray.errors import InputError

if TYPE_CHECKING:
    from nec_ray.archive.archive import Archive

_SHOWN = 120
_MOST_NAMES = 8


def nothing_fits(archive: "Archive", condition: str, to_do: str) -> InputError:
    """The error of a condition that no valid tile meets: with what the columns that it names do hold.

    Args:
        archive: where.
        condition: SQL, as asked; `true` where nothing was.
        to_do: what was to be done.
    """
    said = [
        *([_extent(archive)] if "bbox" in condition or "geometry" in condition else []),
        *([_times(archive)] if "acquired_at" in condition else []),
        *(_names(archive, column) for column in ("codec_id", "label", "sensor") if column in condition),
    ]
    hint = "".join(f"; {one}" for one in said if one)
    shown = f" {shortened(condition)}" if condition != "true" else ""
    return InputError(f"{archive.url}: no valid tile fits{shown}; nothing to {to_do}{hint}")


def shortened(condition: str) -> str:
    """A condition as an error shows it: without the brackets around it, and not all of a region."""
    text = " ".join(condition.split())
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _extent(archive: "Archive") -> str:
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
