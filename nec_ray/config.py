"""Configuration files: TOML checked against a closed model, so that a misspelt key is an error and not a default."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nec_ray.errors import BadRecipe, NotFound


class Section(BaseModel):
    """A part of a configuration file: unknown keys are refused, docstrings become the schema's descriptions.

    Numbers are finite, and values are taken as they are, so that the code accepts what the JSON Schema does: "2" and
    true are no integers.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; write something, or leave the key out if it may be left out")
    return text


Text = Annotated[str, Field(json_schema_extra={"pattern": r"\S"}), AfterValidator(_not_blank)]
"""A string that says something: a blank address is the current folder, a blank condition every tile."""


Model = TypeVar("Model", bound=Section)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The document of a TOML file.

    Args:
        path: the file.
        what: what it is called in messages, such as `recipe`.

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path}: no {what} there; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path}: no TOML ({error})") from None
    except OSError as error:
        raise BadRecipe(f"{path}: cannot be read ({error.strerror})") from None


def override(document: dict[str, Any], text: str) -> None:
    """Set a key of a document.

    Args:
        document: what `read_toml` gave.
        text: `key=value`, keys of sections with dots, of a list by their place from 0: `encoders.0.weights=a.pth`. The
            value is TOML; a bare word is a string.

    Raises:
        BadRecipe: it is not written so, or leads through a value or past the end of a list.
    """
    key, equals, value = text.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not all([*path, last]):
        raise BadRecipe(f"--set {text}: write it as key=value, such as train.beta=0.02")
    inside: Any = document
    for part in path:
        inside = _inside(inside, part, text)
    if isinstance(inside, list):
        inside[_place(inside, last, text)] = toml_value(value)
    else:
        inside[last] = toml_value(value)


def _inside(outer: Any, part: str, text: str) -> Any:
    found = outer[_place(outer, part, text)] if isinstance(outer, list) else outer.setdefault(part, {})
    if not isinstance(found, dict | list):
        raise BadRecipe(f"--set {text}: {part} is no section")
    return found


def _place(outer: list[Any], part: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(outer):
        raise BadRecipe(f"--set {text}: {part} is no place in a list of {len(outer)}")
    return int(part)


def toml_value(text: str) -> Any:
    """What stands behind `key=`: a TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check(model: type[Model], document: dict[str, Any], path: Path, what: str) -> Model:
    """A document as its model.

    Raises:
        BadRecipe: a key is unknown or its value impossible; the message names the key.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        said = {"extra_forbidden": f"no such key in this {what}", "missing": "must be given"}.get(
            first["type"], first["msg"]
        )
        said = said.removeprefix("Value error, ")
        raise BadRecipe(f"{path}: {key}{said}; the keys are in schemas/{what.replace(' ', '_')}.schema.json") from None


def schema(model: type[Section]) -> dict[str, Any]:
    """JSON Schema of a configuration file, as `schemas/` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
