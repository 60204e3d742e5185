"""The `nec` command: parse, call, print.

Exit codes: 0 done; 1 a typed error, one line on stderr; 2 wrong usage; 130 stopped by Ctrl-C.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nec_ray.cli_archive import AtVersion, Printed, Time, Within, archive_app
from nec_ray.cli_tiles import tiles_app
from nec_ray.errors import InputError, Interrupted, MissingDependency, NecError, without_secrets
from nec_ray.printing import (
    NOTES,
    Format,
    number,
    print_facts,
    print_result,
    print_rows,
    printable,
    progress_bar,
    say_unless,
)


class _Stopped(Exception):
    """Ctrl-C, in a shape that Typer lets through: it would turn KeyboardInterrupt into a silent exit."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop) if isinstance(stop, Interrupted) else _STOPPED) from None


_STOPPED = "stopped; nothing is lost, the same command can be run again"

app = typer.Typer(
    name="nec",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural Embedding Compression on Ray: train, encode, query and pull compressed embeddings of imagery.",
)
app.add_typer(tiles_app, name="tiles")
app.add_typer(archive_app, name="archive")
bench_app = typer.Typer(no_args_is_help=True, help="Figures measured side by side with the alternatives, in one run.")
app.add_typer(bench_app, name="bench")


@contextmanager
def _unless_restarted(restart: bool) -> Iterator[None]:
    """Ctrl-C after --restart must not advise to throw the work away once more."""
    try:
        yield
    except KeyboardInterrupt:
        if restart:
            raise _Stopped("stopped; run the same command again without --restart to go on") from None
        raise


def _local(given: str | Path) -> Path:
    """A local path, also as file://; other URLs cannot be written as a folder of files."""
    text = str(given)
    if "://" in text and not text.startswith("file://"):
        raise InputError(f"{text}: this is written to a local path only; give one")
    return Path(text.removeprefix("file://"))


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Where = Annotated[str | None, typer.Option(help="SQL condition, such as \"label = 'water'\".")]
Layers = Annotated[int | None, typer.Option(help="Only the first layers of each payload.", min=1)]


class Task(StrEnum):
    """What a head does."""

    classification = "classification"
    multi_label = "multi-label"
    segmentation = "segmentation"


class Decoder(StrEnum):
    """What a segmentation head is."""

    nec = "nec"
    unet = "unet"


class DecoderLayer(StrEnum):
    """What a head does with the codec's first decoder layer."""

    none = "none"
    frozen = "frozen"
    trained = "trained"


@app.command(epilog="Example: nec demo --out nec-demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.", parser=_local)] = Path("nec-demo"),
    restart: Annotated[
        bool, typer.Option(help="Start clean instead of going on where an earlier run stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The whole road on the built-in real scene, with pictures; a second run goes on where the first stopped."""
    from nec_ray.runtime.demo import run_demo

    with _unless_restarted(restart):
        summary = run_demo(out, restart=restart, say=say_unless(as_json))
    if as_json:
        print_facts(summary, as_json)


@tiles_app.command(
    "build", epilog="Example: nec tiles build scenes/ --tile-size 64 --licence CC-BY-4.0 --out catalog.parquet"
)
def tiles_build(
    source: Annotated[
        str,
        typer.Argument(
            help="GeoTIFF/COG, a folder of them, a folder of images (class folders give labels), a STAC Catalog, "
            "Collection, Item or ItemCollection (.json) or stac-geoparquet (.parquet) of COGs, a Zarr v3 array or "
            "group (in a .zarr), an MMEarth .h5 file, or the folder of a GEO-Bench data set."
        ),
    ],
    out: Annotated[str, typer.Option(help="The catalog, a Parquet file: a path or URL.")],
    tile_size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side of a window; where not given 64 for GeoTIFFs, STAC and Zarr, other images stay whole.",
            min=1,
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Names of the bands, comma-separated, where the file has none; of STAC, the bands to take, by common "
            "name (red,nir), band name (B04) or asset; where not given, all that have a common name."
        ),
    ] = None,
    nodata: Annotated[
        float | None, typer.Option(help="Value that marks missing pixels, where the file does not say.")
    ] = None,
    sensor: Annotated[str | None, typer.Option(help="Platform or instrument.")] = None,
    acquired_at: Annotated[datetime | None, typer.Option(help="Time of acquisition, UTC.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the imagery, where STAC does not say; carried into the archive.")
    ] = None,
    attribution: Annotated[
        str | None, typer.Option(help="Whom to name, where STAC does not say; carried into the archive.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a tile catalog."""
    import pyarrow.compute as pc

    from nec_ray.tiles import build_catalog, write_catalog

    with progress_bar("reading tiles", as_json) as advance:
        catalog = build_catalog(
            source,
            tile_size=tile_size,
            bands=bands.split(",") if bands else None,
            nodata=nodata,
            sensor=sensor,
            acquired_at=acquired_at,
            licence=licence,
            attribution=attribution,
            progress=advance,
        )
    write_catalog(catalog, out)
    labels = catalog.table["label"].combine_chunks().drop_null().unique()
    facts: dict[str, Any] = {"catalog": out, "tiles": len(catalog), "classes": len(labels)}
    columns = (catalog.table[name].to_pylist() for name in ("source", "nodata_share"))
    damaged = sum(
        share is None and source.lower().endswith((".tif", ".tiff")) for source, share in zip(*columns, strict=True)
    )
    if "assets" in catalog.table.column_names:
        damaged += pc.sum(pc.equal(pc.list_value_length(catalog.table["assets"]), 0)).as_py() or 0
    if damaged:
        facts["unreadable_tiles"] = damaged  # encoding records each with its reason
    print_facts(facts, as_json)


@app.command(epilog="Example: nec train recipe.toml --set data.catalog=catalog.parquet --out my-codec")
def train(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file; its keys are in schemas/recipe.schema.json.", parser=_local)
    ],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as train.beta=0.02.")] = None,
    out: Annotated[
        str, typer.Option(help="Folder of the run, a path or URL; the codec is written to OUT/codec.")
    ] = "nec-train",
    restart: Annotated[
        bool, typer.Option(help="Throw an earlier run in OUT away instead of going on with it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Adapt a foundation model for compression; the same command again goes on where it stopped."""
    from nec_ray.codec import load_codec
    from nec_ray.runtime.recipe import read_recipe
    from nec_ray.runtime.train import train as run

    parsed = read_recipe(recipe, set_ or [])
    with _unless_restarted(restart):
        result = run(parsed, out, restart=restart, progress=say_unless(as_json))
    if not parsed.train.adapt_epochs:
        print_facts({"weights": result}, as_json)
        return
    codec = load_codec(result)
    facts = {
        "codec": result,
        "codec_id": codec.id,
        "bits_per_symbol": codec.spec.lineage.bits_per_symbol,
    }
    print_facts(facts, as_json)


@app.command(epilog="Example: nec encode catalog.parquet s3://bucket/archive --codec my-codec/codec")
def encode(
    catalog: Annotated[str, typer.Argument(help="A tile catalog.")],
    archive: Annotated[str, typer.Argument(help="The archive: a path or URL; created where it is not there.")],
    codec: Annotated[
        str | None,
        typer.Option(
            help="Codec directory, or first digits of the id of one in the archive. Not given: the archive's own, or "
            "for 8-bit RGB tiles in a new archive the built-in one."
        ),
    ] = None,
    where: Where = None,
    workers: Annotated[int | None, typer.Option(help="Encoder processes; one a core where not given.", min=1)] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Encode failed tiles again.")] = False,
    as_json: Json = False,
) -> None:
    """Encode a catalog into an archive; the same command again goes on after any stop."""
    from nec_ray.runtime.encode import encode as run
    from nec_ray.runtime.encode import prepare

    if dry_run:
        with prepare(
            catalog, archive, codec_url=codec, where=where, retry_failed=retry_failed, create=False
        ) as prepared:
            todo = prepared.plan
            facts = {
                "archive": archive,
                "codec_id": prepared.codec.id,
                "tiles": todo.tiles,
                "to_encode": todo.todo,
                "shards": todo.shards_todo,
            }
        print_facts(facts, as_json)
        return
    with progress_bar("encoding tiles", as_json) as advance:
        account = run(
            catalog,
            archive,
            codec_url=codec,
            where=where,
            workers=workers,
            local=local,
            retry_failed=retry_failed,
            progress=lambda done, todo, _: advance(done, todo),
        )
    print_facts(account.to_dict(), as_json, account.lines())


@app.command(
    epilog="Example: nec reencode my-archive --layers 2 --where \"acquired_at < TIMESTAMP '2020-01-01'\" --dry-run"
)
def reencode(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    codec: Annotated[
        str | None,
        typer.Option(help="Bring tiles under this codec: a codec directory, or first digits of an id in the archive."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Instead of --codec: keep only the first layers of each payload.", min=1)
    ] = None,
    where: Where = None,
    from_tiles: Annotated[
        str | None, typer.Option(help="A tile catalog: encode from its pixels instead of transcoding payloads.")
    ] = None,
    max_distortion: Annotated[
        float | None,
        typer.Option(help="Refuse a cell of tiles that would lose more than this share of its embeddings' variance."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Instead of all these: the rules of a TOML file; its keys are in schemas/policy.schema.json.",
            parser=_local,
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Tasks at a time; one a core where not given.", min=1)] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and what it would cost; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring tiles of an archive under another codec, or drop layers; readers are not disturbed.

    From payloads where the encoder stays the same, from pixels otherwise. The same command again goes on after any
    stop, and does nothing to tiles that are what they should be.
    """
    from nec_ray.runtime.policy import one_rule, read_policy
    from nec_ray.runtime.reencode import dry_run as look
    from nec_ray.runtime.reencode import reencode as run
    from nec_ray.storage import normalise_url

    rule = {"codec": codec, "layers": layers, "where": where, "tiles": from_tiles, "max_distortion": max_distortion}
    if (codec is not None) + (layers is not None) + (policy is not None) != 1:
        raise InputError(f"{archive}: give one of --codec, --layers and --policy")
    if policy is not None:
        if any(value is not None for value in rule.values()):
            raise InputError(f"{policy}: the policy's rules say this; leave --where and the like out")
        asked = read_policy(policy)
        if normalise_url(archive) != normalise_url(asked.archive):
            raise InputError(
                f"{policy}: it is for {asked.archive}, not for {archive}; name that archive, or write another policy"
            )
    else:
        asked = one_rule(archive, **rule)
    if dry_run:
        account = look(asked)
    else:
        with progress_bar("re-encoding tiles", as_json) as advance:
            account = run(asked, workers=workers, local=local, progress=advance)
    print_facts(account.to_dict(), as_json, account.lines())


@app.command(epilog='Example: nec query my-archive "SELECT tile_id, n_bytes FROM embeddings LIMIT 5" --format csv')
def query(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    sql: Annotated[str, typer.Argument(help="One SELECT over the view `embeddings`.")],
    format_: Printed = Format.table,
    version: AtVersion = None,
) -> None:
    """SQL over an archive's index; nec_decode(payload) gives embeddings."""
    from nec_ray.archive import open_archive

    result = open_archive(archive, version).sql(sql).to_arrow_table()
    print_result(result, format_)


@app.command(epilog="Example: nec pull my-archive --within 10.5,47,11,47.5 --time 2020-05/2020-08 --out embeddings.npz")
def pull(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    out: Annotated[Path, typer.Option(help="File to write: .npz, .zarr or .parquet.", parser=_local)],
    where: Where = None,
    within: Within = None,
    time: Time = None,
    layers: Layers = None,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """Fetch and decode embeddings."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.pull_files import check_out, write_pull
    from nec_ray.codec import parts_of

    check_out(out)
    with progress_bar("pulling tiles", as_json) as advance:
        pulled = open_archive(archive, version).pull(where, layers, within=within, time=time, progress=advance)
    write_pull(pulled, out)
    shapes = [part.shape[1:] for part in parts_of(pulled.embeddings)]  # of each grid scale
    several = len(shapes) > 1
    facts = {
        "out": str(out),
        "tiles": len(pulled),
        "tokens": [tokens for tokens, _ in shapes] if several else shapes[0][0],
        "channels": [channels for _, channels in shapes] if several else shapes[0][1],
        "payload_bytes": int(pulled.n_bytes.sum()),
        "encoder_id": pulled.encoder_id,
    }
    print_facts(facts, as_json)


@app.command(epilog="Example: nec head my-archive --labels labels.geojson --out my-head")
def head(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the head, its metrics and pictures.", parser=_local)],
    labels: Annotated[
        str | None,
        typer.Option(
            help="Parquet, CSV or GeoJSON, or a catalog; the archive's own labels where not given. For segmentation a "
            "folder of PNG or GeoTIFF masks named like tiles or their source images, one label GeoTIFF, or a GEO-Bench "
            "data set's folder. For multi-label a table, or a catalog, with a list of labels."
        ),
    ] = None,
    task: Annotated[
        Task, typer.Option(help="What the labels are for: a class a tile, several, or masks.")
    ] = Task.classification,
    classes: Annotated[
        str | None,
        typer.Option(help="Values or colours of the classes of masks (JSON); classes.json beside them if not given."),
    ] = None,
    decoder: Annotated[
        Decoder | None,
        typer.Option(
            help="Of segmentation: nec, the NEC paper's, or unet; a U-Net where several grid scales are pulled, if not "
            "given."
        ),
    ] = None,
    decoder_layer: Annotated[
        DecoderLayer, typer.Option(help="Use the codec's first decoder layer.")
    ] = DecoderLayer.none,
    layers: Layers = None,
    where: Where = None,
    seed: Annotated[int, typer.Option(help="Seed of the head's weights and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a light head on pulled embeddings."""
    from nec_ray.archive import open_archive
    from nec_ray.evaluate import train_head_on_archive

    with progress_bar("training the head", as_json) as advance:
        metrics = train_head_on_archive(
            open_archive(archive),
            labels,
            out,
            task=task.value,
            classes=classes,
            decoder=decoder.value if decoder else None,
            decoder_layer=decoder_layer.value,
            layers=layers,
            where=where,
            seed=seed,
            progress=advance,
        )
    shown = ["accuracy", "map", "micro_f1", "mean_iou", "majority"]
    shown += ["tiles", "train_tiles", "test_tiles", "bytes_per_tile"]
    print_facts(
        metrics,
        as_json,
        [f"{key.replace('_', ' ')}: {number(metrics[key])}" for key in shown if key in metrics] + [f"results: {out}"],
    )


@app.command(epilog="Example: nec evaluate evaluation.toml --out report")
def evaluate(
    config: Annotated[
        Path,
        typer.Argument(
            help="A TOML file; its keys are in schemas/evaluation.schema.json, of GEO-Bench in "
            "schemas/geobench_evaluation.schema.json.",
            parser=_local,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, results.json, the pictures and the heads.", parser=_local)
    ],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as seeds=[0].")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods by accuracy and bytes on the same tiles, or encoders on GEO-Bench, with several seeds."""
    from nec_ray.evaluate.evaluation import read_evaluation, run_evaluation, summary_lines

    with progress_bar("training heads", as_json) as advance:
        document = run_evaluation(read_evaluation(config, set_ or []), out, advance)
    facts = {"out": str(out), "summary": document["summary"]}
    print_facts(facts, as_json, [*summary_lines(document), f"report: {out / 'report.html'}"])


@app.command(epilog="Example: nec predict my-archive --head my-head --out classes.parquet")
def predict(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    head_dir: Annotated[Path, typer.Option("--head", help="Folder that `nec head` wrote.", parser=_local)],
    out: Annotated[
        Path,
        typer.Option(
            help="Parquet file to write; for a segmentation head a GeoTIFF (.tif) that mosaics the tiles, or a folder "
            "for a PNG a tile and tiles.parquet, which names them.",
            parser=_local,
        ),
    ],
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Apply a head to tiles of an archive."""
    from nec_ray.archive import open_archive
    from nec_ray.evaluate import predict as run

    with progress_bar("predicting", as_json) as advance:
        table = run(open_archive(archive), head_dir, where, out, progress=advance)
    print_facts({"out": str(out), "tiles": table.num_rows}, as_json)


def _print_report(report: dict[str, Any], format_: Format, as_json: bool) -> None:
    """A benchmark's report: whole as JSON; its machine and a table of its rows; or in other formats the rows alone."""
    if as_json or format_ is Format.table:
        print_facts(report if as_json else report["machine"], as_json)
    if not as_json:
        print_rows(report["rows"], format_)


@bench_app.command("codec", epilog="Example: nec bench codec --json")
def bench_codec(
    codec: Annotated[str | None, typer.Option(help="Real symbols and tables: a codec directory.")] = None,
    format_: Printed = Format.table,
    as_json: Json = False,
) -> None:
    """Speed and size of the entropy coder beside CompressAI's and constriction's, on one core, then on all."""
    from nec_ray.codec import load_codec
    from nec_ray.evaluate.bench_codec import bench_codec as run

    report = run(load_codec(codec) if codec else None, say=say_unless(as_json))
    _print_report(report, format_, as_json)


@bench_app.command("encode", epilog="Example: nec bench encode --tiles 4096 --repeats 3")
def bench_encode(
    codec: Annotated[
        str | None, typer.Option(help="A codec for red, green and blue; random weights of a ViT-Ti/16 by default.")
    ] = None,
    tiles: Annotated[int, typer.Option(help="Tiles of a run.", min=512)] = 2048,
    repeats: Annotated[int, typer.Option(help="Runs of each kind; the median counts.", min=1)] = 2,
    memory: Annotated[bool, typer.Option(help="Measure memory at 10,000 and at 100,000 tiles too.")] = True,
    format_: Printed = Format.table,
    as_json: Json = False,
) -> None:
    """Tiles a second, start-up and memory of encoding on Ray beside the bare loop on the same cores."""
    from nec_ray.runtime.bench_encode import bench_encode as run

    report = run(codec, tiles, repeats=repeats, memory=memory, say=say_unless(False))  # to stderr: it takes long
    _print_report(report, format_, as_json)


@bench_app.command("planning", epilog="Example: nec bench planning --tiles 1000000")
def bench_planning(
    tiles: Annotated[int, typer.Option(help="Tiles of the catalog.", min=1000)] = 200_000,
    folder: Annotated[Path | None, typer.Option(help="Where to write, about 400 bytes a tile.")] = None,
    format_: Printed = Format.table,
    as_json: Json = False,
) -> None:
    """Seconds and memory of plan, packs, index, query and pull over a catalog of any size, without pixels."""
    from nec_ray.runtime.bench_planning import bench_planning as run

    report = run(tiles, folder, say=say_unless(False))  # to stderr: it takes long
    _print_report(report, format_, as_json)


@bench_app.command("pull", epilog="Example: nec bench pull --layout nec --layout parquet")
def bench_pull(
    tiles: Annotated[int, typer.Option(help="Tiles of the synthetic archive.", min=1000)] = 200_000,
    s3: Annotated[
        str | None,
        typer.Option(
            help="s3:// prefix to write to and remove again; by default a SeaweedFS of its own, if installed."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Processes for each timing; the fastest counts.", min=1)] = 3,
    layout: Annotated[
        list[str] | None, typer.Option(help="Only this layout (nec, parquet, lance, zarr, npy); may be repeated.")
    ] = None,
    format_: Printed = Format.table,
    as_json: Json = False,
) -> None:
    """Bytes, requests and seconds of five pulls, beside Parquet, Lance, Zarr and .npy files, locally and over S3."""
    from nec_ray.evaluate.bench_pull import bench_pull as run

    report = run(tiles, s3, layouts=layout, repeats=repeats, say=say_unless(False))  # to stderr: it takes long
    _print_report(report, format_, as_json)


@bench_app.command("train", epilog="Example: nec bench train --size base --device cuda")
def bench_train(
    size: Annotated[
        str | None,
        typer.Option(help="micro, tiny, small, base (the default) or large; of mp_mae atto (the default) to tiny."),
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(help="Pixels a side, a multiple of the patch; 224, of mp_mae 7 patches.", min=16)
    ] = None,
    family: Annotated[str, typer.Option(help="mae_vit, or mp_mae: its masked encoder beside a ConvNeXt V2.")] = (
        "mae_vit"
    ),
    patch: Annotated[int, typer.Option(help="Pixels a side of a patch: 16; of mp_mae 8, 16 or 32.")] = 16,
    batch: Annotated[
        int | None, typer.Option(help="Tiles a call; 8 on a CPU, 256 on a GPU where not given.", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    format_: Printed = Format.table,
    as_json: Json = False,
) -> None:
    """Speed of training step and encoder beside timm's plain ViT or ConvNeXt V2: samples a second, FLOP utilisation."""
    from nec_ray.evaluate.bench_train import bench_train as run

    masked = family == "mp_mae"
    report = run(
        size or ("atto" if masked else "base"),
        pixels or (7 * patch if masked else 224),
        family=family,
        patch=patch,
        batch=batch,
        device=device,
        say=say_unless(as_json),
    )
    _print_report(report, format_, as_json)


def main() -> None:
    """Entry point of the `nec` command."""
    try:
        code = app(prog_name="nec", standalone_mode=False)  # the name that completion knows
    except NecError as error:
        code = _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if not extra:
            raise
        code = _fail(
            str(MissingDependency(f"this command needs {error.name}; install it with pip install 'nec-ray[{extra}]'"))
        )
    except _Stopped as stop:
        NOTES.print(f"nec: {stop}", markup=False)
        os._exit(130)  # threads of Ray's end a process whose raylet has gone, by a code of their own
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has enough
        code = 0
    except OSError as error:
        code = _fail(f"{error.filename or 'writing'}: {error.strerror or error}; give another path")
    except Exception as error:
        # Typer carries a click of its own, whose usage errors have no public name.
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        code = error.exit_code
        text = getattr(error, "format_message", lambda: "")()
        if "\n" in text or not text:  # the help of a command that was given nothing
            error.show()
        else:
            command = getattr(getattr(error, "ctx", None), "command_path", "nec")
            _fail(f"{text.rstrip('.')}; `{command} --help` says more")
    sys.exit(code if isinstance(code, int) else 0)


_EXTRAS = {
    "torch": "train",
    "timm": "train",
    "compressai": "train",
    "matplotlib": "train",
    "rasterio": "tiles",
    "PIL": "tiles",
    "h5py": "tiles",
    "ray": "ray",
}


def _fail(message: str) -> int:
    text = printable(without_secrets(" ".join(message.split())))
    NOTES.print(f"nec: error: {text}", markup=False, style="red" if NOTES.is_terminal else None)
    return 1
