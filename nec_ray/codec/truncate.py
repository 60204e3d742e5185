"""Codecs of the first layers of another: its payloads are the first bytes of the other's, byte for byte."""

import hashlib
from pathlib import Path

from nec_ray.codec.directory import Codec, golden_tensors, tensor_bytes, write_directory
from nec_ray.codec.payload import PayloadCoder
from nec_ray.codec.scales import joined, parts_of

MEDIANS = "medians"
"""Array of a truncated codec's decoder.safetensors: the medians of all channels of the latent, which stand for those
that the codec leaves out where the decoder layer is used."""


def truncate_codec(codec: Codec, layers: int, folder: Path) -> str:
    """Write the codec of the first layers of another.

    Encoder, encoder id and decoder layer stay; tables, golden symbols and the axes of the pooled vector are cut to the
    channels of these layers; the grid stays even where no layer of its scale is left; `lineage.parent` becomes the id
    of `codec`, `bits_per_symbol` that of the golden payloads.
    It depends on nothing but its arguments, so that the same cut has the same id everywhere.

    Args:
        codec: of which codec.
        layers: how many of its layers; fewer than it has.
        folder: where to; must not exist.

    Returns:
        The codec id.

    Raises:
        ValueError: not fewer layers than the codec has, or none.
        CorruptCodec: a file of the codec is not the one that codec.json names.
    """
    spec = codec.spec
    if not 1 <= layers < len(spec.layers):
        raise ValueError(f"the codec has {len(spec.layers)} layers, of which {layers} cannot be cut off")
    kept = spec.layers[:layers]
    channels = sum(layer.channels for layer in kept)
    tables = codec.tables.first(channels)
    scales = codec.scales(layers)
    golden = joined(
        part[:, :, : len(scale.rows)] for part, scale in zip(parts_of(codec.golden()), scales, strict=False)
    )
    payloads = PayloadCoder(tables, kept).compress(golden)
    size = len(payloads) * sum(layer.tokens * layer.channels for layer in kept)
    decoder = codec.tensors("decoder")
    decoder.setdefault(MEDIANS, codec.tables.median)
    center, basis = codec.pool_axes()
    transform = None if codec.transform is None else codec.transform.first(channels)
    width = channels if transform is None else len(center)
    data = {
        "tables.safetensors": tensor_bytes(
            {
                **tables.to_tensors(),
                "pool_center": center[:width],
                "pool_basis": basis[:width],
                **(transform.to_tensors() if transform else {}),
            }
        ),
        "encoder.safetensors": codec.file("encoder.safetensors"),
        "decoder.safetensors": tensor_bytes(decoder),
        "golden.safetensors": tensor_bytes(golden_tensors(payloads, golden)),
    }
    lineage = {"parent": codec.id, "bits_per_symbol": 8 * int(payloads.length.sum()) / size}
    cut = spec.model_copy(
        update={
            "channels": channels,
            "layers": kept,
            "lineage": spec.lineage.model_copy(update=lineage),
            "files": {name: hashlib.sha256(blob).hexdigest() for name, blob in data.items()},
        }
    )
    return write_directory(folder, cut, data)


def is_prefix(codec: Codec, longer: Codec) -> bool:
    """Whether the first bytes of a payload of `longer` are the payload that `codec` would make of the same tile."""
    count = len(codec.spec.layers)
    if codec.encoder_id != longer.encoder_id or codec.spec.grid != longer.spec.grid:
        return False
    if codec.spec.layers != longer.spec.layers[:count]:
        return False
    if codec.transform is not None and longer.transform is not None:
        if not codec.transform.equals(longer.transform.first(codec.spec.channels)):
            return False
    elif codec.transform is not longer.transform:
        return False
    return codec.tables.equals(longer.tables.first(codec.spec.channels))
