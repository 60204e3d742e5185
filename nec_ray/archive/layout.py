"""Names inside an archive, and archive.json."""

import json
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nec_ray.codec import Codec, CodecSpec, load_codec_cached, load_spec_cached
from nec_ray.codec.spec import canonical_json
from nec_ray.errors import CorruptIndex, InputError, NoBucket, NotFound, UnsupportedFormat
from nec_ray.storage import Store

FORMAT_VERSION = 1
INDEX = "index"
ARCHIVE_JSON = "archive.json"
_MAX_JSON = 1 << 20
_PACK = re.compile(r"packs/([0-9a-f]{64})/([0-9a-f]{2})/([0-9a-f]{64})\.pack")


class ArchiveInfo(BaseModel):
    """The whole of archive.json."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: Literal[1] = 1
    licence: str | None = None
    attribution: str | None = None


def create_archive(store: Store, info: ArchiveInfo) -> bool:
    """Create archive.json unless it is there; true if this call created it."""
    return store.create(ARCHIVE_JSON, canonical_json(info.model_dump()))


def read_info(store: Store) -> ArchiveInfo:
    """archive.json of the archive at `store`.

    Raises:
        NotFound: no archive there.
        UnsupportedFormat: written by a later release.
    """
    try:
        raw = store.read_start(ARCHIVE_JSON, _MAX_JSON)
    except NoBucket:
        raise
    except NotFound:
        raise NotFound(f"{store.url}: no archive there (archive.json is missing); check the path or URL") from None
    try:
        version = json.loads(raw)["format_version"]
        if version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{store.url}: archive format {version}, this release reads up to {FORMAT_VERSION}; update nec_ray"
            )
        return ArchiveInfo.model_validate_json(raw)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise CorruptIndex(f"{store.url}/{ARCHIVE_JSON}: not an archive's description; restore it") from None


def pack_name(codec_id: str, sha256: str) -> str:
    """Where the pack of this content lies."""
    return f"packs/{codec_id}/{sha256[:2]}/{sha256}.pack"


def pack_codec(name: str) -> str:
    """Codec id of a pack's name.

    Raises:
        CorruptIndex: the name is not one of a pack inside the archive.
    """
    if not is_pack(name):
        raise CorruptIndex(f"the index names {name[:120]!r}, which is no pack of this archive; nothing was read")
    return name.split("/")[1]


def is_pack(name: str) -> bool:
    """Whether a name is one of a pack."""
    match = _PACK.fullmatch(name)
    return match is not None and match[3][:2] == match[2]


def is_codec_id(text: str) -> bool:
    """Whether a text is a codec's id."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def archive_codec(store: Store, codec_id: str) -> Codec:
    """A codec of the archive, loaded once a process."""
    return load_codec_cached(_codec_url(store, codec_id))


def archive_spec(store: Store, codec_id: str) -> CodecSpec:
    """What a codec of the archive declares, read once a process: what fetching its payloads needs, not decoding."""
    return load_spec_cached(_codec_url(store, codec_id))


def _codec_url(store: Store, codec_id: str) -> str:
    if not is_codec_id(codec_id):
        raise CorruptIndex(f"the index names codec {codec_id[:80]!r}, which is no codec id; nothing was read")
    return f"{store.url}/codecs/{codec_id}"


def codec_ids(store: Store) -> list[str]:
    """Ids of the codecs that the archive holds."""
    names = store.names("codecs")
    return [name.split("/")[1] for name in names if name.endswith("/codec.json")]


def find_codec(store: Store, prefix: str) -> Codec:
    """The archive's one codec whose id starts with `prefix`.

    Raises:
        NotFound: none does.
        InputError: several do.
    """
    found = [codec_id for codec_id in codec_ids(store) if codec_id.startswith(prefix)]
    if not found:
        there = ", ".join(codec_id[:12] for codec_id in codec_ids(store)) or "none"
        raise NotFound(f"{store.url}: no codec {prefix}; there are: {there}")
    if len(found) > 1:
        raise InputError(f"{store.url}: {len(found)} codecs start with {prefix!r}; give more digits")
    return archive_codec(store, found[0])


def install_codec(store: Store, codec: Codec) -> None:
    """Copy a codec into the archive, codec.json last, so that it is there whole or not at all.

    One that is there already is made young again, so that `gc` does not take it from under a run that has not
    committed a tile of it yet.
    """
    for name, data in codec.files().items():
        path = f"codecs/{codec.id}/{name}"
        if not store.create(path, data):
            store.touch(path)
