"""Trains a codec on Ray Train: MAE pretraining, then adaptation with the entropy model, then export."""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nec_ray.codec import InputSpec
from nec_ray.errors import BadRecipe, BadSource, InputError, RunError
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.recipe import Recipe
from nec_ray.storage import normalise_url
from nec_ray.tiles import Catalog, check_bands, read_catalog, read_tiles

METRICS = "metrics.csv"
_RECIPE = "recipe.json"
_PIXELS = "pixels.f16"
_LOCK = ".nec-train.lock"
_INPUT = "input.json"
_CODEC = "codec"
_RUN = "ray"
_STATISTICS_TILES = 1024
_CONSTANT = 1e-6
"""A band whose standard deviation is below this share of its mean carries nothing, and is not blown up."""
_LARGEST_INPUT = 1e4
"""Standard deviations from the mean at which pixels are cut off, within the range of float16."""
_MOST_NODATA = 0.5
"""A tile with more missing pixels than this teaches nothing."""

Say = Callable[[str], None]


def train(recipe: Recipe, out: Path | str, *, restart: bool = False, progress: Say | None = None) -> Path:
    """Train a codec; the same call again goes on where it stopped, or returns the finished codec.

    Args:
        recipe: what to train on, and how.
        out: folder of the run, on storage that every worker reaches: recipe.json, metrics.csv, loss.png, codec/.
        restart: throw an earlier run in `out` away.
        progress: called with a line for every epoch.

    Returns:
        The codec directory, `out`/codec.

    Raises:
        BadRecipe: `out` holds a run of another recipe.
        InputError: `out` holds something else, or another run is at work in it.
        NotFound: the catalog is not there.
        CodecMismatch: the catalog lacks a band.
        RunError: training broke off.
    """
    out = Path(out).expanduser().absolute()
    say = progress or _silent
    catalog = read_catalog(recipe.data.catalog)
    check_bands(catalog, _bands(recipe, catalog))
    codec = out / _CODEC
    with _alone(out):
        _claim(recipe, catalog, out, restart)
        return _train(recipe, catalog, out, codec, say)


def _train(recipe: Recipe, catalog: Catalog, out: Path, codec: Path, say: Say) -> Path:
    if (codec / "codec.json").exists():
        say(f"trained already: {codec}")
        return codec
    with connect():
        tiles = _cache_pixels(recipe, catalog, out, say)
        _fit(recipe, catalog, out, tiles, say)
    if not (codec / "codec.json").exists():
        raise RunError(f"{out}: training ended without a codec; run the same command again to go on")
    _plot(out)
    for leftover in (out / _PIXELS, out / _INPUT):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(out / _RUN, ignore_errors=True)
    return codec


def _silent(_: str) -> None:
    """Say nothing."""


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold `out` against a second run on this machine; the operating system lets go when the process ends."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; give a folder with --out")
    if out.exists() and any(out.iterdir()) and not (out / _RECIPE).exists() and not (out / _LOCK).exists():
        raise InputError(f"{out}: not empty and no training run; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: another run is at work in it; wait for it, or give another --out") from None
        yield


def _claim(recipe: Recipe, catalog: Catalog, out: Path, restart: bool) -> None:
    """Make `out` the folder of this recipe on these tiles."""
    path = out / _RECIPE
    wanted = recipe.model_dump(mode="json")
    wanted["data"] |= {"catalog": normalise_url(recipe.data.catalog), "tiles": _digest(catalog)}
    if path.exists():
        found = json.loads(path.read_text())
        if restart:
            for name in (_CODEC, _RUN):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in (METRICS, _PIXELS, _INPUT, "loss.png"):
                (out / name).unlink(missing_ok=True)
        elif found != wanted:
            changed = [
                f"{s}.{k}" for s, keys in wanted.items() for k, v in keys.items() if found.get(s, {}).get(k) != v
            ]
            raise BadRecipe(f"{out}: a run of another recipe ({', '.join(changed)}); give another --out, or --restart")
    written = path.with_suffix(".part")
    written.write_text(json.dumps(wanted, indent=1))
    written.replace(path)


def _digest(catalog: Catalog) -> str:
    """Changes when the catalog's tiles or their sources do."""
    pairs = sorted(zip(*(catalog.table[name].to_pylist() for name in ("tile_id", "source_etag")), strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _bands(recipe: Recipe, catalog: Catalog) -> list[str]:
    if recipe.data.bands:
        return list(recipe.data.bands)
    if not catalog.table.num_rows:
        raise BadSource(f"{recipe.data.catalog}: no tiles in it; build a catalog with nec tiles build")
    first: list[str] = catalog.table["bands"][0].as_py()
    return first


def _cache_pixels(recipe: Recipe, catalog: Catalog, out: Path, say: Say) -> int:
    """Read the tiles once, normalised, into a memory-mapped float16 file that all workers share; how many there are."""
    pixels = out / _PIXELS
    size, bands = recipe.data.size, _bands(recipe, catalog)
    if (out / _INPUT).exists() and pixels.exists():
        return pixels.stat().st_size // (len(bands) * size * size * np.dtype(np.float16).itemsize)
    rows = catalog.table
    if rows.num_rows > recipe.data.max_tiles:
        rows = rows.take(pa.array(np.linspace(0, rows.num_rows - 1, recipe.data.max_tiles).astype(np.int64)))
    say(f"reading {rows.num_rows:,} tiles")
    sample = np.unique(np.linspace(0, rows.num_rows - 1, _STATISTICS_TILES).astype(np.int64))
    # Statistics come from tiles without missing pixels, so that what these are filled with does not enter.
    probe = read_tiles(rows.take(pa.array(sample)), bands=bands, size=size, fill=[0.0] * len(bands))
    whole = probe.pixels[probe.nodata_share[probe.valid] == 0]
    if not len(whole):
        raise BadSource(f"{recipe.data.catalog}: no tile of the sample is whole; the statistics need some")
    mean = whole.mean(axis=(0, 2, 3), dtype=np.float64)
    std = whole.std(axis=(0, 2, 3), dtype=np.float64)
    std = np.where(std > _CONSTANT * np.maximum(1, np.abs(mean)), std, 1.0)
    spec = InputSpec(bands=bands, mean=mean.tolist(), std=std.tolist(), size=size)

    def read(start: int) -> np.ndarray[Any, np.dtype[np.float16]]:
        batch = read_tiles(rows.slice(start, 256), bands=bands, size=size, fill=spec.mean)
        good = batch.pixels[batch.nodata_share[batch.valid] <= _MOST_NODATA]
        scaled = (good - mean[:, None, None]) / std[:, None, None]
        return np.clip(scaled, -_LARGEST_INPUT, _LARGEST_INPUT).astype(np.float16)

    # Written as it is read, so that memory holds no more than what the readers are at.
    written, tiles = pixels.with_suffix(".part"), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, written.open("wb") as file:
        for part in pool.map(read, range(0, rows.num_rows, 256)):
            part.tofile(file)
            tiles += len(part)
    if tiles < recipe.train.workers:
        raise BadSource(f"{recipe.data.catalog}: {tiles} usable tiles for {recipe.train.workers} workers")
    written.replace(pixels)
    (out / _INPUT).write_text(spec.model_dump_json())
    return tiles


def _fit(recipe: Recipe, catalog: Catalog, out: Path, tiles: int, say: Say) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from nec_ray.runtime.train_loop import train_loop

    cores = ray.cluster_resources().get("CPU", 1)
    workers = recipe.train.workers
    if workers > cores:
        raise RunError(f"{workers} training workers need as many cores, Ray has {cores:g}; lower train.workers")
    say(f"training on {tiles:,} tiles with {workers} worker{'s' * (workers > 1)}")
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "pixels": str(out / _PIXELS),
            "shape": [tiles, len(_bands(recipe, catalog)), recipe.data.size, recipe.data.size],
            "input": (out / _INPUT).read_text(),
            "metrics": str(out / METRICS),
            "codec": str(out / _CODEC),
            "threads": max(1, int(cores) // workers),
            "data": catalog.metadata.title or recipe.data.catalog,
            "licence": catalog.metadata.licence or "not stated",
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=_RUN,
            storage_path=str(out),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with _Follow(out / METRICS, recipe, say):
        try:
            _beside_main_thread(trainer.fit)
        except ray.exceptions.RayError as error:
            raise RunError(f"{out}: training broke off ({_last_line(error)}); run the same command again") from error
        except ray.train.TrainingFailedError as error:
            raise RunError(f"{out}: training failed ({_last_line(error)}); run the same command again") from error


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

    def __init__(self, path: Path, recipe: Recipe, say: Say) -> None:
        self._path = path
        self._say = say
        self._epochs = recipe.train.pretrain_epochs + recipe.train.adapt_epochs
        self._every = max(1, self._epochs // 20)
        self._said = len(read_metrics(path))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._report()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._report()

    def _report(self) -> None:
        rows = read_metrics(self._path)
        for number, row in enumerate(rows[self._said :], self._said + 1):
            if number % self._every == 0 or number == self._epochs:
                rate = f", {float(row['bits']):.3f} bits per element" if row["phase"] == "adapt" else ""
                self._say(
                    f"epoch {number} of {self._epochs} ({row['phase']}): MSE {float(row['mse']):.4f}{rate}, "
                    f"{float(row['samples_s']):,.0f} tiles/s"
                )
        self._said = len(rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv: epoch, phase, mse, bits (per element, noise proxy), lr, samples_s."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("samples_s")]


def _plot(out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(out / METRICS)
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
    figure.savefig(out / "loss.png", dpi=130)
    plt.close(figure)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
