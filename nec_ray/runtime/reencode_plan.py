"""What a policy asks of an archive's version: which tiles go from which codec to which, cut into cells."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive import Archive, open_archive
from nec_ray.archive.datafile import DataFile
from nec_ray.archive.index import Index
from nec_ray.archive.layout import archive_codec, archive_spec, install_codec
from nec_ray.archive.sql import bracketed
from nec_ray.codec import Codec, CodecSpec, Scale, is_prefix, load_codec, scales_of, truncate_codec
from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadQuery, CodecMismatch, InputError, RunError
from nec_ray.runtime.choose import named_codec
from nec_ray.runtime.policy import OneRule, Policy, Rule
from nec_ray.runtime.transcode import transcode
from nec_ray.storage import Store

CELL_TILES = 131_072
_SAMPLE_TILES = 256


@dataclass
class Move:
    """Tiles that one rule moves to a codec."""

    rule: Rule
    number: int
    """Of the rule in its policy, from 0."""
    sources: tuple[str, ...]
    """Ids of the codecs that they are under; one, unless they are encoded from pixels."""
    target: Codec | None
    """None until `load_target` has made the codec of the source's first layers."""
    tiles: int
    valid: int
    n_bytes: int
    """Of their payloads."""
    packs: int
    """That these payloads lie in."""

    @property
    def source(self) -> str:
        """Id of the codec that they are under."""
        return self.sources[0]

    @property
    def encodes(self) -> bool:
        """Whether it starts from pixels."""
        return self.rule.tiles is not None


@dataclass(frozen=True)
class Cell:
    """Rows that are transcoded, measured and swapped together.

    They are a run of a data file's rows, which lie in Hilbert order, or of several small files'.
    """

    number: int
    move: Move
    parts: list[tuple[DataFile, npt.NDArray[np.int64]]]
    """Data files, and places of the rows in each."""

    @property
    def tiles(self) -> int:
        """How many rows."""
        return sum(len(places) for _, places in self.parts)


@dataclass(frozen=True)
class Selection:
    """What is to be done, against one version of an archive."""

    archive: Archive
    at: datetime
    """What `now()` is in the rules' conditions."""
    chosen: str
    """SQL that gives the number of a tile's rule."""
    moves: list[Move]
    owner: npt.NDArray[np.int16]
    """Of every row of the version, in the order of its files: the number of the move in `moves`, -1 for none."""
    marks: npt.NDArray[np.uint64]
    """Of every row: a hash of its tile id."""
    n_bytes: int
    """Of all payloads."""

    @property
    def todo(self) -> int:
        """Tiles to re-encode."""
        return sum(move.tiles for move in self.moves)

    def places(self, move: Move) -> Iterator[tuple[DataFile, npt.NDArray[np.int64]]]:
        """The data files that hold tiles of a move, and their places in each."""
        number = next(n for n, one in enumerate(self.moves) if one is move)
        start = 0
        for file in self.archive.files:
            places = np.flatnonzero(self.owner[start : start + file.rows] == number)
            if len(places):
                yield file, places
            start += file.rows

    def check(self, file: DataFile, ids: pa.Array) -> None:
        """See that rows of a file lie where the query found them: otherwise others would be re-encoded.

        Raises:
            RunError: DuckDB gave the rows in another order.
        """
        start = sum(one.rows for one in takewhile(lambda one: one != file, self.archive.files))
        if not np.array_equal(self.marks[start : start + file.rows], _marks_of(ids)):
            raise RunError(
                f"{self.archive.url}: {file.name} holds its rows in another order than SQL gives; compact it"
            )

    def tile_ids(self, move: Move, index: Index) -> pa.Array:
        """Ids of the tiles of a move, in the order of the files."""
        found = [pa.array([], pa.string())]
        for file, places in self.places(move):
            ids = index.read([file], ["tile_id"])["tile_id"].combine_chunks()
            self.check(file, ids)
            found.append(ids.take(pa.array(places)))
        return pa.concat_arrays(found)


def select(policy: Policy, store: Store) -> Selection:
    """Find the tiles that are not what the policy says.

    A tile that no rule's condition picks is left as it is, like one that is already what its rule says.

    Raises:
        NotFound: no archive there, or no such codec.
        BadQuery: a condition does not parse or run; the message names its rule.
        InputError: a command asks for more layers than any of its tiles has.
        CodecMismatch: tiles are of another encoder than the codec to transcode them to, or hold less than it needs.
    """
    archive = open_archive(policy.archive)
    chosen = _first_rule(archive, policy.rules)
    counts = _counted(archive, policy.rules, chosen).to_pylist()
    rows = [row for row in counts if row["rule"] is not None]
    moves = []
    asked_now = isinstance(policy, OneRule)
    for number, rule in enumerate(policy.rules):
        mine = [row for row in rows if row["rule"] == number]
        moves += [Move(number=number, **found) for found in _moves(rule, mine, store, asked_now=asked_now)]
    at, owner, marks = _owners(archive, chosen, moves)
    return Selection(archive, at, chosen, moves, owner, marks, sum(row["n_bytes"] or 0 for row in counts))


def load_target(move: Move, store: Store, *, install: bool = True) -> Codec:
    """The codec that a move brings its tiles under, put into the archive unless `install` is false."""
    if move.target is None:
        source = archive_codec(store, move.source)
        assert move.rule.layers is not None
        with tempfile.TemporaryDirectory(prefix="nec-codec-") as folder:
            truncate_codec(source, move.rule.layers, Path(folder) / "codec")
            move.target = load_codec(Path(folder) / "codec")
            if install:
                install_codec(store, move.target)
    elif install:
        install_codec(store, move.target)
    if install:
        move.target = archive_codec(store, move.target.id)
    return move.target


def bytes_after(move: Move, selection: Selection, store: Store) -> tuple[int, bool, float | None]:
    """Bytes of a move's payloads once it is done, whether that is exact, and its distortion on a sample of tiles.

    Exact where payloads are cut; otherwise by the sample, and for pixels by what the codec's lineage says.
    """
    target = load_target(move, store, install=False)
    if move.encodes:
        return round(move.valid * target.spec.symbols * target.spec.lineage.bits_per_symbol / 8), False, None
    source = archive_codec(store, move.source)
    rows = _sample(move, selection, Index(store))
    done = transcode(rows, store, source, target, write=False)
    if is_prefix(target, source):
        kept = f"sum(list_sum(payload.layer_lengths[1:{len(target.spec.layers)}]))::BIGINT"
        [(exact,)] = selection.archive.sql(
            f"SELECT {kept} FROM embeddings WHERE {selection.chosen} = {move.number} AND codec_id = '{move.source}'"
        ).fetchall()
        return exact or 0, True, done.loss.distortion
    before, after = (pc.sum(table["n_bytes"]).as_py() or 0 for table in (rows, done.rows))
    return round(move.n_bytes * after / max(1, before)), False, done.loss.distortion


def cells(selection: Selection, cell_tiles: int = CELL_TILES) -> Iterator[Cell]:
    """The cells of the moves that transcode, move by move.

    A swap writes the data files that it touches anew, so that cells are cut along files: otherwise each of many
    would be written for each cell.
    """
    number = 0
    for move in selection.moves:
        if move.encodes:
            continue
        runs = [
            (file, places[i : i + cell_tiles])
            for file, places in selection.places(move)
            for i in range(0, len(places), cell_tiles)
        ]
        for parts in _gathered(runs, cell_tiles):
            yield Cell(number, move, parts)
            number += 1


class CellRows:
    """Reads the index rows of cells; the data file read last stays in memory, since the next cell is often in it."""

    def __init__(self, index: Index, selection: Selection) -> None:
        self._index = index
        self._selection = selection
        self._last: tuple[DataFile, pa.Table] | None = None

    def read(self, cell: Cell) -> pa.Table:
        """A cell's index rows, schema index.json."""
        return pa.concat_tables([self._file(file).take(pa.array(places)) for file, places in cell.parts])

    def _file(self, file: DataFile) -> pa.Table:
        if self._last is None or self._last[0] != file:
            rows = self._index.read([file], arrow_schema("index.json").names)
            self._selection.check(file, rows["tile_id"])
            self._last = file, rows
        return self._last[1]


def _first_rule(archive: Archive, rules: Sequence[Rule]) -> str:
    """SQL that gives the number of the first rule whose condition holds for a tile."""
    conditions = []
    for rule in rules:
        try:
            condition = bracketed(rule.where)
            # Run by itself, so that an error names its rule.
            archive.sql(f"SELECT tile_id FROM embeddings WHERE {condition} LIMIT 0").to_arrow_table()
        except BadQuery as error:
            raise BadQuery(f"rule {rule.name!r}: {error}") from None
        conditions.append(condition)
    return _cases(conditions)


def _cases(conditions: Sequence[str]) -> str:
    return f"CASE {' '.join(f'WHEN {one} THEN {number}' for number, one in enumerate(conditions))} END"


def _counted(archive: Archive, rules: Sequence[Rule], chosen: str) -> pa.Table:
    """Tiles, valid ones, bytes and packs by rule and codec.

    Raises:
        BadQuery: a condition parses, but fails on a tile, as a cast does; the message names its rule.
    """
    query = (
        "SELECT rule, codec_id, count(*) AS tiles, count(*) FILTER (status = 'valid') AS valid, "
        "sum(n_bytes)::BIGINT AS n_bytes, count(DISTINCT payload.pack) AS packs "
        f"FROM (SELECT codec_id, status, n_bytes, payload, {chosen} AS rule FROM embeddings) "
        "GROUP BY ALL ORDER BY rule, codec_id"
    )
    try:
        return archive.sql(query).to_arrow_table()
    except BadQuery:
        # A condition is only met by tiles that no earlier one holds for: the first rules without the others, one more
        # each time, fail where the last of them does.
        for number, rule in enumerate(rules, 1):
            try:
                first = _cases([bracketed(one.where) for one in rules[:number]])
                archive.sql(f"SELECT max({first}) FROM embeddings").to_arrow_table()
            except BadQuery as error:
                raise BadQuery(f"rule {rule.name!r}: {error}") from None
        raise


def _moves(rule: Rule, rows: list[dict[str, Any]], store: Store, *, asked_now: bool) -> Iterator[dict[str, Any]]:
    """What is to be done about the tiles of one rule, given their numbers by codec; those without payloads go along.

    Raises:
        InputError: `asked_now`, by a command and not by a policy, are more layers than any of the tiles holds.
    """
    if rule.keep:
        return
    specs = {row["codec_id"]: archive_spec(store, row["codec_id"]) for row in rows}
    held = {row["codec_id"] for row in rows if row["valid"]}
    if rule.layers is not None:
        most = max((len(specs[codec_id].layers) for codec_id in held), default=rule.layers)
        if most < rule.layers and asked_now:
            raise InputError(
                f"{store.url}: {rule.layers} layers are asked for, the tiles have {most} at most; ask for fewer"
            )
        for row in rows:
            if len(specs[row["codec_id"]].layers) > rule.layers:
                yield _move(rule, [row], None)
        return
    assert rule.codec is not None
    target = named_codec(rule.codec, store)
    rows = [row for row in rows if row["codec_id"] != target.id]
    if rule.tiles is not None:
        yield from [_move(rule, rows, target)] if rows else []
        return
    for row in rows:
        if row["codec_id"] in held:
            _check_transcodable(rule, row["codec_id"], specs[row["codec_id"]], target)
        yield _move(rule, [row], target)


def _move(rule: Rule, rows: Sequence[dict[str, Any]], target: Codec | None) -> dict[str, Any]:
    totals = {name: sum(row[name] or 0 for row in rows) for name in ("tiles", "valid", "n_bytes", "packs")}
    return {"rule": rule, "sources": tuple(row["codec_id"] for row in rows), "target": target, **totals}


def _check_transcodable(rule: Rule, codec_id: str, source: CodecSpec, target: Codec) -> None:
    pair = f"rule {rule.name!r}: tiles under codec {codec_id[:12]}"
    again = "encode them again from pixels (--from-tiles CATALOG, or `tiles` in a policy)"
    if source.encoder_id != target.encoder_id:
        raise CodecMismatch(f"{pair} were made by another encoder than that of codec {target.id[:12]}; {again}")
    held, needed = scales_of(source.grid, source.layers), target.scales()
    fits = len(held) >= len(needed) and all(
        there.grid == scale.grid and np.array_equal(there.rows[: len(scale.rows)], scale.rows)
        for there, scale in zip(held, needed, strict=False)
    )
    if source.width is not None or target.spec.width is not None:
        fits = fits and source.embedding_shapes() == target.spec.embedding_shapes()
    if not fits:
        raise CodecMismatch(
            f"{pair} hold {_described(held)}, codec {target.id[:12]} needs {_described(needed)}; {again}"
        )


def _described(scales: Sequence[Scale]) -> str:
    return " and ".join(f"{len(scale.rows)} channels of {scale.grid[0]} x {scale.grid[1]} tokens" for scale in scales)


def _owners(
    archive: Archive, chosen: str, moves: list[Move]
) -> tuple[datetime, npt.NDArray[np.int16], npt.NDArray[np.uint64]]:
    """What `now()` is, and the move and mark of every row, all by one query; moves without tiles are taken out."""
    cases = " ".join(
        f"WHEN rule = {move.number} AND codec_id = '{source}' THEN {n}"
        for n, move in enumerate(moves)
        for source in move.sources
    )
    query = (
        f"SELECT {f'CASE {cases} ELSE -1 END' if cases else '-1'}::SMALLINT AS move, hash(tile_id) AS mark, "
        "now() AS at, coalesce(n_bytes, 0)::INTEGER AS n_bytes, status = 'valid' AS valid "
        f"FROM (SELECT tile_id, codec_id, n_bytes, status, {chosen} AS rule FROM embeddings)"
    )
    found = archive.sql(query).to_arrow_table()
    owner, valid = found["move"].to_numpy(), found["valid"].to_numpy()
    for n, move in enumerate(moves):
        mine = owner == n
        move.tiles, move.valid = int(mine.sum()), int((mine & valid).sum())
        move.n_bytes = int(found["n_bytes"].to_numpy()[mine].sum(dtype=np.int64))
    new = np.cumsum([-1, *(move.tiles > 0 for move in moves)])  # -1, which is the last one, stays -1
    number = np.where([move.tiles > 0 for move in moves], new[1:], -1)
    moves[:] = [move for move in moves if move.tiles]
    at = found["at"][0].as_py() if found.num_rows else datetime.now(UTC)
    return at, np.append(number, -1)[owner].astype(np.int16), found["mark"].to_numpy()


def _marks_of(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """As DuckDB hashes them; in a database of its own, which has no views to be seen from."""
    with duckdb.connect(":memory:", config={"python_enable_replacements": False}) as connection:
        connection.register("ids", pa.table({"tile_id": ids}))
        return connection.sql("SELECT hash(tile_id) AS mark FROM ids").to_arrow_table()["mark"].to_numpy()


def _sample(move: Move, selection: Selection, index: Index) -> pa.Table:
    """Whole index rows of an even sample of a move's tiles."""
    wanted = np.unique(np.linspace(0, move.tiles - 1, _SAMPLE_TILES).astype(int))
    ids: list[str] = []
    start = 0
    for file, places in selection.places(move):
        here = wanted[(wanted >= start) & (wanted < start + len(places))] - start
        if len(here):
            ids += index.read([file], ["tile_id"])["tile_id"].take(pa.array(places[here])).to_pylist()
        start += len(places)
    schema = arrow_schema("index.json")
    query = f"SELECT {', '.join(schema.names)} FROM embeddings WHERE tile_id IN (SELECT unnest(?))"
    return selection.archive.sql(query, [ids]).to_arrow_table().cast(schema)


def _gathered(
    runs: Sequence[tuple[DataFile, npt.NDArray[np.int64]]], most: int
) -> Iterator[list[tuple[DataFile, npt.NDArray[np.int64]]]]:
    """Runs of rows put together as long as they are few."""
    parts: list[tuple[DataFile, npt.NDArray[np.int64]]] = []
    for run in runs:
        if parts and sum(len(places) for _, places in parts) + len(run[1]) > most:
            yield parts
            parts = []
        parts.append(run)
    if parts:
        yield parts
