"""What methods leave of embeddings, from pixels on: each against its parts put together by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import TypeAdapter

from nec_ray.codec import Codec
from nec_ray.errors import InputError
from nec_ray.evaluate.experiment import Method
from nec_ray.evaluate.labels import LABEL_ROWS, Labels, read_labels
from nec_ray.evaluate.methods import Coded, Encodings, source_bytes
from nec_ray.models.embed import Embedder
from nec_ray.tiles import Catalog, build_catalog, builtin_labels, builtin_scene, read_catalog, read_tiles, write_catalog
from tests.runtime.make import random_codec

Made = tuple[Labels, Codec, str, Encodings]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Labelled tiles of the scene, a codec, the catalog's path."""
    folder = tmp_path_factory.mktemp("methods")
    path = str(folder / "catalog.parquet")
    write_catalog(build_catalog(builtin_scene(), tile_size=32), path)
    rows = read_catalog(path).select("x_off < 400").table
    labels = read_labels(builtin_labels(), rows.select(list(LABEL_ROWS)))
    assert 20 < len(labels) < 400
    return labels, random_codec(folder / "codec"), path, Encodings(labels)


def code(made: Made, **keys: Any) -> tuple[Coded, dict[str, Any]]:
    _, codec, catalog, encodings = made
    method: Method = TypeAdapter(Method).validate_python({"name": "x", "archive": "a", "catalog": catalog} | keys)
    coded = encodings.code(method, None, codec)  # type: ignore[arg-type] # only NEC's own asks the archive
    return coded, encodings.facts(method, coded, codec)


def latents(made: Made) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Tile by tile, in the labels' order."""
    labels, codec, path, _ = made
    spec, table = codec.spec.input, read_catalog(path).table
    place = {name: i for i, name in enumerate(table["tile_id"].to_pylist())}
    rows = table.take([place[name] for name in labels.tile_ids])
    return Embedder(codec).latents(read_tiles(rows, bands=spec.bands, size=spec.size, fill=spec.mean).pixels)


def test_ranges_are_those_of_the_training_tiles_alone(made: Made) -> None:
    x, labels = latents(made), made[0]
    coded, facts = code(made, kind="quantised", precision="int3", ranges="channel")
    train = x[~labels.is_test].reshape(-1, 16)
    low, high = train.min(axis=0), train.max(axis=0)
    assert np.any(x[labels.is_test].reshape(-1, 16).max(axis=0) > high), "the test tiles would show in the range"
    levels = np.clip(np.rint((x - low) / (high - low) * 7), 0, 7)
    np.testing.assert_allclose(coded.x, low + levels * (high - low) / 7, atol=2e-3)
    test = labels.is_test
    assert facts["mse"] == pytest.approx(np.mean((coded.x[test].astype(np.float64) - x[test]) ** 2), rel=1e-3)
    assert facts["bits_per_channel"] == pytest.approx(8 * coded.bytes_per_tile / 256)
    assert 60 < coded.bytes_per_tile <= 256 * 3 / 8 + 20
    assert (facts["shared_bytes"], facts["bits_per_pixel"]) == (2 * 16 * 4, None)


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "quantised", "precision": "float16"},
        {"kind": "quantised", "precision": "int8", "ranges": "channel", "percentile": 99.9},
        {"kind": "pca", "components": 4},
        {"kind": "binary"},
    ],
)
def test_less_precision_is_fewer_bytes_and_more_distortion(made: Made, keys: dict[str, Any]) -> None:
    coded, facts = code(made, **keys)
    whole, _ = code(made, kind="quantised", precision="float32")
    np.testing.assert_array_equal(whole.x, latents(made))
    assert coded.bytes_per_tile < whole.bytes_per_tile <= 256 * 4 + 20
    assert facts["mse"] > 0
    assert facts["snr_db"] > 1
    assert facts["encoder_id"] == made[1].spec.encoder_id


def test_raw_pixels_of_sixteen_bits_give_the_very_embeddings(made: Made) -> None:
    coded, facts = code(made, kind="raw", bits=16)
    plain, none = code(made, kind="uncompressed")
    np.testing.assert_array_equal(coded.x, plain.x)
    assert (facts["mse"], facts["snr_db"], none["mse"]) == (0, None, 0)
    assert 0.3 * 6144 < coded.bytes_per_tile < 0.95 * 6144
    assert facts["bits_per_pixel"] == pytest.approx(8 * coded.bytes_per_tile / 32**2)
    eight, less = code(made, kind="raw", bits=8)
    assert eight.bytes_per_tile < coded.bytes_per_tile
    assert less["snr_db"] > 20


def test_a_consumer_who_trains_the_encoder_gets_the_pixels(made: Made) -> None:
    labels, codec, _, _ = made
    coded, facts = code(made, kind="raw", bits=16, encoder="trained")
    frozen, _ = code(made, kind="raw", bits=16)
    assert coded.x.shape == (len(labels), 3, 32, 32)
    np.testing.assert_array_equal(Embedder(codec).latents(coded.x[:8]), latents(made)[:8])
    assert (coded.bytes_per_tile, facts["mse"]) == (frozen.bytes_per_tile, None)


def test_jpeg_2000_comes_nearer_with_its_rate(made: Made) -> None:
    found = [code(made, kind="jpeg2000", bits_per_pixel=rate, curve="JPEG 2000")[1] for rate in (1.5, 4, 12)]
    assert [row["bytes_per_tile"] for row in found] == sorted(row["bytes_per_tile"] for row in found)
    assert [row["snr_db"] for row in found] == sorted(row["snr_db"] for row in found)
    assert found[-1]["bits_per_pixel"] <= 12.5


def test_tiles_share_their_file_s_bytes(made: Made, tmp_path: Path) -> None:
    catalog = read_catalog(made[2])
    shares = source_bytes(catalog, catalog.table)
    assert shares.sum() == pytest.approx(Path(builtin_scene()).stat().st_size)
    coded, facts = code(made, kind="files")
    np.testing.assert_array_equal(coded.x, latents(made))
    assert 0 < facts["bits_per_pixel"] < 48
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 255, (10 + number, 12, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    images = build_catalog(str(tmp_path))
    sizes = [(tmp_path / name).stat().st_size for name in images.table["tile_id"].to_pylist()]
    assert source_bytes(images, images.table).tolist() == pytest.approx(sizes)


def test_images_of_one_stack_share_it_by_their_pixels(tmp_path: Path) -> None:
    for name, size in (("cube.zarr/zarr.json", 100), ("cube.zarr/c/0/0", 500), ("other.zarr/c/0", 7)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "tiles.h5").write_bytes(bytes(90))
    source = [f"{tmp_path}/cube.zarr#0", f"{tmp_path}/cube.zarr#1", f"{tmp_path}/tiles.h5#0", f"{tmp_path}/tiles.h5#1"]
    table = pa.table({"source": source, "width": [10, 10, 4, 4], "height": [10, 20, 4, 4]})
    assert source_bytes(Catalog(table), table.slice(1)).tolist() == [400, 45, 45]


def test_tiles_of_several_files_share_them_all(tmp_path: Path) -> None:
    (tmp_path / "red.tif").write_bytes(bytes(100))
    (tmp_path / "nir.tif").write_bytes(bytes(60))
    hrefs = [["red.tif", "nir.tif"], ["red.tif", "nir.tif"], ["red.tif", "red.tif"], None]
    assets = [None if names is None else [{"href": f"{tmp_path}/{name}"} for name in names] for names in hrefs]
    source = ["item.json", "item.json", "other.json", f"{tmp_path}/nir.tif"]
    table = pa.table({"source": source, "width": [10, 30, 5, 5], "height": [10, 10, 5, 5], "assets": assets})
    assert source_bytes(Catalog(table), table).tolist() == [40, 120, 100, 60]


def test_layers_that_were_left_out_count_as_their_medians(made: Made) -> None:
    labels, codec, catalog, encodings = made
    x = latents(made)
    method: Method = TypeAdapter(Method).validate_python(
        {"kind": "nec", "name": "x", "archive": "a", "layers": 1, "catalog": catalog}
    )
    facts = encodings.facts(method, Coded(x[:, :, :6], [(4, 4)], 10.0, 0, None), codec)
    error = (x[labels.is_test, :, 6:].astype(np.float64) - codec.tables.median[6:]) ** 2
    assert facts["mse"] == pytest.approx(error.sum() / (labels.is_test.sum() * 256), rel=1e-5)
    assert facts["bits_per_channel"] == 80 / 256


def test_what_does_not_fit_is_said(made: Made) -> None:
    with pytest.raises(InputError, match="17 principal components of embeddings of 16 channels"):
        code(made, kind="pca", components=17)
    few = f"{made[2]}.few.parquet"
    write_catalog(read_catalog(made[2]).select("x_off > 400"), few)
    with pytest.raises(InputError, match=r"labelled tile .* is not in it"):
        code(made, kind="raw", bits=8, catalog=few)
