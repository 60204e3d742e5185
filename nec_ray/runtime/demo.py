"""`nec demo`: the whole road on the built-in scene, each step the same call that its own command makes."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nec_ray.archive import open_archive
from nec_ray.archive.pull_files import write_pull
from nec_ray.codec import load_codec
from nec_ray.errors import InputError
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.encode import encode
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, build_catalog, builtin_labels, builtin_scene, read_catalog, read_tiles, write_catalog

TILE_PIXELS = 32
_MARK = "nec-demo.json"
_RECIPE = Path(__file__).resolve().parent.parent / "data" / "demo_recipe.toml"

Say = Callable[[str], None]


def run_demo(out: Path, *, restart: bool = False, say: Say = print) -> dict[str, Any]:
    """Catalog, codec, archive, SQL, pull, head, predictions and pictures of the built-in scene, below `out`.

    Every step goes on where an earlier run stopped; `restart` throws that run away.

    Raises:
        InputError: `out` holds something else.
    """
    started = time.monotonic()
    out = out.expanduser().absolute()
    _prepare(out, restart)
    catalog_path, archive_path = out / "catalog.parquet", out / "archive"

    say("1/6 tile catalog of the built-in scene (Landsat 8, Itaipu, 2020-05-18)")
    if not catalog_path.exists():
        built = build_catalog(
            builtin_scene(),
            tile_size=TILE_PIXELS,
            title="Landsat 8, Itaipu, 2020-05-18",
            licence="public domain",
            attribution="U.S. Geological Survey",
        )
        write_catalog(built, catalog_path)
    catalog = read_catalog(str(catalog_path))
    say(f"    {len(catalog):,} tiles of {TILE_PIXELS} x {TILE_PIXELS} pixels: {catalog_path}")

    with connect():  # one Ray for both steps
        say("2/6 adapting a small masked autoencoder for compression, on Ray Train")
        codec_path = _train(out, catalog_path, say)
        codec = load_codec(codec_path)

        say("3/6 encoding the tiles into an archive, on Ray Data")
        account = encode(catalog_path, archive_path, codec_url=codec_path)
        for line in account.lines():
            say(f"    {line}")

    say("4/6 SQL over the archive, and a pull")
    archive = open_archive(archive_path)
    sql = "SELECT status, count(*) AS tiles, sum(n_bytes) AS bytes FROM embeddings GROUP BY status ORDER BY status"
    say(f"    {sql}")
    for status, tiles, size in archive.sql(sql).fetchall():
        say(f"    {status}: {tiles} tiles, {size:,} bytes")
    pull = archive.pull()
    write_pull(pull, out / "embeddings.npz")
    exact = _same_symbols(catalog, codec, pull)
    say(f"    pulled {len(pull):,} embeddings of {pull.embeddings.shape[1]} x {pull.embeddings.shape[2]}; {exact}")

    say("5/6 a head for land cover on the pulled embeddings alone")
    metrics = _head(archive, catalog, codec, out, say)

    say("6/6 pictures")
    pictures = _pictures(archive, pull, out)
    for picture in pictures:
        say(f"    {picture}")
    seconds = time.monotonic() - started
    say(f"done in {seconds:.0f} s; everything is in {out}, and the other commands work on it, for instance")
    say(f'    nec query {archive_path} "SELECT tile_id, n_bytes FROM embeddings ORDER BY n_bytes DESC LIMIT 5"')
    summary = {
        "out": str(out),
        "catalog": str(catalog_path),
        "codec": str(codec_path),
        "archive": account.to_dict(),
        "head": {key: value for key, value in metrics.items() if key != "confusion"},
        "pictures": [str(picture) for picture in pictures],
        "seconds": seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _prepare(out: Path, restart: bool) -> None:
    mark = out / _MARK
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; give a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise InputError(f"{out}: not empty and no folder of an earlier demo; give another --out")
    if restart and mark.exists():
        for entry in out.iterdir():  # the mark stays: a stop in the middle must not lock the user out
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != mark:
                entry.unlink()
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text('{"format_version": 1}\n')


def _train(out: Path, catalog: Path, say: Say) -> Path:
    from nec_ray.runtime.recipe import read_recipe
    from nec_ray.runtime.train import train

    recipe = read_recipe(_RECIPE, [f"data.catalog={catalog}"])
    return Path(train(recipe, out / "train", progress=lambda line: say(f"    {line}")))


def _same_symbols(catalog: Catalog, codec: Any, pull: Any) -> str:
    """Encode a few tiles again, serially, and compare: what was pulled is what the encoder produced."""
    from nec_ray.models.embed import Embedder

    wanted = pull.tile_ids[:: max(1, len(pull) // 8)]
    rows = catalog.where_ids(wanted).table
    spec = codec.spec.input
    batch = read_tiles(rows, bands=spec.bands, size=spec.size, fill=spec.mean)
    ids = rows["tile_id"].to_pylist()
    row_of = {tile_id: i for i, tile_id in enumerate(pull.tile_ids)}
    pulled = pull.symbols[[row_of[ids[i]] for i in batch.valid]]
    expected = Embedder(codec).symbols(batch.pixels)
    return f"{np.mean(pulled == expected):.2%} of the symbols of {len(batch.valid)} tiles encoded again are the same"


def _head(archive: Any, catalog: Catalog, codec: Any, out: Path, say: Say) -> dict[str, Any]:
    from nec_ray.evaluate import compare_with_uncompressed, predict, train_head_on_archive

    metrics = train_head_on_archive(archive, builtin_labels(), out / "head")
    raw = compare_with_uncompressed(archive, builtin_labels(), catalog, codec)
    metrics["accuracy_uncompressed"] = raw["accuracy"]
    (out / "head" / "metrics.json").write_text(json.dumps(metrics, indent=1))
    say(
        f"    accuracy on {metrics['test_tiles']} tiles it has not seen: {metrics['accuracy']:.1%} "
        f"from {metrics['bytes_per_tile']:.0f} bytes a tile; uncompressed embeddings {raw['accuracy']:.1%}, "
        f"majority class {metrics['majority']:.1%}"
    )
    predict(archive, out / "head", None, out / "land_cover.parquet")
    return metrics


def _pictures(archive: Any, pull: Any, out: Path) -> list[Path]:
    from nec_ray.evaluate import pictures

    rows = archive.rows([*pictures.PLACEMENT_ROWS, "n_bytes"], "status = 'valid'")
    placement = pictures.place(rows)
    scene = _scene(pictures.Scene)
    predicted = pq.read_table(out / "land_cover.parquet").sort_by("tile_id")
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    n_bytes = rows["n_bytes"].to_numpy().astype(np.int64)
    confidence = predicted["confidence"].to_numpy()
    return [
        pictures.scene_and_embeddings(scene, placement, pull.embeddings, pull.grid, folder / "embeddings.png"),
        pictures.bytes_map(placement, n_bytes, folder / "bytes.png", scene=scene),
        pictures.class_map(
            scene,
            placement,
            predicted["label"].to_pylist(),
            folder / "land_cover.png",
            confidence=confidence,
            title="Land cover, predicted from the embeddings",
        ),
        out / "head" / "confusion.png",
    ]


def _scene(make: Any) -> Any:
    """The built-in scene as a picture, stretched between percentiles of its valid pixels."""
    from nec_ray.tiles.geotiff import open_image

    path = builtin_scene()
    with open_image(Store(path.parent), path.name) as image:
        pixels, bounds = image.read().astype(np.float32), image.bounds
    valid = (pixels > 0).all(axis=0)
    low, high = np.percentile(pixels[:, valid], (1, 99), axis=1)[:, :, None, None]
    rgb = np.clip((pixels - low) / (high - low), 0, 1) * valid * 255
    return make(rgb.astype(np.uint8).transpose(1, 2, 0), (bounds.left, bounds.right, bounds.bottom, bounds.top))
