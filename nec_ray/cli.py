"""The `nec` command: parse, call, print.

Exit codes: 0 done; 1 a typed error, one line on stderr; 2 wrong usage; 130 stopped by Ctrl-C.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nec_ray.errors import InputError, Interrupted, MissingDependency, NecError
from nec_ray.printing import NOTES, Format, number, print_facts, print_result, print_rows, progress_bar, say_unless


class _Stopped(Exception):
    """Ctrl-C, in a shape that Typer lets through: it would turn KeyboardInterrupt into a silent exit."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop) if isinstance(stop, Interrupted) else _STOPPED) from None


_STOPPED = "stopped; run the same command again to go on"

app = typer.Typer(
    name="nec",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural Embedding Compression on Ray: train, encode, query and pull compressed embeddings of imagery.",
)
tiles_app = typer.Typer(no_args_is_help=True, help="Tile catalogs: where each tile's pixels are.")
app.add_typer(tiles_app, name="tiles")
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
AtVersion = Annotated[str | None, typer.Option("--version", help="Number of a version, or a time with its zone.")]


class DecoderLayer(StrEnum):
    """What a head does with the codec's first decoder layer."""

    none = "none"
    frozen = "frozen"
    trained = "trained"


@app.command()
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


@tiles_app.command("build")
def tiles_build(
    source: Annotated[
        str,
        typer.Argument(help="GeoTIFF/COG, a folder of them, or a folder of images (class folders give labels)."),
    ],
    out: Annotated[str, typer.Option(help="The catalog, a Parquet file: a path or URL.")],
    tile_size: Annotated[
        int | None, typer.Option(help="Pixels a side of a window (GeoTIFF); 64 where not given.", min=1)
    ] = None,
    bands: Annotated[
        str | None, typer.Option(help="Names of the bands, comma-separated, where the file has none.")
    ] = None,
    nodata: Annotated[
        float | None, typer.Option(help="Value that marks missing pixels, where the file does not say.")
    ] = None,
    sensor: Annotated[str | None, typer.Option(help="Platform or instrument.")] = None,
    acquired_at: Annotated[datetime | None, typer.Option(help="Time of acquisition, UTC.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the imagery; carried into the archive.")] = None,
    attribution: Annotated[str | None, typer.Option(help="Whom to name; carried into the archive.")] = None,
    as_json: Json = False,
) -> None:
    """Build a tile catalog."""
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
    if damaged:
        facts["unreadable_tiles"] = damaged  # encoding records each with its reason
    print_facts(facts, as_json)


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(help="A TOML file; its keys are in schemas/recipe.schema.json.", parser=_local)
    ],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as train.beta=0.02.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; the codec is written to OUT/codec.", parser=_local)
    ] = Path("nec-train"),
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
        folder = run(parsed, out, restart=restart, progress=say_unless(as_json))
    codec = load_codec(folder)
    facts = {
        "codec": str(folder),
        "codec_id": codec.id,
        "bits_per_symbol": codec.spec.lineage.bits_per_symbol,
    }
    print_facts(facts, as_json)


@app.command()
def encode(
    catalog: Annotated[str, typer.Argument(help="A tile catalog.")],
    archive: Annotated[str, typer.Argument(help="The archive: a path or URL; created where it is not there.")],
    codec: Annotated[
        str | None, typer.Option(help="Codec directory, or first digits of the id of one in the archive.")
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
        _, chosen, todo, _, _ = prepare(
            catalog, archive, codec_url=codec, where=where, retry_failed=retry_failed, create=False
        )
        facts = {
            "archive": archive,
            "codec_id": chosen.id,
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


@app.command()
def query(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    sql: Annotated[str, typer.Argument(help="One SELECT over the view `embeddings`.")],
    format_: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
    version: AtVersion = None,
) -> None:
    """SQL over an archive's index; nec_decode(payload) gives embeddings."""
    from nec_ray.archive import open_archive

    result = open_archive(archive, version).sql(sql).to_arrow_table()
    print_result(result, format_)


@app.command()
def pull(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    out: Annotated[Path, typer.Option(help="File to write: .npz, .zarr or .parquet.", parser=_local)],
    where: Where = None,
    layers: Layers = None,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """Fetch and decode embeddings."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.export import check_out, write_pull

    check_out(out)
    pulled = open_archive(archive, version).pull(where, layers)
    write_pull(pulled, out)
    _, tokens, channels = pulled.embeddings.shape
    facts = {
        "out": str(out),
        "tiles": len(pulled),
        "tokens": tokens,
        "channels": channels,
        "payload_bytes": int(pulled.n_bytes.sum()),
        "encoder_id": pulled.encoder_id,
    }
    print_facts(facts, as_json)


@app.command()
def head(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the head, its metrics and pictures.", parser=_local)],
    labels: Annotated[
        str | None,
        typer.Option(help="Parquet, CSV or GeoJSON, or a catalog; the archive's own labels where not given."),
    ] = None,
    task: Annotated[str, typer.Option(help="classification")] = "classification",
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
            task=task,
            decoder_layer=decoder_layer.value,
            layers=layers,
            where=where,
            seed=seed,
            progress=advance,
        )
    shown = ("accuracy", "majority", "tiles", "train_tiles", "test_tiles", "bytes_per_tile")
    print_facts(
        metrics,
        as_json,
        [f"{key.replace('_', ' ')}: {number(metrics[key])}" for key in shown] + [f"results: {out}"],
    )


@app.command()
def predict(
    archive: Annotated[str, typer.Argument(help="An archive: a path or URL.")],
    head_dir: Annotated[Path, typer.Option("--head", help="Folder that `nec head` wrote.", parser=_local)],
    out: Annotated[Path, typer.Option(help="Parquet file to write.", parser=_local)],
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Apply a head to tiles of an archive."""
    from nec_ray.archive import open_archive
    from nec_ray.evaluate import predict as run

    with progress_bar("predicting", as_json) as advance:
        table = run(open_archive(archive), head_dir, where, out, progress=advance)
    print_facts({"out": str(out), "tiles": table.num_rows}, as_json)


@bench_app.command("codec")
def bench_codec(
    codec: Annotated[str | None, typer.Option(help="Real symbols and tables: a codec directory.")] = None,
    as_json: Json = False,
) -> None:
    """Speed and size of the entropy coder beside CompressAI's and constriction's, on one core, then on all."""
    from nec_ray.codec import load_codec
    from nec_ray.evaluate.bench_codec import bench_codec as run

    report = run(load_codec(codec) if codec else None, say=say_unless(as_json))
    if as_json:
        print_facts(report, as_json)
        return
    print_facts(report["machine"], as_json)
    print_rows(report["rows"])


def main() -> None:
    """Entry point of the `nec` command."""
    try:
        code = app(standalone_mode=False)
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
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has enough
        code = 0
    except OSError as error:
        code = _fail(f"{error.filename or 'writing'}: {error.strerror or error}; give another path")
    except Exception as error:
        # Typer carries a click of its own, whose usage errors have no public name.
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)


_EXTRAS = {
    "torch": "train",
    "timm": "train",
    "compressai": "train",
    "matplotlib": "train",
    "rasterio": "tiles",
    "PIL": "tiles",
    "ray": "ray",
}


def _fail(message: str) -> int:
    NOTES.print(f"nec: error: {' '.join(message.split())}", markup=False, style="red" if NOTES.is_terminal else None)
    return 1
