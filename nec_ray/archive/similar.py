"""The tiles most like a tile or a vector, by the cosine of pooled vectors, in SQL and without decoding."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.archive.tile_set import listed
from nec_ray.codec import Codec
from nec_ray.errors import InputError, MixedCodecs, NotFound

if TYPE_CHECKING:
    from nec_ray.archive.archive import Archive


def similar(archive: "Archive", like: Any, k: int, condition: str, columns: Sequence[str]) -> pa.Table:
    """Arguments and result of `Archive.similar`; `condition` is SQL in brackets."""
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k {k}: give how many similar tiles are wanted, 1 or more")
    comparable = f"status = 'valid' AND pooled IS NOT NULL AND {condition}"
    ids = archive.sql(f"SELECT DISTINCT codec_id FROM embeddings WHERE {comparable} ORDER BY codec_id").fetchall()
    codec_ids = [codec_id for (codec_id,) in ids]
    if isinstance(like, str):
        codec_id, vector = _of_tile(archive, like)
        codec_ids = sorted({*codec_ids, codec_id})
        comparable += " AND tile_id <> ?"
    if len(codec_ids) > 1:
        _check_axes(archive, codec_ids)
    if not isinstance(like, str):
        vector = _of_array(archive, like, codec_ids)
    if not vector.any():
        raise InputError(f"{archive.url}: the vector is zero, and nothing is similar to it by direction")
    cosine = "list_cosine_similarity(pooled::DOUBLE[], ?::DOUBLE[])"
    names = ", ".join(["tile_id", *listed(columns)])
    found = archive.sql(
        # The cosine of a vector without length is no number: such tiles are like no other.
        f"SELECT {names}, coalesce(nullif({cosine}, 'nan'::DOUBLE), 0) AS similarity "
        f"FROM embeddings WHERE {comparable} AND len(pooled) = {len(vector)} "
        f"ORDER BY similarity DESC, tile_id LIMIT {k}",
        [vector.tolist(), *([like] if isinstance(like, str) else [])],
    )
    return found.to_arrow_table()


def pool_kind(codec: Codec) -> Hashable:
    """What codecs share whose pooled vectors can be compared: the encoder, the axes, and what is left out."""
    coded = codec.spec.channels if codec.transform else None
    return (codec.encoder_id, coded, *(axes.tobytes() for axes in codec.pool_axes()))


def _of_tile(archive: "Archive", tile_id: str) -> tuple[str, npt.NDArray[np.float64]]:
    rows = archive.sql("SELECT codec_id, status, pooled FROM embeddings WHERE tile_id = ?", [tile_id]).fetchall()
    if not rows:
        query = (
            "SELECT tile_id, levenshtein(tile_id, $1) AS far FROM embeddings "
            "WHERE far < greatest(len($1), len(tile_id)) / 2 ORDER BY far, tile_id LIMIT 1"
        )
        near = "".join(f"; did you mean {name!r}?" for name, _ in archive.sql(query, [tile_id[:200]]).fetchall())
        raise NotFound(f"{archive.url}: no tile {tile_id[:200]!r}{near}")
    [(codec_id, status, pooled)] = rows
    if status != "valid" or pooled is None:
        why = "has no pooled vector" if status == "valid" else f"is {status} and has no embedding"
        raise InputError(f"{archive.url}: tile {tile_id} {why}; give another, or a vector")
    return codec_id, np.array(pooled, np.float64)


def _of_array(archive: "Archive", like: Any, codec_ids: list[str]) -> npt.NDArray[np.float64]:
    """A pooled vector as it is, or that of an embedding (tokens, channels) as `pull` gives it."""
    try:
        array = np.asarray(like, np.float64)
    except (TypeError, ValueError):
        array = np.zeros((0, 0, 0))
    if array.ndim not in {1, 2} or not np.isfinite(array).all():
        raise InputError("similar to what? give a tile id, a pooled vector, or one tile's embedding (tokens, channels)")
    if not codec_ids:
        return array.reshape(-1)
    center, basis = archive.codec(codec_ids[0]).pool_axes()
    if array.shape[-1] != basis.shape[2 - array.ndim]:
        raise InputError(
            f"{archive.url}: {array.shape[-1]} numbers where pooled vectors have {basis.shape[1]} and embeddings "
            f"{basis.shape[0]} channels"
        )
    return array if array.ndim == 1 else (array.mean(axis=0) - center) @ basis


def _check_axes(archive: "Archive", codec_ids: list[str]) -> None:
    """Pooled vectors can be compared where encoder and axes are the same."""
    kinds = {pool_kind(archive.codec(codec_id)) for codec_id in codec_ids}
    if len(kinds) > 1:
        raise MixedCodecs(
            f"{archive.url}: these tiles have pooled vectors of {len(kinds)} kinds; pick one with a condition such as "
            f"codec_id = '{codec_ids[0]}'"
        )
