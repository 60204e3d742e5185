"""Which codec a run encodes with."""

import os
from pathlib import Path

from nec_ray.archive.hints import did_you_mean
from nec_ray.archive.layout import archive_spec, codec_ids, find_codec
from nec_ray.codec import Codec, load_codec
from nec_ray.errors import InputError, NotFound
from nec_ray.storage import Store
from nec_ray.tiles import OrderedTiles, check_bands

RGB_CODEC = Path(__file__).parent.parent / "data" / "rgb_codec"
"""The codec that nec_ray brings along: for 8-bit tiles of red, green and blue; its card says what it was trained on."""


def choose_codec(url: str | os.PathLike[str] | None, store: Store, tiles: OrderedTiles) -> Codec:
    """The codec that was named, the archive's own, or for 8-bit RGB tiles in a new archive `RGB_CODEC`.

    Args:
        url: a codec directory, the folder of a training run, or the first digits of the id of a codec in the archive.
        store: the archive.
        tiles: what is to be encoded.

    Raises:
        InputError: none is named, and the archive has several, or none and `RGB_CODEC` is not for these tiles.
        NotFound: no such codec.
        CodecMismatch: it is not for this catalog's bands.
    """
    if url is not None:
        codec = named_codec(os.fspath(url), store)
    else:
        ids = codec_ids(store) if store.exists("codecs") else []
        if len(ids) > 1:
            raise InputError(f"{store.url} holds several codecs; name one with --codec")
        codec = find_codec(store, ids[0]) if ids else _rgb_codec(store, tiles)
    check_bands(tiles.band_sets, codec.spec.input.bands, tiles.url)
    return codec


def _rgb_codec(store: Store, tiles: OrderedTiles) -> Codec:
    codec = load_codec(RGB_CODEC)
    if tiles.dtypes <= {"uint8"} and any(set(codec.spec.input.bands) <= set(bands) for bands in tiles.band_sets):
        return codec
    raise InputError(
        f"{store.url} holds no codec yet, and the built-in one is for 8-bit tiles of "
        f"{', '.join(codec.spec.input.bands)}; name one for these tiles with --codec (`nec train` makes one)"
    )


def akin_codecs(store: Store, codec: Codec) -> list[str]:
    """Ids of the archive's codecs of the same encoder."""
    return [one for one in codec_ids(store) if archive_spec(store, one).encoder_id == codec.encoder_id]


def named_codec(text: str, store: Store) -> Codec:
    """A codec by its directory, the folder of a training run, or the first digits of its id in the archive.

    Raises:
        NotFound: no such codec.
    """
    try:
        return load_codec(text)
    except NotFound as error:
        if Store(text).exists("codec/codec.json"):
            return load_codec(f"{text.rstrip('/')}/codec")  # the folder that `nec train --out` made
        if text and set(text) <= set("0123456789abcdef"):
            return find_codec(store, text)
        there = ", ".join(one[:12] for one in codec_ids(store)) if store.exists("codecs") else ""
        raise NotFound(f"{error}{_beside(text)}{f'; the archive holds {there}' if there else ''}") from None


def _beside(text: str) -> str:
    """`; did you mean 'x'?` of a local folder beside one that is not there and that holds a codec; or nothing."""
    place = Path(text).parent
    if "://" in text or not place.is_dir():
        return ""
    holds = [*place.glob("*/codec.json"), *place.glob("*/codec/codec.json")]
    return did_you_mean(Path(text).name, {path.relative_to(place).parts[0] for path in holds})
