"""The S3 policies of cluster/s3: their form, and what a real S3 server lets nec_ray do under each of them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import botocore.session
import pytest
import s3fs

from nec_ray import open_archive
from nec_ray.archive.change import delete
from nec_ray.archive.collect import collect
from nec_ray.archive.compact import compact
from nec_ray.archive.index import Index
from nec_ray.archive.verify import verify
from nec_ray.codec import load_codec_cached, load_spec_cached
from nec_ray.errors import StorageError, TooMuchLoss
from nec_ray.runtime.encode import encode
from nec_ray.runtime.plan import SHARD_TILES
from nec_ray.runtime.policy import one_rule
from nec_ray.runtime.reencode import reencode
from nec_ray.storage import Store
from nec_ray.storage import store as store_module
from nec_ray.tiles import write_catalog
from nec_ray.tiles.build import build_catalog
from tests.runtime.make import random_codec, with_other_tables
from tests.s3 import Server

ROOT = Path(__file__).resolve().parents[2]
POLICIES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "cluster" / "s3").glob("*.json"))}
OPERATIONS = {  # of IAM's actions, the operations of S3's interface that they allow
    "s3:ListBucket": "ListObjectsV2",
    "s3:GetObject": "GetObject",
    "s3:PutObject": "PutObject",
    "s3:DeleteObject": "DeleteObject",
    "s3:AbortMultipartUpload": "AbortMultipartUpload",
}
ABOUT_BUCKETS = {"s3:ListBucket"}
BUCKET = re.compile(r"arn:aws:s3:::(ARCHIVE|TILES|RUNS)-BUCKET")
OBJECTS = re.compile(r"arn:aws:s3:::(ARCHIVE|TILES|RUNS)-BUCKET/\1-PREFIX/[^*]*\*")
NAMES = {"ARCHIVE-BUCKET": "tests", "ARCHIVE-PREFIX": "archive", "TILES-BUCKET": "tests", "TILES-PREFIX": "tiles"}
ARCHIVE, CATALOG = "s3://tests/archive", "s3://tests/tiles/catalog.parquet"


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_closed(name: str) -> None:
    known = botocore.session.get_session().get_service_model("s3").operation_names
    assert set(OPERATIONS.values()) <= set(known)
    policy = POLICIES[name]
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert set(statement) == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        assert set(statement["Action"]) <= set(OPERATIONS)  # and so no wildcards
        # Bucket and objects never stand together, since no action is about both.
        kind = BUCKET if set(statement["Action"]) <= ABOUT_BUCKETS else OBJECTS
        assert not set(statement["Action"]) & ABOUT_BUCKETS or kind is BUCKET
        assert statement["Resource"]
        for resource in statement["Resource"]:
            assert kind.fullmatch(resource), resource


def test_each_policy_names_what_its_readme_says() -> None:
    text = (ROOT / "cluster" / "s3" / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.json`", text, re.MULTILINE)) == set(POLICIES)


def may(name: str) -> set[tuple[str, str]]:
    return {(a, r) for s in POLICIES[name]["Statement"] for a in s["Action"] for r in s["Resource"]}


def test_who_may_more_than_whom() -> None:
    assert may("consumer") < may("provider")
    assert may("consumer") < may("maintainer")
    assert {a for a, _ in may("consumer")} == {"s3:ListBucket", "s3:GetObject"}
    assert "s3:DeleteObject" not in {a for a, _ in may("provider")}
    of_runs = {(a, r) for a, r in may("provider") if "RUNS-" in r}
    assert {a for a, _ in of_runs} == {"s3:ListBucket", "s3:GetObject"}, "a provider reads a run's codec, no more"
    assert of_runs < may("trainer")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    roles = {}
    for name, policy in POLICIES.items():
        text = json.dumps(policy)
        for placeholder, value in NAMES.items():
            text = text.replace(placeholder, value)
        roles[name] = text
    server = Server(tmp_path_factory.mktemp("roles"), roles=roles)
    server.start()
    try:
        server.files().put_file(str(ROOT / "nec_ray" / "data" / "landsat8_itaipu.tif"), "tests/tiles/scene.tif")
        yield server
    finally:
        server.stop()


@pytest.fixture
def become(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes this process somebody who has one policy alone, and who has read nothing yet."""

    def become(role: str) -> None:
        for name, value in (server.environment | {"AWS_ACCESS_KEY_ID": role}).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        load_codec_cached.cache_clear()
        load_spec_cached.cache_clear()

    yield become
    become("nobody")


def objects(server: Server) -> dict[str, str]:
    """All but probes of the store's time, which are what a refused `gc` may leave."""
    found = server.files().find("tests", detail=True)
    return {path: info["ETag"] for path, info in found.items() if "/clocks/" not in path}


@pytest.mark.slow
def test_each_role_does_its_work_and_no_more(server: Server, become: Callable[[str], None], tmp_path: Path) -> None:
    codec = random_codec(tmp_path / "codec")
    become("test")  # the administrator
    write_catalog(build_catalog("s3://tests/tiles/scene.tif", tile_size=48), CATALOG)

    become("provider")
    account = encode(CATALOG, ARCHIVE, codec_url=tmp_path / "codec", local=True)
    assert account.encoded == account.tiles > SHARD_TILES  # several packs, so that there is something to compact
    assert compact(Store(ARCHIVE)).packs > 1
    other = with_other_tables(codec, tmp_path / "other")
    rule = one_rule(ARCHIVE, codec=other._store.url, where="bbox.xmin > -54.5", max_distortion=1000)
    done = reencode(rule, local=True)
    assert 0 < done.swapped < account.tiles
    with pytest.raises(TooMuchLoss):  # which cannot remove what it wrote
        reencode(one_rule(ARCHIVE, codec=codec.id, max_distortion=0), local=True)
    assert len(Store(ARCHIVE).names("leases")) > 2
    delete(Store(ARCHIVE), "bbox.ymin > -25.3")
    before = objects(server)
    with pytest.raises(StorageError, match="refused"):
        collect(Store(ARCHIVE), timedelta(0))
    become("consumer")
    with pytest.raises(StorageError, match=r"refused|403 Forbidden"):
        delete(Store(ARCHIVE), "true")
    with pytest.raises(StorageError, match=r"refused|403 Forbidden"):
        encode(CATALOG, ARCHIVE, codec_url=tmp_path / "codec", local=True)
    assert objects(server) == before

    become("maintainer")
    collect(Store(ARCHIVE), timedelta(0))
    gone = set(before) - set(objects(server))
    assert any("/packs/" in name for name in gone)
    assert len(Store(ARCHIVE).names("leases")) == 1
    assert any("/index/part-" in name for name in gone)
    assert objects(server).items() <= before.items()

    become("consumer")
    archive = open_archive(ARCHIVE)
    [[left]] = archive.sql("SELECT count(*) FROM embeddings WHERE status = 'valid'").fetchall()
    assert 0 < left < account.tiles
    assert sum(len(archive.pull(f"codec_id = '{one}'")) for one in (codec.id, other.id)) == left
    assert not verify(archive).faults
    assert len(Index(Store(ARCHIVE)).history()) > 2


@pytest.mark.slow
def test_single_operations(become: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PART_BYTES", 5 << 20)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12 << 20))

    become("provider")
    store = Store("s3://tests/single/archive")
    with pytest.raises(StorageError, match="refused"):
        store.create("x", b"1")
    store = Store(f"{ARCHIVE}/single")
    assert store.create_from("large", large)  # in parts
    assert not store.create_from("large", large)
    store.touch("large")
    assert not store.exists("none")
    with pytest.raises(StorageError, match="refused"):
        store.delete(["large"])
    with pytest.raises(StorageError, match="refused"):
        Store("s3://tests/tiles").create("x", b"1")

    become("consumer")
    store = Store(f"{ARCHIVE}/single")
    assert store.read_range("large", 5, 9) == large.read_bytes()[5:9]
    for change in (lambda: store.create("x", b"1"), lambda: store.touch("large"), lambda: store.delete(["large"])):
        with pytest.raises(StorageError, match="refused"):
            change()
    with pytest.raises(StorageError, match="refused"):
        Store("s3://tests/tiles").read("scene.tif")

    become("maintainer")
    with pytest.raises(StorageError, match="refused"):
        Store(ARCHIVE).delete(["index/_delta_log/00000000000000000000.json"])
    with pytest.raises(StorageError, match="refused"):
        Store("s3://tests/tiles").read("scene.tif")
    Store(ARCHIVE).now()  # writes a probe and removes it
