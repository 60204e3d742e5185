"""Loads the machine-readable contracts of `schemas/`: the one place that knows where they lie."""

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

_HERE = Path(__file__).resolve().parent
_FOLDERS = (_HERE / "schemas", _HERE.parent / "schemas")  # installed wheel, source checkout


def contract_text(name: str) -> str:
    """Text of the contract `name`, a file name in `schemas/`."""
    for folder in _FOLDERS:
        path = folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"contract {name} is in none of {[str(f) for f in _FOLDERS]}")


@functools.cache
def contract(name: str) -> Any:
    """The JSON contract `name`, parsed."""
    return json.loads(contract_text(name))


@functools.cache
def arrow_schema(name: str, part: str = "columns") -> pa.Schema:
    """Arrow schema written in a part of the JSON contract `name`: a list of columns `{name, type, nullable, doc}`."""
    columns = contract(name)[part]
    return pa.schema([pa.field(c["name"], _arrow_type(c["type"]), nullable=c["nullable"]) for c in columns])


def _arrow_type(spec: Any) -> pa.DataType:
    """A type is an Arrow alias, `["list", type]`, or `{field: type}` for a struct."""
    if isinstance(spec, dict):
        return pa.struct([pa.field(name, _arrow_type(t)) for name, t in spec.items()])
    if isinstance(spec, list):
        return pa.list_(pa.field("element", _arrow_type(spec[1])))
    if spec == "timestamp":
        return pa.timestamp("us", tz="UTC")
    return pa.type_for_alias(spec)
