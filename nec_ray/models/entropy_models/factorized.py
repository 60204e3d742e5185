"""CompressAI's fully factorized densities (Balle et al. 2018, arXiv 1802.01436, appendix 6.1), as in the NEC paper."""

import copy

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor

from nec_ray.codec import Arrays, EntropyTables, parts_of
from nec_ray.models.entropy import EntropyModel

_MAX_RADIUS = 4096
_TAIL = 1e-9
"""Probability that may lie outside a channel's table: what does is coded as an escape."""
_DEAD = 1e-4
"""A channel whose symbols differ from 0 more rarely than this costs nothing but escapes."""
_DEAD_CALIBRATION = 1e-3


def tables_of(bottleneck: EntropyBottleneck, latents: Arrays) -> EntropyTables:
    """Integer tables of a trained bottleneck.

    Args:
        bottleneck: the trained densities.
        latents: real latents float32 (tiles, tokens, channels), of each grid scale, to tell dead channels.
    """
    parts = parts_of(latents)
    bottleneck.update(force=True, update_quantiles=True)
    with torch.no_grad():
        quantiles = bottleneck.quantiles[:, 0, :]
        median = quantiles[:, 1]
        # The quantiles of CompressAI leave a tail of 1e-9 on either side.
        reach = torch.maximum(median - quantiles[:, 0], quantiles[:, 2] - median).ceil().clamp(1, _MAX_RADIUS)
        radius = int(reach.max())
        steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
        # In float32 the difference of two sigmoids near 1 is lost in the upper tail.
        exact = copy.deepcopy(bottleneck).double()
        likelihood, _, _ = exact._likelihood(median.double()[:, None, None] + steps, stop_gradient=True)
        density = likelihood[:, 0].numpy()
        centre = median.detach().numpy()
    pmfs, offset = [], np.zeros(len(centre), np.int64)
    for channel, row in enumerate(density):
        inside = np.flatnonzero(row > _TAIL)
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (radius, radius)
        pmfs.append(row[first : last + 1] / max(1.0, float(row.sum())))
        offset[channel] = first - radius
    centres = np.split(centre, np.cumsum([part.shape[2] for part in parts])[:-1])
    moved = np.concatenate(
        [np.mean(np.rint(part - own) != 0, axis=(0, 1)) for part, own in zip(parts, centres, strict=True)]
    )
    dead = (density[:, radius] >= 1 - _DEAD) & (moved <= _DEAD_CALIBRATION)
    return EntropyTables.from_pmf(pmfs, offset, centre, dead, tokens=max(part.shape[1] for part in parts))


def _medians(bottleneck: EntropyBottleneck) -> Tensor:
    found: Tensor = bottleneck._get_medians()[:, 0, 0].detach()
    return found


def _bits(bottleneck: EntropyBottleneck, values: Tensor) -> Tensor:
    # Its forward draws noise from the global generator; its parts are used instead.
    likelihood, _, _ = bottleneck._likelihood(values[:, None, :])
    if bottleneck.use_likelihood_bound:
        likelihood = bottleneck.likelihood_lower_bound(likelihood)
    found: Tensor = -likelihood.log2()[:, 0]
    return found


ENTROPY = EntropyModel(
    make=EntropyBottleneck,
    medians=_medians,
    bits=_bits,
    tables=tables_of,
    fixed=lambda bottleneck: [bottleneck.quantiles],  # solved for when the tables are made
)
