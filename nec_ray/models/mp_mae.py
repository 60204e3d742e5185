"""MP-MAE: a masked ConvNeXt V2 that predicts many modalities from Sentinel-2 (MMEarth, section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nec_ray.errors import InputError
from nec_ray.models.convnext import (
    SIZES,
    STAGES,
    Block,
    ChannelNorm,
    ConvNextConfig,
    ConvNextEncoder,
    Reach,
    enlarged,
    initialise,
    visible_map,
)
from nec_ray.models.mae import random_keep
from nec_ray.models.pretext import BANDS, Inputs, Output, Targets, TaskWeighting, Weighting, mmearth_outputs, task_loss

MASK_RATIO = 0.6
"""Of the patches: 30 of 7x7 are masked."""
DECODER_DIM = 512

Pool = Literal["masked", "all"]


@dataclass(frozen=True)
class MpMaeConfig:
    """What a model is fed, what it predicts, and how.

    Raises:
        InputError: no outputs, or two of one name.
    """

    encoder: ConvNextConfig
    outputs: tuple[Output, ...]
    weighting: Weighting = "uncertainty"
    decoder_dim: int = DECODER_DIM
    pool: Pool = "masked"
    """Places that image heads average: the masked ones (the paper), or all (the released code)."""
    reach: Reach = "sample"
    """See `ConvNextEncoder`."""

    def __post_init__(self) -> None:
        names = [output.name for output in self.outputs]
        if not names or len(set(names)) < len(names) or self.decoder_dim < 1:
            raise InputError(f"outputs {names} of {self.decoder_dim} channels: give at least one, each once")

    @classmethod
    def mmearth(
        cls,
        size: str,
        *,
        pixels: int,
        patch: int,
        inputs: Inputs = "s2",
        targets: Targets = "all",
        weighting: Weighting = "uncertainty",
    ) -> "MpMaeConfig":
        """One of the paper's models.

        Args:
            size: of `convnext.SIZES`.
            pixels: a side of the input.
            patch: pixels a side.
            inputs: Sentinel-2's visible bands, or its 12.
            targets: Sentinel-2 alone, or with pixel modalities, image modalities, or all (Tables 3 and 4).
            weighting: of the tasks.
        """
        if size not in SIZES:
            raise InputError(f"no size {size!r}; there are {', '.join(SIZES)}")
        encoder = ConvNextConfig(size=pixels, patch=patch, bands=len(BANDS[inputs]), **SIZES[size])
        return cls(encoder, mmearth_outputs(targets, inputs), weighting)


@dataclass(frozen=True)
class PretextLosses:
    """What a batch cost."""

    loss: Tensor
    """Weighted sum of the tasks'."""
    tasks: dict[str, Tensor] = field(default_factory=dict)
    """Each task's own, detached; NaN where a batch had nothing of it."""


class MpMae(nn.Module):
    """Encoder, a decoder for each task, and the weighting of their losses.

    Every decoder is one dense ConvNeXt V2 block on the projected visible places and a mask token elsewhere; a pixel
    head predicts each place's patch, an image head one vector of the image.
    """

    def __init__(self, config: MpMaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvNextEncoder(config.encoder, config.reach)
        self.decoder = MpMaeDecoder(config)
        self.weighting = TaskWeighting(len(config.outputs), config.weighting)

    def forward(
        self,
        pixels: Tensor,
        targets: Mapping[str, Tensor],
        *,
        mask_ratio: float = MASK_RATIO,
        generator: torch.Generator | None = None,
    ) -> PretextLosses:
        """Losses of a batch.

        Args:
            pixels: normalised input (batch, bands, size, size), NaN where missing: such values are 0, the mean, to
                the encoder.
            targets: normalised targets by the outputs' names; see `pretext`. Others are ignored.
            mask_ratio: share of masked patches.
            generator: of the masks, on the pixels' device.

        Raises:
            InputError: a target is not there, or of another shape or type.
        """
        keep = random_keep(len(pixels), self.config.encoder.tokens, mask_ratio, generator, pixels.device)
        features = self.encoder(pixels.nan_to_num(nan=0.0), keep)
        losses, there = self.decoder.losses(features[-1], keep, targets)
        whole = self.weighting(losses, there)
        tasks = {
            output.name: torch.where(present, loss.detach(), torch.nan)
            for output, loss, present in zip(self.config.outputs, losses, there, strict=True)
        }
        return PretextLosses(whole, tasks)

    def log_variances(self) -> dict[str, float]:
        """The tasks' learned uncertainties; none of equal weighting."""
        if self.weighting.log_vars is None:
            return {}
        return dict(zip((output.name for output in self.config.outputs), self.weighting.log_vars.tolist(), strict=True))


class MpMaeDecoder(nn.Module):
    """One stage's features -> predictions of every task.

    Args:
        config: of the model.
        stage: whose features; the paper's is the last one, whose places are the patches. An earlier one has more
            places, of which each predicts fewer pixels; masks are whole patches still.
        channels: of the features; the stage's where it is None.
    """

    def __init__(self, config: MpMaeConfig, stage: int = STAGES, channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.side, self.patch = encoder.side_of(stage), encoder.patch >> (STAGES - stage)
        dim, patch = config.decoder_dim, self.patch
        self.proj = nn.Conv2d(channels or encoder.dims[stage - 1], dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleDict({output.name: Block(dim) for output in config.outputs})
        self.heads = nn.ModuleDict(
            {
                output.name: nn.Conv2d(dim, patch**2 * output.width, 1)
                if output.level == "pixel"
                else nn.Linear(dim, output.width)
                for output in config.outputs
            }
        )
        # Shared by all image heads, as released.
        self.image_norm = (
            ChannelNorm(dim) if any(output.level == "image" for output in config.outputs) else nn.Identity()
        )
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Predictions by task, as `pretext.task_loss` takes them.

        Args:
            features: of the stage (batch, channels, side, side); masked places are not looked at.
            keep: (batch, kept) indexes of the visible patches.
        """
        visible = self._visible(keep)
        x = torch.where(visible, self.proj(features), self.mask_token.to(features.dtype))
        pooled = (~visible if self._pools_masked(keep) else torch.ones_like(visible)).to(x.dtype)
        predictions = {}
        for output in self.config.outputs:
            y = self.blocks[output.name](x)
            if output.level == "pixel":
                predictions[output.name] = self.heads[output.name](y).flatten(2).transpose(1, 2)
            else:
                mean = (self.image_norm(y) * pooled).sum((2, 3)) / pooled.sum((2, 3))
                predictions[output.name] = self.heads[output.name](mean)
        return predictions

    def losses(
        self, features: Tensor, keep: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Each task's loss, and whether the batch had anything of it (bool), in the outputs' order.

        Over masked patches; over all where nothing is masked.
        """
        missing = [output.name for output in self.config.outputs if output.name not in targets]
        if missing:
            raise InputError(f"the batch lacks the targets {', '.join(missing)}; give them, all missing if need be")
        predictions = self(features, keep)
        counted = ~self._visible(keep).flatten(1)
        if not self._masks(keep):
            counted = torch.ones_like(counted)
        found = [
            task_loss(output, predictions[output.name], targets[output.name], counted, self.patch)
            for output in self.config.outputs
        ]
        return [loss for loss, _ in found], [there for _, there in found]

    def _visible(self, keep: Tensor) -> Tensor:
        """Bool (batch, 1, side, side): the stage's places in visible patches."""
        return enlarged(visible_map(keep, self.config.encoder.side), self.side)

    def _masks(self, keep: Tensor) -> bool:
        return keep.shape[1] < self.config.encoder.tokens

    def _pools_masked(self, keep: Tensor) -> bool:
        return self.config.pool == "masked" and self._masks(keep)
