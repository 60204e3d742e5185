"""Writes pulled embeddings where consumers want them: .npz, .zarr or .parquet."""

import secrets
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.archive.pull import Pull
from nec_ray.codec import parts_of
from nec_ray.errors import InputError

FORMATS = (".npz", ".zarr", ".parquet")


def check_out(path: Path) -> None:
    """Refuse a place that `write_pull` cannot write to, before anything is fetched.

    Raises:
        InputError: unknown ending, missing folder, or a Zarr store that is already there.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: embeddings are written as {', '.join(FORMATS)}; give one of these endings")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} is not there; make it first")
    if path.suffix == ".zarr" and path.exists():
        raise InputError(f"{path}: already there; give another --out or remove it")
    if path.suffix != ".zarr" and path.is_dir():
        raise InputError(f"{path}: a folder; give a file's name")


def write_pull(pull: Pull, path: Path) -> None:
    """Write tile ids and embeddings; a file appears whole.

    Where the pull is of several grid scales, `embeddings_1`, `embeddings_2`, ... stand in the place of `embeddings`,
    coarse first, `embedding_1`, ... in that of `embedding`, and `grids` beside `grid`, which is the finest of them.

    `.npz` and `.zarr` hold `tile_id` (tiles,), in Zarr as `tile_id_utf8` uint8 (tiles, bytes), `embeddings` float32
    (tiles, tokens, channels) and `n_bytes` (tiles,); `.parquet` one row a tile with `embedding`, a list of tokens of
    lists of channels. Each carries the token grid and the encoder id.
    """
    check_out(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        _WRITERS[path.suffix](pull, temporary)
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); give another --out") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _write_npz(pull: Pull, path: Path) -> None:
    np.savez_compressed(
        path,
        tile_id=np.array(pull.tile_ids),
        **_named(pull, "embeddings"),
        n_bytes=pull.n_bytes,
        grid=np.array(pull.grid),
        encoder_id=np.array(pull.encoder_id),
        **({"grids": np.array(pull.grids)} if len(pull.grids) > 1 else {}),
    )


def _write_zarr(pull: Pull, path: Path) -> None:
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.attrs.update({"grid": list(pull.grid), "encoder_id": pull.encoder_id})
    if len(pull.grids) > 1:
        group.attrs["grids"] = [list(grid) for grid in pull.grids]
    width = max(len(tile_id.encode()) for tile_id in pull.tile_ids)
    ids = np.array([tile_id.encode() for tile_id in pull.tile_ids], f"S{width}")
    # Fixed-width bytes as uint8: Zarr v3 has no settled string type that every reader knows.
    group.create_array(
        "tile_id_utf8", data=ids.view(np.uint8).reshape(len(ids), width), dimension_names=("tile", "byte")
    )
    for name, array in _named(pull, "embeddings").items():
        number = name.removeprefix("embeddings")  # dimensions of one name must be of one length
        group.create_array(
            name,
            data=array,
            chunks=(min(256, len(pull)), *array.shape[1:]),
            dimension_names=("tile", f"token{number}", f"channel{number}"),
        )
    group.create_array("n_bytes", data=pull.n_bytes, dimension_names=("tile",))


def _write_parquet(pull: Pull, path: Path) -> None:
    columns = {name: _tokens_of_channels(array) for name, array in _named(pull, "embedding").items()}
    table = pa.table({"tile_id": pa.array(pull.tile_ids), **columns, "n_bytes": pa.array(pull.n_bytes)})
    metadata = {"grid": f"{pull.grid[0]},{pull.grid[1]}", "encoder_id": pull.encoder_id}
    if len(pull.grids) > 1:
        metadata["grids"] = ";".join(f"{rows},{cols}" for rows, cols in pull.grids)
    pq.write_table(
        table.replace_schema_metadata(metadata),
        path,
        compression="zstd",
        row_group_size=max(1, min(len(pull), 4096)),
    )


def _named(pull: Pull, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """The arrays of all scales by name, which is numbered where there are several."""
    parts = parts_of(pull.embeddings)
    return {name: parts[0]} if len(parts) == 1 else {f"{name}_{n}": part for n, part in enumerate(parts, 1)}


def _tokens_of_channels(array: npt.NDArray[np.float32]) -> pa.Array:
    _, tokens, channels = array.shape
    token = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), channels)
    return pa.FixedSizeListArray.from_arrays(token, tokens)


_WRITERS = {".npz": _write_npz, ".zarr": _write_zarr, ".parquet": _write_parquet}
