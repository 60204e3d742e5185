"""`nec archive ...`: what is in an archive, its versions, its upkeep."""

import re
import sys
from contextlib import suppress
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nec_ray.errors import InputError
from nec_ray.printing import Format, number, print_facts, print_result, print_rows, progress_bar

archive_app = typer.Typer(no_args_is_help=True, help="What an archive holds, its versions, and its upkeep.")

Printed = Annotated[Format, typer.Option("--format", help="How to print the table.")]
Url = Annotated[str, typer.Argument(metavar="ARCHIVE", help="An archive: a path or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
AtVersion = Annotated[str | None, typer.Option("--version", help="Number of a version, or a time with its zone.")]
Within = Annotated[
    str | None,
    typer.Option(help="Only tiles that meet a region: a GeoJSON file or text, or west,south,east,north in degrees."),
]
Time = Annotated[
    str | None,
    typer.Option(help="Only tiles acquired then: 2020, 2020-05, 2020-05-18, an instant, or a range 2020-05/2020-08."),
]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST = 100 * 366 * 86_400


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else _LONGEST + 1
    if seconds > _LONGEST:
        raise InputError(f"{text}: no duration; give a number and s, m, h, d or w, such as 7d")
    return timedelta(seconds=seconds)


@archive_app.command(epilog="Example: nec archive info my-archive --version 3")
def info(archive: Url, version: AtVersion = None, as_json: Json = False) -> None:
    """Tiles, bytes, codecs and coverage of a version."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.info import describe

    facts = describe(open_archive(archive, version))
    status = " + ".join(f"{facts[key]:,} {key}" for key in ("valid", "nodata", "failed"))
    lines = [
        f"archive: {facts['archive']}, version {facts['version']}",
        f"tiles: {facts['tiles']:,} = {status}",
        f"payloads: {facts['payload_bytes']:,} bytes in {facts['packs']:,} packs, "
        f"{number(facts['bytes_per_tile'])} a tile",
        f"index: {facts['index_bytes']:,} bytes in {facts['index_files']:,} files",
    ]
    if facts["bbox"]:
        west, south, east, north = facts["bbox"]
        lines.append(f"extent: {west:.5f} to {east:.5f} east, {south:.5f} to {north:.5f} north")
    if facts["acquired"]:
        lines.append(f"acquired: {' to '.join(dict.fromkeys(facts['acquired']))}")
    lines += [
        f"codec {codec['codec_id'][:12]}: {codec['tiles']:,} tiles, {codec['payload_bytes']:,} bytes, "
        f"{codec['family']}, {codec['layers']} layers, {codec['grid']} tokens x {codec['channels']} channels"
        for codec in facts["codecs"]
    ]
    lines += [f"{key}: {facts[key]}" for key in ("licence", "attribution") if facts[key]]
    print_facts(facts, as_json, lines)


@archive_app.command(epilog="Example: nec archive history my-archive")
def history(archive: Url, format_: Printed = Format.table, as_json: Json = False) -> None:
    """The versions, the newest first."""
    from nec_ray.archive.index import Index
    from nec_ray.archive.layout import read_info
    from nec_ray.storage import Store

    store = Store(archive)
    read_info(store)
    rows: list[dict[str, Any]] = [
        {"version": entry.version, "time": entry.time.isoformat(timespec="milliseconds"), "operation": entry.operation}
        for entry in Index(store).history()
    ]
    if as_json:
        print_facts({"versions": rows}, as_json)
    else:
        print_rows(rows, format_)


@archive_app.command(epilog="Example: nec archive verify my-archive --sample 1000")
def verify(
    archive: Url,
    sample: Annotated[int | None, typer.Option(help="Check only so many payloads, drawn at random.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """Fetch, hash and decode every payload, or a sample; exit code 1 where one, or a recorded catalog, is damaged."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.verify import verify as run

    with progress_bar("verifying payloads", as_json) as advance:
        done = run(open_archive(archive, version), sample=sample, seed=seed, progress=advance)
    facts = {
        "archive": archive,
        "tiles": done.tiles,
        "checked": done.checked,
        "payload_bytes": done.payload_bytes,
        "faults": [{"tile_id": fault.tile_id, "what": fault.what} for fault in done.faults],
        "catalogs": done.catalogs,
    }
    lines = [f"{done.checked:,} payloads ({done.payload_bytes:,} bytes) of {done.tiles:,} tiles checked"]
    wrong = [*(f"tile {fault.tile_id}: {fault.what}" for fault in done.faults), *done.catalogs]
    lines += wrong or ["all are what was written"]
    print_facts(facts, as_json, lines)
    if wrong:
        raise typer.Exit(1)


@archive_app.command(epilog="Example: nec archive gc my-archive --grace 14d --dry-run")
def gc(
    archive: Url,
    grace: Annotated[
        str, typer.Option(help="Leave alone what is younger, and versions that readers of this age see.")
    ] = "7d",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove packs, codecs, index files and recorded catalogs that no kept version needs; try --dry-run first.

    A grace shorter than the longest reader or writer at work takes things from under them. Parts of uploads that were
    killed are an object store's own: let a lifecycle rule of the bucket abort unfinished uploads.
    """
    from nec_ray.archive.collect import collect, find_garbage
    from nec_ray.archive.layout import read_info
    from nec_ray.storage import Store

    store, age = Store(archive), _duration(grace)
    read_info(store)
    with progress_bar("removing garbage", as_json) as advance:
        garbage = find_garbage(store, age) if dry_run else collect(store, age, advance)
    oldest, newest = garbage.kept_versions
    size = sum(entry.size for entry in garbage.entries)
    facts = {
        "archive": archive,
        "removed": not dry_run,
        "oldest_kept_version": oldest,
        "newest_version": newest,
        "packs": len(garbage.packs),
        "codecs": garbage.codecs,
        "index_files": len(garbage.index_files),
        "catalogs": len(garbage.catalogs),
        "objects": len(garbage.entries),
        "bytes": size,
    }
    does = "would be removed" if dry_run else "removed"
    lines = [
        f"{does}: {len(garbage.packs):,} packs, {len(garbage.codecs):,} codecs, "
        f"{len(garbage.index_files):,} index files, {len(garbage.catalogs):,} recorded catalogs, {size:,} bytes in all",
        f"kept whole: versions {oldest} to {newest}",
    ]
    print_facts(facts, as_json, lines)


@archive_app.command(epilog="Example: nec archive compact my-archive --dry-run")
def compact(archive: Url, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Merge small index files, and small and half-dead packs, as one version."""
    from nec_ray.archive.compact import compact as run
    from nec_ray.archive.layout import read_info
    from nec_ray.storage import Store

    store = Store(archive)
    read_info(store)
    with progress_bar("copying payload bytes", as_json) as advance:
        done = run(store, dry_run=dry_run, progress=advance)
    facts = {
        "archive": archive,
        "version": done.version,
        "done": not dry_run,
        "index_files": done.files,
        "packs": done.packs,
        "tiles": done.tiles,
        "copied_bytes": done.copied_bytes,
    }
    does = "would be rewritten" if dry_run else "rewritten"
    lines = [
        f"{does}: {done.files:,} index files ({done.tiles:,} tiles), "
        f"{done.packs:,} packs ({done.copied_bytes:,} payload bytes)",
        f"version: {done.version}",
    ]
    print_facts(facts, as_json, lines)


@archive_app.command(epilog="Example: nec archive delete my-archive --where \"status = 'failed'\" --dry-run")
def delete(
    archive: Url,
    where: Annotated[str, typer.Option(help="SQL condition that picks the tiles, such as \"status = 'failed'\".")],
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove tiles; older versions keep them, and their payloads stay until `gc`."""
    from nec_ray.archive.change import delete as run
    from nec_ray.storage import Store

    done = run(Store(archive), where, dry_run=dry_run)
    facts = {"archive": archive, "version": done.version, "done": not dry_run, "tiles": done.dropped}
    does = "would be deleted" if dry_run else "deleted"
    print_facts(facts, as_json, [f"{does}: {done.dropped:,} tiles", f"version: {done.version}"])


@archive_app.command(epilog="Example: nec archive restore my-archive --version 3")
def restore(
    archive: Url,
    version: Annotated[str, typer.Option("--version", help="Number of a version, or a time with its zone.")],
    as_json: Json = False,
) -> None:
    """Make an older version the newest one; the versions between stay in the history."""
    from nec_ray.archive.archive import parse_version
    from nec_ray.archive.change import restore as run
    from nec_ray.archive.layout import read_info
    from nec_ray.storage import Store

    store = Store(archive)
    read_info(store)
    number_or_time = parse_version(version)
    assert number_or_time is not None
    done = run(store, number_or_time)
    facts = {"archive": archive, "version": done.version, "restored": version, "tiles": done.added}
    print_facts(facts, as_json, [f"version {version} restored as version {done.version}: {done.added:,} tiles"])


@archive_app.command(epilog="Example: nec archive rebuild my-archive")
def rebuild(archive: Url, as_json: Json = False) -> None:
    """Make the index anew from the packs; tiles deleted since come back where their packs are still there."""
    from nec_ray.archive.change import rebuild as run
    from nec_ray.storage import Store

    with progress_bar("reading packs", as_json) as advance:
        done, faults = run(Store(archive), advance)
    facts = {"archive": archive, "version": done.version, "tiles": done.added, "faults": faults}
    print_facts(facts, as_json, [f"index rebuilt as version {done.version}: {done.added:,} tiles", *faults])
    if faults:
        raise typer.Exit(1)


class ExportFormat(StrEnum):
    """What an archive is exported as."""

    stac = "stac"
    geoparquet = "geoparquet"
    zarr = "zarr"


@archive_app.command(epilog="Example: nec archive export my-archive --format stac --out my-stac")
def export(
    archive: Url,
    out: Annotated[Path, typer.Option(help="What to write: a folder for stac and zarr, a file for geoparquet.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="As what.")],
    where: Annotated[str | None, typer.Option(help="SQL condition, such as \"label = 'water'\".")] = None,
    within: Within = None,
    time: Time = None,
    layers: Annotated[int | None, typer.Option(help="Only the first layers of each payload.", min=1)] = None,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """Write an archive for other tools: a STAC catalog that points into it, or decoded embeddings."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.exports import export as run

    with progress_bar("exporting tiles", as_json) as advance:
        tiles = open_archive(archive, version).select(where, within=within, time=time)
        facts = run(tiles.archive, out, format=format_.value, where=tiles.where, layers=layers, progress=advance)
    print_facts(facts, as_json)


@archive_app.command(epilog="Example: nec archive sql my-archive > archive.sql")
def sql(archive: Url, version: AtVersion = None) -> None:
    """Print SQL that makes the view `embeddings` in any DuckDB: `duckdb -init archive.sql` needs no nec_ray."""
    from nec_ray.archive import open_archive

    sys.stdout.write(open_archive(archive, version).view_sql())


@archive_app.command(epilog="Example: nec archive coverage my-archive --within region.geojson --time 2020-05")
def coverage(
    archive: Url,
    within: Within = None,
    time: Time = None,
    catalog: Annotated[
        list[str] | None,
        typer.Option(help="What of this tile catalog is absent, in place of the recorded ones; repeatable."),
    ] = None,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """How many tiles of a place and a time are valid, no-data, failed and absent: asked for, and not in the archive."""
    from nec_ray.archive import open_archive
    from nec_ray.archive.hints import extent

    opened = open_archive(archive, version)
    found = opened.coverage(within, time, catalog or None)
    facts = {name: getattr(found, name) for name in ("valid", "nodata", "failed", "absent")}
    lines = [f"{name}: {count:,}" for name, count in facts.items() if count is not None]
    if found.absent is None:
        lines.append("absent: unknown, since no catalog is recorded; name those that were encoded with --catalog")
    if not found.tiles.num_rows and (within or time):
        sys.stderr.write(f"nec: note: no tile is there and then; {extent(opened)}\n")
    print_facts({"archive": archive, **facts}, as_json, lines)


@archive_app.command(epilog="Example: nec archive similar my-archive scene/r0004/c0007 -k 5 --format json")
def similar(
    archive: Url,
    tile_id: Annotated[str, typer.Argument(metavar="TILE", help="Id of the tile to compare with.")],
    k: Annotated[int, typer.Option("-k", help="How many tiles.", min=1)] = 10,
    where: Annotated[str | None, typer.Option(help="SQL condition, such as \"label = 'water'\".")] = None,
    within: Within = None,
    time: Time = None,
    format_: Printed = Format.table,
    version: AtVersion = None,
) -> None:
    """The tiles most like one, by the cosine of their pooled vectors."""
    from nec_ray.archive import open_archive

    columns = ["label", "acquired_at", "source"]
    opened = open_archive(archive, version)
    print_result(opened.similar(tile_id, k, where, within=within, time=time, columns=columns), format_)


@archive_app.command(epilog="Example: nec archive explore my-archive --out map.html")
def explore(
    archive: Url,
    out: Annotated[Path | None, typer.Option(help="Write one HTML file that opens anywhere; serve nothing.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition, such as \"label = 'water'\".")] = None,
    within: Within = None,
    time: Time = None,
    port: Annotated[int, typer.Option(help="Port to serve on; a free one where not given.", min=0, max=65535)] = 0,
    version: AtVersion = None,
    as_json: Json = False,
) -> None:
    """A map of the tiles in a web page: status, time, bytes, false colour, similar tiles; nothing from the network.

    Serves it on this machine alone until Ctrl-C, or writes it to --out.
    """
    from nec_ray.archive import open_archive
    from nec_ray.archive.explore import Server, one_page, pack_columns
    from nec_ray.archive.exports.output import appearing, check_free

    if out:
        check_free(out)
    packed = pack_columns(open_archive(archive, version).select(where, within=within, time=time))
    if out:
        page = one_page(packed).encode()
        with appearing(out) as temporary:
            temporary.write_bytes(page)
        facts = {"archive": archive, "out": str(out), "bytes": len(page)}
        print_facts(facts, as_json, [f"{out}: {len(page):,} bytes; open it in a browser"])
        return
    with Server(packed, port) as server:
        print_facts({"archive": archive, "url": server.url}, as_json, [f"{server.url} (Ctrl-C ends)"])
        sys.stdout.flush()  # whoever started this waits for the address
        with suppress(KeyboardInterrupt):
            server.serve_forever()
