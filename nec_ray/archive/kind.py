"""Which embeddings may stand in one array: of one encoder and one grid, and of the same layers."""

from collections.abc import Mapping
from itertools import takewhile

from nec_ray.codec import CodecSpec, LayerSpec
from nec_ray.errors import InputError, MixedCodecs


def common_layers(where: str, specs: Mapping[str, CodecSpec], layers: int | None = None) -> list[LayerSpec]:
    """The layers that are pulled of tiles of some codecs.

    Args:
        where: the archive, for messages.
        specs: the codecs by id; at least one.
        layers: how many layers are wanted; all where it is None.

    Raises:
        InputError: a codec has fewer layers than are wanted.
        MixedCodecs: the codecs are of several encoders or grids, or hold other layers.
    """
    pick = f"pick one with a condition such as codec_id = '{min(specs)}'"
    encoders = {(spec.encoder_id, spec.grid) for spec in specs.values()}
    if len(encoders) > 1:
        raise MixedCodecs(f"{where}: these tiles have embeddings of {len(encoders)} kinds; {pick}")
    for codec_id, spec in sorted(specs.items()):
        try:
            spec.first_layers(layers)
        except ValueError:
            raise InputError(
                f"{where}: the codec {codec_id[:12]} of some tiles has {len(spec.layers)} layers, not {layers}; "
                "ask for fewer layers"
            ) from None
    if len({spec.width for spec in specs.values()}) > 1:
        raise MixedCodecs(f"{where}: some of these tiles' embeddings are coded by a transform, some are not; {pick}")
    kinds = sorted({tuple(spec.first_layers(layers)) for spec in specs.values()}, key=len)
    if len(kinds) > 1:
        shared = len(list(takewhile(lambda row: len(set(row)) == 1, zip(*kinds, strict=False))))
        ask = f"ask for layers={shared}, which all of them have, or " if shared else ""
        raise MixedCodecs(
            f"{where}: these tiles have embeddings of {len(kinds)} kinds, of {len(kinds[0])} to {len(kinds[-1])} "
            f"layers; {ask}{pick}"
        )
    return list(kinds[0])
