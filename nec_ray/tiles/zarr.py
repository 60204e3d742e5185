"""Arrays of a Zarr v3 store as images of bands, rows and columns, one a time; read without what could run code.

A source is the path or URL of an array, or of a group whose arrays are one band each. Its folder, or one above it,
has a name that ends with `.zarr`. `#n` behind it is the number of a time, from 0.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import StorePath

from nec_ray.errors import BadSource, NotFound
from nec_ray.storage import Store
from nec_ray.tiles.reader import numbered
from nec_ray.tiles.zarr_store import read_only

_ROWS = ("y", "lat", "latitude", "northing", "row", "rows", "height")
_COLUMNS = ("x", "lon", "longitude", "easting", "column", "columns", "col", "width")
TIMES = ("time", "t", "date", "datetime")
"""Names of the dimension of times."""

_TYPES = frozenset(f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)) | {"float32", "float64"}
# Compression and order of bytes. Others are Python packages' own, and may unpickle what they read.
_CODECS = frozenset({"bytes", "crc32c", "gzip", "zstd", "blosc", "transpose", "sharding_indexed"})
_MOST_BYTES = 1 << 29
"""Of a chunk that is read whole."""


@dataclass(frozen=True)
class Member:
    """An array, by its `zarr.json`.

    Attributes:
        store: the folder that holds the Zarr store.
        path: of the array below it, which begins with the name of the Zarr store.
        document: its metadata.
    """

    store: Store
    path: str
    document: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Path or URL."""
        return f"{self.store.url}/{self.path}"

    @property
    def name(self) -> str:
        """In its group."""
        return self.path.rpartition("/")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return tuple(self.document["shape"])

    @property
    def dtype(self) -> str:
        """Numpy name."""
        return str(self.document["data_type"])

    @property
    def axes(self) -> tuple[str, ...]:
        """What each dimension is: time, band, row or column."""
        names = [str(name or "").lower() for name in self.document.get("dimension_names") or ()]
        axes = tuple("time" if name in TIMES else "band" for name in names[:-2])
        if len(names) < 2 or names[-2] not in _ROWS or names[-1] not in _COLUMNS or len(set(axes)) < len(axes):
            said = ", ".join(names) or "without names"
            self.refuse(f"its dimensions are {said}; name them time, band, y, x, of which the first two may be missing")
        return (*axes, "row", "column")

    def length(self, axis: str) -> int:
        """Of an axis; 1 where it has none of that name."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def objects(self, place: Mapping[str, range]) -> Iterator[str]:
        """Names, below the array, of the objects that hold a part of it; of axes not in `place`, everything."""
        sizes = self.document["chunk_grid"]["configuration"]["chunk_shape"]
        parts = [place.get(axis, range(n)) for axis, n in zip(self.axes, self.shape, strict=True)]
        numbers = [range(p.start // n, (p.stop - 1) // n + 1) for p, n in zip(parts, sizes, strict=True)]
        encoding = self.document["chunk_key_encoding"]
        default = encoding["name"] == "default"
        separator = (encoding.get("configuration") or {}).get("separator", "/" if default else ".")
        for at in np.ndindex(*map(len, numbers)):
            key = [str(number[i]) for number, i in zip(numbers, at, strict=True)]
            yield separator.join(["c", *key] if default else key)

    def open(self) -> Any:
        """The array.

        Raises:
            BadSource: dimensions, a type, compression or size that are not read here.
        """
        document = self.document
        if str(document.get("data_type")) not in _TYPES:
            self.refuse(f"its type {document.get('data_type')!r} is no plain number")
        codecs = _codec_names(document)
        unknown = sorted(codecs - _CODECS)
        if unknown or document.get("storage_transformers"):
            said = f"codec {unknown[0]}" if unknown else "storage transformer"
            self.refuse(f"it uses the {said}, which is not read here; write it with {', '.join(sorted(_CODECS))}")
        whole = np.dtype(self.dtype).itemsize * int(np.prod(_read_shape(document), dtype=object))
        if not 0 < whole <= _MOST_BYTES:
            self.refuse(f"one of its chunks has {whole:,} bytes, {_MOST_BYTES:,} are the most; use smaller chunks")
        _ = self.axes
        try:
            return zarr.Array.from_dict(StorePath(read_only(self.store, self.path)), dict(document))
        except (ValueError, TypeError, KeyError) as error:
            self.refuse(f"its metadata does not read ({_line(error)})")

    def refuse(self, why: str) -> NoReturn:
        """Raise `BadSource` of this array."""
        raise BadSource(f"{self.where}: {why}")


def members(store: Store, path: str) -> Member | dict[str, Member]:
    """The array at a path, or the arrays of the group there by name.

    Args:
        store: the folder that holds the Zarr store.
        path: below it.

    Raises:
        NotFound: nothing is there.
        BadSource: no Zarr v3.
    """
    document = _document(store, path)
    if document["node_type"] == "array":
        return Member(store, path, document)
    known = ((document.get("consolidated_metadata") or {}).get("metadata")) or {}
    names = sorted(name for name, one in known.items() if "/" not in name and one.get("node_type") == "array")
    if not names and store.lists:
        below = {name.removeprefix(f"{path}/") for name in store.names(path)}
        names = sorted(n.partition("/")[0] for n in below if n.count("/") == 1 and n.endswith("/zarr.json"))
    found = {name: _document(store, f"{path}/{name}") for name in names}
    return {name: Member(store, f"{path}/{name}", one) for name, one in found.items() if one["node_type"] == "array"}


def consolidated(store: Store, path: str) -> bool:
    """Whether the metadata of a group's arrays stand in its own."""
    return bool(_document(store, path).get("consolidated_metadata"))


def split(source: str) -> tuple[Store, str, int]:
    """The folder that holds a source's Zarr store, the path of the source below it, and the number of the time."""
    url, number = numbered(source)
    outer, mark, inner = f"{url}/".partition(".zarr/")
    folder, _, name = outer.rpartition("/")
    return Store(folder or "/"), f"{name}{mark}{inner}".rstrip("/"), number


@contextmanager
def image(source: str, bands: Sequence[str]) -> Iterator[Any]:
    """A function (time, rows, columns) that reads a window of a source as (bands, height, width).

    Args:
        source: without the number of a time.
        bands: names of all bands, in order; of a group, those of its arrays.

    Raises:
        BadSource: it cannot be read, or has other bands.
    """
    store, path, _ = split(source)
    if isinstance(found := members(store, path), Member):
        chosen = [found]
    elif missing := [name for name in bands if name not in found]:
        raise BadSource(f"{source}: it has no array {', '.join(missing)}")
    else:
        chosen = [found[name] for name in bands]
    opened = [(one, one.open()) for one in chosen]
    count = sum(one.length("band") for one in chosen)
    if count != len(bands):
        raise BadSource(f"{source}: it has {count} bands, its catalog says {len(bands)}")
    height, width, times = (min(one.length(axis) for one in chosen) for axis in ("row", "column", "time"))

    def window(time: int, rows: range, columns: range) -> npt.NDArray[Any]:
        if rows.stop > height or columns.stop > width or time >= times:
            raise BadSource(f"its window ends outside the array of {width} x {height} pixels and {times} times")
        parts = []
        for one, array in opened:
            at = {"time": time, "band": slice(None), "row": slice(rows.start, rows.stop)}
            at["column"] = slice(columns.start, columns.stop)
            pixels = np.asarray(array[tuple(at[axis] for axis in one.axes)])
            parts.append(pixels if "band" in one.axes else pixels[None])
        return np.concatenate(parts)

    yield window


def _document(store: Store, path: str) -> dict[str, Any]:
    where = f"{store.url}/{path}"
    try:
        document = json.loads(store.read(f"{path}/zarr.json"))
        kind = document["node_type"]
        if document["zarr_format"] != 3 or kind not in {"array", "group"}:
            raise BadSource(f"{where}: no Zarr v3; write it with `zarr_format=3`")
        if kind == "array":
            _check(document)
    except NotFound:
        raise NotFound(f"{where}: no Zarr v3 there (no zarr.json); check the path, or write it with format 3") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadSource(f"{where}: its zarr.json does not read ({_line(error)})") from None
    return dict(document)


def _check(document: Mapping[str, Any]) -> None:
    """Raise one of the errors of JSON that is of another form where an array's metadata is."""
    shape, sizes = document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"]
    if document["chunk_grid"]["name"] != "regular" or len(sizes) != len(shape):
        raise ValueError("its chunks are not regular")
    if not all(isinstance(n, int) and n >= least for least, ns in ((0, shape), (1, sizes)) for n in ns):
        raise ValueError("its shape and chunks are not counts")
    if document["chunk_key_encoding"]["name"] not in {"default", "v2"}:
        raise ValueError("its chunks have names of an unknown kind")
    names = document.get("dimension_names")
    if names is not None and len(names) != len(shape):
        raise ValueError("its dimensions have other names than it has dimensions")


def _codec_names(document: Mapping[str, Any]) -> set[str]:
    """Of all codecs, also of those within shards."""
    names: set[str] = set()
    for codec in document["codecs"]:
        settings = codec.get("configuration") or {}
        names.add(str(codec["name"]))
        for inner in ("codecs", "index_codecs"):
            if inner in settings:
                names |= _codec_names({"codecs": settings[inner]})
    return names


def _read_shape(document: Mapping[str, Any]) -> Sequence[int]:
    """Of what is decoded at a time: a chunk, of shards one within them."""
    for codec in document["codecs"]:
        if codec["name"] == "sharding_indexed":
            return list(codec["configuration"]["chunk_shape"])
    return list(document["chunk_grid"]["configuration"]["chunk_shape"])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
