"""What each method leaves of the labelled tiles' embeddings, and the bytes that are fetched for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.archive import Archive
from nec_ray.codec import Arrays, Codec, of_tiles, parts_of
from nec_ray.evaluate.baselines import (
    EmbeddingCoder,
    PixelCoder,
    fit_binary,
    fit_jpeg2000,
    fit_pca,
    fit_quantised,
    fit_raw,
)
from nec_ray.evaluate.consumer import check_valid, labelled_rows, parts, uncompressed_latents
from nec_ray.evaluate.distortion import distortion
from nec_ray.evaluate.experiment import (
    Binary,
    Embeddings,
    Jpeg2000,
    Method,
    PrincipalComponents,
    Quantised,
    Raw,
    SourceFiles,
    Uncompressed,
    trains_encoder,
)
from nec_ray.evaluate.fitting import Floats, align
from nec_ray.evaluate.labels import LabelledTiles
from nec_ray.models.embed import Embedder
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, read_catalog, read_native, resize
from nec_ray.tiles.reader import numbered
from nec_ray.tiles.rows import is_stack, is_zarr

_Files = tuple[str, ...]
_TRAINING_TILES = 64
"""Whose pixels ranges and arrangements are fitted to, evenly spaced among all."""


@dataclass(frozen=True)
class Coded:
    """What a consumer has of the labelled tiles."""

    x: Arrays
    """Float32 (tiles, tokens, channels) in the labels' order; the encoder's first channels where layers were left out
    (with a transform all of them); of several grid scales a tuple of one such array a scale. Where the consumer trains
    the encoder: its input, pixels (tiles, bands, size, size) in the source's units."""
    grids: Sequence[tuple[int, int]]
    """Token rows and columns of each scale."""
    bytes_per_tile: float
    """Mean of the bytes that are fetched for a tile."""
    shared_bytes: int
    """That are fetched once, whatever the number of tiles."""
    bits_per_pixel: float | None
    """Of the source's pixels, all bands together; None where no pixels are fetched."""


class Encodings:
    """Makes methods' embeddings of labelled tiles; the encoder's own, which several need, are made once.

    Args:
        labels: of the tiles; what is fitted is fitted to those that are not kept for the test.
    """

    def __init__(self, labels: LabelledTiles) -> None:
        self._labels = labels
        self._latents: tuple[tuple[str, str, str], Arrays] | None = None

    def uncompressed(self, catalog: str, codec: Codec) -> Arrays:
        """What `uncompressed_latents` gives of a codec's encoder; the last ones are kept."""
        key = (catalog, codec.encoder_id, str(codec.spec.embedding_shapes()))
        if self._latents is None or self._latents[0] != key:
            self._latents = None  # before the next ones: both need not fit into memory
            self._latents = key, uncompressed_latents(self._labels, read_catalog(catalog), codec)
        return self._latents[1]

    def code(self, method: Method, archive: Archive, codec: Codec) -> Coded:
        """Code and decode all labelled tiles.

        Raises:
            InputError: the catalog lacks a labelled tile, its pixels cannot be read, or the method does not fit.
        """
        if isinstance(method, Embeddings):
            pull = archive.pull(layers=method.layers, tile_ids=self._labels.tile_ids)
            take = align(archive.url, pull, self._labels.tile_ids)
            return Coded(of_tiles(pull.embeddings, take), pull.grids, float(pull.n_bytes[take].mean()), 0, None)
        if isinstance(method, Raw | Jpeg2000 | SourceFiles):
            return self._code_pixels(method, read_catalog(method.catalog), codec)
        latents, grids = self.uncompressed(method.catalog, codec), [scale.grid for scale in codec.scales()]
        if isinstance(method, Uncompressed):
            return Coded(latents, grids, sum(part[0].nbytes for part in parts_of(latents)), 0, None)
        coder = _embedding_coder(method, latents[~self._labels.is_test])
        out, total = np.empty_like(latents), 0
        for number, tile in enumerate(latents):
            data = coder.encode(tile)
            total += len(data)
            out[number] = coder.decode(data)
        return Coded(out, grids, total / len(out), coder.shared_bytes, None)

    def facts(self, method: Method, coded: Coded, codec: Codec) -> dict[str, Any]:
        """What rows of results say of a method whatever is done with its embeddings."""
        found: dict[str, Any] = {
            "bytes_per_tile": coded.bytes_per_tile,
            "shared_bytes": coded.shared_bytes,
            "bits_per_channel": 8 * coded.bytes_per_tile / codec.spec.values,
            "bits_per_pixel": coded.bits_per_pixel,
            "codec_id": codec.id,
            "encoder_id": codec.spec.encoder_id,
            "mse": None,
            "snr_db": None,
        }
        if method.catalog is None or trains_encoder(method) or len(codec.scales()) > 1:
            return found
        test = self._labels.is_test
        whole = coded.x[test]
        missing = codec.tables.median[whole.shape[2] :]
        if codec.transform is None and len(missing):
            whole = np.concatenate([whole, np.broadcast_to(missing, (*whole.shape[:2], len(missing)))], axis=2)
        error = distortion(whole, self.uncompressed(method.catalog, codec)[test])
        return found | {"mse": error.mse, "snr_db": error.snr_db}

    def _code_pixels(self, method: Raw | Jpeg2000 | SourceFiles, catalog: Catalog, codec: Codec) -> Coded:
        """Code the tiles' pixels, and give what is decoded to the encoder, unless that is to be trained."""
        place, rows = labelled_rows(self._labels, catalog)
        coder = None if isinstance(method, SourceFiles) else self._fit_pixels(method, rows, codec)
        spec, embedder, total = codec.spec.input, Embedder(codec), 0
        latent = (codec.spec.tokens, codec.spec.width or codec.spec.channels)
        image = (len(spec.bands), spec.size, spec.size)
        out = np.empty((len(place), *(image if trains_encoder(method) else latent)), np.float32)
        for part in parts(rows):
            decoded = []
            for tile in _pixels(part, codec):
                data = coder.encode(tile) if coder else b""
                total += len(data)
                seen = coder.decode(data, *tile.shape[1:]) if coder else tile
                decoded.append(resize(seen, spec.size, spec.size))
            pixels = np.stack(decoded)
            made = pixels if trains_encoder(method) else embedder.latents(pixels)
            out[[place[name] for name in part["tile_id"].to_pylist()]] = made
        n_bytes = total / len(place) if coder else float(source_bytes(catalog, rows).mean())
        shared, bits = coder.shared_bytes if coder else 0, 8 * n_bytes / _pixels_per_tile(rows)
        return Coded(out, [codec.spec.token_grid], n_bytes, shared, bits)

    def _fit_pixels(self, method: Raw | Jpeg2000, rows: pa.Table, codec: Codec) -> PixelCoder:
        """Fit a coder to training tiles evenly spaced among their catalog rows."""
        is_test = dict(zip(self._labels.tile_ids, self._labels.is_test, strict=True))
        train = np.flatnonzero([not is_test[name] for name in rows["tile_id"].to_pylist()])
        some = train[np.linspace(0, len(train) - 1, min(len(train), _TRAINING_TILES)).round().astype(np.int64)]
        pixels, dtypes = list(_pixels(rows.take(pa.array(some)), codec)), set(_value_types(rows))
        if isinstance(method, Raw):
            return fit_raw(pixels, method.bits, dtypes)
        return fit_jpeg2000(pixels, method.bits_per_pixel, method.bits, dtypes)


def source_bytes(catalog: Catalog, rows: pa.Table) -> npt.NDArray[np.float64]:
    """Bytes (rows,) of each tile's share of its source file, which the catalog's tiles of it share by their pixels.

    Args:
        catalog: all tiles of the files.
        rows: the catalog rows that are asked for.

    Raises:
        NotFound: a file is not there.
    """
    pixels: dict[_Files, int] = {}
    for name, count in zip(_files(catalog.table), _pixel_counts(catalog.table), strict=True):
        pixels[name] = pixels.get(name, 0) + count
    sizes: dict[_Files, int] = {}
    for name in _files(rows):
        if name not in sizes:
            sizes[name] = sum(map(_file_size, name))
    return np.array(
        [sizes[name] * count / pixels[name] for name, count in zip(_files(rows), _pixel_counts(rows), strict=True)]
    )


def _files(rows: pa.Table) -> list[_Files]:
    """The files that hold each row's pixels."""
    return [
        tuple(sorted({asset["href"] for asset in assets}))
        if assets
        else (numbered(source)[0] if is_stack(source) else source,)
        for source, assets in zip(rows["source"].to_pylist(), _assets(rows), strict=True)
    ]


def _value_types(rows: pa.Table) -> list[str]:
    """Numpy's names of the pixels' types, in the tiles' units: scaled numbers are floats."""
    return [
        "float32" if assets else dtype for dtype, assets in zip(rows["dtype"].to_pylist(), _assets(rows), strict=True)
    ]


def _assets(rows: pa.Table) -> list[list[dict[str, Any]] | None]:
    return rows["assets"].to_pylist() if "assets" in rows.column_names else [None] * rows.num_rows


def _pixel_counts(rows: pa.Table) -> list[int]:
    return [w * h for w, h in zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)]


def _file_size(source: str) -> int:
    folder, _, name = source.rpartition("/")
    store = Store(folder or "/")
    return sum(entry.size for entry in store.entries(name)) if is_zarr(source) else store.size(name)


def _pixels_per_tile(rows: pa.Table) -> float:
    return float(np.mean(_pixel_counts(rows)))


def _pixels(rows: pa.Table, codec: Codec) -> Iterator[Floats]:
    """Pixels (bands, height, width) of the codec's bands of tiles, one after the other, as the sources have them."""
    spec, names = codec.spec.input, rows["tile_id"].to_pylist()
    for name, tile in zip(names, read_native(rows, bands=spec.bands, fill=spec.mean), strict=True):
        check_valid(name, tile.status, tile.reason)
        assert tile.pixels is not None
        yield tile.pixels


def _embedding_coder(method: Quantised | PrincipalComponents | Binary, train: Floats) -> EmbeddingCoder:
    if isinstance(method, Quantised):
        return fit_quantised(train, method.precision, method.ranges, method.percentile)
    if isinstance(method, PrincipalComponents):
        return fit_pca(train, method.components, method.precision, method.ranges, method.percentile)
    return fit_binary(train)
