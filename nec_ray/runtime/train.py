"""Trains a codec on Ray Train: MAE pretraining, then adaptation with the entropy model, then export."""

import io
import os
import threading
from collections.abc import Callable

import numpy as np

from nec_ray.codec import InputSpec
from nec_ray.errors import NotFound, RunError
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_data import bands_of, input_of, shares
from nec_ray.runtime.train_files import CODEC, INPUT, LOSS, METRICS, RAY, WEIGHTS, alone, claim, clear, read_metrics
from nec_ray.storage import Store
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
            tensorboard/, ray/ (checkpoints, while it runs), weights.safetensors (pretrained), codec/.
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
        RunError: training broke off.
    """
    store = Store(out)
    say = progress or _silent
    catalog = read_catalog(recipe.data.catalog)
    check_bands(band_sets(catalog.table), bands_of(recipe, catalog), recipe.data.catalog)
    with alone(store):
        claim(recipe, catalog, store, restart=restart)
        return _train(recipe, catalog, store, say)


def _train(recipe: Recipe, catalog: Catalog, store: Store, say: Say) -> str:
    last = f"{CODEC}/codec.json" if recipe.train.adapt_epochs else WEIGHTS
    result = f"{store.url}/{CODEC if recipe.train.adapt_epochs else WEIGHTS}"
    if store.exists(last):
        say(f"trained already: {result}")
        return result
    if recipe.model.init:
        _check_init(recipe, len(bands_of(recipe, catalog)), say)
    spec = _input(recipe, catalog, store)
    with connect():
        _fit(recipe, catalog, spec, store, say)
    if not store.exists(last):
        raise RunError(f"{store.url}: training ended without its result; run the same command again to go on")
    _plot(store)
    store.delete([INPUT])
    clear(store, (RAY,))
    return result


def _silent(_: str) -> None:
    """Say nothing."""


def _input(recipe: Recipe, catalog: Catalog, store: Store) -> InputSpec:
    """What the encoder is fed; computed once a run."""
    try:
        return InputSpec.model_validate_json(store.read(INPUT))
    except NotFound:
        spec = input_of(recipe, catalog)
        store.replace(INPUT, spec.model_dump_json().encode())
        return spec


def _check_init(recipe: Recipe, bands: int, say: Say) -> None:
    """Refuse weights that do not fit before Ray starts; say what of them is used."""
    from nec_ray.runtime.train_loop import initial_model

    say(initial_model(recipe, bands)[2])


def _fit(recipe: Recipe, catalog: Catalog, spec: InputSpec, store: Store, say: Say) -> None:
    import ray
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from nec_ray.runtime.train_loop import train_loop

    found = ray.cluster_resources()
    cores, workers = found.get("CPU", 1), recipe.train.workers
    gpu = found.get("GPU", 0) >= workers
    if workers > cores:
        raise RunError(f"{workers} training workers need as many cores, Ray has {cores:g}; lower train.workers")
    say(f"reading {min(catalog.table.num_rows, recipe.data.max_tiles):,} tiles")
    parts = shares(recipe, catalog, spec)
    where = f"{workers} worker{'s' * (workers > 1)} on {'GPUs' if gpu else 'CPU cores'}"
    say(f"training on {sum(part.count() for part in parts):,} tiles with {where}")
    files, root = store.arrow()
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "input": spec.model_dump_json(),
            "out": store.url,
            "threads": max(1, int(cores) // workers),
            "gpu": gpu,
            "data": recipe.data.title or catalog.metadata.title or recipe.data.catalog,
            "licence": catalog.metadata.licence or "not stated",
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})}
        ),
        datasets={f"share{number}": part for number, part in enumerate(parts)},
        # Each worker reads the whole of the share that is its own.
        dataset_config=DataConfig(datasets_to_split=[]),
        run_config=RunConfig(
            name=RAY,
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
                rate = f", {float(row['bits']):.3f} bits per element" if row["phase"] == "adapt" else ""
                self._say(
                    f"epoch {number} of {self._epochs} ({row['phase']}): MSE {float(row['mse']):.4f}{rate}, "
                    f"{float(row['samples_s']):,.0f} tiles/s"
                )
        self._said = len(rows)


def _plot(store: Store) -> None:
    """Draw loss.png: distortion and rate by epoch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(f"{store.url}/{METRICS}")
    epochs = np.arange(1, len(rows) + 1)
    adapted = np.array([row["phase"] == "adapt" for row in rows])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, [float(row["mse"]) for row in rows], color="#0072B2")
    left.set(xlabel="epoch", ylabel="MSE on masked patches", title="Distortion")
    if adapted.any() and not adapted.all():
        start = float(epochs[adapted][0]) - 0.5
        left.axvline(start, color="0.6", linestyle="--")
        left.annotate(
            "entropy model added",
            (start, 1),
            (-4, -4),
            ("data", "axes fraction"),
            "offset points",
            ha="right",
            va="top",
            color="0.35",
        )
    right.plot(epochs[adapted], [float(row["bits"]) for row in np.array(rows)[adapted]], color="#D55E00")
    right.set(xlabel="epoch", ylabel="bits per element", title="Rate (noise proxy)", ylim=(0, None))
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    store.replace(LOSS, file.getvalue())


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
