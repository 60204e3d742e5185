"""One sample of GEO-Bench: an HDF5 file with a data set for each band, and one named `label` where that is a mask.

What a sample says of its bands, and its label where that is no mask, is a pickle in the attribute `pickle`.

Sentinel-2 bands have MMEarth's names here (B1 to B12), so that whatever reads bands by name takes the right ones; other
bands keep GEO-Bench's. Three data sets need more:
- So2Sat has reflectances from 0 to 1 and 10 bands: they are multiplied by 10,000, as all others are, and B1 and B9 are
  copies of B2 and B8A (MMEarth, supplement B; `geobenchdataset.py` of MMEarth-train).
- EuroSAT's last five bands and most of Brick Kiln's have other names in GEO-Bench than they are (its issues 28 and 29).
  They are known by the folder's name, and get the right ones.
- Brick Kiln has 10 of the 12 bands, and 3 of a true-colour image: B6 and B9 are copies of B7 and B8A. (MMEarth's code
  reads it by the wrong names, which gives an encoder green and blue of that image as B11 and B12.)
"""

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadSource
from nec_ray.storage import Store
from nec_ray.tiles import hdf5
from nec_ray.tiles.pickled import Name, Record, parse

FILE_NAMES = {
    "B1": "01 - Coastal aerosol",
    "B2": "02 - Blue",
    "B3": "03 - Green",
    "B4": "04 - Red",
    "B5": "05 - Vegetation Red Edge",
    "B6": "06 - Vegetation Red Edge",
    "B7": "07 - Vegetation Red Edge",
    "B8": "08 - NIR",
    "B8A": "08A - Vegetation Red Edge",
    "B9": "09 - Water vapour",
    "B10": "10 - SWIR - Cirrus",
    "B11": "11 - SWIR",
    "B12": "12 - SWIR",
}
_EUROSAT = {
    "B8A": "12 - SWIR",
    "B9": "08A - Vegetation Red Edge",
    "B10": "09 - Water vapour",
    "B11": "10 - SWIR - Cirrus",
    "B12": "11 - SWIR",
}
_BRICK_KILN = {
    "B7": "06 - Vegetation Red Edge",
    "B8A": "07 - Vegetation Red Edge",
    "B8": "08 - NIR",
    "B11": "08A - Vegetation Red Edge",
    "B12": "09 - Water vapour",
    "TCI_R": "10 - SWIR - Cirrus",
    "TCI_G": "11 - SWIR",
    "TCI_B": "12 - SWIR",
}
_MISNAMED = {"eurosat": _EUROSAT, "brick-kiln": _BRICK_KILN}
_OF_SO2SAT = "01 - VH.Real"
"""The first of its Sentinel-1 bands; no other data set of GEO-Bench has any."""
_OF_BRICK_KILN = "TCI_R"
_STAND_INS = {
    _OF_SO2SAT: {"B1": "B2", "B9": "B8A"},
    # B5 is 6 nm closer to B6, but on the other side of the red edge: in EuroSAT's samples B6 goes with B7.
    _OF_BRICK_KILN: {"B6": "B7", "B9": "B8A"},
}
_SO2SAT_SCALE = 10_000
_MOST_TEXT = 1 << 22
_BYTES = re.compile(
    r"""b(?:'(?:[ -&(-\[\]-~]|\\[ntr\\']|\\x[0-9a-f]{2})*'|"(?:[ !#-\[\]-~]|\\[ntr\\"]|\\x[0-9a-f]{2})*")"""
)
"""What Python writes for bytes."""


def file_names(folder: str) -> dict[str, str]:
    """GEO-Bench's name of each Sentinel-2 band, for the data set whose folder has this name."""
    wrong = _MISNAMED.get(misnamed(folder) or "", {})
    right = {band: name for band, name in FILE_NAMES.items() if name not in wrong.values()}
    return right | wrong


def misnamed(name: str) -> str | None:
    """Which of the data sets with wrong band names a folder's name, such as m-eurosat, says that it is."""
    plain = name.lower().replace("_", "-").removeprefix("m-")
    return next((known for known in _MISNAMED if plain.startswith(known)), None)


def stand_ins(bands: Iterable[str]) -> dict[str, str]:
    """The band that stands for each Sentinel-2 band that a data set lacks: So2Sat's closest by wavelength, and so on.

    Args:
        bands: of the data set, by their names here.
    """
    there = set(bands)
    return next((filled for band, filled in _STAND_INS.items() if band in there), {})


@contextmanager
def open_sample(store: Store, name: str, file_names: Mapping[str, str]) -> Iterator["SampleFile"]:
    """A sample for reading.

    Args:
        store: the data set's folder.
        name: of the file.
        file_names: of `file_names`.

    Raises:
        BadSource: it is damaged.
        NotFound: nothing is there.
    """
    where = f"{store.url}/{name}"
    with hdf5.opened(store, name) as file:
        try:
            yield SampleFile(file, file_names, where)
        except (OSError, ValueError, LookupError, RuntimeError) as error:  # HDF5 finds damage wherever it looks
            raise BadSource(f"{where}: does not read ({hdf5.line(error)}); fetch the data set again") from None


class SampleFile:
    """An open sample; `open_sample` makes one.

    Raises:
        BadSource: (in all methods) it holds what no sample of GEO-Bench does.
    """

    def __init__(self, file: Any, file_names: Mapping[str, str], where: str) -> None:
        self.where = where
        """Its path or URL."""
        self._file = file
        self._file_names = file_names
        self._names: list[str] = list(file)
        self._filled = stand_ins([*self._names, *file_names])

    @functools.cached_property
    def attributes(self) -> dict[str, Any]:
        """What it says of its bands, by data set, and its label."""
        try:
            found = self._file.attrs.get_id("pickle")
        except KeyError:
            raise BadSource(f"{self.where}: no sample of GEO-Bench, it has no attribute pickle") from None
        is_text = found.shape == () and h5py.check_string_dtype(found.dtype) is not None
        attributes = parse(pickle_of(self._file.attrs["pickle"] if is_text else None, self.where), self.where)
        if not isinstance(attributes, dict):
            raise BadSource(f"{self.where}: its attribute pickle is no dict")
        return attributes

    def check_names(self) -> None:
        """Check that each data set is named as its description says: no band is taken for another."""
        for name in self._names:
            about = self.attributes.get(name)
            info = about.get("band_info") if isinstance(about, dict) else None
            said = info.state.get("name") if isinstance(info, Record) and isinstance(info.state, dict) else None
            if not isinstance(said, str) or _without_date(name) != said:
                raise BadSource(f"{self.where}: its data set {name[:60]!r} is described as {str(said)[:60]!r}")

    def size(self, bands: Sequence[str]) -> tuple[int, int, str]:
        """Height, width and numpy type of what `pixels` gives of these bands."""
        found = self._found(bands)
        kinds = [np.dtype(np.float32) if self._is_scaled(band) else one.dtype for band, one in found.items()]
        height, width = next(iter(found.values())).shape
        return int(height), int(width), np.result_type(*kinds).newbyteorder("=").name

    def pixels(self, bands: Sequence[str]) -> npt.NDArray[Any]:
        """Pixels (bands, rows, columns) of these bands."""
        found = self._found(bands)
        planes = {band: np.asarray(hdf5.whole(one, band, self.where)) for band, one in found.items()}
        scaled = {band: planes[band].astype(np.float32) * _SO2SAT_SCALE for band in bands if self._is_scaled(band)}
        return np.stack([scaled.get(band, planes[band]) for band in bands])

    def mask(self) -> npt.NDArray[np.int64]:
        """The label where it is a mask: class numbers (rows, columns)."""
        found = self._own("label")
        if found.dtype.kind not in "iu":
            raise BadSource(f"{self.where}: its mask is {found.dtype}, no class numbers")
        return np.asarray(hdf5.whole(found, "label", self.where)).astype(np.int64)

    def label_numbers(self, most: int) -> npt.NDArray[np.int64]:
        """The label where it is none: a number (), or at most so many (numbers,)."""
        value = self.attributes.get("label")
        if isinstance(value, int):
            value = [value]
        if isinstance(value, list | tuple):
            good = len(value) <= most and all(isinstance(one, int) and 0 <= one < 1 << 16 for one in value)
            numbers = np.array(value, np.int64) if good else None
        else:
            numbers = _numpy(value)
        if numbers is None or numbers.size > most:
            raise BadSource(f"{self.where}: its label is no whole number and no list of them")
        return numbers

    def _found(self, bands: Sequence[str]) -> dict[str, Any]:
        """The data set of each band, all of one size."""
        found = {}
        for band in bands:
            named = self._named(band) or self._named(self._filled.get(band, band))
            if len(named) != 1:
                said = f"{len(named)} data sets, of several times," if named else "no data set"
                raise BadSource(f"{self.where}: has {said} for the band {band}")
            found[band] = self._own(named[0])
        sizes = sorted({one.shape for one in found.values()})
        if len(sizes) != 1:
            raise BadSource(f"{self.where}: its bands are of {len(sizes)} sizes; those of one size are read")
        return found

    def _named(self, band: str) -> list[str]:
        wanted = self._file_names.get(band, band)
        return [name for name in self._names if _without_date(name) == wanted]

    def _own(self, name: str) -> Any:
        """A data set of the file itself, of plain numbers (rows, columns)."""
        link = self._file.get(name, getlink=True) if "/" not in name else None
        if not isinstance(link, h5py.HardLink) or not isinstance(self._file.get(name), h5py.Dataset):
            raise BadSource(f"{self.where}: has no data set {name[:60]!r} of its own")
        found = hdf5.dataset(self._file, name, self.where)
        if found.ndim != 2 or found.dtype.kind not in "iuf" or 0 in found.shape:
            raise BadSource(f"{self.where}: its data set {name} is {found.dtype} {found.shape}, no image of one band")
        if found.size * found.dtype.itemsize > hdf5.MOST_BYTES:
            raise BadSource(f"{self.where}: its data set {name} is of {found.shape} pixels, too many for a sample")
        return found

    def _is_scaled(self, band: str) -> bool:
        return band in FILE_NAMES and _OF_SO2SAT in self._names


def pickle_of(text: Any, where: str) -> bytes:
    """The pickle that a sample's attribute holds: Python's text of its bytes.

    Raises:
        BadSource: it is no such text.
    """
    if not isinstance(text, str) or len(text) > _MOST_TEXT or not _BYTES.fullmatch(text):
        raise BadSource(f"{where}: its attribute pickle is no text of bytes")
    return bytes(ast.literal_eval(text))


def _without_date(name: str) -> str:
    """A data set's name is its band's, with the date behind it where that is known."""
    return re.sub(r"_\d{4}-\d\d-\d\d$", "", name)


def _numpy(value: Any) -> npt.NDArray[np.int64] | None:
    """What numpy pickles of a scalar or vector of whole numbers; None for anything else."""
    match value:
        case Record(name=Name(name="scalar"), args=(Record() as kind, bytes(raw)), state=None):
            shape: tuple[int, ...] = ()
        case Record(name=Name(name="_reconstruct"), state=(int(), (int(length),), Record() as kind, False, bytes(raw))):
            shape = (length,)
        case _:
            return None
    match kind:
        case Record(name=Name("numpy", "dtype"), args=(str(code), *_), state=(int(), "<" | "|", *_)):
            if re.fullmatch(r"[iu][1248]|b1", code) and len(raw) == np.dtype(code).itemsize * int(np.prod(shape)):
                return np.frombuffer(raw, np.dtype(code).newbyteorder("<")).reshape(shape).astype(np.int64)
    return None
