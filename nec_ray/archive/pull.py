"""Pulled embeddings, and parts of a pull that other processes can do."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nec_ray.archive.kind import common_layers
from nec_ray.archive.layout import archive_codec, archive_spec, pack_codec
from nec_ray.archive.payloads import References, decode, fetch
from nec_ray.codec import Arrays, joined, parts_of, scales_of
from nec_ray.errors import without_secrets
from nec_ray.notebook import facts_html
from nec_ray.storage import Store


@dataclass(frozen=True)
class Pull:
    """Decoded embeddings of one encoder, ordered by tile id."""

    tile_ids: list[str]
    symbols: Arrays
    """int32 (tiles, tokens, channels), exactly what was coded, of each tile by its own codec; where the pulled layers
    are of several grid scales, a tuple of one such array a scale, coarse first."""
    embeddings: Arrays
    """float32, of the shape of the symbols: symbols plus the channels' medians. Of codecs with a transform, always of
    all the encoder's channels (`CodecSpec.width`), and the same on all machines but for a float's last bits."""
    grid: tuple[int, int]
    """Token rows and columns: token `r * cols + c` is row r, column c. The finest one where there are several."""
    encoder_id: str
    layers: int
    n_bytes: npt.NDArray[np.int64]
    """(tiles,) payload bytes fetched for each tile."""
    grids: tuple[tuple[int, int], ...]
    """The token grid of each scale."""

    @property
    def coded_channels(self) -> int:
        """Channels of the symbols, of all grid scales; a transform gives embeddings of more, whatever the layers."""
        return sum(part.shape[2] for part in parts_of(self.symbols))

    def __len__(self) -> int:
        return len(self.tile_ids)

    def __repr__(self) -> str:
        size = f"{int(self.n_bytes.sum()):,} payload bytes"
        return f"<Pull: {len(self):,} tiles of {', '.join(self._scales())}, {size}>"

    def _repr_html_(self) -> str:
        return facts_html(
            f"Pull of {len(self):,} tiles",
            [
                ("embeddings", f"float32, of each tile {', '.join(self._scales())}"),
                ("layers", self.layers),
                ("payload bytes", f"{int(self.n_bytes.sum()):,}"),
                ("encoder", self.encoder_id[:12]),
            ],
        )

    def _scales(self) -> list[str]:
        parts = zip(self.grids, parts_of(self.embeddings), strict=True)
        return [f"{part.shape[1]} tokens ({rows}x{cols}) x {part.shape[2]} channels" for (rows, cols), part in parts]


@dataclass(frozen=True)
class Part:
    """Some tiles of a pull: it can be sent to another process, which reads their payloads and nothing of the index.

    Attributes:
        url: of the archive.
        wanted: where the payloads are.
        layers: only the first layers; all where it is None.
    """

    url: str
    wanted: References
    layers: int | None

    def __len__(self) -> int:
        return len(self.wanted)

    def __repr__(self) -> str:
        return f"<Part: {len(self):,} tiles of {without_secrets(self.url)}>"

    def pull(self) -> Pull:
        """Fetch and decode them, in the order of the part.

        Raises:
            CorruptPayload: a payload fails its checksum; the message names the tile.
            CorruptPack: a pack is gone, since `gc` removed the version.
        """
        return pull(Store(self.url), self.wanted, self.layers)


def parts(url: str, wanted: References, layers: int | None, tiles: int) -> list[Part]:
    """Parts of at most so many tiles, which lie near each other in the packs."""
    order = np.lexsort((wanted.offset, wanted.pack))
    return [Part(url, _some(wanted, order[start : start + tiles]), layers) for start in range(0, len(order), tiles)]


def _some(wanted: References, numbers: npt.NDArray[np.int64]) -> References:
    used, pack = np.unique(wanted.pack[numbers], return_inverse=True)
    return replace(
        wanted,
        tile_ids=[wanted.tile_ids[i] for i in numbers.tolist()],
        packs=[wanted.packs[i] for i in used.tolist()],
        pack=pack.astype(np.int64),
        offset=wanted.offset[numbers],
        length=wanted.length[numbers],
    )


def pull(
    store: Store, wanted: References, layers: int | None, progress: Callable[[int, int], None] | None = None
) -> Pull:
    """Fetch and decode payloads, in the order of the references.

    Args:
        store: of the archive.
        wanted: where the payloads are.
        layers: only the first layers; all where it is None.
        progress: called with (tiles done, tiles).

    Raises:
        MixedCodecs: they are of several encoders, or of several shapes.
        InputError: a codec has fewer layers.
        CorruptPayload: one fails its checksum; the message names the tile.
    """
    specs = {codec_id: archive_spec(store, codec_id) for codec_id in {pack_codec(name) for name in wanted.packs}}
    chosen, first = common_layers(store.url, specs, layers), specs[min(specs)]
    scales = scales_of(first.grid, chosen)
    symbols = [np.empty((len(wanted), *scale.shape), np.int32) for scale in scales]
    embeddings = [np.empty((len(wanted), *shape), np.float32) for shape in first.embedding_shapes(layers)]
    done = 0
    for batch in fetch(store, wanted):
        codec = archive_codec(store, batch.codec_id)
        decoded = decode(codec, [wanted.tile_ids[i] for i in batch.number], batch.payloads, layers)
        for whole, part in zip(symbols, parts_of(decoded), strict=True):
            whole[batch.number] = part
        for latent, part in zip(embeddings, parts_of(codec.dequantise(decoded)), strict=True):
            latent[batch.number] = part
        done += len(batch.number)
        if progress:
            progress(done, len(wanted))
    return Pull(
        tile_ids=wanted.tile_ids,
        symbols=joined(symbols),
        embeddings=joined(embeddings),
        grid=max((scale.grid for scale in scales), key=math.prod),
        grids=tuple(scale.grid for scale in scales),
        encoder_id=first.encoder_id,
        layers=len(chosen),
        n_bytes=wanted.length,
    )
