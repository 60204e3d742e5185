"""Codec directories: immutable, named by their content, refused unless they decode what they promise."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from nec_ray.codec.payload import PayloadCoder, Payloads
from nec_ray.codec.quantise import MAX_ENTRIES
from nec_ray.codec.scales import Arrays, Scale, joined, parts_of, scales_of
from nec_ray.codec.spec import CodecSpec, InputSpec, LayerSpec, Lineage, canonical_json
from nec_ray.codec.tables import EntropyTables
from nec_ray.codec.transform import Transform
from nec_ray.errors import CorruptCodec, CorruptPayload, NotFound, UnsupportedFormat
from nec_ray.notebook import facts_html
from nec_ray.storage import Store

FORMAT_VERSION = 1
FILES = ("tables.safetensors", "encoder.safetensors", "decoder.safetensors", "golden.safetensors")
_MAX_JSON = 1 << 20
_GOLDEN_TILES = 4
_MOST_GOLDEN_TILES = 64
_SPARE_BYTES = 1 << 16
_POOL_CHANNELS = 32
_LARGEST = 1 << 30
"""A symbol at most, so that nothing overflows where codecs are far apart."""
_POOL_SIGMAS = 4.0
"""Spread of the pooled vector that the range of int8 covers."""

Tensors = Mapping[str, npt.NDArray[Any]]


class Codec:
    """A loaded codec: symbols to payloads and back, with numpy alone.

    Attributes:
        id: SHA-256 of the canonical codec.json, 64 hexadecimal digits.
        spec: what codec.json declares.
        tables: the integer entropy tables.
        transform: from embeddings to what is rounded, and back; None where that is the embeddings themselves.
    """

    def __init__(
        self,
        store: Store,
        codec_id: str,
        spec: CodecSpec,
        tables: EntropyTables,
        pool: Tensors,
        transform: Transform | None = None,
    ) -> None:
        self._store = store
        self.id = codec_id
        self.spec = spec
        self.tables = tables
        self.transform = transform
        self._coder = PayloadCoder(tables, spec.layers)
        self._scales = scales_of(spec.grid, spec.layers)
        self._pool = pool

    def __repr__(self) -> str:
        rows, cols = self.spec.token_grid
        channels = self.spec.width or self.spec.channels
        return f"<Codec {self.id[:12]}: {self.spec.family}, {rows}x{cols} tokens x {channels} channels>"

    def _repr_html_(self) -> str:
        rows, cols = self.spec.grid
        channels = self.spec.width or self.spec.channels
        facts: list[tuple[str, object]] = [
            ("family", self.spec.family),
            ("input", f"{', '.join(self.spec.input.bands)}, {self.spec.input.size} pixels a side"),
            ("embedding", f"{rows} x {cols} tokens of {channels} channels, {len(self.spec.layers)} layers"),
            ("encoder", self.encoder_id[:12]),
        ]
        return facts_html(f"Codec {self.id[:12]}", facts)

    @property
    def encoder_id(self) -> str:
        """What made the embeddings: codecs of one encoder give comparable ones."""
        return self.spec.encoder_id

    def compress(self, symbols: Arrays, *, threads: int | None = None) -> Payloads:
        """Payloads of `symbols` int32 (tiles, tokens, channels); a tuple of one such array a grid scale, if several.

        Args:
            symbols: what to code; the codec's number of tokens, or less for smaller tiles.
            threads: how many to use; all the cores this process may use where it is None.

        Raises:
            ValueError: an array's type or shape is not the codec's.
        """
        return self._coder.compress(symbols, threads=threads)

    def decompress(self, payloads: Sequence[bytes], layers: int | None = None, *, threads: int | None = None) -> Arrays:
        """Symbols int32 (tiles, tokens, channels of the first `layers`) of payloads or of their first layers.

        Where these layers are of several grid scales, a tuple of one such array a scale.

        Args:
            payloads: what `compress` made, or any sequence of bytes.
            layers: how many layers to decode; all where it is None.
            threads: how many to use; all the cores this process may use where it is None.

        Raises:
            CorruptPayload: one is damaged; the message says which, counted from 0.
            ValueError: the codec has fewer layers.
        """
        return joined(self._coder.decompress(payloads, len(self.layers(layers)), threads=threads))

    def layers(self, count: int | None = None) -> list[LayerSpec]:
        """The first `count` layers, all where it is None.

        Raises:
            ValueError: the codec has not that many.
        """
        return self.spec.first_layers(count)

    def scales(self, layers: int | None = None) -> list[Scale]:
        """The grid scales of the first `layers`, all where it is None, in the order of their arrays.

        Raises:
            ValueError: the codec has not that many layers.
        """
        return scales_of(self.spec.grid, self.layers(layers))

    def layer_lengths(self, payloads: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Bytes of each layer of whole payloads, int32 (tiles, layers).

        Raises:
            CorruptPayload: one is shorter, longer, or fails a checksum.
        """
        return self._coder.layer_lengths(payloads)

    def dequantise(self, symbols: Arrays) -> Arrays:
        """Embeddings float32 of `symbols` int32 (..., channels): symbol plus the channel's median.

        Where the codec has a transform, of as many channels as the encoder has whatever the number of layers.
        Where there are several grid scales, of a tuple of one array a scale: all of them, or the first ones.
        """
        if self.transform is not None:
            return self.transform.inverse(symbols)
        median = self.tables.median
        return joined(
            np.add(part, median[scale.rows[: part.shape[-1]]], dtype=np.float32)
            for part, scale in zip(parts_of(symbols), self._scales, strict=False)
        )

    def quantise(self, embeddings: Arrays) -> Arrays:
        """Symbols int32 of embeddings float32 (tiles, tokens, channels): their distance to the medians, rounded.

        Where the codec has a transform, of their coordinates along its axes. Where there are several grid scales, of
        a tuple of one array a scale.
        """
        parts: tuple[Any, ...]
        if self.transform is not None:
            parts = (self.transform.forward(embeddings),)
        else:
            median = self.tables.median
            parts = tuple(
                part - median[scale.rows] for part, scale in zip(parts_of(embeddings), self._scales, strict=True)
            )
        return joined(np.clip(np.rint(part), -_LARGEST, _LARGEST).astype(np.int32) for part in parts)

    def pool(self, symbols: Arrays) -> npt.NDArray[np.int8]:
        """Small vectors int8 (tiles, at most 32) for ranking by similarity, of symbols (tiles, tokens, channels).

        The mean over the tokens of each scale, along the principal axes of the calibration tiles' means.
        """
        if self.transform is None:
            mean = _means(parts_of(self.dequantise(symbols)), [scale.rows for scale in self._scales], np.float32)
        else:  # the mean's embedding is the embeddings' mean
            mean = self.transform.inverse(np.mean(symbols, axis=1, dtype=np.float64))
        scaled = np.rint((mean - self._pool["pool_center"]) @ self._pool["pool_basis"])
        return np.clip(scaled, -127, 127).astype(np.int8)

    def pool_axes(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """What `pool` uses: the centre (channels,) and the scaled axes (channels, at most 32)."""
        return self._pool["pool_center"], self._pool["pool_basis"]

    def tensors(self, part: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays of `encoder` or `decoder`, checked against the hash in codec.json.

        Raises:
            CorruptCodec: the file's hash differs.
        """
        return _read_tensors(self._store, f"{part}.safetensors", self.spec)

    def golden(self) -> Arrays:
        """The golden symbols int32 (tiles, tokens, channels): real ones, of a few training tiles."""
        found = _read_tensors(self._store, "golden.safetensors", self.spec)
        return joined(np.asarray(found[name], np.int32) for name in _golden_names(len(self._scales)))

    def files(self) -> dict[str, bytes]:
        """Every file of the directory, hash-checked, codec.json last: what copying the codec needs."""
        return {name: self.file(name) for name in (*self.spec.files, "codec.json")}

    def file(self, name: str) -> bytes:
        """One file of the directory, hash-checked.

        Raises:
            CorruptCodec: its hash differs.
        """
        return _checked(self._store, name, self.spec.files.get(name, self.id))


def load_codec(url: str | os.PathLike[str]) -> Codec:
    """Load the codec directory at `url`; needs neither torch nor ray.

    Raises:
        NotFound: no codec.json there.
        CorruptCodec: a hash differs, the tables break their rules, or the golden payloads do not reproduce.
        UnsupportedFormat: written by a later release.
    """
    store = Store(url)
    codec_id, spec = _identify(store)
    tensors = _read_tensors(store, "tables.safetensors", spec)
    try:
        tables = EntropyTables.from_tensors(tensors)
    except CorruptCodec as error:
        raise CorruptCodec(f"{store.url}/tables.safetensors: {error}; restore the codec") from None
    if tables.channels != spec.channels:
        raise CorruptCodec(f"{store.url}: tables for {tables.channels} channels, codec.json declares {spec.channels}")
    pool: dict[str, npt.NDArray[Any]] = {k: v for k, v in tensors.items() if k.startswith("pool_")}
    if not _pool_fits(pool, spec.width or spec.channels):
        raise CorruptCodec(f"{store.url}: the pooling matrices do not fit {spec.width or spec.channels} channels")
    transform = None
    if spec.width is not None:
        transform = Transform.from_tensors(tensors)
        if transform is None or transform.basis.shape != (spec.channels, spec.width):
            raise CorruptCodec(
                f"{store.url}: no transform from {spec.channels} to {spec.width} channels; restore the codec"
            )
    codec = Codec(store, codec_id, spec, tables, pool, transform)
    _check_golden(codec, _read_tensors(store, "golden.safetensors", spec))
    return codec


@functools.lru_cache(maxsize=16)
def load_codec_cached(url: str) -> Codec:
    """`load_codec`, once a process: a codec named by its content never changes."""
    return load_codec(url)


@functools.lru_cache(maxsize=64)
def load_spec_cached(url: str) -> CodecSpec:
    """What a codec declares, once a process; the only part of it that fetching payloads needs.

    Raises:
        NotFound: no codec.json there.
        CorruptCodec: it is not the one that the folder is named for, or breaks its rules.
        UnsupportedFormat: written by a later release.
    """
    return _identify(Store(url))[1]


def _identify(store: Store) -> tuple[str, CodecSpec]:
    """A codec's id and what it declares."""
    try:
        raw = store.read_start("codec.json", _MAX_JSON + 1)
    except NotFound:
        raise NotFound(f"{store.url}: no codec there (codec.json is missing); name a codec directory") from None
    if len(raw) > _MAX_JSON:
        raise CorruptCodec(f"{store.url}/codec.json: over {_MAX_JSON} bytes, more than any codec has")
    spec = _read_spec(raw, f"{store.url}/codec.json")
    codec_id = hashlib.sha256(raw).hexdigest()
    name = store.url.rsplit("/", 1)[-1]
    if len(name) == 64 and set(name) <= set("0123456789abcdef") and name != codec_id:
        raise CorruptCodec(f"{store.url}: codec.json's hash is {codec_id}, not the folder's name; restore the codec")
    return codec_id, spec


def write_codec(
    folder: Path,
    *,
    family: str,
    architecture: Mapping[str, int],
    input: InputSpec,  # noqa: A002  (the word of codec.json)
    grid: tuple[int, int],
    layers: Sequence[LayerSpec],
    lineage: Lineage,
    tables: EntropyTables,
    encoder: Tensors,
    decoder: Tensors,
    calibration: Arrays,
    transform: Transform | None = None,
) -> str:
    """Write a codec directory; it appears whole, or not at all.

    Args:
        folder: where; must not exist.
        family: model family.
        architecture: sizes from which the encoder is built.
        input: what the encoder is fed.
        grid: token rows and columns.
        layers: the latent's layers.
        lineage: where the codec comes from.
        tables: integer entropy tables.
        encoder: the encoder's arrays.
        decoder: arrays of the first decoder layer.
        calibration: real symbols int32 (tiles, tokens, channels), a tuple of one such array a grid scale if there are
            several: the first ones become the golden payloads, all of them give the axes of the pooled vector.
        transform: between embeddings and what is rounded, where that is not the embeddings themselves.

    Returns:
        The codec id.
    """
    scales, parts = scales_of(grid, layers), parts_of(calibration)
    if transform is None:
        latents = [part + tables.median[scale.rows] for part, scale in zip(parts, scales, strict=True)]
        rows = [scale.rows for scale in scales]
    else:
        latents, rows = [transform.inverse(parts[0])], [np.arange(transform.basis.shape[1])]
    center, basis = _pool_axes(_means(latents, rows, np.float64))
    golden = joined(part[:_GOLDEN_TILES] for part in parts)
    blobs: dict[str, dict[str, npt.NDArray[Any]]] = {
        "tables.safetensors": {
            **tables.to_tensors(),
            "pool_center": center,
            "pool_basis": basis,
            **(transform.to_tensors() if transform else {}),
        },
        "encoder.safetensors": dict(encoder),
        "decoder.safetensors": dict(decoder),
        "golden.safetensors": golden_tensors(PayloadCoder(tables, layers).compress(golden), golden),
    }
    data = {name: tensor_bytes(blob) for name, blob in blobs.items()}
    hashes = {name: hashlib.sha256(blob).hexdigest() for name, blob in data.items()}
    encoder_id = hashlib.sha256(
        canonical_json(
            {
                "family": family,
                "architecture": dict(architecture),
                "input": input.model_dump(),
                "weights": hashes["encoder.safetensors"],
            }
        )
    ).hexdigest()
    spec = CodecSpec.model_validate(
        {
            "family": family,
            "architecture": dict(architecture),
            "encoder_id": encoder_id,
            "input": input,
            "grid": grid,
            "channels": tables.channels,
            "layers": list(layers),
            "width": transform.basis.shape[1] if transform else None,
            "lineage": lineage,
            "files": hashes,
        }
    )
    return write_directory(folder, spec, data)


def tensor_bytes(tensors: Tensors) -> bytes:
    """A safetensors file of arrays."""
    return bytes(save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()}))


def golden_tensors(payloads: Payloads, symbols: Arrays) -> dict[str, npt.NDArray[Any]]:
    """What golden.safetensors holds: `symbols`, or where there are several grid scales `symbols_1`, `symbols_2`, ..."""
    parts = parts_of(symbols)
    named = dict(zip(_golden_names(len(parts)), parts, strict=True))
    return {"payload": payloads.data, "length": payloads.length, **named}


def _golden_names(scales: int) -> list[str]:
    return ["symbols"] if scales == 1 else [f"symbols_{number}" for number in range(1, scales + 1)]


def write_directory(folder: Path, spec: CodecSpec, data: Mapping[str, bytes]) -> str:
    """Write a codec's files to a folder that appears whole, or not at all; the codec id.

    Args:
        folder: where; must not exist.
        spec: what codec.json declares, with the hashes of the other files.
        data: the other files' bytes by name.
    """
    raw = canonical_json(spec.document())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / folder.name
        staged.mkdir()
        for name, blob in {**data, "codec.json": raw}.items():
            (staged / name).write_bytes(blob)
        staged.rename(folder)
    return hashlib.sha256(raw).hexdigest()


def _read_spec(raw: bytes, where: str) -> CodecSpec:
    try:
        document = json.loads(raw)
        version = document.get("format_version")
    except (ValueError, AttributeError, RecursionError):
        raise CorruptCodec(f"{where}: not a JSON object; restore the codec") from None
    if type(version) is not int:  # 1.0 and true are 1 to Python, and something else to other readers
        raise CorruptCodec(f"{where}: format_version: not a whole number; restore the codec")
    if version > FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{where}: codec format {version}, this release reads up to {FORMAT_VERSION}; update nec_ray"
        )
    try:
        spec = CodecSpec.model_validate_json(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "codec.json"
        raise CorruptCodec(f"{where}: {key}: {first['msg']}") from None
    if any(layer.table_sets != 1 for layer in spec.layers):
        raise UnsupportedFormat(
            f"{where}: layers of several table sets, which this release does not read; update nec_ray"
        )
    return spec


def _checked(store: Store, name: str, sha256: str) -> bytes:
    data = store.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptCodec(
            f"{store.url}/{name}: its SHA-256 is {found[:12]}…, {sha256[:12]}… is expected; restore the codec"
        )
    return data


def _read_tensors(store: Store, name: str, spec: CodecSpec) -> dict[str, npt.NDArray[Any]]:
    if name not in spec.files:
        raise CorruptCodec(f"{store.url}: codec.json lists no {name}; restore the codec")
    most = _most_bytes(name, spec)
    if most is not None and store.exists(name) and store.size(name) > most:
        raise CorruptCodec(f"{store.url}/{name}: {store.size(name):,} bytes, its codec needs at most {most:,}")
    try:
        return dict(load_tensors(_checked(store, name, spec.files[name])))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptCodec(f"{store.url}/{name}: {error}; restore the codec") from None


def _most_bytes(name: str, spec: CodecSpec) -> int | None:
    """Most bytes that a file of this codec can need; None where that is up to its model."""
    if name == "tables.safetensors":
        tables = 2 * (MAX_ENTRIES + 1) * 4 + 64
        width = spec.width or spec.channels
        transform = (spec.channels + 1) * spec.width * 4 if spec.width else 0
        return _SPARE_BYTES + spec.channels * tables + width * (_POOL_CHANNELS + 1) * 4 + transform
    if name == "golden.safetensors":
        return _SPARE_BYTES + _MOST_GOLDEN_TILES * spec.symbols * 12  # a symbol, and its payload's share at its worst
    return None


def _check_golden(codec: Codec, golden: Tensors) -> None:
    where = f"codec {codec.id[:12]}"
    payload, length = golden.get("payload"), golden.get("length")
    scales = codec.scales()
    expected: list[Any] = [golden.get(name) for name in _golden_names(len(scales))]
    if (
        payload is None
        or length is None
        or (str(payload.dtype), str(length.dtype)) != ("uint8", "int64")
        or (payload.ndim, length.ndim) != (1, 1)
        or not 1 <= len(length) <= _MOST_GOLDEN_TILES
        or any(
            array is None or str(array.dtype) != "int32" or array.shape != (len(length), *scale.shape)
            for array, scale in zip(expected, scales, strict=True)
        )
        or np.any((length < 0) | (length > len(payload)))
        or length.sum() != len(payload)
    ):
        raise CorruptCodec(f"{where}: its golden payloads are not of its shape; restore the codec")
    payload.flags.writeable = False
    try:
        symbols = codec.decompress(Payloads(payload, np.cumsum(length) - length, length))
    except CorruptPayload as error:
        raise CorruptCodec(f"{where}: its golden payloads do not decode ({error}); do not use it") from None
    if any(not np.array_equal(part, array) for part, array in zip(parts_of(symbols), expected, strict=True)):
        raise CorruptCodec(f"{where}: its golden payloads decode to other symbols on this machine; do not use it")


def _means(
    latents: Sequence[npt.NDArray[Any]], rows: Sequence[npt.NDArray[np.int64]], dtype: type[np.floating[Any]]
) -> npt.NDArray[np.floating[Any]]:
    """Means over the tokens (tiles, channels) of an array a scale, whose channels become those of `rows`."""
    means = np.empty((len(latents[0]), sum(len(row) for row in rows)), dtype)
    for latent, row in zip(latents, rows, strict=True):
        means[:, row] = latent.mean(axis=1, dtype=dtype)
    return means


def _pool_axes(
    means: npt.NDArray[np.floating[Any]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Centre (channels,) and scaled principal axes (channels, at most 32) of the tiles' mean latents."""
    center = means.mean(axis=0)
    _, spread, axes = np.linalg.svd(means - center, full_matrices=False)
    axes = axes[:_POOL_CHANNELS]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # one sign everywhere
    largest = max(float(spread[0]) / np.sqrt(len(means)), 1e-6)  # one scale, so that distances keep their meaning
    return center.astype(np.float32), (axes.T * (127 / _POOL_SIGMAS / largest)).astype(np.float32)


def _pool_fits(pool: Tensors, channels: int) -> bool:
    center, basis = pool.get("pool_center"), pool.get("pool_basis")
    return (
        center is not None
        and basis is not None
        and center.dtype == basis.dtype == np.float32
        and center.shape == (channels,)
        and basis.ndim == 2
        and basis.shape[0] == channels
        and 1 <= basis.shape[1] <= _POOL_CHANNELS
        and bool(np.all(np.isfinite(center)) and np.all(np.isfinite(basis)))
    )
