"""All modalities of MMEarth's files, against h5py and the published conventions written out value by value."""

import json
import math
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nec_ray.errors import BadSource, InputError
from nec_ray.storage import Store
from nec_ray.tiles import build_catalog, hdf5
from nec_ray.tiles.mmearth import read_modalities
from nec_ray.tiles.mmearth_reader import decode, open_mmearth
from nec_ray.tiles.modalities import MODALITIES, QUALITY, cyclic
from tests.s3 import Server

COUNT, SIDE = 4, 8
LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "sentinel2": ("u2", (13, SIDE, SIDE)),
    "sentinel2_cloudmask": ("u2", (1, SIDE, SIDE)),
    "sentinel2_cloudprod": ("u2", (1, SIDE, SIDE)),
    "sentinel2_scl": ("u1", (1, SIDE, SIDE)),
    "sentinel1": ("f4", (8, SIDE, SIDE)),
    "aster": ("i2", (2, SIDE, SIDE)),
    "canopy_height_eth": ("i1", (2, SIDE, SIDE)),
    "era5": ("f4", (12,)),
    "lat": ("f4", (2,)),
    "lon": ("f4", (2,)),
    "month": ("f4", (2,)),
    "biome": ("u1", (14,)),
    "eco_region": ("u2", (846,)),
    "dynamic_world": ("u1", (1, SIDE, SIDE)),
    "esa_worldcover": ("u1", (1, SIDE, SIDE)),
}
"""Published: `convert_to_h5.py` of vishalned/MMEarth-data."""
WORLD_COVER = {10: 0, 20: 1, 30: 2, 40: 3, 50: 4, 60: 5, 70: 6, 80: 7, 90: 8, 95: 9, 100: 10}
USUAL = [0, 1, 5, 9, 10, 11, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100, 127, 255]


def file_values(name: str) -> st.SearchStrategy[Any]:
    """What a file may hold of a sample, often values that stand for missing ones."""
    dtype, shape = LAYOUT[name]
    if name in {"biome", "eco_region"}:
        hot = st.integers(0, shape[0] - 1).map(lambda i: np.eye(1, shape[0], i, dtype=dtype)[0])
        return hot | arrays(dtype, shape, elements=st.sampled_from([0, 1, np.iinfo(dtype).max]))
    shape = (shape[0], 2, 3) if len(shape) == 3 else shape
    if dtype == "f4":
        return arrays(dtype, shape, elements=st.sampled_from([-np.inf, np.inf, np.nan, 0, -17.25, 291.5]))
    limits = np.iinfo(dtype)
    usual = [value for value in [*USUAL, -32768, 65535, -1] if limits.min <= value <= limits.max]
    return arrays(dtype, shape, elements=st.sampled_from(usual) | st.integers(int(limits.min), int(limits.max)))


def expected(name: str, raw: Any) -> Any:
    """The conventions of `research/mp-mae-original.md`, one value after the other."""
    if name in {"biome", "eco_region"}:
        ones = [i for i, value in enumerate(raw) if value == 1]
        return ones[0] if len(ones) == 1 and sum(int(value) for value in raw) == 1 else -1
    if name == "sentinel2":
        raw = np.concatenate([raw[:10], raw[11:]])  # without B10, the eleventh
    rules: dict[str, Callable[[Any], Any]] = {
        "sentinel2": lambda x: math.nan if x == 0 else x,
        "sentinel2_cloudmask": lambda x: math.nan if x == 65535 else x,
        "sentinel2_cloudprod": lambda x: math.nan if x == 65535 else x,
        "sentinel2_scl": lambda x: x if x < 12 else -1,
        "aster": lambda x: math.nan if x == -32768 else x,
        "canopy_height_eth": lambda x: math.nan if x in {127, 255} else x,
        "dynamic_world": lambda x: x - 1 if 1 <= x <= 9 else -1,
        "esa_worldcover": lambda x: WORLD_COVER.get(x, -1),
    }
    rule: Callable[[Any], Any] = rules.get(name, lambda x: x if math.isfinite(x) else math.nan)
    return np.reshape([rule(value) for value in raw.ravel().tolist()], raw.shape)


@settings(max_examples=25)
@pytest.mark.parametrize("name", LAYOUT)
@given(data=st.data())
def test_every_convention_of_every_data_set(name: str, data: st.DataObject) -> None:
    raw = data.draw(file_values(name))
    modality = {**MODALITIES, **QUALITY}[name]
    got = decode(modality, raw)
    assert got.dtype == (np.float32 if modality.kind == "continuous" else np.int64)
    assert got.shape == modality.shape(2, 3)
    np.testing.assert_array_equal(got, expected(name, raw))


def test_what_stands_for_a_missing_value_is_read_as_missing() -> None:
    gaps = {name: modality.gap for name, modality in {**MODALITIES, **QUALITY}.items()}
    published = {"sentinel2": 0, "aster": -32768, "canopy_height_eth": 127, "dynamic_world": 0, "sentinel2_scl": 255}
    assert {name: gaps[name].item() for name in published} == published
    for name, gap in gaps.items():
        dtype, shape = LAYOUT[name]
        assert gap.dtype == np.dtype(dtype)
        got = decode({**MODALITIES, **QUALITY}[name], np.full(shape, gap))
        assert np.isnan(got).all() if got.dtype == np.float32 else (got == -1).all()


def test_values_that_wider_files_can_hold_are_missing_too() -> None:
    canopy = decode(MODALITIES["canopy_height_eth"], np.array([[[255, 254]], [[127, 3]]], np.int16))
    np.testing.assert_array_equal(canopy, [[[np.nan, 254]], [[np.nan, 3]]])
    aster = decode(MODALITIES["aster"], np.array([[[-np.inf, -3]], [[-32768, 3]]], np.float32))
    np.testing.assert_array_equal(aster, [[[np.nan, -3]], [[np.nan, 3]]])


def test_what_hdf5_makes_of_values_that_do_not_fit(tmp_path: Path) -> None:
    """Which is where 127 and -32768 come from: the released script assigns these arrays."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("canopy", (1, 2), np.int8)[0] = np.full(2, 255.0, np.float32)
        file.create_dataset("aster", (1, 2), np.int16)[0] = np.full(2, -np.inf, np.float32)
        stored = [file["canopy"][0], file["aster"][0]]
    assert np.isnan(decode(MODALITIES["canopy_height_eth"], stored[0][:, None, None])).all()
    assert np.isnan(decode(MODALITIES["aster"], stored[1][:, None, None])).all()


def test_names_and_orders_are_the_published_ones() -> None:
    channels = {name: modality.channels for name, modality in MODALITIES.items()}
    assert channels == {
        "sentinel2": 12,
        "sentinel1": 8,
        "aster": 2,
        "canopy_height_eth": 2,
        "dynamic_world": 9,
        "esa_worldcover": 11,
        "biome": 14,
        "eco_region": 846,
        "era5": 12,
        "lat": 2,
        "lon": 2,
        "month": 2,
    }
    assert list(MODALITIES)[:6] == ["sentinel2", "sentinel1", "aster", "era5", "dynamic_world", "canopy_height_eth"]
    assert list(MODALITIES)[6:] == ["lat", "lon", "biome", "eco_region", "month", "esa_worldcover"]
    assert MODALITIES["sentinel2"].bands[6:10] == ("B7", "B8A", "B8", "B9")
    assert MODALITIES["sentinel1"].bands[:5] == ("asc_VV", "asc_VH", "asc_HH", "asc_HV", "desc_VV")
    assert MODALITIES["era5"].bands[3:5] == ("prev_month_total_precip", "curr_month_avg_temp")
    assert sum(len(m.bands) for m in MODALITIES.values()) == 46  # table 1
    for name, (dtype, shape) in LAYOUT.items():
        modality = {**MODALITIES, **QUALITY}[name]
        assert (np.dtype(modality.dtype), modality.file_shape(SIDE, SIDE)) == (np.dtype(dtype), shape)


@given(st.floats(-180, 180), st.integers(1, 12))
def test_cyclic_encodings(degrees: float, month: int) -> None:
    assert cyclic(degrees, 360) == pytest.approx(
        [math.sin(2 * math.pi * degrees / 360), math.cos(2 * math.pi * degrees / 360)], abs=1e-6
    )
    assert cyclic([month], 12)[0] == pytest.approx(
        [math.sin(2 * math.pi * month / 12), math.cos(2 * math.pi * month / 12)], abs=1e-6
    )
    assert np.allclose(cyclic(degrees, 360), cyclic(degrees + 360, 360), atol=1e-6)


def made(folder: Path, **changed: Any) -> Path:
    """A file with random values in every data set, and the JSON files; `changed` replaces data sets, None drops one."""
    rng = np.random.default_rng(1)
    path = folder / "data_100k_v001.h5"
    with h5py.File(path, "w") as file:
        for name, (dtype, shape) in LAYOUT.items():
            if name in {"biome", "eco_region"}:
                values = np.eye(shape[0], dtype=dtype)[rng.integers(0, shape[0], COUNT)]
            elif dtype == "f4":
                values = rng.normal(size=(COUNT, *shape)).astype(dtype)
            else:
                values = rng.choice([value for value in USUAL if value <= np.iinfo(dtype).max], (COUNT, *shape))
            if name in changed:
                if changed[name] is not None:
                    file.create_dataset(name, **changed[name])
                continue
            file.create_dataset(name, data=values.astype(dtype), chunks=(1, *shape), compression="gzip")
        if "metadata" not in changed:
            rows = [(f"t{i}", ["l1c", "l2a"][i % 2]) for i in range(COUNT)]
            file["metadata"] = np.array(rows, [("tile_id", "S100"), ("S2_type", "S10")])
        elif changed["metadata"] is not None:
            file.create_dataset("metadata", **changed["metadata"])
    stats = {
        key: {what: rng.uniform(1, 2, len(modality.file_bands)).tolist() for what in ("mean", "std", "min", "max")}
        for modality in [*MODALITIES.values(), *QUALITY.values()]
        for key in modality.statistics
    }
    stats["sentinel1"]["std"][2] = 0
    stats["sentinel1"]["min"][2] = stats["sentinel1"]["max"][2]
    stats["sentinel1"]["mean"][3] = stats["sentinel1"]["std"][3] = None  # as of a band without values
    for kind, document in {
        "tile_info": {f"t{i}": {"biome": i, "eco_region": 100 + i} for i in range(COUNT)},
        "splits": {"train": [0, 1], "val": [2], "test": [3]},
        "band_stats": stats,
    }.items():
        (folder / f"data_100k_v001_{kind}.json").write_text(json.dumps(document))
    return path


def test_a_file_against_h5py(tmp_path: Path) -> None:
    path = made(tmp_path)
    with open_mmearth(Store(tmp_path), path.name) as file, h5py.File(path) as direct:
        assert (file.count, file.height, file.width) == (COUNT, SIDE, SIDE)
        assert (file.s2_types[:2], file.tile_ids[3], file.splits["val"]) == (["l1c", "l2a"], "t3", [2])
        read = file.read([2, 0], [*MODALITIES, *QUALITY])
        part = file.read([3], rows=slice(1, 4), columns=slice(2, 8))
        for name in LAYOUT:
            raw = direct[name][...]
            np.testing.assert_array_equal(read[name], np.stack([expected(name, raw[2]), expected(name, raw[0])]))
            if name in MODALITIES:
                window = raw[3][:, 1:4, 2:8] if raw.ndim == 4 else raw[3]
                np.testing.assert_array_equal(part[name][0], expected(name, window))
        with pytest.raises(InputError, match="has 4 samples, none has the number 4"):
            file.read([4])
        with pytest.raises(InputError, match="'sentinel3' is no modality"):
            file.read([0], ["sentinel3"])


def test_standardised_by_the_level_of_the_sample(tmp_path: Path) -> None:
    path = made(tmp_path)
    stats = json.loads((tmp_path / "data_100k_v001_band_stats.json").read_text())
    with open_mmearth(Store(tmp_path), path.name) as file:
        plain, scaled = file.read([0, 1]), file.read([0, 1], standardised=True)
    for i, level in enumerate(["l1c", "l2a"]):
        own = stats[f"sentinel2_{level}"]
        mean, std = (np.delete(own[what], 10)[:, None, None] for what in ("mean", "std"))  # B10 is the eleventh
        np.testing.assert_allclose(scaled["sentinel2"][i], (plain["sentinel2"][i] - mean) / std, rtol=1e-5)
    era5 = (plain["era5"] - stats["era5"]["mean"]) / stats["era5"]["std"]
    np.testing.assert_allclose(scaled["era5"], era5, rtol=1e-5, atol=1e-6)
    radar = plain["sentinel1"][:, 2] - stats["sentinel1"]["mean"][2]
    np.testing.assert_allclose(scaled["sentinel1"][:, 2], radar, rtol=1e-5, atol=1e-6)
    assert np.isnan(scaled["sentinel1"][:, 3]).all()
    np.testing.assert_array_equal(scaled["biome"], plain["biome"])


def test_catalog_rows_lead_to_all_modalities(tmp_path: Path) -> None:
    path = made(tmp_path)
    tiles = build_catalog(path).table
    assert tiles["eco_region"].to_pylist() == ["100", "101", "102", "103"]
    rows = tiles.take([3, 1, 2])
    sources = rows["source"].to_pylist()
    broken = rows.set_column(
        rows.schema.get_field_index("source"), "source", pa.array([sources[0], f"{path}#9", sources[2]])
    )
    batch = read_modalities(broken, ["aster", "biome"])
    assert batch.valid.tolist() == [0, 2]
    assert batch.reason[0] is None
    assert "window ends outside the file" in str(batch.reason[1])
    with h5py.File(path) as direct:
        for i, number in enumerate([3, 2]):
            np.testing.assert_array_equal(batch.values["aster"][i], expected("aster", direct["aster"][number]))
            assert batch.values["biome"][i] == direct["biome"][number].argmax()
    other = tiles.set_column(tiles.schema.get_field_index("width"), "width", pa.array([8, 8, 4, 8], pa.int32()))
    assert read_modalities(other, ["lat"]).reason[2] == "4 x 8 pixels, the tiles before have 8 x 8"
    image = tiles.slice(0, 1).set_column(tiles.schema.get_field_index("source"), "source", pa.array(["/x/a.png"]))
    assert "no MMEarth file" in str(read_modalities(image).reason[0])
    nothing = read_modalities(image, ["lat"])
    assert (nothing.values, nothing.valid.tolist()) == ({}, [])


def test_a_merged_file_whose_levels_stand_in_tile_info_only(tmp_path: Path) -> None:
    path = made(tmp_path, metadata={"data": np.array([(f"t{i}",) for i in range(COUNT)], [("tile_id", "S100")])})
    with (
        open_mmearth(Store(tmp_path), path.name) as file,
        pytest.raises(BadSource, match="does not say the S2_type of t1"),
    ):
        file.read([1], standardised=True)
    info = {f"t{i}": {"S2_type": ["l1c", "l2a"][i % 2]} for i in range(COUNT)}
    (tmp_path / "data_100k_v001_tile_info.json").write_text(json.dumps(info))
    with open_mmearth(Store(tmp_path), path.name) as file:
        assert file.s2_type(3) == "l2a"
        assert file.s2_types == ["l1c", "l2a"] * 2


@pytest.mark.parametrize("said", ["L2A", "", "l2"])
def test_another_processing_level_is_refused_when_the_catalog_is_built(tmp_path: Path, said: str) -> None:
    rows = np.array([("t0", "l1c"), ("t1", "l2a"), ("t2", said), ("t3", "l1c")], [("tile_id", "S9"), ("S2_type", "S9")])
    path = made(tmp_path, metadata={"data": rows})
    message = rf"^{path}: its metadata says S2_type '{said}' of t2; l1c or l2a is wanted$"
    with pytest.raises(BadSource, match=message):
        build_catalog(path)
    with open_mmearth(Store(tmp_path), path.name) as file:
        assert file.s2_type(1) == "l2a"
        with pytest.raises(BadSource, match=message):
            file.read([2], ["sentinel2"], standardised=True)


WRONG_STATISTICS: list[tuple[str, Any, str]] = [
    ("mean", math.inf, "has mean inf and std"),
    ("mean", None, "has mean nan and std"),
    ("mean", math.nan, "has mean nan and std"),
    ("std", math.inf, "and std inf of slope"),
    ("std", None, "and std nan of slope"),
    ("std", -1.5, "and std -1.5 of slope"),
    ("std", 0, "and std 0 of slope, but values from"),
    ("mean", "1.5", ": has no mean, std, min and max of aster"),
    ("max", "1.5", ": has no mean, std, min and max of aster"),
    ("min", True, ": has no mean, std, min and max of aster"),
    ("std", 10**400, ": has no mean, std, min and max of aster"),
]


@pytest.mark.parametrize(("what", "value", "message"), WRONG_STATISTICS)
def test_statistics_that_cannot_be_are_refused(tmp_path: Path, what: str, value: Any, message: str) -> None:
    made(tmp_path)
    where = tmp_path / "data_100k_v001_band_stats.json"
    stats = json.loads(where.read_text())
    stats["aster"]["min"][1], stats["aster"]["max"][1] = 0, 9
    stats["aster"][what][1] = value
    where.write_text(json.dumps(stats))
    with open_mmearth(Store(tmp_path), "data_100k_v001.h5") as file:
        assert np.isfinite(file.statistics(MODALITIES["era5"]).std).all()
        with pytest.raises(BadSource, match=message) as refused:
            file.read([0], ["aster"], standardised=True)
    assert str(refused.value).startswith(f"{where}: ")
    assert "aster" in str(refused.value)


def test_on_an_object_store(s3_server: Server, tmp_path: Path) -> None:
    path = made(tmp_path)
    bucket = s3_server.bucket()
    for one in tmp_path.iterdir():
        s3_server.files().put(str(one), f"{bucket}/in/{one.name}")
    with open_mmearth(Store(f"s3://{bucket}/in"), path.name) as there, open_mmearth(Store(tmp_path), path.name) as here:
        for name, values in here.read(range(COUNT), standardised=True).items():
            np.testing.assert_array_equal(there.read(range(COUNT), [name], standardised=True)[name], values)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no modality": ({"aster": None}, "no data set aster of its own"),
    "other bands": ({"aster": {"shape": (COUNT, 3, SIDE, SIDE), "dtype": "i2"}}, "not int16 (samples, 2, rows"),
    "other count": ({"era5": {"shape": (COUNT + 1, 12), "dtype": "f4"}}, "not float32 (samples, 12) of 4 samples"),
    "other size": ({"aster": {"shape": (COUNT, 2, SIDE, 9), "dtype": "i2"}}, "its aster is int16"),
    "no numbers": ({"aster": {"shape": (COUNT, 2, SIDE, SIDE), "dtype": "S4"}}, "its aster is |S4"),
    "no integers": ({"dynamic_world": {"shape": (COUNT, 1, SIDE, SIDE), "dtype": "f4"}}, "its dynamic_world is float"),
    "a scalar": ({"sentinel2": {"shape": (), "dtype": "u2"}}, "its sentinel2 is uint16 ()"),
    "nothing at all": ({"sentinel2": {"dtype": "u2", "data": h5py.Empty("u2")}}, "sentinel2"),
    "no pixels": ({"sentinel2": {"shape": (COUNT, 13, 0, 0), "dtype": "u2"}}, "its sentinel2 is uint16"),
    "a huge sample": ({"sentinel2": {"shape": (COUNT, 13, 1 << 20, 1 << 20), "dtype": "u2"}}, "a sample of sentinel2"),
    "a huge chunk": (
        {"sentinel2": {"shape": (1 << 20, 13, 64, 64), "dtype": "u2", "chunks": (1 << 14, 13, 64, 64)}},
        "a chunk of sentinel2",
    ),
    "more samples than bytes": (
        {
            "sentinel2": {"shape": (1 << 50, 13, SIDE, SIDE), "dtype": "u2", "chunks": (1, 13, SIDE, SIDE)},
            "metadata": {
                "shape": (1 << 50,),
                "dtype": [("tile_id", "S100"), ("S2_type", "S10")],
                "chunks": (1,),
                "maxshape": (None,),
            },
        },
        "which the file does not hold",
    ),
    "long ids": ({"metadata": {"shape": (COUNT,), "dtype": [("tile_id", "S2000"), ("S2_type", "S10")]}}, "no tile_id"),
    "numbers for ids": ({"metadata": {"shape": (COUNT,), "dtype": [("tile_id", "i4"), ("S2_type", "S10")]}}, "no tile"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    changed, message = HOSTILE[name]
    path = made(tmp_path, **changed)
    with pytest.raises(BadSource) as error, open_mmearth(Store(tmp_path), path.name) as file:  # noqa: PT012
        assert file.tile_ids
        file.read([0])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_modality_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    secret = made(tmp_path / "other")
    path = made(tmp_path, aster=None, lat=None)
    with h5py.File(path, "a") as file:
        file["aster"] = h5py.ExternalLink(str(secret), "aster")
        file.create_dataset("lat", (COUNT, 2), "f4", external=[(str(secret), 0, 8 * COUNT)])
    with open_mmearth(Store(tmp_path), path.name) as opened:
        for name, message in {"aster": "no data set aster of its own", "lat": "lies in other files"}.items():
            with pytest.raises(BadSource, match=message):
                opened.read([0], [name])


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("tile_info", "[]", "holds no JSON object"),
        ("tile_info", '{"t0": 3}', "does not hold one object a tile"),
        ("tile_info", "[" * 100_000, "does not read as JSON"),
        ("splits", '{"train": [9]}', "train does not list numbers of the 4 samples"),
        ("splits", '{"train": {"0": 1}}', "train does not list numbers"),
        ("band_stats", "{}", "has no mean, std, min and max of sentinel2_l1c"),
        ("band_stats", '{"sentinel2_l1c": {"mean": [1], "std": [1], "min": [1], "max": [1]}}', "has not 13 numbers"),
        ("band_stats", '{"sentinel2_l1c": {"mean": "many", "std": [1], "min": [1], "max": [1]}}', "has no mean"),
        ("band_stats", "\ufeff", "does not read as JSON"),
    ],
)
def test_json_files_that_lie_are_refused_in_one_line(kind: str, text: str, message: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    (tmp_path / f"data_100k_v001_{kind}.json").write_text(text)
    with pytest.raises(BadSource) as error, open_mmearth(Store(tmp_path), path.name) as file:  # noqa: PT012
        assert file.tile_info
        assert file.splits
        file.read([0], standardised=True)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)),
    chunks=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)),
    bounds=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    packing=st.fixed_dictionaries(
        {"compression": st.sampled_from([None, "gzip"]), "shuffle": st.booleans(), "fletcher32": st.booleans()}
    ),
    dtype=st.sampled_from(["u1", "<i2", ">f4"]),
    written=st.integers(0, 5),
)
def test_chunks_of_any_shape_against_h5py(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    bounds: tuple[int, int],
    packing: dict[str, Any],
    dtype: str,
    written: int,
) -> None:
    chunks = tuple(min(chunk, size) for chunk, size in zip(chunks, shape, strict=True))
    start, stop = sorted(min(bound, shape[0]) for bound in bounds)
    with h5py.File("unused", "w", driver="core", backing_store=False) as file:
        made = file.create_dataset("x", shape, dtype, chunks=chunks, fillvalue=7, **packing)
        made[:written] = np.random.default_rng(0).integers(0, 99, made[:written].shape)
        found = hdf5.dataset(file, "x", "here")
        np.testing.assert_array_equal(hdf5.part(found, start, stop, "x", "here"), made[start:stop])


def test_a_chunk_that_unpacks_to_more_than_it_should_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    bomb = zlib.compress(bytes(100 << 20), 9)
    with h5py.File(path, "a") as file:
        for name, packed in {"lat": bomb, "lon": zlib.compress(bytes(7)), "month": zlib.compress(bytes(900))}.items():
            file[name].id.write_direct_chunk((0, 0), packed)
    with open_mmearth(Store(tmp_path), path.name) as file:
        for name, message in {
            "lat": "a chunk of 8 bytes takes 101,",
            "lon": "a chunk of 8 bytes holds 7 or more",
            "month": "a chunk of 8 bytes holds 900 or more",
        }.items():
            tracemalloc.start()
            with pytest.raises(BadSource, match=message):
                file.read([0], [name])
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
            tracemalloc.stop()


@settings(max_examples=30, derandomize=True)
@given(data=st.data())
def test_damaged_files_give_typed_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = made(folder)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try:
        with open_mmearth(Store(folder), path.name) as file:
            assert len(file.tile_ids) == file.count
            file.read([0, 3])
    except BadSource as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said
