"""Re-encoding archives: what readers see, before, during and after; what a kill, another writer and a guard change."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.util.metrics
from PIL import Image

from nec_ray import load_codec, open_archive
from nec_ray.archive.change import delete, rebuild
from nec_ray.archive.index import Index
from nec_ray.archive.verify import verify
from nec_ray.codec import Codec, truncate_codec
from nec_ray.errors import BadCatalog, BadQuery, CodecMismatch, InputError, LeaseHeld, LeaseLost, NotFound, TooMuchLoss
from nec_ray.runtime.encode import encode
from nec_ray.runtime.policy import Policy, one_rule
from nec_ray.runtime.reencode import dry_run, reencode
from nec_ray.storage import Store
from nec_ray.storage.lease import Lease
from nec_ray.tiles import build_catalog, read_catalog, write_catalog
from tests.archive.make import Made, damage, empty_archive, filled_archive, pack
from tests.runtime.make import random_codec, with_layers, with_other_tables
from tests.s3 import Server

ROOT = Path(__file__).resolve().parents[2]
TILES = 40


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two commits of 20 tiles: a000 to a018 valid, a019 no-data, b000 to b019 valid."""
    made = empty_archive(tmp_path_factory.mktemp("template"))
    status = ["valid"] * 19 + ["nodata"]
    made.index.append(made.index.version(), pack(made, [f"a{i:03}" for i in range(20)], status, seed=1))
    made.index.append(made.index.version(), pack(made, [f"b{i:03}" for i in range(20)], seed=2))
    return made


@pytest.fixture
def made(template: Made, tmp_path: Path) -> Made:
    """A copy of it."""
    return copy_of(template, tmp_path / "archive")


def copy_of(template: Made, folder: Path) -> Made:
    shutil.copytree(template.url, folder)
    store = Store(folder)
    return Made(store.url, store, Index(store), template.codec, dict(template.symbols))


@pytest.fixture(scope="module")
def other(template: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_other_tables(template.codec, tmp_path_factory.mktemp("other") / "codec")._store.url


def everything(url: str) -> dict[str, int]:
    """Every file below a folder, with its time."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(Path(url).rglob("*"))}


def seen(url: str, version: int | None = None) -> dict[str, tuple[str, bytes | None]]:
    """Codec and payload hash by tile, each tile once."""
    rows = open_archive(url, version).rows(["tile_id", "codec_id", "sha256"])
    ids = rows["tile_id"].to_pylist()
    assert len(ids) == len(set(ids)), "a tile is there twice"
    return dict(zip(ids, zip(rows["codec_id"].to_pylist(), rows["sha256"].to_pylist(), strict=True), strict=True))


def check_cut(made: Made, url: str) -> None:
    """Every tile is there once, with exactly the first layer of what was encoded."""
    archive = open_archive(url)
    pulled = archive.pull()
    assert pulled.tile_ids == sorted(made.symbols)
    for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id][:, :8])
    assert len(archive) == TILES
    assert not verify(archive).faults


def test_dropping_layers_leaves_their_first_ones_and_older_versions_as_they_were(made: Made) -> None:
    old = open_archive(made.url)
    before = old.pull()
    account = reencode(one_rule(made.url, layers=1), local=True, cell_tiles=15)
    check_cut(made, made.url)
    assert np.array_equal(old.pull().symbols, before.symbols)
    assert old.pull().embeddings.shape[2] == 24
    assert (account.swapped, account.todo, account.version) == (40, 40, 6)  # cells of 15 and 5 tiles, two files
    [move] = account.moves
    assert (move.swapped, move.left, move.failed, move.cells) == (40, 0, 0, 4)
    rows = open_archive(made.url).rows(["encoded_from", "codec_id", "n_bytes"])
    assert set(rows["encoded_from"].to_pylist()) == {made.codec.id}
    assert account.bytes_after == sum(rows["n_bytes"].to_pylist()) < account.bytes_before
    [cut] = set(rows["codec_id"].to_pylist())
    assert open_archive(made.url).codec(cut).spec.lineage.parent == made.codec.id
    assert {entry.operation for entry in made.index.history()[:4]} == {"reencode"}


def test_a_second_run_writes_nothing(made: Made) -> None:
    reencode(one_rule(made.url, layers=1), local=True)
    before = everything(made.url)
    again = reencode(one_rule(made.url, layers=1), local=True)
    assert (again.todo, again.swapped, again.moves) == (0, 0, [])
    assert everything(made.url) == before


def test_a_dry_run_writes_nothing_and_tells_the_bytes_that_there_will_be(made: Made) -> None:
    before = everything(made.url)
    looked = dry_run(one_rule(made.url, layers=1, where="label = 'water'"))
    assert everything(made.url) == before
    done = reencode(one_rule(made.url, layers=1, where="label = 'water'"), local=True)
    assert looked.exact
    there = sum(open_archive(made.url).rows(["n_bytes"])["n_bytes"].to_pylist())
    assert looked.bytes_after == done.bytes_after == there
    assert (looked.todo, done.swapped) == (20, 20)
    assert looked.storage_month_after == pytest.approx(there / 1e9 * 0.023)
    assert looked.moves[0].distortion == pytest.approx(done.moves[0].distortion)
    assert looked.moves[0].target == done.moves[0].target
    assert "nothing was written" in "\n".join(looked.lines())


def test_other_tables_by_transcoding(made: Made, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nec_ray.runtime.reencode.CHUNK_TILES", 7)  # a cell of several tasks and packs
    looked = dry_run(one_rule(made.url, codec=other))
    assert not looked.exact
    account = reencode(one_rule(made.url, codec=other), local=True)
    codec, archive = load_codec(other), open_archive(made.url)
    pulled = archive.pull()
    old = np.stack([made.symbols[tile_id] for tile_id in pulled.tile_ids]) + made.codec.tables.median
    assert np.array_equal(pulled.symbols, np.rint(old - codec.tables.median))
    lost = ((old.astype(float) - pulled.embeddings) ** 2).sum() / ((old - old.mean(axis=(0, 1))) ** 2).sum()
    [move] = account.moves
    assert (move.cells, move.swapped) == (1, 40)
    assert move.distortion == move.largest_distortion == pytest.approx(lost, rel=1e-5)
    assert {codec_id for codec_id, _ in seen(made.url).values()} == {codec.id}
    assert looked.bytes_after == pytest.approx(account.bytes_after, rel=0.02)
    assert not verify(archive).faults


def test_a_rebuild_finds_the_new_rows(made: Made) -> None:
    reencode(one_rule(made.url, layers=1, where="tile_id < 'b'"), local=True)
    before = seen(made.url)
    shutil.rmtree(Path(made.url) / "index")
    rebuild(made.store)
    assert seen(made.url) == before


def test_the_guard_refuses_a_cell_and_leaves_no_trace_of_it(made: Made) -> None:
    lost = dry_run(one_rule(made.url, layers=1)).moves[0].distortion
    assert lost is not None
    before, packs = seen(made.url), made.store.names("packs")
    policy = one_rule(made.url, layers=1, max_distortion=lost / 2)
    with pytest.raises(TooMuchLoss, match=r"rule 'the command': cell 0 \(.*would lose \d\.\d+ .* is allowed"):
        reencode(policy, local=True)
    assert open_archive(made.url).version == 2
    assert (seen(made.url), made.store.names("packs")) == (before, packs)
    assert "it would be refused" in "\n".join(dry_run(policy).lines())
    reencode(one_rule(made.url, layers=1, max_distortion=lost * 2), local=True)
    check_cut(made, made.url)


def test_a_refused_rule_does_not_hold_up_the_others(made: Made, other: str) -> None:
    rules = [
        {"name": "a", "where": "tile_id < 'b'", "layers": 1, "max_distortion": 0},
        {"name": "b", "codec": other},
    ]
    with pytest.raises(TooMuchLoss, match="rule 'a'"):
        reencode(Policy.model_validate({"archive": made.url, "rules": rules}), local=True, cell_tiles=5)
    under = {tile_id: codec_id for tile_id, (codec_id, _) in seen(made.url).items()}
    assert {under[t] for t in under if t < "b"} == {made.codec.id}
    assert {under[t] for t in under if t >= "b"} == {load_codec(other).id}


def test_the_first_rule_that_holds_decides(made: Made, other: str) -> None:
    rules = [
        {"name": "sample", "where": "tile_id IN ('a003', 'b004')", "keep": True},
        {"name": "none", "where": "sensor = 'unknown'", "layers": 1},  # NULL in every row: holds for none
        {"name": "old", "where": "acquired_at < now() - INTERVAL 2 YEAR AND tile_id < 'b'", "layers": 1},
        {"name": "rest", "codec": other},
    ]
    policy = Policy.model_validate({"archive": made.url, "rules": rules})
    account = reencode(policy, local=True)
    by_rule = {move.rule: move.swapped for move in account.moves}
    assert by_rule == {"old": 19, "rest": 19}
    for tile_id, (codec_id, _) in seen(made.url).items():
        if tile_id in ("a003", "b004"):
            assert codec_id == made.codec.id
        elif tile_id < "b":
            assert open_archive(made.url).codec(codec_id).spec.lineage.parent == made.codec.id
        else:
            assert codec_id == load_codec(other).id
    assert abs((datetime.fromisoformat(account.at) - datetime.now(UTC)).total_seconds()) < 600
    version = open_archive(made.url).version
    assert reencode(policy, local=True).version == version  # and there is nothing left to do


def once_before_a_swap(patch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    real = Index.swap

    def call(self: Index, *arguments: Any, **options: Any) -> Any:
        patch.setattr(Index, "swap", real)
        happens()
        return real(self, *arguments, **options)

    patch.setattr(Index, "swap", call)


def test_what_others_change_meanwhile_is_left_as_they_made_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile() -> None:
        delete(made.store, "tile_id IN ('a001', 'a002')")
        again = pack(made, ["a002", "new"], seed=9)
        made.index.append(made.index.version(), again)

    once_before_a_swap(monkeypatch, meanwhile)
    account = reencode(one_rule(made.url, layers=1), local=True)
    assert (account.swapped, account.moves[0].left) == (38, 2)
    found = seen(made.url)
    assert "a001" not in found
    assert found["a002"][0] == found["new"][0] == made.codec.id
    again = reencode(one_rule(made.url, layers=1), local=True)
    assert again.swapped == 2
    assert not verify(open_archive(made.url)).faults
    assert len(seen(made.url)) == 40


def test_a_damaged_tile_stays_and_is_named(made: Made) -> None:
    damage(made, "a007")
    account = reencode(one_rule(made.url, layers=1), local=True)
    assert (account.swapped, account.moves[0].failed) == (39, 1)
    assert "SHA-256 differs" in account.moves[0].reasons["a007"]
    assert seen(made.url)["a007"][0] == made.codec.id


def test_a_policy_s_rule_that_has_nothing_to_do_does_not_keep_the_others_from_theirs(made: Made) -> None:
    rules = [
        {"name": "more than there are", "where": "label = 'water'", "layers": 3},
        {"name": "rest", "layers": 1},
    ]
    policy = Policy.model_validate({"archive": made.url, "rules": rules})
    looked, done = dry_run(policy), reencode(policy, local=True)
    assert looked.todo == done.swapped == 20
    left = open_archive(made.url).rows(["codec_id"], "label = 'water'")["codec_id"].to_pylist()
    assert left == [made.codec.id] * 20
    alone = Policy.model_validate({"archive": made.url, "rules": rules[:1]})
    assert reencode(alone, local=True).todo == 0


def test_a_condition_that_fails_on_a_tile_names_its_rule(made: Made) -> None:
    """The first rule keeps what the third's cast could not take from it; the second is not the culprit."""
    rules = [
        {"name": "kept", "where": "label = 'water'", "keep": True},
        {"name": "sound", "where": "tile_id = 't000'", "layers": 1},
        {"name": "unsound", "where": "CAST(tile_id AS INT) > 3", "layers": 1},
        {"name": "rest", "keep": True},
    ]
    with pytest.raises(BadQuery, match=r"^rule 'unsound': .*Conversion Error") as caught:
        dry_run(Policy.model_validate({"archive": made.url, "rules": rules}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        ({"layers": 3}, InputError, "3 layers are asked for, the tiles have 2 at most"),
        ({"layers": 1, "where": "no_such = 1"}, BadQuery, "rule 'the command': .*no_such"),
        ({"layers": 1, "where": "CAST(tile_id AS INT) > 3"}, BadQuery, "rule 'the command': .*Conversion Error"),
        ({"layers": 1, "where": "true) OR (true"}, BadQuery, "no SQL condition"),
        ({"layers": 1, "where": "1; DROP VIEW embeddings"}, BadQuery, "rule 'the command'"),
        (
            {"layers": 1, "where": "tile_id IN (SELECT column0 FROM read_csv('/etc/passwd'))"},
            BadQuery,
            "rule 'the command'",
        ),
        ({"codec": "abcdef012345"}, NotFound, "no codec abcdef012345"),
        ({"codec": "/nowhere/codec"}, NotFound, "no codec there"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    made: Made, rule: dict[str, Any], kind: type[Exception], message: str
) -> None:
    before = everything(made.url)
    for run in (dry_run, reencode):
        with pytest.raises(kind, match=message) as caught:
            run(one_rule(made.url, **rule))
        assert "\n" not in str(caught.value)
    assert everything(made.url) == before


def test_another_encoder_needs_pixels(made: Made, tmp_path: Path) -> None:
    from tests.codec.make import make_codec

    make_codec(tmp_path / "codec", seed=1)
    with pytest.raises(CodecMismatch, match=r"another encoder .*--from-tiles"):
        reencode(one_rule(made.url, codec=str(tmp_path / "codec")), local=True)
    reencode(one_rule(made.url, layers=1), local=True)
    with pytest.raises(CodecMismatch, match=r"hold 8 channels .* needs 24"):
        reencode(one_rule(made.url, codec=made.codec.id), local=True)


class Reader(threading.Thread):
    """Opens the newest version again and again, and looks at every tile of it."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self._made = made
        self._over = threading.Event()
        self.versions: set[int] = set()
        self.faults: list[str] = []

    def run(self) -> None:
        last = False
        while not last:
            last = self._over.is_set()
            archive = open_archive(self._made.url)
            pulled = archive.pull(layers=1)
            if archive.rows(["tile_id"]).num_rows != TILES or pulled.tile_ids != sorted(self._made.symbols):
                self.faults.append(f"version {archive.version}: not every tile once")
            for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
                if not np.array_equal(symbols, self._made.symbols[tile_id][:, :8]):
                    self.faults.append(f"version {archive.version}: {tile_id} is not what was encoded")
            self.versions.add(archive.version)

    def stop(self) -> None:
        self._over.set()
        self.join()


def test_readers_see_every_tile_once_all_the_time(made: Made) -> None:
    reader = Reader(made)
    reader.start()
    try:
        reencode(one_rule(made.url, layers=1), local=True, cell_tiles=2)
    finally:
        reader.stop()
    assert not reader.faults
    assert len(reader.versions) > 2
    check_cut(made, made.url)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_archive(template: Made, tmp_path: Path, fault_seed: int) -> None:
    from tests.runtime.reencoder import run

    rng = random.Random(fault_seed)
    whole, killed = (copy_of(template, tmp_path / name) for name in ("whole", "killed"))
    run(whole.url, 1, 3, 30)
    command = [sys.executable, "-m", "tests.runtime.reencoder", killed.url, "1", "3", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        for _ in range(rng.randrange(1, 8)):
            assert driver.stdout.readline()
        time.sleep(rng.uniform(0, 0.2))
        driver.kill()
    part = {codec_id for codec_id, _ in seen(killed.url).values()}
    assert made_so_far(killed) < TILES, "it was killed too late"
    assert len(part) == 2
    run(killed.url, 1, 3, 1)
    assert seen(killed.url) == seen(whole.url)
    check_cut(template, killed.url)


def made_so_far(made: Made) -> int:
    return sum(codec_id != made.codec.id for codec_id, _ in seen(made.url).values())


@pytest.mark.slow
def test_ray_makes_the_archive_of_the_serial_run(
    template: Made, other: str, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.runtime.reencode.CHUNK_TILES", 10)
    monkeypatch.setattr("nec_ray.runtime.transcode._WAVE", 4)  # of six chunks
    one, two = (copy_of(template, tmp_path / name) for name in ("one", "two"))
    serial = reencode(one_rule(one.url, codec=other), local=True, cell_tiles=15)
    on_ray = reencode(one_rule(two.url, codec=other), cell_tiles=15)
    assert seen(one.url) == seen(two.url)
    assert on_ray.moves[0].distortion == pytest.approx(serial.moves[0].distortion)


def test_two_runs_at_once_are_refused(made: Made) -> None:
    with Lease(made.store, "leases/reencode", 60) as held:
        with pytest.raises(LeaseHeld, match=held.holder) as caught:
            reencode(one_rule(made.url, layers=1), local=True)
        assert "\n" not in str(caught.value)
    reencode(one_rule(made.url, layers=1), local=True)


def test_a_run_that_lost_its_lease_commits_nothing_more(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(self: Lease) -> None:
        if open_archive(made.url).version > 3:
            raise LeaseLost("taken")

    monkeypatch.setattr(Lease, "check", taken)
    with pytest.raises(LeaseLost):
        reencode(one_rule(made.url, layers=1), local=True, cell_tiles=5)
    assert open_archive(made.url).version == 4


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Codec, Codec]:
    """Two encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    return random_codec(folder / "a", mean=128), random_codec(folder / "b", mean=120, seed=1)


def images(folder: Path) -> Path:
    """Catalog of 10 images, one of them truncated."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    path = folder / "images" / "9.png"
    path.write_bytes(path.read_bytes()[:300])
    write_catalog(build_catalog(folder / "images"), folder / "catalog.parquet")
    return folder / "catalog.parquet"


def test_from_tiles_with_another_encoder(codecs: tuple[Codec, Codec], tmp_path: Path) -> None:
    first, second = codecs
    catalog = images(tmp_path)
    encode(catalog, tmp_path / "archive", codec_url=first._store.url, local=True)
    encode(catalog, tmp_path / "expected", codec_url=second._store.url, local=True)
    (tmp_path / "images" / "3.png").unlink()
    lacks = read_catalog(catalog).select("tile_id <> '5.png'")
    write_catalog(lacks, tmp_path / "lacks.parquet")
    policy = one_rule(str(tmp_path / "archive"), codec=second._store.url, tiles=str(tmp_path / "lacks.parquet"))
    looked = dry_run(policy)
    assert (looked.todo, looked.moves[0].not_in_catalog, looked.exact) == (10, 1, False)
    account = reencode(policy, local=True)
    [move] = account.moves
    assert (move.swapped, move.failed, move.not_in_catalog, move.distortion) == (8, 1, 1, None)
    assert "nothing is there" in move.reasons["3.png"]
    found, expected = seen(str(tmp_path / "archive")), seen(str(tmp_path / "expected"))
    assert {t for t, (codec_id, _) in found.items() if codec_id == first.id} == {"3.png", "5.png"}
    for tile_id in set(found) - {"3.png", "5.png"}:
        assert found[tile_id] == expected[tile_id]
    archive = open_archive(tmp_path / "archive")
    assert len(archive.pull("codec_id = '" + first.id + "'")) == 2
    assert set(archive.rows(["encoded_from"])["encoded_from"].to_pylist()) == {"pixels"}
    assert archive.rows(["tile_id"], "status = 'failed'")["tile_id"].to_pylist() == ["9.png"]
    assert not verify(archive).faults
    shutil.rmtree(tmp_path / "archive" / "index")
    rebuild(Store(tmp_path / "archive"))
    assert seen(str(tmp_path / "archive")) == found  # also there the tile that failed now is still what it was


@pytest.mark.slow
def test_from_tiles_on_ray(codecs: tuple[Codec, Codec], tmp_path: Path, local_ray: None) -> None:
    first, second = codecs
    catalog = images(tmp_path)
    encode(catalog, tmp_path / "archive", codec_url=first._store.url, local=True)
    encode(catalog, tmp_path / "expected", codec_url=second._store.url, local=True)
    account = reencode(one_rule(str(tmp_path / "archive"), codec=second._store.url, tiles=str(catalog)))
    assert account.swapped == 10
    assert seen(str(tmp_path / "archive")) == seen(str(tmp_path / "expected"))


def test_the_encoder_of_a_truncated_codec_makes_its_first_channels(codecs: tuple[Codec, Codec], tmp_path: Path) -> None:
    """So that new tiles can be encoded straight under the codec that older ones were cut down to."""
    from nec_ray.models.embed import Embedder, first_decoder_layer, latent_medians

    whole = with_layers(codecs[0], tmp_path / "layered", [6, 10])
    truncate_codec(whole, 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    pixels = np.random.default_rng(1).uniform(0, 255, (3, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(Embedder(cut).symbols(pixels), Embedder(whole).symbols(pixels)[:, :, :6])
    assert np.array_equal(latent_medians(cut), whole.tables.median)
    assert first_decoder_layer(cut).state_dict().keys() == first_decoder_layer(whole).state_dict().keys()


def test_encoding_goes_on_in_an_archive_of_which_tiles_were_transcoded(
    codecs: tuple[Codec, Codec], tmp_path: Path
) -> None:
    catalog = images(tmp_path)
    url, codec = str(tmp_path / "archive"), with_layers(codecs[0], tmp_path / "layered", [6, 10])
    encode(catalog, url, codec_url=codec._store.url, local=True, where="tile_id < '5'")
    reencode(one_rule(url, layers=1), local=True)
    before = seen(url)
    account = encode(catalog, url, codec_url=codec.id, local=True)
    assert (account.encoded, account.missing) == (5, 0)
    after = seen(url)
    assert {tile_id: after[tile_id] for tile_id in before} == before
    with pytest.raises(CodecMismatch, match="give that codec"):
        encode(catalog, url, codec_url=codecs[1]._store.url, local=True)


def test_heads_with_the_decoder_layer_learn_from_an_archive_of_which_layers_were_dropped(
    codecs: tuple[Codec, Codec], tmp_path: Path
) -> None:
    from nec_ray.evaluate import train_head_on_archive

    rng = np.random.default_rng(0)
    for i in range(16):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(
            tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        )
    write_catalog(build_catalog(tmp_path / "images"), tmp_path / "catalog.parquet")
    whole = with_layers(codecs[0], tmp_path / "layered", [6, 10])
    url = str(tmp_path / "archive")
    encode(tmp_path / "catalog.parquet", url, codec_url=whole._store.url, local=True)
    how: dict[str, Any] = {"decoder_layer": "frozen", "epochs": 1}
    coarse = train_head_on_archive(open_archive(url), None, tmp_path / "coarse", layers=1, **how)
    reencode(one_rule(url, layers=1, where="label = 'a'"), local=True)
    mixed = train_head_on_archive(open_archive(url), None, tmp_path / "mixed", layers=1, **how)
    with pytest.raises(InputError, match="ask for layers=1"):
        train_head_on_archive(open_archive(url), None, tmp_path / "wrong", **how)
    reencode(one_rule(url, layers=1), local=True)
    dropped = train_head_on_archive(open_archive(url), None, tmp_path / "dropped", **how)
    weights = {(tmp_path / name / "head.safetensors").read_bytes() for name in ("coarse", "mixed", "dropped")}
    assert len(weights) == 1  # the channels that are gone stand at the same medians
    assert coarse["accuracy"] == mixed["accuracy"] == dropped["accuracy"]


@pytest.mark.slow
def test_on_an_object_store(s3_server: Server, tmp_path: Path) -> None:
    made = filled_archive(tmp_path, url=f"s3://{s3_server.bucket()}/archives/one")
    policy = one_rule(made.url, layers=1, where="tile_id < 't030'")
    around = Store(made.url.removesuffix("/one"))
    names = around.names("one")
    looked = dry_run(policy)
    assert around.names("one") == names
    done = reencode(policy, local=True, cell_tiles=16)
    assert (done.swapped, done.bytes_after) == (30, looked.bytes_after)
    archive = open_archive(made.url)
    pulled = archive.pull(layers=1)
    assert pulled.tile_ids == sorted(made.symbols)
    for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id][:, :8])
    assert not verify(archive).faults
    assert reencode(policy, local=True).version == done.version


class _Counted:
    """Stands in for Ray's counters and histograms."""

    total: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self._name = name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = self._name, *(tags[tag] for tag in sorted(tags))
        self.total[key] = self.total.get(key, 0) + value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.inc(1, tags)


def test_a_run_logs_and_counts_every_cell(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for name in ("Counter", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{name}", _Counted)
    monkeypatch.setattr(_Counted, "total", {})
    damage(made, "a007")
    with caplog.at_level("INFO", logger="nec_ray.runtime.reencode"):
        done = reencode(one_rule(made.url, layers=1), local=True, cell_tiles=15)
    lines = [(record.getMessage(), vars(record)["facts"]) for record in caplog.records]
    assert lines[0] == ("planned", {"archive": made.url, "tiles": 40, "to_reencode": 40, "moves": 1})
    assert [facts["tile_id"] for event, facts in lines if event == "tile failed"] == ["a007"]
    swaps = [facts for event, facts in lines if event == "cell swapped"]
    assert [swap["version"] for swap in swaps] == [3, 4, 5, 6]
    assert sum(swap["tiles"] for swap in swaps) == done.swapped == 39
    rows = open_archive(made.url).rows(["codec_id", "n_bytes"], "tile_id <> 'a007'")
    assert sum(swap["payload_bytes"] for swap in swaps) == sum(rows["n_bytes"].to_pylist())
    [cut] = set(rows["codec_id"].to_pylist())
    assert _Counted.total == {
        ("nec_reencoded_tiles_total", cut[:12], "swapped"): 39,
        ("nec_reencoded_tiles_total", cut[:12], "failed"): 1,
        ("nec_reencoded_cells_total", cut[:12], "swapped"): 4,
        ("nec_reencoded_bytes_total", cut[:12]): sum(rows["n_bytes"].to_pylist()),
        ("nec_swap_seconds", cut[:12]): 4,
    }


def job(policy: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "jobs" / "reencode.py"), str(policy), *more]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.slow
def test_the_job_says_by_its_exit_code_what_to_do(made: Made, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'archive = "{made.url}"\n[[rules]]\nname = "all"\nlayers = 1\n')
    looked = job(policy, "--dry-run")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["todo"] == 40
    with Lease(made.store, "leases/reencode", 60):
        held = job(policy)
    assert (held.returncode, held.stdout) == (75, "")
    [line] = held.stderr.splitlines()
    assert json.loads(line)["error"] == "LeaseHeld"
    policy.write_text(f'archive = "{made.url}"\n[[rules]]\nname = "all"\nlayer = 1\n')
    wrong = job(policy)
    assert wrong.returncode == 1
    assert "rules.0.layer: no such key in this policy" in wrong.stderr


def test_a_tile_that_stands_twice_in_the_catalog_is_refused(codecs: tuple[Codec, Codec], tmp_path: Path) -> None:
    first, second = codecs
    catalog = images(tmp_path)
    encode(catalog, tmp_path / "archive", codec_url=first._store.url, local=True)
    table = pq.read_table(catalog)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), tmp_path / "twice.parquet")
    policy = one_rule(str(tmp_path / "archive"), codec=second._store.url, tiles=str(tmp_path / "twice.parquet"))
    before = seen(str(tmp_path / "archive"))
    for run in (dry_run, reencode):
        with pytest.raises(BadCatalog, match=r"stand more than once, such as '3\.png'"):
            run(policy, **({"local": True} if run is reencode else {}))
    assert seen(str(tmp_path / "archive")) == before
