"""The codec room: integer entropy tables, rANS, payloads and the codec directory. numpy and numba only."""

from nec_ray.codec.directory import Codec, load_codec, load_codec_cached, write_codec
from nec_ray.codec.payload import PayloadCoder, Payloads
from nec_ray.codec.spec import CodecSpec, InputSpec, LayerSpec, Lineage
from nec_ray.codec.tables import EntropyTables

__all__ = [
    "Codec",
    "CodecSpec",
    "EntropyTables",
    "InputSpec",
    "LayerSpec",
    "Lineage",
    "PayloadCoder",
    "Payloads",
    "load_codec",
    "load_codec_cached",
    "write_codec",
]
