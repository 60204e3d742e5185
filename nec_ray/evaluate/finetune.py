"""Trains a codec's encoder and the head end to end on pixels: what a consumer of raw data does (NEC, section 4).

The paper fine-tunes the whole model on raw data. What is kept is the head and its training; the encoder learns at a
tenth of the head's rate, and tiles are mirrored and turned, which only a consumer of pixels can do.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nec_ray.codec import Codec
from nec_ray.errors import InputError
from nec_ray.evaluate.fitting import Floats, choose_epochs, cosine, device, fit, poly
from nec_ray.evaluate.head import Scores, Targets, score
from nec_ray.evaluate.segment import ClassMap, SegmentationScores, predict_classes, score_segmentation
from nec_ray.models.augment import augment
from nec_ray.models.embed import encoder_of, model_config
from nec_ray.models.heads import ClassificationHead, TokenHead
from nec_ray.models.segmentation import PixelHead, SegmentationDecoder, SegmentationHead
from nec_ray.models.unet import UNetHead

_BATCH = 32
_STEPS = 1500  # at least, within these epochs, where their number is not given
_EPOCHS = (20, 100)
_LEARNING_RATE, _ENCODER_RATE = 1e-3, 1e-4
_AUGMENTATIONS = ("flip", "turn")
_SCORE_BATCH = 64


class PixelEncoder(nn.Module):
    """A codec's encoder from raw pixels on: float32 (tiles, bands, size, size) -> (tiles, tokens, channels).

    While it is trained, tiles are mirrored and turned at random.

    Args:
        codec: whose encoder.
        seed: of the augmentations.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, codec: Codec, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder_of(codec)
        spec = codec.spec.input
        self.register_buffer("mean", torch.tensor(spec.mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(spec.std, dtype=torch.float32)[:, None, None])
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = self._generator.get_state()

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens of raw pixels."""
        x = (pixels - self.mean) / self.std
        if self.training:
            if self._generator.device != x.device:
                self._generator = torch.Generator(x.device).manual_seed(self._seed)
            self._drawn = self._generator.get_state()
            x = augment(x, _AUGMENTATIONS, self._generator)
        tokens: Tensor = self.encoder(x)
        return tokens

    def turned_alike(self, masks: Tensor) -> Tensor:
        """Masks (tiles, size, size) mirrored and turned as the tiles of the last step of training were."""
        again = torch.Generator(self._generator.device)
        again.set_state(self._drawn)
        return augment(masks[:, None], _AUGMENTATIONS, again)[:, 0]


def evaluate_pixels(
    train_x: Floats,
    train_y: Targets,
    test_x: Floats,
    test_y: Targets,
    codec: Codec,
    *,
    classes: int,
    epochs: int | None = None,
    seed: int = 0,
) -> Scores:
    """Train encoder and head on pixels, and score them.

    Args:
        train_x: float32 (tiles, bands, size, size), raw units, as the codec's input says.
        train_y: int64 (tiles,) classes, 0 and up.
        test_x: as `train_x`.
        test_y: int64 (tiles,).
        codec: whose encoder training begins from.
        classes: number of classes.
        epochs: passes over the training tiles; chosen by their number where it is None.
        seed: of the head's initial weights, the order of tiles and the augmentations.
    """
    target = torch.from_numpy(train_y).to(device())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PixelEncoder(codec, seed)
        channels = model_config(codec).dim
        head = ClassificationHead(channels, classes, first_layer=encoder).to(device()).eval()
        _fit(
            head,
            train_x,
            lambda x, tiles: nn.functional.cross_entropy(head.score(x), target[tiles.to(target.device)]),
            epochs,
            cosine,
        )
    with torch.no_grad():
        parts = torch.split(torch.from_numpy(test_x), _SCORE_BATCH)
        predicted = np.concatenate([head(part.to(device())).argmax(dim=1).cpu().numpy() for part in parts])
    return score(test_y, predicted, train_y, classes)


def segment_pixels(
    train_x: Floats,
    train_y: ClassMap,
    test_x: Floats,
    test_y: ClassMap,
    codec: Codec,
    *,
    classes: int,
    decoder: SegmentationDecoder = "nec",
    epochs: int | None = None,
    seed: int = 0,
) -> tuple[SegmentationScores, ClassMap]:
    """Train encoder and segmentation head on pixels, and score them.

    Args:
        train_x: see `evaluate_pixels`, like all that is not named here.
        train_y: uint8 (tiles, rows, columns) class numbers or `IGNORED`, as many rows as columns.
        test_x: as `train_x`.
        test_y: as `train_y`.
        codec: see `evaluate_pixels`.
        classes: number of classes.
        decoder: of the head.
        epochs: see `evaluate_pixels`.
        seed: see `evaluate_pixels`.

    Returns:
        The scores, and what was said of the test tiles, of `test_y`'s shape.

    Raises:
        InputError: masks that are not square: tiles could not be turned.
    """
    if train_y.shape[1] != train_y.shape[2]:
        raise InputError(
            f"masks of {train_y.shape[2]} x {train_y.shape[1]} pixels: an encoder is trained on square tiles; "
            "cut square tiles, or leave it frozen"
        )
    masks = torch.from_numpy(train_y)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PixelEncoder(codec, seed)
        channels = model_config(codec).dim
        head: PixelHead
        if decoder == "unet":
            head = UNetHead([channels], classes, [codec.spec.grid], encoder)
        else:
            head = SegmentationHead(channels, classes, codec.spec.grid, first_layer=encoder)
        head = head.to(device()).eval()

        def loss(x: Tensor, tiles: Tensor) -> Tensor:
            true = encoder.turned_alike(masks[tiles].to(x.device))
            return head.loss(x, true.long())

        _fit(head, train_x, loss, epochs, poly)
    predicted = np.concatenate(list(predict_classes(head, test_x, (test_y.shape[1], test_y.shape[2]))))
    return score_segmentation(test_y, predicted, train_y, classes), predicted


def _fit(
    head: TokenHead,
    pixels: Floats,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int | None,
    decay: Callable[[float], float],
) -> None:
    fit(
        head,
        pixels,
        loss,
        epochs=epochs or choose_epochs(len(pixels), _BATCH, _STEPS, _EPOCHS),
        batch=_BATCH,
        learning_rate=_LEARNING_RATE,
        first_layer_rate=_ENCODER_RATE,
        score_batch=_SCORE_BATCH,
        decay=decay,
        progress=None,
    )
