"""What every Ray Train worker runs; in the package, so that workers can import it."""

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.errors import RunError
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_data import local_copy
from nec_ray.runtime.train_files import CODEC, WEIGHTS, Metrics
from nec_ray.storage import Store

_CALIBRATION_TILES = 512


def train_loop(config: dict[str, Any]) -> None:
    """Pretrain, adapt and export; goes on from the last checkpoint that Ray Train kept.

    An epoch's masks, order, noise and augmentation depend on the seed, the epoch and the worker alone, so that a run
    that was interrupted between epochs sees what an undisturbed one sees.
    """
    import torch
    from ray import train
    from ray.train.torch import get_device

    from nec_ray.codec import InputSpec

    recipe = Recipe.model_validate(config["recipe"])
    how = recipe.train
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device() if config["gpu"] else torch.device("cpu")
    torch.set_num_threads(min(config["threads"], os.cpu_count() or 1))  # the cluster's cores may be on other nodes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # in training; encoders do not
    share = train.get_dataset_shard(f"share{rank}")
    assert share is not None
    pixels = local_copy(share.iter_batches(batch_size=None, prefetch_batches=1))
    spec = InputSpec.model_validate_json(config["input"])
    model, decoder_is_new, _ = initial_model(recipe, len(spec.bands))
    first, optimiser_state = how.pretrain_epochs if recipe.pretrains_mp_mae else 0, None  # elsewhere: pretrain_loop
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        first, optimiser_state = int(state["epoch"]), state["optimiser"]
    model.to(device)
    metrics = Metrics(config["out"], first) if rank == 0 else None
    worker = _Worker(model, recipe, pixels, device, rank, world)
    epochs = how.pretrain_epochs + how.adapt_epochs
    for epoch in range(first, epochs):
        if epoch == how.pretrain_epochs:
            worker.begin_adaptation()
        if epoch in {first, how.pretrain_epochs}:
            worker.begin_phase(adapting=epoch >= how.pretrain_epochs, decoder_is_new=decoder_is_new)
            if optimiser_state is not None and epoch == first != how.pretrain_epochs:
                worker.optimiser.load_state_dict(optimiser_state)
        row = worker.epoch(epoch)
        ended = epoch + 1 in {how.pretrain_epochs, epochs}
        if metrics:
            metrics.append(row)
            if epoch + 1 == how.pretrain_epochs:
                _keep_weights(model, recipe.model.family, config["out"])
        if ended or (epoch + 1) % how.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimiser": worker.optimiser.state_dict(), "epoch": epoch + 1}
            report(row, state if rank == 0 else None)
    if metrics:
        metrics.close()
        if how.adapt_epochs:
            _export(model.cpu(), pixels, spec, recipe, config)


def report(row: dict[str, Any], state: dict[str, Any] | None) -> None:
    """Tell Ray Train of an epoch, with a checkpoint where a state is given."""
    import torch
    from ray import train

    with tempfile.TemporaryDirectory() as temporary:
        if state is not None:
            torch.save(state, Path(temporary) / "state.pt")
        kept = None if state is None else train.Checkpoint.from_directory(temporary)
        train.report({"epoch": row["epoch"], "mse": row["mse"]}, checkpoint=kept)


def initial_model(recipe: Recipe, bands: int) -> tuple[Any, bool, str]:
    """The compressor that training begins from, whether its decoder is new beside given weights, and a line on them.

    Raises:
        NotFound: what `model.init` names is not there.
        BadCheckpoint: it does not fit the recipe's model.
    """
    from nec_ray.models.families import family

    begun = family(recipe.model.family).begin(recipe.model, recipe.data.size, bands, recipe.train.seed)
    return begun.model, begun.decoder_is_new, begun.line


class _Worker:
    """One worker's model, optimiser and tiles."""

    optimiser: Any

    def __init__(self, model: Any, recipe: Recipe, pixels: Any, device: Any, rank: int, world: int) -> None:
        self._model = model
        self._how = recipe.train
        self._augment = recipe.data.augment
        self._step = recipe.model.step
        self._pretrains = recipe.train.pretrain_epochs > 0 and not recipe.pretrains_mp_mae
        self._pixels = pixels
        self._device = device
        self._rank = rank
        self._world = world
        self._wrapped = model

    def begin_adaptation(self) -> None:
        """Set the transform, or put the channels in the order of their variance where there are several layers."""
        import torch
        import torch.distributed as dist

        if self._step is not None:
            channels = self._model.encoder.channels
            sums = torch.zeros((channels + 1, channels + 1), dtype=torch.float64, device=self._device)
            for (latent,) in self._calibration_latents():
                tokens = torch.nn.functional.pad(latent.flatten(0, 1).double(), (0, 1), value=1.0)
                sums += tokens.T @ tokens
            if self._world > 1:
                dist.all_reduce(sums)
            mean = sums[-1, :-1] / sums[-1, -1]
            self._model.set_transform(mean, sums[:-1, :-1] / sums[-1, -1] - torch.outer(mean, mean), self._step)
        elif len(self._model.layers) > 1:
            variance = torch.zeros(self._model.encoder.channels, device=self._device)
            for latents in self._calibration_latents():
                variance += torch.cat([latent.var(dim=(0, 1)) for latent in latents])
            if self._world > 1:
                dist.all_reduce(variance)
            self._model.encoder.reorder(self._model.decoder, self._model.order_of(variance))

    def _calibration_latents(self) -> Iterator[tuple[Any, ...]]:
        """Latents of some tiles, a batch at a time, of each grid scale."""
        import torch

        from nec_ray.codec import parts_of

        chosen = np.unique(np.linspace(0, len(self._pixels) - 1, _CALIBRATION_TILES).astype(np.int64))
        for start in range(0, len(chosen), 64):
            part = torch.from_numpy(self._pixels[chosen[start : start + 64]].astype(np.float32))
            with torch.inference_mode():
                latents = parts_of(self._model.eval().encoder(part.to(self._device)))
            yield latents

    def begin_phase(self, *, adapting: bool, decoder_is_new: bool) -> None:
        """Free what this phase trains, and begin its optimiser.

        Args:
            adapting: whether this is the adaptation.
            decoder_is_new: whether the run began with a new decoder; after a pretraining in the same run it is none.
        """
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from nec_ray.models.nec import set_trainable
        from nec_ray.models.optimise import choose_attention, parameter_groups

        choose_attention(self._model, self._model.encoder.tokens, self._device)
        new = decoder_is_new and not (adapting and self._pretrains)
        set_trainable(self._model, self._how.trainable if adapting else "all", decoder_is_new=new)
        if not adapting:
            self._model.bottleneck.requires_grad_(False)
        self._wrapped = DistributedDataParallel(self._model) if self._world > 1 else self._model
        groups = parameter_groups(self._model, self._how.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over this worker's tiles; a row of metrics, the mean over all workers."""
        import torch
        import torch.distributed as dist

        from nec_ray.models.augment import augment
        from nec_ray.models.optimise import gradients, learning_rate

        how = self._how
        adapting = epoch >= how.pretrain_epochs
        total = how.adapt_epochs if adapting else how.pretrain_epochs
        done = epoch - how.pretrain_epochs if adapting else epoch
        peak = how.adapt_lr if adapting else how.lr
        mask_ratio = how.adapt_mask_ratio if adapting and how.adapt_mask_ratio is not None else how.mask_ratio
        order = np.random.default_rng([how.seed, epoch, self._rank]).permutation(len(self._pixels))
        batch = min(how.batch_size // self._world, len(self._pixels))
        steps = len(self._pixels) // batch
        generator = torch.Generator(self._device).manual_seed(hash((how.seed, epoch, self._rank)) & 0x7FFFFFFF)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        started = time.monotonic()
        self._model.train()
        for step in range(steps):
            lr = learning_rate(peak, (done * steps + step) / (total * steps), how.warmup)
            for group in self.optimiser.param_groups:
                group["lr"] = lr * group["lr_scale"]
            chosen = np.sort(order[step * batch : (step + 1) * batch])
            inputs = torch.from_numpy(self._pixels[chosen])
            if self._device.type == "cuda":
                inputs = inputs.pin_memory().to(self._device, non_blocking=True)
            inputs = augment(inputs.float(), self._augment, generator)
            self.optimiser.zero_grad(set_to_none=True)
            sums += gradients(
                self._wrapped,
                inputs,
                mask_ratio=mask_ratio,
                beta=how.beta if adapting else None,
                generator=generator,
                accumulate=how.accumulate,
                precision=how.precision,
            )
            self.optimiser.step()
        means = sums / steps
        if self._world > 1:
            dist.all_reduce(means)
            means /= self._world
        mse, bits = means.tolist()
        if not math.isfinite(mse + bits):
            raise RunError(f"the loss is no longer a number in epoch {epoch + 1}; lower train.lr or train.adapt_lr")
        return {
            "epoch": epoch + 1,
            "phase": "adapt" if adapting else "pretrain",
            "mse": mse,
            "bits": bits,
            "lr": lr,
            "samples_s": steps * batch * self._world / (time.monotonic() - started),
        }


def _keep_weights(model: Any, name: str, out: str) -> None:
    """Write the pretrained encoder and decoder, by the names of their family."""
    from safetensors.torch import save

    from nec_ray.models.families import family

    Store(out).replace(WEIGHTS, save(family(name).weights(model.encoder, model.decoder)))


def _export(model: Any, pixels: Any, spec: Any, recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Write the codec directory; codec.json comes last, so that the folder is a codec or none."""
    from nec_ray.codec import Lineage
    from nec_ray.models.export import export_codec

    store = Store(config["out"])
    chosen = np.unique(np.linspace(0, len(pixels) - 1, _CALIBRATION_TILES).astype(np.int64))
    scale = np.array(spec.std)[:, None, None], np.array(spec.mean)[:, None, None]
    calibration = (pixels[chosen].astype(np.float64) * scale[0] + scale[1]).astype(np.float32)
    parent = recipe.model.init.rpartition("/")[2] if recipe.model.init else None
    how = {"data": config["data"], "licence": config["licence"], "beta": recipe.train.beta}
    lineage = Lineage(parent=parent, **how, bits_per_symbol=0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / CODEC
        export_codec(
            model,
            folder,
            input_spec=spec,
            lineage=lineage,
            calibration=calibration,
            half=recipe.model.weights == "float16",
        )
        for file in sorted(folder.iterdir(), key=lambda path: path.name == "codec.json"):
            store.replace(f"{CODEC}/{file.name}", file.read_bytes())
