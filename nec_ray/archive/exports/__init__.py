"""Exports: an archive, or a part of it, as a STAC catalog, a GeoParquet file or a Zarr store for other tools.

`nec_ray.archive.pull_files` writes what `nec pull` has in memory; here everything goes by batches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from nec_ray.archive.archive import Archive
from nec_ray.archive.exports import geoparquet, stac, zarr
from nec_ray.archive.exports.output import appearing, check_free
from nec_ray.archive.exports.selection import Selection, select
from nec_ray.errors import without_secrets

__all__ = ["FORMATS", "Format", "export"]

Format = Literal["stac", "geoparquet", "zarr"]
Progress = Callable[[int, int], None]

FORMATS: dict[str, Callable[[Selection, Path, Progress], dict[str, Any]]] = {
    "stac": stac.write,
    "geoparquet": geoparquet.write,
    "zarr": zarr.write,
}


def export(
    archive: Archive,
    out: Path,
    *,
    format: Format,  # noqa: A002  (the word of the command's option)
    where: str | None = None,
    layers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the archive's valid tiles in another format; `out` appears whole or not at all.

    Memory does not grow with the tiles, but for about 100 bytes each to put them in Hilbert order.

    Args:
        archive: the version to export.
        out: what to write: a folder for `stac` and `zarr`, a file for `geoparquet`. It may not be there yet.
        format: `stac`: a static catalog that points into the archive; `geoparquet` and `zarr`: decoded embeddings.
        where: an SQL condition over `embeddings`; all tiles where it is None.
        layers: only the first layers of each payload; all where it is None.
        progress: called with the tiles done and the tiles in all.

    Returns:
        What was written: `out`, `format`, `archive`, `version`, `tiles`, `skipped_nodata`, `skipped_failed`, `tokens`,
        `channels`, and what the format adds.

    Raises:
        InputError: `out` is there, or its folder is not; no valid tile fits; the codec has fewer layers, or layers
            of other token grids than its finest.
        BadQuery: the condition does not parse.
        MixedCodecs: the tiles have embeddings of several encoders, or of several shapes.
        CorruptPayload: a payload fails its checksum; the message names the tile.
    """
    check_free(out)
    selection = select(archive, where, layers)
    with appearing(out) as temporary:
        added = FORMATS[format](selection, temporary, progress or _silent)
    return {
        "out": str(out),
        "format": format,
        "archive": without_secrets(archive.url),
        "version": archive.version,
        "tiles": len(selection),
        **{f"skipped_{status}": count for status, count in selection.skipped.items()},
        "tokens": selection.tokens,
        "channels": selection.channels,
        **added,
    }


def _silent(done: int, total: int) -> None:
    """Where nobody asked for progress."""
