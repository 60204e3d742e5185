"""Policies: what an archive should be, as TOML; `jobs/reencode.py` makes it so."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from nec_ray.config import Section, Text, check, read_toml, schema
from nec_ray.errors import InputError

_COMMAND = "the command"
_GIVEN: dict[str, Any] = {
    key: {"required": [key], "properties": {key: said}}
    for key, said in {
        "layers": {"type": "integer"},
        "codec": {"type": "string"},
        "keep": {"const": True},
        "tiles": {"type": "string"},
        "max_distortion": {"type": "number"},
    }.items()
}
"""That a key is given, as JSON Schema; null and `keep = false` count as not given."""
_TOGETHER: dict[str, Any] = {
    "oneOf": [_GIVEN["layers"], _GIVEN["codec"], _GIVEN["keep"]],
    "allOf": [
        {"if": _GIVEN["tiles"], "then": _GIVEN["codec"]},
        {"if": _GIVEN["max_distortion"], "then": {"not": {"anyOf": [_GIVEN["tiles"], _GIVEN["keep"]]}}},
    ],
}
"""What `Rule._one_thing` says, for the schema."""


class Rule(Section):
    """What some tiles should be. The first rule whose condition holds decides for a tile."""

    model_config = ConfigDict(json_schema_extra=_TOGETHER)

    name: str = Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f]+$")
    where: Text | None = None
    """SQL condition over `embeddings`, such as "acquired_at < now() - INTERVAL 2 YEAR"; all tiles where not given."""
    layers: int | None = Field(default=None, ge=1, le=64)
    """Keep only the first layers of each payload; tiles that hold no more are left as they are."""
    codec: Text | None = None
    """Codec that the tiles should be under: a codec directory, the folder of a training run, or the first digits of the
    id of one in the archive. Of the same encoder, unless `tiles` says where pixels are."""
    tiles: Text | None = None
    """Tile catalog, a path or URL: encode from its pixels instead of transcoding."""
    keep: bool = False
    """Leave these tiles as they are, whatever later rules say."""
    max_distortion: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Largest loss that is accepted of a cell of tiles: squared error over the old embeddings' variance, 0 to 1 and
    more; any where not given."""

    @model_validator(mode="after")
    def _one_thing(self) -> "Rule":
        if (self.layers is not None) + (self.codec is not None) + self.keep != 1:
            raise ValueError(f"rule {self.name!r}: give one of layers, codec and keep = true")
        if self.tiles is not None and self.codec is None:
            raise ValueError(f"rule {self.name!r}: tiles is for a codec to encode with")
        if self.max_distortion is not None and (self.tiles is not None or self.keep):
            raise ValueError(
                f"rule {self.name!r}: max_distortion is for transcoding: "
                + ("nothing is lost of tiles that are kept" if self.keep else "two encoders cannot be compared")
            )
        return self


class LeaseSection(Section):
    """What keeps two runs from overlapping."""

    seconds: float = Field(default=60, ge=1, le=86_400)
    """How long after its last sign of life a run is taken for dead, and another may begin."""


class CostSection(Section):
    """Prices, by which a run says what it costs and saves; those of Amazon S3 Standard where not given."""

    storage_gb_month: float = Field(default=0.023, ge=0, allow_inf_nan=False)
    """Of a GB (10^9 bytes) kept for a month."""
    reads_1000: float = Field(default=0.0004, ge=0, allow_inf_nan=False)
    """Of 1000 read requests."""
    writes_1000: float = Field(default=0.005, ge=0, allow_inf_nan=False)
    """Of 1000 write requests."""
    currency: str = Field(default="USD", min_length=1, max_length=8)


class Policy(Section):
    """A whole policy."""

    archive: Text
    """The archive: a path or URL."""
    rules: Annotated[list[Rule], Field(min_length=1, max_length=100)]
    lease: LeaseSection = LeaseSection()
    cost: CostSection = CostSection()

    @model_validator(mode="after")
    def _names_differ(self) -> "Policy":
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are named {name!r}")
        return self


class OneRule(Policy):
    """What a command asks for, now: where no tile holds that many layers it is mistaken, a policy has nothing to do."""


def read_policy(path: Path) -> Policy:
    """Policy of a TOML file.

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    return check(Policy, read_toml(path, "policy"), path, "policy")


def one_rule(archive: str, **rule: Any) -> OneRule:
    """A policy of one rule, whose keys are given; keys that are None count as not given.

    Raises:
        InputError: they contradict each other, or a value is impossible.
    """
    given = {key: value for key, value in rule.items() if value is not None}
    try:
        return OneRule.model_validate({"archive": archive, "rules": [{"name": _COMMAND, **given}]})
    except ValidationError as error:
        first = error.errors()[0]
        key = f"{first['loc'][-1]}: " if isinstance(first["loc"][-1], str) else ""  # or it is of the rule as a whole
        said = first["msg"].removeprefix("Value error, ").removeprefix(f"rule {_COMMAND!r}: ")
        raise InputError(f"{archive}: {key}{said}") from None


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy, as schemas/policy.schema.json holds it."""
    return schema(Policy)
