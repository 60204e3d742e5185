"""Reads plain data from a pickle without unpickling it: no name that it gives is looked up, and nothing is called.

GEO-Bench keeps its tasks and the attributes of every sample as pickles. Here containers, numbers, texts and bytes
become themselves, and an object of the few classes that GEO-Bench writes becomes a `Record` of what the file says of
it. Any other name, and any opcode that those files do not need, is refused.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nec_ray.errors import BadSource

MOST_BYTES = 1 << 23
"""Of a pickle: six times the largest of GEO-Bench's."""
_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("datetime", "datetime"),
    ("datetime", "date"),
    ("affine", "Affine"),
    ("rasterio.crs", "CRS"),
}
_PACKAGES = re.compile(r"(geobench|ccb)(\.[A-Za-z_]\w*)*", re.ASCII)
"""GEO-Bench, and what it was called before: classes of tasks, bands and labels."""


@dataclass(frozen=True, slots=True)
class Name:
    """What stands for a class or function: its name, and no more."""

    module: str
    name: str


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object as the pickle describes it."""

    name: Name
    args: tuple[Any, ...]
    """What its class or function would have been called with."""
    state: Any = None
    """What it would have been given then, mostly a dict of its attributes."""


def parse(data: bytes, where: str) -> Any:
    """What a pickle of protocol 3 to 5 holds.

    Args:
        data: the pickle.
        where: what to call it in an error.

    Raises:
        BadSource: it is damaged, too large, or holds anything but plain data and objects of the listed classes.
    """
    if len(data) > MOST_BYTES:
        raise BadSource(f"{where}: a pickle of {len(data):,} bytes, {MOST_BYTES:,} are the most")
    machine = _Machine(data)
    try:
        return machine.run()
    except _Refused as error:
        raise BadSource(f"{where}: its pickle holds {error}, which is more than plain data; it is not read") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error):
        raise BadSource(f"{where}: its pickle is damaged; fetch the data set again") from None


class _Refused(Exception):
    """What a pickle may not hold."""


class _Machine:
    """The bytes, and the stack and memo that they work on; each step is one opcode (see `pickletools`)."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        """Stacks below the marks."""
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            if code not in _STEPS:
                raise _Refused(f"the opcode {code!r}")
            _STEPS[code](self)
        if self.marked:
            raise ValueError
        [value] = self.stack
        return value

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count < 0 or self.at + count > len(self.data):
            raise ValueError
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number, in a form of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        """The next text up to a newline."""
        text = self.data[self.at : self.data.index(b"\n", self.at)]
        self.at += len(text) + 1
        return text.decode()

    def items(self) -> list[Any]:
        """What stands above the last mark; both go."""
        found, self.stack = self.stack, self.marked.pop()
        return found

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise ValueError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target, keys = self.stack[-1], values[::2]
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise TypeError
        target.update(zip(keys, values[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if (module, name) not in _NAMES and not (_PACKAGES.fullmatch(module) and name.isidentifier()):
            raise _Refused(f"the name {f'{module}.{name}'[:80]!r}")
        self.stack.append(Name(module, name))

    def make(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise TypeError
        self.stack.append(Record(name, args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Record):
            raise TypeError
        target.state = state


def _value(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        value = read(machine)  # which may put another stack in place
        machine.stack.append(value)

    return step


def _long(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.number("<B")), "little", signed=True)


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME: how the bytes were buffered
    b"N": _value(lambda _: None),
    b"\x88": _value(lambda _: True),
    b"\x89": _value(lambda _: False),
    b"K": _value(lambda m: m.number("<B")),
    b"M": _value(lambda m: m.number("<H")),
    b"J": _value(lambda m: m.number("<i")),
    b"\x8a": _value(_long),
    b"G": _value(lambda m: m.number(">d")),
    b"\x8c": _value(lambda m: m.take(m.number("<B")).decode()),
    b"X": _value(lambda m: m.take(m.number("<I")).decode()),
    b"C": _value(lambda m: m.take(m.number("<B"))),
    b"B": _value(lambda m: m.take(m.number("<I"))),
    b"]": _value(lambda _: []),
    b"}": _value(lambda _: {}),
    b")": _value(lambda _: ()),
    b"(": lambda m: m.mark(),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": _value(lambda m: tuple(m.items())),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.items()),
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.set_items(m.items()),
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    b"q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    b"r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    b"h": _value(lambda m: m.memo[m.number("<B")]),
    b"j": _value(lambda m: m.memo[m.number("<I")]),
    b"c": lambda m: m.name(m.line(), m.line()),  # GLOBAL
    b"\x93": lambda m: m.name(m.stack.pop(-2), m.stack.pop()),  # STACK_GLOBAL
    b"R": lambda m: m.make(),  # REDUCE and NEWOBJ: what would be called is recorded
    b"\x81": lambda m: m.make(),
    b"b": lambda m: m.build(),
}
