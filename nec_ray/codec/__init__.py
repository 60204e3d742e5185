"""The codec room: integer entropy tables, rANS, payloads and the codec directory. numpy and numba only."""

from nec_ray.codec.directory import Codec, load_codec, load_codec_cached, load_spec_cached, write_codec
from nec_ray.codec.payload import PayloadCoder, Payloads
from nec_ray.codec.scales import Arrays, Scale, joined, of_tiles, parts_of, scales_of
from nec_ray.codec.spec import CodecSpec, InputSpec, LayerSpec, Lineage
from nec_ray.codec.tables import EntropyTables
from nec_ray.codec.transform import Transform
from nec_ray.codec.truncate import is_prefix, truncate_codec

__all__ = [
    "Arrays",
    "Codec",
    "CodecSpec",
    "EntropyTables",
    "InputSpec",
    "LayerSpec",
    "Lineage",
    "PayloadCoder",
    "Payloads",
    "Scale",
    "Transform",
    "is_prefix",
    "joined",
    "load_codec",
    "load_codec_cached",
    "load_spec_cached",
    "of_tiles",
    "parts_of",
    "scales_of",
    "truncate_codec",
    "write_codec",
]
