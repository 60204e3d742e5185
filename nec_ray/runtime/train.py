"""Trains a codec on Ray Train: pretraining of a masked autoencoder, then adaptation with the entropy model, export.

A vision transformer's pretraining and adaptation are phases of one run of Ray Train's, on the same pixels. MP-MAE's
pretraining, on all modalities, is a run before it, whose weights the adaptation begins with.
"""

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from nec_ray.codec import InputSpec
from nec_ray.errors import NotFound, RunError
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.pretrain_data import check_modalities, modality_shares, optical_input, statistics_of
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_data import bands_of, input_of, shares
from nec_ray.runtime.train_files import (
    CODEC,
    INPUT,
    LOSS,
    METRICS,
    RAY,
    RAY_PRETRAINING,
    UNCERTAINTIES,
    WEIGHTS,
    alone,
    claim,
    clear,
    read_metrics,
)
from nec_ray.storage import Store, normalise_url
from nec_ray.tiles import Catalog, band_sets, check_bands, read_catalog

__all__ = ["read_metrics", "train"]

Say = Callable[[str], None]
_MAX_FAILURES = 3
"""Workers or nodes that may be lost before training gives up; it goes on from the last checkpoint each time."""
_POLL_SECONDS = 1.0
_POLL_SECONDS_REMOTE = 5.0


def train(recipe: Recipe, out: str | os.PathLike[str], *, restart: bool = False, progress: Say | None = None) -> str:
    """Train a codec; the same call again goes on where it stopped, or returns the finished codec.

    Args:
        recipe: what to train on, and how.
        out: folder of the run, a path or URL that every worker reaches: recipe.json, metrics.csv, loss.png,
            tensorboard/, ray/ (checkpoints, while it runs), weights.safetensors (pretrained), codec/; of MP-MAE's
            pretraining also uncertainties.png and reconstructions.png, and weights in MMEarth's published layout.
        restart: throw an earlier run in `out` away.
        progress: called with a line for every epoch.

    Returns:
        The codec directory, `out`/codec; `out`/weights.safetensors where the recipe ends with pretraining.

    Raises:
        BadRecipe: `out` holds a run of another recipe.
        InputError: `out` holds something else, or another run is at work in it.
        BadCheckpoint: `model.init` does not fit the recipe's model.
        NotFound: the catalog, or what `model.init` names, is not there.
        CodecMismatch: the catalog lacks a band.
        BadSource: MP-MAE is to be pretrained on a catalog that is not MMEarth's.
        RunError: training broke off.
    """
    store = Store(out)
    say = progress or _silent
    catalog = read_catalog(recipe.data.catalog)
    if recipe.pretrains_mp_mae:
        check_modalities(recipe, catalog)
    check_bands(band_sets(catalog.table), bands_of(recipe, catalog), recipe.data.catalog)
    with alone(store):
        # Before the folder is this recipe's, and before what is in it is thrown away: a mistyped path costs nothing.
        begun = WEIGHTS if recipe.pretrains_mp_mae else _last(recipe)  # what needs the given weights no more
        line = _look_at_init(recipe, catalog) if restart or not store.exists(begun) else None
        claim(recipe, catalog, store, restart=restart)
        if line:
            say(line)
        return _train(recipe, catalog, store, say)


def _last(recipe: Recipe) -> str:
    """What is written last; a run that has it is finished."""
    return f"{CODEC}/codec.json" if recipe.train.adapt_epochs else WEIGHTS


def _look_at_init(recipe: Recipe, catalog: Catalog) -> str | None:
    """What of the weights that a recipe gives is used; None where it gives none.

    Raises:
        NotFound: they are not there.
        BadCheckpoint: they do not fit the recipe's model.
    """
    from nec_ray.runtime.pretrain_loop import initial_pretraining
    from nec_ray.runtime.train_loop import initial_model

    if not recipe.model.init:
        return None
    recipe = _begun_from(recipe, normalise_url(recipe.model.init))
    if recipe.pretrains_mp_mae:
        return initial_pretraining(recipe)[1]
    return initial_model(recipe, len(bands_of(recipe, catalog)))[2]


def _train(recipe: Recipe, catalog: Catalog, store: Store, say: Say) -> str:
    last = _last(recipe)
    result = f"{store.url}/{CODEC if recipe.train.adapt_epochs else WEIGHTS}"
    if store.exists(last):
        say(f"trained already: {result}")
        return result
    if recipe.model.init:  # workers have another working directory
        recipe = _begun_from(recipe, normalise_url(recipe.model.init))
    with ExitStack() as stack:
        if recipe.pretrains_mp_mae:
            recipe = _pretrain(recipe, catalog, store, say, stack)
        if not store.exists(last):
            _adapt(recipe, catalog, store, say, stack)
    if not store.exists(last):
        raise RunError(f"{store.url}: training ended without its result; run the same command again to go on")
    _plot(store)
    store.delete([INPUT])
    clear(store, (RAY, RAY_PRETRAINING))
    return result


def _pretrain(recipe: Recipe, catalog: Catalog, store: Store, say: Say, stack: ExitStack) -> Recipe:
    """Pretrain MP-MAE, unless that is done; gives the recipe with its weights to begin from."""
    from nec_ray.runtime.pretrain_loop import pretrain_loop

    if not store.exists(WEIGHTS):
        stack.enter_context(connect())
        facts = {"statistics": statistics_of(recipe, catalog), "bands": bands_of(recipe, catalog)}
        read = partial(modality_shares, recipe, catalog)
        _fit(recipe, store, say, pretrain_loop, RAY_PRETRAINING, read, _count(recipe, catalog), facts)
    return _begun_from(recipe, f"{store.url}/{WEIGHTS}")


def _begun_from(recipe: Recipe, weights: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": weights})})


def _adapt(recipe: Recipe, catalog: Catalog, store: Store, say: Say, stack: ExitStack) -> None:
    """Adapt, after a vision transformer's pretraining where the recipe has it."""
    from nec_ray.runtime.train_loop import initial_model, train_loop

    if recipe.pretrains_mp_mae:  # whose own weights are new here; given ones were looked at first of all
        say(initial_model(recipe, len(bands_of(recipe, catalog)))[2])
    spec = _input(recipe, catalog, store)
    stack.enter_context(connect())
    facts = {
        "input": spec.model_dump_json(),
        "data": recipe.data.title or catalog.metadata.title or recipe.data.catalog,
        "licence": catalog.metadata.licence or "not stated",
    }
    _fit(recipe, store, say, train_loop, RAY, partial(shares, recipe, catalog, spec), _count(recipe, catalog), facts)


def _count(recipe: Recipe, catalog: Catalog) -> int:
    return min(catalog.table.num_rows, recipe.data.max_tiles)


def _silent(_: str) -> None:
    """Say nothing."""


def _input(recipe: Recipe, catalog: Catalog, store: Store) -> InputSpec:
    """What the encoder is fed; computed once a run."""
    try:
        return InputSpec.model_validate_json(store.read(INPUT))
    except NotFound:
        spec = optical_input(recipe, catalog) if recipe.pretrains_mp_mae else input_of(recipe, catalog)
        store.replace(INPUT, spec.model_dump_json().encode())
        return spec


def _fit(
    recipe: Recipe,
    store: Store,
    say: Say,
    loop: Callable[[dict[str, Any]], None],
    name: str,
    read: Callable[[], list[Any]],
    count: int,
    facts: dict[str, Any],
) -> None:
    """Run a loop on the workers.

    Args:
        recipe: what to train, and how.
        store: the run's folder.
        say: told what goes on.
        loop: what a worker runs.
        name: of the folder with Ray Train's checkpoints.
        read: gives a data set a worker.
        count: tiles that it reads.
        facts: what the loop is told besides.
    """
    import ray
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    found = ray.cluster_resources()
    cores, workers = found.get("CPU", 1), recipe.train.workers
    gpu = found.get("GPU", 0) >= workers
    if workers > cores:
        raise RunError(f"{workers} training workers need as many cores, Ray has {cores:g}; lower train.workers")
    say(f"reading {count:,} tiles")
    parts = read()
    where = f"{workers} worker{'s' * (workers > 1)} on {'GPUs' if gpu else 'CPU cores'}"
    say(f"training on {sum(part.count() for part in parts):,} tiles with {where}")
    files, root = store.arrow()
    trainer = TorchTrainer(
        loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "out": store.url,
            "threads": max(1, int(cores) // workers),
            "gpu": gpu,
            **facts,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})}
        ),
        datasets={f"share{number}": part for number, part in enumerate(parts)},
        # Each worker reads the whole of the share that is its own.
        dataset_config=DataConfig(datasets_to_split=[]),
        run_config=RunConfig(
            name=name,
            **({"storage_path": store.url} if store.is_local else {"storage_path": root, "storage_filesystem": files}),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with _Follow(store, recipe, say):
        try:
            _beside_main_thread(trainer.fit)
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            raise RunError(
                f"{store.url}: training broke off ({_last_line(error)}); run the same command again to go on"
            ) from error


def _beside_main_thread(fit: Callable[[], object]) -> None:
    """Run `fit` in a thread: in the main one Ray Train would turn Ctrl-C into the exit code 0."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failure:
        raise failure[0]


class _Follow:
    """Says a line for every epoch that appears in metrics.csv."""

    def __init__(self, store: Store, recipe: Recipe, say: Say) -> None:
        self._url = f"{store.url}/{METRICS}"
        self._pause = _POLL_SECONDS if store.is_local else _POLL_SECONDS_REMOTE
        self._say = say
        self._epochs = recipe.train.pretrain_epochs + recipe.train.adapt_epochs
        self._every = max(1, self._epochs // 20)
        self._said = len(read_metrics(self._url))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._report()

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            self._report()

    def _report(self) -> None:
        rows = read_metrics(self._url)
        for number, row in enumerate(rows[self._said :], self._said + 1):
            if number % self._every == 0 or number == self._epochs:
                added = f", {float(row['bits']):.3f} bits per element (noise proxy)" if row["phase"] == "adapt" else ""
                if row.get("loss"):
                    added = f" of Sentinel-2, {float(row['loss']):.4f} of all tasks, weighted"
                self._say(
                    f"epoch {number} of {self._epochs} ({row['phase']}): MSE {float(row['mse']):.4f}{added}, "
                    f"{float(row['samples_s']):,.0f} tiles/s"
                )
        self._said = len(rows)


def _plot(store: Store) -> None:
    """Draw loss.png, and uncertainties.png where tasks have some."""
    from nec_ray.evaluate.training_pictures import distortion_and_rate, task_losses, task_uncertainties

    rows = read_metrics(f"{store.url}/{METRICS}")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / LOSS
        (task_losses if "loss" in rows[0] else distortion_and_rate)(rows, path)
        store.replace(LOSS, path.read_bytes())
        if any(value for row in rows for name, value in row.items() if name.startswith("log_var_")):
            store.replace(UNCERTAINTIES, task_uncertainties(rows, Path(temporary) / UNCERTAINTIES).read_bytes())


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
