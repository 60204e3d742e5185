"""Which value or colour of a mask is which class: classes.json, or the values found."""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadLabels
from nec_ray.models.segmentation import IGNORED

CLASSES_JSON = "classes.json"
MAX_CLASSES = 254
Colour = tuple[int, int, int]

_UNKNOWN = 254  # a class's number is below it, IGNORED above
_CODES = 1 << 24  # a code is a value, or 0xRRGGBB
_LARGEST_VALUE = 65_535
_IGNORE = {"ignore", "ignored"}
_HEX = re.compile(r"#[0-9a-fA-F]{6}", re.ASCII)
_LARGEST_FILE = 1 << 20
# Okabe and Ito's, then lighter and darker ones between them.
_PALETTE = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#F0E442",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
    "#8C6D31",
    "#AEC7E8",
    "#98DF8A",
    "#C5B0D5",
    "#843C39",
    "#17BECF",
    "#FFBB78",
]


class ClassList:
    """Turns a mask's codes (values, or colours as 0xRRGGBB) to class numbers.

    Args:
        names: the class of each code, in the order of classes; `ignore` marks codes that do not count, which alone may
            be below 0. Where it is None, every value found becomes a class of that name.
        is_colour: whether codes are colours.
        where: what to call the list in an error.
    """

    def __init__(self, names: dict[int, str] | None, *, is_colour: bool, where: str) -> None:
        self.is_colour = is_colour
        self._where = where
        self._open = names is None
        self._names: list[str] = []
        self._code_of: dict[str, int] = {}
        self._below: list[int] = []
        self._table = np.full(_CODES if is_colour else _LARGEST_VALUE + 1, _UNKNOWN, np.uint8)
        if not is_colour and IGNORED not in (names or {}):
            self._table[IGNORED] = IGNORED
        for code, name in (names or {}).items():
            self._add(code, name)

    def _add(self, code: int, name: str) -> None:
        if name.casefold() in _IGNORE:
            if code < 0:
                self._below.append(code)
            else:
                self._table[code] = IGNORED
            return
        if name not in self._code_of:
            if len(self._names) == MAX_CLASSES:
                raise BadLabels(
                    f"{self._where}: more than {MAX_CLASSES} classes; masks of classes are needed, join some of them"
                )
            self._code_of[name] = code
            self._names.append(name)
        self._table[code] = self._names.index(name)

    def numbers(
        self, codes: npt.NDArray[np.int32], ignored: npt.NDArray[np.bool_] | None, where: str
    ) -> npt.NDArray[np.uint8]:
        """Class numbers of codes, of their shape; `IGNORED` where `ignored` says so or a code is to be ignored.

        Raises:
            BadLabels: a code that is no class's; `where` names the mask.
        """
        if self._below and codes.size and codes.min() < 0:
            below = np.isin(codes, self._below)
            ignored = below if ignored is None else ignored | below
        if ignored is not None:  # what lies there may be anything
            codes = np.where(ignored, np.int32(IGNORED), codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < len(self._table):
            bad = codes.min() if codes.min() < 0 else codes.max()
            raise BadLabels(
                f"{where}: value {bad} is no class; classes are 0 to {_LARGEST_VALUE}, mark others as nodata, or say "
                f'{{"ignore": {bad}}} in the list of classes'
            )
        if self._open:
            for code in np.unique(codes[self._table[codes] == _UNKNOWN]).tolist():
                self._add(code, str(code))
        found = self._table[codes]
        if ignored is not None:
            found = np.where(ignored, np.uint8(IGNORED), found)
        unknown = codes[found == _UNKNOWN]
        if unknown.size:
            code, count = (int(x[0]) for x in np.unique(unknown, return_counts=True))
            what = f"colour #{code:06X}" if self.is_colour else f"value {code}"
            raise BadLabels(
                f"{where}: {what} ({count:,} pixels) is not in {self._where}; add it there, as a class or as ignore"
            )
        return found

    def order(self) -> tuple[list[str], list[Colour], npt.NDArray[np.uint8]]:
        """Names and colours of the classes, and the final number of each number that `numbers` gave."""
        rank = list(range(len(self._names)))
        if self._open:
            rank = sorted(rank, key=lambda i: self._code_of[self._names[i]])
        renumber = np.arange(256).astype(np.uint8)
        renumber[rank] = np.arange(len(rank))
        names = [self._names[i] for i in rank]
        if self.is_colour:
            return names, [split_colour(self._code_of[name]) for name in names], renumber
        return names, [class_colour(i) for i in range(len(names))], renumber


def read_class_list(where: str, data: bytes) -> ClassList:
    """The list in a classes.json.

    One of: `{name: value}`, `{value: name}`, `[name, ...]` (values from 0), `{name: "#RRGGBB"}`,
    `{name: [red, green, blue]}`, `{"#RRGGBB": name}`, `{"classes": [{"title": name, "color": "#RRGGBB"}, ...]}`.
    The name `ignore` is for what does not count; its value may be below 0.

    Raises:
        BadLabels: none of these.
    """
    try:
        pairs = list(_pairs(json.loads(data[:_LARGEST_FILE].decode("utf-8-sig"))))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadLabels(
            f'{where}: no list of classes; write {{"name": value}} with values 0 to {_LARGEST_VALUE}, '
            'or {"name": "#RRGGBB"}'
        ) from None
    if not pairs or len({is_colour for is_colour, _, _ in pairs}) > 1:
        raise BadLabels(f"{where}: {'values and colours in one list' if pairs else 'no classes'}; write one kind")
    is_colour = pairs[0][0]
    names: dict[int, str] = {}
    for _, code, name in pairs if is_colour else sorted(pairs, key=lambda pair: pair[1]):
        if code < 0 and name.casefold() not in _IGNORE:
            raise BadLabels(f"{where}: {name!r} is {code}; classes are 0 to {_LARGEST_VALUE}")
        if names.setdefault(code, name) != name:
            raise BadLabels(f"{where}: {names[code]!r} and {name!r} are of one value or colour; give each its own")
    return ClassList(names, is_colour=is_colour, where=where)


def split_colour(code: int) -> Colour:
    """Red, green and blue of 0xRRGGBB."""
    return code >> 16, code >> 8 & 255, code & 255


def class_colour(number: int) -> Colour:
    """A colour for a class that has none: sixteen differ clearly, then they repeat darker."""
    red, green, blue = split_colour(int(_PALETTE[number % len(_PALETTE)][1:], 16))
    dim = 0.82 ** (number // len(_PALETTE))
    return round(red * dim), round(green * dim), round(blue * dim)


def _pairs(document: Any) -> Iterable[tuple[bool, int, str]]:
    """(is a colour, code, name) of every entry."""
    if isinstance(document, dict) and isinstance(document.get("classes"), list):
        document = document["classes"]
    if isinstance(document, list):
        for number, entry in enumerate(document):
            if isinstance(entry, str):
                yield (*_code(number), _name(entry))
            else:
                yield (*_code(entry["color"]), _name(entry["title"] if "title" in entry else entry["name"]))
        return
    for key, value in document.items():
        if _HEX.fullmatch(key) or (key.isdecimal() and isinstance(value, str) and not _HEX.fullmatch(value)):
            yield (*_code(key), _name(value))
        else:
            yield (*_code(value), _name(key))


def _code(given: Any) -> tuple[bool, int]:
    if isinstance(given, str) and _HEX.fullmatch(given):
        return True, int(given[1:], 16)
    if isinstance(given, list):
        red, green, blue = given
        if not all(type(part) is int and 0 <= part <= 255 for part in given):
            raise ValueError
        return True, red << 16 | green << 8 | blue
    if isinstance(given, bool) or not isinstance(given, int | str) or abs(int(given)) > _LARGEST_VALUE:
        raise ValueError
    return False, int(given)


def _name(given: Any) -> str:
    if not isinstance(given, str) or not given.strip() or len(given) > 200:
        raise ValueError
    return given.strip()
