"""What `jobs/encode.py` is told: one encoding run, as TOML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from nec_ray.config import Section, Text, check, read_toml, schema, toml_value
from nec_ray.errors import BadRecipe
from nec_ray.runtime.encode import COMMIT_SECONDS, WAIT_SECONDS
from nec_ray.runtime.plan import SHARD_TILES

_WHAT = "encode job"
_TEXTS = ("catalog", "archive", "codec", "where")
"""Keys whose overrides are strings also where they look like numbers, as the first digits of a codec's id may."""


class EncodeJob(Section):
    """One encoding run."""

    catalog: Text
    """Tile catalog: a path or URL."""
    archive: Text
    """The archive: a path or URL that every node reaches; created where it is not there."""
    codec: Text | None = None
    """Codec directory, or first digits of the id of one in the archive; the archive's own where not given."""
    where: Text | None = None
    """SQL condition over the catalog's columns; all tiles where not given."""
    workers: int | None = Field(default=None, ge=1)
    """Encoder processes; one a core, or `encoders_per_gpu` a GPU where there are any, if not given."""
    encoders_per_gpu: int = Field(default=1, ge=1, le=64)
    """Models that share one GPU."""
    cores: int = Field(default=0, ge=0)
    """That the cluster's autoscaler is asked for while the run lasts; 0 takes the nodes that are there."""
    gpus: int = Field(default=0, ge=0)
    """Likewise."""
    wait_seconds: float = Field(default=WAIT_SECONDS, ge=0, le=604_800, allow_inf_nan=False)
    """How long to wait for these cores and GPUs; after that the run begins with what there is."""
    retry_failed: bool = False
    """Encode failed tiles again."""
    commit_seconds: float = Field(default=COMMIT_SECONDS, ge=0, le=86_400, allow_inf_nan=False)
    """How often finished shards are committed: the most work that a killed run loses."""
    shard_tiles: int = Field(default=SHARD_TILES, ge=1, le=65_536)
    """Tiles that are read, encoded and packed together; another number makes other batches, not other payloads."""


def read_encode_job(path: Path, overrides: Sequence[str] = ()) -> EncodeJob:
    """The job of a TOML file.

    Args:
        path: the file.
        overrides: `key=value`, which win over the file's.

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    document = read_toml(path, _WHAT)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BadRecipe(f"--set {override}: write it as key=value, such as workers=4")
        document[key.strip()] = value if key.strip() in _TEXTS else toml_value(value)
    return check(EncodeJob, document, path, _WHAT)


def encode_job_schema() -> dict[str, Any]:
    """JSON Schema of the file, as schemas/encode_job.schema.json holds it."""
    return schema(EncodeJob)
