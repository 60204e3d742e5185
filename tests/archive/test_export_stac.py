"""The STAC catalog: valid by pystac and by the extension's rules, and its byte ranges are the payloads."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pystac.validation
import pytest
from shapely import wkb
from shapely.geometry import shape

from nec_ray import open_archive
from nec_ray.archive.exports import export, stac
from nec_ray.archive.layout import install_codec
from nec_ray.codec import load_codec
from nec_ray.errors import CorruptIndex
from tests.archive.exporting import ENCODED, awkward_archive
from tests.archive.make import Made, empty_archive, filled_archive, pack
from tests.codec import make as codecs
from tests.codec.make import laplacian_tables

CORE = "https://schemas.stacspec.org/v1.1.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return awkward_archive(tmp_path_factory.mktemp("awkward"))


@pytest.fixture(scope="module")
def out(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stac") / "catalog"
    facts = export(open_archive(made.url), out, format="stac")
    keys = ("tiles", "items", "item_files", "skipped_nodata", "skipped_failed", "skipped_unlocated")
    assert [facts[key] for key in keys] == [44, 43, 43, 1, 1, 1]
    return out


def items(out: Path) -> Iterator[pystac.Item]:
    return pystac.Collection.from_file(str(out / "collection.json")).get_items(recursive=True)


def local(href: str) -> Path:
    assert href.startswith("file://")
    return Path(unquote(urlsplit(href).path))


def cut(asset: dict[str, Any]) -> bytes:
    """What any client would fetch by the asset's own fields."""
    with local(asset["href"]).open("rb") as file:
        file.seek(asset["nec:offset"])
        return file.read(asset["nec:length"])


def check_emb_fields(document: dict[str, Any]) -> None:
    """Rules of the embedding extension's schema 0.0.1 (see stac_items.py), which is not published for offline use."""
    assert "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json" in document["stac_extensions"]
    collection = document["type"] == "Collection"
    place = document if collection else document["properties"]
    of_collection = {"emb:type", "emb:dimensions", "emb:chip_layout"}
    assert {key for key in place if key.startswith("emb:")} == (of_collection if collection else {"emb:quantization"})
    for asset in [*document["assets"].values(), *document.get("item_assets", {}).values()]:
        assert not [key for key in asset if key.startswith("emb:")]
    if collection:
        assert document["emb:type"] in ("pixel", "chip")
        assert isinstance(document["emb:dimensions"], int)
        assert isinstance(document["data_type"], str)
        assert document["emb:chip_layout"].keys() <= {"layout_type", "chip_size", "stride", "grid_id"}
        assert document["emb:chip_layout"]["layout_type"] in ("regular_grid", "variable_grid", "named_grid")
        assert {"emb:model", "emb:source-data"} <= {link["rel"] for link in document["links"]}
    else:
        assert "embeddings" in document["assets"]
        known = {"method", "original_dtype", "quantized_dtype", "scale", "offset", "link"}
        assert {"method", "original_dtype"} <= place["emb:quantization"].keys() <= known
        assert {"rel", "href"} <= place["emb:quantization"]["link"].keys()


def test_every_file_is_valid_and_every_link_leads_somewhere(out: Path) -> None:
    seen = 0
    for path in out.rglob("*.json"):
        document = json.loads(path.read_text())
        # Without extensions pystac needs no network: it brings the core's schemas.
        [schema] = pystac.validation.validate_dict(document, extensions=[])
        assert schema.startswith(CORE)
        if document["type"] != "Catalog":
            check_emb_fields(document)
        for link in document["links"]:
            if link["href"].startswith("."):
                assert (path.parent / link["href"]).is_file(), link
            elif link["href"].startswith("file:") and link["rel"].startswith("emb:") and "index" not in link["href"]:
                assert local(link["href"]).is_file(), link
        if document["type"] == "Feature":
            assert (path.parent / document["properties"]["emb:quantization"]["link"]["href"]).is_file()
        seen += 1
    assert seen == 43 + 1 + 1


def test_the_collection_says_what_the_archive_is(made: Made, out: Path) -> None:
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert collection.id == "archive-v2"
    assert collection.extent.spatial.bboxes[0] == pytest.approx([0, 0, 1, 0.4])
    assert collection.extent.temporal.intervals == [[None, None]]  # one tile's time is not known
    assert collection.license == "other"  # "CC0" is no SPDX identifier
    assert (out / "licence.txt").read_text() == "CC0\nnobody\n"
    assert [provider.name for provider in collection.providers or []] == ["nobody"]
    assert collection.extra_fields["emb:dimensions"] == 24
    assert collection.extra_fields["emb:chip_layout"]["chip_size"] == [8, 8]
    assert collection.summaries.get_list("nec:codec_id") == [made.codec.id]
    [model] = collection.get_links("emb:model")
    assert hashlib.sha256(local(model.href).read_bytes()).hexdigest() == made.codec.id
    assert collection.item_assets["embeddings"].to_dict()["roles"] == ["data"]


def test_items_are_the_tiles(made: Made, out: Path) -> None:
    found = {item.id: item for item in items(out)}
    assert sorted(found) == sorted(set(made.symbols) - {"nowhere"})
    rows = open_archive(made.url).rows(["tile_id", "geometry", "acquired_at", "source", "label"], "bbox IS NOT NULL")
    for row in rows.to_pylist():
        if row["tile_id"] in found:
            item = found[row["tile_id"]]
            footprint = wkb.loads(row["geometry"])
            assert shape(item.geometry).equals(footprint)
            assert item.bbox == pytest.approx(footprint.bounds)
            assert item.datetime == row["acquired_at"]
            assert item.properties["nec:label"] == row["label"]
            sources = [link.href for link in item.get_links("emb:source-data")]
            # A relative path would mean another place in the catalog than it did where it was written.
            assert sources == ([] if row["source"] == "scene.tif" else [row["source"]])
            assert item.collection_id == "archive-v2"
    untimed = found["untimed"].common_metadata
    assert untimed.start_datetime == datetime.fromisoformat("1858-01-01T00:00:00Z")
    assert untimed.end_datetime == ENCODED
    assert found["placed"].properties["proj:code"] == "EPSG:32621"
    assert found["placed"].properties["proj:shape"] == [4, 4]
    assert "proj:code" not in found["t000"].properties


def test_the_range_of_an_asset_is_the_payload(made: Made, out: Path) -> None:
    spec = importlib.util.spec_from_file_location("payload_decoder", out / "payload_decoder.py")
    assert spec is not None
    assert spec.loader is not None
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    model = local(collection.get_links("emb:model")[0].href).read_bytes()
    tables = local(collection.get_links("emb:decoder")[0].href).read_bytes()
    for item in items(out):
        asset = item.assets["embeddings"].to_dict()
        payload = cut(asset)
        assert np.array_equal(made.codec.decompress([payload])[0], made.symbols[item.id])
        assert asset["nec:checksum"] == "1220" + hashlib.sha256(payload).hexdigest()
        assert asset["file:checksum"] == "1220" + hashlib.sha256(local(asset["href"]).read_bytes()).hexdigest()
        if item.id in ("t000", "placed"):  # plain Python is slow
            layers = [np.array(layer) for layer in decoder.decode(payload, model, tables)]
            assert np.array_equal(np.concatenate(layers, axis=1), made.symbols[item.id])


def test_codecs_of_one_encoder_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled_archive(tmp_path, tiles=4)
    monkeypatch.setattr(codecs, "laplacian_tables", lambda scales: laplacian_tables(scales, radius=5))
    other = empty_archive(tmp_path / "other")
    other.store, other.index, other.url = made.store, made.index, made.url
    install_codec(made.store, other.codec)
    made.index.append(made.index.version(), pack(other, ["recoded"]))
    assert other.codec.id != made.codec.id
    export(open_archive(made.url), tmp_path / "catalog", format="stac")
    collection = pystac.Collection.from_file(str(tmp_path / "catalog" / "collection.json"))
    found = {local(link.href).parent.name: local(link.href) for link in collection.get_links("emb:model")}
    assert found.keys() == {made.codec.id, other.codec.id}
    by_id = {item.id: item for item in items(tmp_path / "catalog")}
    recoded = by_id["recoded"]
    codec = load_codec(found[recoded.properties["nec:codec_id"]].parent)
    assert np.array_equal(codec.decompress([cut(recoded.assets["embeddings"].to_dict())])[0], other.symbols["recoded"])
    assert sorted(by_id) == ["recoded", "t000", "t001"]


def test_a_prefix_of_layers_is_a_shorter_range(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "catalog"
    export(open_archive(made.url), out, format="stac", layers=1, where="tile_id = 't005'")
    [item] = items(out)
    asset = item.assets["embeddings"].to_dict()
    assert np.array_equal(made.codec.decompress([cut(asset)], 1)[0], made.symbols["t005"][:, :8])
    assert "nec:checksum" not in asset  # that of the whole payload would not hold
    collection = pystac.Collection.from_file(str(out / "collection.json"))
    assert collection.extra_fields["emb:dimensions"] == 8
    assert [str(time)[:10] for time in collection.extent.temporal.intervals[0]] == ["2020-05-18"] * 2


def test_items_parquet_mirrors_the_items(out: Path) -> None:
    table = pq.read_table(out / "items.parquet")
    frame = geopandas.read_parquet(out / "items.parquet", bbox=(0.22, 0.12, 0.28, 0.18))
    assert list(frame["id"]) == ["t012"]
    mirror = json.loads(table.schema.metadata[b"stac-geoparquet"])
    assert mirror["collections"]["archive-v2"] == json.loads((out / "collection.json").read_text())
    files = {item.id: item.to_dict(include_self_link=False, transform_hrefs=False) for item in items(out)}
    assert len(files) == table.num_rows
    for row in table.to_pylist():
        item = files[row["id"]]
        found = {key: value for key, value in row["assets"]["embeddings"].items() if value is not None}
        assert found == item["assets"]["embeddings"]
        assert row["bbox"] == dict(zip(("xmin", "ymin", "xmax", "ymax"), item["bbox"], strict=True))
        for key, value in item["properties"].items():
            if key in ("start_datetime", "end_datetime", "datetime"):
                assert row[key] == (value and datetime.fromisoformat(value))
            elif key == "emb:quantization":
                assert row[key]["method"] == value["method"]
                assert (out / row[key]["link"]["href"]).is_file()
            else:
                assert row[key] == pytest.approx(value) if isinstance(value, float) else row[key] == value
    query = "SELECT assets.embeddings.\"nec:offset\" FROM read_parquet(?) WHERE id = 't012'"
    [(offset,)] = duckdb.execute(query, [str(out / "items.parquet")]).fetchall()
    assert offset == files["t012"]["assets"]["embeddings"]["nec:offset"]


def test_parts_are_bounded_and_names_of_files_are_safe(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stac, "_ITEMS_A_PART", 10)
    monkeypatch.setattr(stac, "_BATCH", 7)
    out = tmp_path / "catalog"
    export(open_archive(made.url), out, format="stac")
    assert sorted(path.name for path in out.glob("tiles-*")) == [f"tiles-{i:05}" for i in range(5)]
    assert [len(list(part.glob("*.json"))) for part in sorted(out.glob("tiles-*"))] == [11, 11, 11, 11, 4]
    names = [path.name for path in out.glob("tiles-*/*.json") if path.name != "catalog.json"]
    assert all(name.replace("Item-", "item-").removesuffix(".json").replace("-", "").isalnum() for name in names)
    assert "a1.json" in names
    assert "A1.json" not in names  # the same file on a disk that folds case
    assert len(list(items(out))) == 43


def test_many_tiles_are_rows_only(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stac, "_MOST_FILES", 42)
    out = tmp_path / "catalog"
    facts = export(open_archive(made.url), out, format="stac")
    assert (facts["items"], facts["item_files"]) == (43, 0)
    assert [path.name for path in out.rglob("*.json")] == ["collection.json"]
    assert pq.read_table(out / "items.parquet").num_rows == 43
    pystac.validation.validate_dict(json.loads((out / "collection.json").read_text()), extensions=[])


def test_a_selection_without_footprints_is_an_empty_catalog_that_says_so(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "catalog"
    facts = export(open_archive(made.url), out, format="stac", where="tile_id = 'nowhere'")
    assert (facts["items"], facts["skipped_unlocated"]) == (0, 1)
    assert list(items(out)) == []
    pystac.validation.validate_dict(json.loads((out / "collection.json").read_text()), extensions=[])


@pytest.mark.parametrize(
    ("licence", "stated"), [("CC-BY-4.0", "CC-BY-4.0"), ("research use only", "other"), (None, "other")]
)
def test_the_licence(tmp_path: Path, licence: str | None, stated: str) -> None:
    made = filled_archive(tmp_path)
    path = Path(made.url) / "archive.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "licence": licence, "attribution": None}))
    export(open_archive(made.url), tmp_path / "catalog", format="stac", where="tile_id < 't002'")
    document = json.loads((tmp_path / "catalog" / "collection.json").read_text())
    assert document["license"] == stated
    assert "providers" not in document
    pystac.validation.validate_dict(document, extensions=[])
    assert (tmp_path / "catalog" / "licence.txt").read_text() == f"{licence or 'The archive states no licence.'}\n"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("payload", {"pack": "../../etc/passwd", "offset": 0, "layer_lengths": [10]}),
        ("payload", None),
        ("geometry", b"\x01\x03\x00\x00\x00\xff\xff\xff\x7f\xff\xff\xff\x7f"),
        ("geometry", wkb.dumps(shape({"type": "Point", "coordinates": [1, 2]}))),
        ("geometry", wkb.dumps(shape({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}))),
        ("geometry", b""),
    ],
)
def test_a_hostile_row_cannot_make_a_catalog(tmp_path: Path, column: str, value: object) -> None:
    made = empty_archive(tmp_path)
    rows = pack(made, ["evil"])
    at = rows.schema.get_field_index(column)
    field = rows.schema.field(at)
    made.index.append(made.index.version(), rows.set_column(at, field, pa.array([value], field.type)))
    with pytest.raises(CorruptIndex, match=r"evil|no pack of this archive"):
        export(open_archive(made.url), tmp_path / "catalog", format="stac")
    assert not [path for path in tmp_path.iterdir() if "catalog" in path.name]


def test_an_archive_with_a_space_in_its_path(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    moved = tmp_path / "my archive ü"
    shutil.move(made.url, moved)
    export(open_archive(moved), tmp_path / "catalog", format="stac", where="tile_id = 't003'")
    [item] = items(tmp_path / "catalog")
    assert item.collection_id == "my-archive-v1"
    assert np.array_equal(made.codec.decompress([cut(item.assets["embeddings"].to_dict())])[0], made.symbols["t003"])
