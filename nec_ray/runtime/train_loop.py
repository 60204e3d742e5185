"""What every Ray Train worker runs; in the package, so that workers can import it."""

import csv
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.errors import RunError
from nec_ray.runtime.recipe import Recipe, TrainSection

_FIELDS = ("epoch", "phase", "mse", "bits", "lr", "samples_s")
_CALIBRATION_TILES = 512
_DENSITY_LR_SCALE = 10.0


def train_loop(config: dict[str, Any]) -> None:
    """Pretrain, adapt and export; goes on from the last checkpoint that Ray Train kept.

    An epoch's masks, order and augmentation depend on the seed, the epoch and the worker alone, so that a run
    that was interrupted between epochs sees what an undisturbed one sees.
    """
    import torch
    from ray import train
    from torch.nn.parallel import DistributedDataParallel

    from nec_ray.models.mae import SIZES, MaeConfig
    from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable

    recipe = Recipe.model_validate(config["recipe"])
    how = recipe.train
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(min(config["threads"], os.cpu_count() or 1))  # the cluster's cores may be on other nodes
    pixels = np.memmap(config["pixels"], np.float16, "r", shape=tuple(config["shape"]))
    sizes = dict(SIZES[recipe.model.size])
    if recipe.model.depth:
        sizes["depth"] = recipe.model.depth
    torch.manual_seed(how.seed)
    model = NeuralEmbeddingCompressor(
        MaeConfig(size=recipe.data.size, patch=recipe.model.patch, bands=pixels.shape[1], **sizes)
    )
    epochs = how.pretrain_epochs + how.adapt_epochs
    first, optimiser_state = 0, None
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        first, optimiser_state = int(state["epoch"]), state["optimiser"]
    if rank == 0:
        _keep_metrics(Path(config["metrics"]), first)

    wrapped: torch.nn.Module = model
    optimiser: torch.optim.Optimizer | None = None
    for epoch in range(first, epochs):
        adapting = epoch >= how.pretrain_epochs
        if optimiser is None or epoch == how.pretrain_epochs:
            set_trainable(model, how.trainable if adapting else "all")
            model.bottleneck.requires_grad_(adapting)
            model.bottleneck.quantiles.requires_grad_(False)
            wrapped = DistributedDataParallel(model) if world > 1 else model
            optimiser = torch.optim.AdamW(_groups(model, how.weight_decay), betas=(0.9, 0.95))
            if optimiser_state is not None and epoch == first != how.pretrain_epochs:
                optimiser.load_state_dict(optimiser_state)
        row = _epoch(wrapped, optimiser, pixels, how, epoch, rank, world)
        if rank == 0:
            _append(Path(config["metrics"]), row)
        if (epoch + 1) % how.checkpoint_every == 0 or epoch + 1 == epochs:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1}
                    torch.save(state, Path(folder) / "state.pt")
                kept = train.Checkpoint.from_directory(folder) if rank == 0 else None
                train.report({"epoch": epoch + 1, "mse": row["mse"]}, checkpoint=kept)
    if rank == 0:
        _export(model, pixels, config, how)


def _epoch(
    model: Any, optimiser: Any, pixels: Any, how: TrainSection, epoch: int, rank: int, world: int
) -> dict[str, Any]:
    """One pass over this worker's share of the tiles; the mean losses over all workers."""
    import torch
    import torch.distributed as dist

    model.train()
    adapting = epoch >= how.pretrain_epochs
    total = how.adapt_epochs if adapting else how.pretrain_epochs
    done = epoch - how.pretrain_epochs if adapting else epoch
    peak = how.adapt_lr if adapting else how.lr
    order = np.random.default_rng([how.seed, epoch]).permutation(len(pixels))
    batch = min(how.batch_size, len(pixels)) // world
    steps = max(1, len(pixels) // (batch * world))
    torch.manual_seed(hash((how.seed, epoch, rank)) & 0x7FFFFFFF)  # of the bottleneck's noise
    generator = torch.Generator().manual_seed(hash((how.seed, epoch, rank, 1)) & 0x7FFFFFFF)
    sums = np.zeros(2)
    started = time.monotonic()
    for step in range(steps):
        lr = _learning_rate(peak, (done * steps + step) / (total * steps), how.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]
        begin = step * batch * world + rank * batch
        chosen = np.sort(order[begin : begin + batch])
        inputs = _augment(torch.from_numpy(pixels[chosen].astype(np.float32)), generator)
        losses = model(inputs, mask_ratio=how.mask_ratio, beta=how.beta if adapting else None, generator=generator)
        optimiser.zero_grad(set_to_none=True)
        losses.loss.backward()
        optimiser.step()
        if not math.isfinite(float(losses.loss.detach())):
            raise RunError(f"the loss is no longer a number in epoch {epoch + 1}; lower train.lr or train.adapt_lr")
        sums += [float(losses.mse.detach()), float(losses.bits.detach())]
    means = torch.from_numpy(sums / steps)
    if world > 1:
        dist.all_reduce(means)
        means /= world
    seconds = time.monotonic() - started
    return {
        "epoch": epoch + 1,
        "phase": "adapt" if adapting else "pretrain",
        "mse": float(means[0]),
        "bits": float(means[1]),
        "lr": lr,
        "samples_s": steps * batch * world / seconds,
    }


def _augment(pixels: Any, generator: Any) -> Any:
    """Random flips and quarter turns of each tile: overhead imagery has no upright."""
    import torch

    turns = torch.randint(0, 8, (len(pixels),), generator=generator)
    out = torch.empty_like(pixels)
    for turn in range(8):
        mine = turns == turn
        part = pixels[mine].rot90(turn % 4, dims=(2, 3))
        out[mine] = part.flip(3) if turn >= 4 else part
    return out


def _learning_rate(peak: float, progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Biases, norms, tokens and densities do not decay; the densities move faster, they start far too wide."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    density = [p for name, p in trained if name.startswith("bottleneck")]
    plain = [p for name, p in trained if (p.ndim < 2 or "token" in name) and not name.startswith("bottleneck")]
    taken = {id(p) for p in density + plain}
    decayed = [p for _, p in trained if id(p) not in taken]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": density, "weight_decay": 0.0, "lr_scale": _DENSITY_LR_SCALE},
    ]


def _keep_metrics(path: Path, epochs: int) -> None:
    """Start metrics.csv, or cut it back to the epochs that the checkpoint holds."""
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["epoch"] and int(row["epoch"]) <= epochs]
    written = path.with_suffix(".part")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    written.replace(path)  # whoever follows the file never sees it half written


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, _FIELDS).writerow(row)


def _export(model: Any, pixels: Any, config: dict[str, Any], how: TrainSection) -> None:
    from nec_ray.codec import InputSpec, Lineage
    from nec_ray.models.export import export_codec

    spec = InputSpec.model_validate_json(config["input"])
    chosen = np.unique(np.linspace(0, len(pixels) - 1, _CALIBRATION_TILES).astype(np.int64))
    scale = np.array(spec.std)[:, None, None], np.array(spec.mean)[:, None, None]
    calibration = (pixels[chosen].astype(np.float64) * scale[0] + scale[1]).astype(np.float32)
    lineage = Lineage(data=config["data"], licence=config["licence"], beta=how.beta, bits_per_symbol=0.0)
    folder = Path(config["codec"])
    if not folder.exists():
        export_codec(model, folder, input_spec=spec, lineage=lineage, calibration=calibration)
