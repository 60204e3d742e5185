"""What an archive holds: tiles, bytes, codecs, coverage."""

from typing import Any

from nec_ray.archive.archive import Archive
from nec_ray.archive.layout import archive_codec
from nec_ray.errors import without_secrets
from nec_ray.storage import Store


def describe(archive: Archive) -> dict[str, Any]:
    """Counts and bytes of the archive's version, its codecs, extent and times, as plain types."""
    [totals] = (
        archive.sql(
            """
        SELECT count(*) AS tiles, count(*) FILTER (status = 'valid') AS valid,
            count(*) FILTER (status = 'nodata') AS nodata, count(*) FILTER (status = 'failed') AS failed,
            coalesce(sum(n_bytes), 0)::BIGINT AS payload_bytes, count(DISTINCT payload.pack) AS packs,
            min(bbox.xmin) AS xmin, min(bbox.ymin) AS ymin, max(bbox.xmax) AS xmax, max(bbox.ymax) AS ymax,
            min(acquired_at) AS first, max(acquired_at) AS last
        FROM embeddings
        """
        )
        .to_arrow_table()
        .to_pylist()
    )
    codecs = (
        archive.sql(
            """
        SELECT codec_id, count(*) AS tiles, coalesce(sum(n_bytes), 0)::BIGINT AS payload_bytes
        FROM embeddings WHERE status = 'valid' GROUP BY codec_id ORDER BY tiles DESC, codec_id
        """
        )
        .to_arrow_table()
        .to_pylist()
    )
    store = Store(archive.url)
    for row in codecs:
        spec = archive_codec(store, row["codec_id"]).spec
        row |= {"family": spec.family, "encoder_id": spec.encoder_id, "layers": len(spec.layers)}
        row["channels"], row["grid"] = spec.width or spec.channels, list(spec.token_grid)
    box = [totals.pop(edge) for edge in ("xmin", "ymin", "xmax", "ymax")]
    times = [totals.pop(name) for name in ("first", "last")]
    return {
        "archive": without_secrets(archive.url),
        "version": archive.version,
        **totals,
        "bytes_per_tile": totals["payload_bytes"] / max(1, totals["valid"]),
        "index_files": len(archive.files),
        "index_bytes": sum(file.size for file in archive.files),
        "bbox": None if box[0] is None else box,
        "acquired": None if times[0] is None else [time.isoformat() for time in times],
        "codecs": codecs,
        "licence": archive.info.licence,
        "attribution": archive.info.attribution,
    }
