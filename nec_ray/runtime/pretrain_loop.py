"""What every Ray Train worker runs to pretrain MP-MAE; in the package, so that workers can import it."""

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.errors import RunError
from nec_ray.runtime.pretrain_data import OPTICAL, Values, local_modalities
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_files import RECONSTRUCTIONS, WEIGHTS, Metrics, pretext_fields
from nec_ray.runtime.train_loop import report
from nec_ray.storage import Store

_DRAWN = 4


def pretrain_loop(config: dict[str, Any]) -> None:
    """Pretrain; goes on from the last checkpoint that Ray Train kept.

    An epoch's masks, windows and order depend on the seed, the epoch and the worker alone.
    """
    import torch
    from ray import train
    from ray.train.torch import get_device

    recipe = Recipe.model_validate(config["recipe"])
    how = recipe.train
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device() if config["gpu"] else torch.device("cpu")
    torch.set_num_threads(min(config["threads"], os.cpu_count() or 1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    share = train.get_dataset_shard(f"share{rank}")
    assert share is not None
    tiles = local_modalities(share.iter_batches(batch_size=None, prefetch_batches=1))
    model = initial_pretraining(recipe)[0]
    first, optimiser_state = 0, None
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        first, optimiser_state = int(state["epoch"]), state["optimiser"]
    model.to(device)
    metrics = Metrics(config["out"], first, pretext_fields(tasks(model))) if rank == 0 else None
    worker = Pretrainer(model, recipe, tiles, device, rank, world)
    if optimiser_state is not None:
        worker.optimiser.load_state_dict(optimiser_state)
    for epoch in range(first, how.pretrain_epochs):
        row = worker.epoch(epoch)
        if metrics:
            metrics.append(row)
        if epoch + 1 == how.pretrain_epochs or (epoch + 1) % how.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimiser": worker.optimiser.state_dict(), "epoch": epoch + 1}
            report(row, state if rank == 0 else None)
    if metrics:
        metrics.close()
        draw(model, recipe, tiles, config["bands"], config["statistics"], config["out"])
        _keep_weights(model, config["out"])  # the last: with it the pretraining is done


def initial_pretraining(recipe: Recipe) -> tuple[Any, str]:
    """The `MpMae` that pretraining begins from, and a line on its weights.

    Raises:
        NotFound: what `model.init` names is not there.
        BadCheckpoint: it does not fit the recipe's model.
    """
    import torch

    from nec_ray.models.mmearth_weights import import_pretraining
    from nec_ray.models.mp_mae import MpMae, MpMaeConfig
    from nec_ray.models.published import read_checkpoint

    given = recipe.model
    config = MpMaeConfig.mmearth(
        given.size,
        pixels=recipe.data.size,
        patch=given.patch,
        inputs=given.inputs or "s2",
        targets=given.targets or "all",
        weighting=given.weighting or "uncertainty",
    )
    torch.manual_seed(recipe.train.seed)
    model = MpMae(config)
    if not given.init:
        return model, "random weights"
    import_pretraining(model, read_checkpoint(given.init), given.init)
    return model, f"weights of {given.init}: encoder, decoders and log variances"


def tasks(model: Any) -> list[str]:
    """Names of what a model predicts, in order."""
    return [output.name for output in model.config.outputs]


class Pretrainer:
    """One worker's model, optimiser and tiles."""

    def __init__(self, model: Any, recipe: Recipe, tiles: Values, device: Any, rank: int, world: int) -> None:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from nec_ray.models.optimise import parameter_groups

        self._model, self._how, self._size = model, recipe.train, recipe.data.size
        self._tiles, self._device, self._rank, self._world = tiles, device, rank, world
        self._wrapped = DistributedDataParallel(model) if world > 1 else model
        self.optimiser = torch.optim.AdamW(parameter_groups(model, self._how.weight_decay), betas=(0.9, 0.95))

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over this worker's tiles; a row of metrics, the mean over all workers."""
        import torch
        import torch.distributed as dist

        from nec_ray.models.optimise import learning_rate, pretext_gradients
        from nec_ray.models.pretext import random_crop

        how, names = self._how, tasks(self._model)
        count = len(self._tiles[OPTICAL])
        order = np.random.default_rng([how.seed, epoch, self._rank]).permutation(count)
        batch = min(how.batch_size // self._world, count)
        steps = count // batch
        generator = torch.Generator(self._device).manual_seed(hash((how.seed, epoch, self._rank)) & 0x7FFFFFFF)
        sums = torch.zeros(2, 1 + len(names), dtype=torch.float64, device=self._device)
        started = time.monotonic()
        self._model.train()
        for step in range(steps):
            lr = learning_rate(how.lr, (epoch * steps + step) / (how.pretrain_epochs * steps), how.warmup)
            for group in self.optimiser.param_groups:
                group["lr"] = lr * group["lr_scale"]
            chosen = np.sort(order[step * batch : (step + 1) * batch])
            targets = random_crop(batch_of(self._tiles, chosen, self._device), self._size, generator)
            self.optimiser.zero_grad(set_to_none=True)
            sums += pretext_gradients(
                self._wrapped,
                targets[OPTICAL],
                targets,
                mask_ratio=how.mask_ratio,
                generator=generator,
                accumulate=how.accumulate,
                precision=how.precision,
            )
            self.optimiser.step()
        if self._world > 1:
            dist.all_reduce(sums)
        loss, *each = (sums[0] / sums[1]).tolist()  # NaN where the epoch had nothing of a task
        if not math.isfinite(loss):
            raise RunError(f"the loss is no longer a number in epoch {epoch + 1}; lower train.lr")
        losses, log_vars = dict(zip(names, each, strict=True)), self._model.log_variances()
        return {
            "epoch": epoch + 1,
            "phase": "pretrain",
            "mse": losses[OPTICAL],
            "bits": 0.0,
            "lr": lr,
            "samples_s": steps * batch * self._world / (time.monotonic() - started),
            "loss": loss,
            **{f"loss_{name}": value for name, value in losses.items()},
            **{f"log_var_{name}": log_vars.get(name, "") for name in names},
        }


def batch_of(tiles: Values, chosen: Any, device: Any) -> dict[str, Any]:
    """Some tiles' modalities as tensors on a device: float32 with NaN, or int64 with -1, where a value is missing."""
    import torch

    found = {}
    for name, values in tiles.items():
        tensor = torch.from_numpy(values[chosen])
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        found[name] = tensor.float() if tensor.is_floating_point() else tensor.long()
    return found


def draw(
    model: Any, recipe: Recipe, tiles: Values, bands: Sequence[str], statistics: Mapping[str, Any], out: str
) -> None:
    """Write reconstructions.png of some tiles, with masks that depend on the seed alone."""
    import torch

    from nec_ray.evaluate.reconstructions import reconstruct, reconstructions
    from nec_ray.models.pretext import random_crop

    model.cpu().eval()
    count = len(tiles[OPTICAL])
    chosen = np.unique(np.linspace(0, count - 1, min(_DRAWN, count)).astype(np.int64))
    generator = torch.Generator().manual_seed(recipe.train.seed)
    targets = random_crop(batch_of(tiles, chosen, torch.device("cpu")), recipe.data.size, generator)
    found = reconstruct(model, targets[OPTICAL], targets, recipe.train.mask_ratio, generator)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / RECONSTRUCTIONS
        reconstructions(found, bands, statistics, path)
        Store(out).replace(RECONSTRUCTIONS, path.read_bytes())


def _keep_weights(model: Any, out: str) -> None:
    """Write the whole model by the names and in the shapes of MMEarth's published weights."""
    from safetensors.torch import save

    from nec_ray.models.mmearth_weights import mmearth_tensors

    Store(out).replace(WEIGHTS, save(mmearth_tensors(model.cpu())))
