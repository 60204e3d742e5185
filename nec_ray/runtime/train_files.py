"""A training run's folder, on any storage: its recipe, metrics, pictures; and who is at work in it."""

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nec_ray.errors import BadRecipe, InputError, NotFound
from nec_ray.runtime.recipe import Recipe
from nec_ray.storage import Store, normalise_url, read_url
from nec_ray.tiles import Catalog

METRICS = "metrics.csv"
RECIPE = "recipe.json"
INPUT = "input.json"
CODEC = "codec"
WEIGHTS = "weights.safetensors"
LOSS = "loss.png"
TENSORBOARD = "tensorboard"
UNCERTAINTIES = "uncertainties.png"
RECONSTRUCTIONS = "reconstructions.png"
RAY = "ray"
RAY_PRETRAINING = "ray-pretraining"
_LOCK = ".nec-train.lock"
FIELDS = ("epoch", "phase", "mse", "bits", "lr", "samples_s")


def pretext_fields(tasks: Sequence[str]) -> tuple[str, ...]:
    """Columns of a metrics.csv that begins with MP-MAE's pretraining, whose adaptation leaves the added ones empty."""
    added = ("loss", *(f"{what}_{name}" for what in ("loss", "log_var") for name in tasks))
    return *FIELDS[:-1], *added, FIELDS[-1]  # the last one says that a row is whole


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Hold a local folder against a second run on this machine; the operating system lets go when the process ends.

    Raises:
        InputError: the folder is a file, holds something else, or another run is at work in it.
    """
    if not store.is_local:
        yield
        return
    out = Path(store.url)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; give a folder with --out")
    if out.exists() and any(out.iterdir()) and not (out / RECIPE).exists() and not (out / _LOCK).exists():
        raise InputError(f"{out}: not empty and no training run; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: another run is at work in it; wait for it, or give another --out") from None
        yield


def claim(recipe: Recipe, catalog: Catalog, store: Store, *, restart: bool) -> None:
    """Make the folder that of this recipe on these tiles.

    Raises:
        BadRecipe: it holds a run of another recipe.
    """
    wanted = recipe.model_dump(mode="json")
    wanted["data"] |= {"catalog": normalise_url(recipe.data.catalog), "tiles": _digest(catalog)}
    if restart:
        pictures = (LOSS, UNCERTAINTIES, RECONSTRUCTIONS)
        clear(store, (RAY, RAY_PRETRAINING, TENSORBOARD, CODEC), (METRICS, INPUT, WEIGHTS, *pictures))
    elif store.exists(RECIPE):
        found = json.loads(store.read(RECIPE))
        changed = [f"{s}.{k}" for s, keys in wanted.items() for k, v in keys.items() if found.get(s, {}).get(k) != v]
        if changed:
            raise BadRecipe(
                f"{store.url}: a run of another recipe ({', '.join(changed)}); give another --out, or --restart"
            )
        return
    store.replace(RECIPE, json.dumps(wanted, indent=1).encode())


def clear(store: Store, folders: tuple[str, ...], files: tuple[str, ...] = ()) -> None:
    """Remove what an earlier run left; codec.json goes first, so that no half codec stays."""
    store.delete([f"{CODEC}/codec.json"] if CODEC in folders else [])
    for folder in folders:
        if store.is_local:
            shutil.rmtree(store.path(folder), ignore_errors=True)
        else:
            store.delete(store.names(folder))
    store.delete(files)


def _digest(catalog: Catalog) -> str:
    """Changes when the catalog's tiles or their sources do."""
    pairs = sorted(zip(*(catalog.table[name].to_pylist() for name in ("tile_id", "source_etag")), strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def read_metrics(url: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows of a metrics.csv: epoch, phase, mse, bits (per element, noise proxy), lr, samples_s; none if not there.

    Those of MP-MAE's pretraining have the weighted loss and each task's loss and log variance too (`pretext_fields`);
    their mse is the optical task's loss.
    """
    try:
        text = read_url(url).decode()
    except NotFound:
        return []
    return [row for row in csv.DictReader(io.StringIO(text, newline="")) if row.get("samples_s")]


class Metrics:
    """Writes metrics.csv and TensorBoard's events, an epoch at a time; of one worker."""

    def __init__(self, url: str, epochs: int, fields: Sequence[str] = ()) -> None:
        """Go on after `epochs`, those that the checkpoint holds; later ones of an interrupted run are dropped.

        Args:
            url: the run's folder.
            epochs: see above.
            fields: columns, `FIELDS` among them; those that the file has, or `FIELDS`, where none are given.
        """
        from tensorboardX import SummaryWriter

        self._store = Store(url)
        self._rows = [row for row in read_metrics(f"{self._store.url}/{METRICS}") if int(row["epoch"]) <= epochs]
        self._fields = tuple(fields or (self._rows[0] if self._rows else FIELDS))
        self._local = None if self._store.is_local else tempfile.TemporaryDirectory(prefix="nec-tensorboard-")
        folder = self._local.name if self._local else self._store.path(TENSORBOARD)
        self._folder = Path(folder)
        self._writer = SummaryWriter(folder, purge_step=epochs + 1, filename_suffix=f".after{epochs}")
        self._write()

    def append(self, row: dict[str, Any]) -> None:
        """Add an epoch."""
        added = [name for name in self._fields if name not in FIELDS]
        self._rows.append({name: str(row[name]) for name in FIELDS} | {name: str(row.get(name, "")) for name in added})
        self._write()
        for name in ("mse", "bits", "lr", "samples_s", *added):
            if row.get(name, "") != "":
                self._writer.add_scalar(name, row[name], row["epoch"])
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        """End it."""
        self._writer.close()  # only now has its thread written everything
        self._upload()
        if self._local:
            self._local.cleanup()

    def _upload(self) -> None:
        for file in self._folder.iterdir() if self._local else ():
            self._store.replace(f"{TENSORBOARD}/{file.name}", file.read_bytes())

    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._fields)
        writer.writeheader()
        writer.writerows(self._rows)
        self._store.replace(METRICS, text.getvalue().encode())
