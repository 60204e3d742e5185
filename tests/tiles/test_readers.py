"""A reader is one file: imagery of a kind that nothing of nec_ray names becomes a catalog, and tiles are read."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nec_ray.errors import BadSource
from nec_ray.tiles import build_catalog, read_tiles, readers

TOY = Path(__file__).with_name("toy_reader.py")


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    (tmp_path / "arrays" / "town").mkdir(parents=True)
    made = {f"town/{i}.npy": rng.integers(0, 255, (2, 16, 24), np.uint8) for i in range(3)}
    for name, pixels in made.items():
        np.save(tmp_path / "arrays" / name, pixels)
    (tmp_path / "arrays" / "town" / "broken.NPY").write_bytes(b"no array")
    return made


def test_a_reader_in_one_file_is_used(
    arrays: dict[str, npt.NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadSource, match="holds no GeoTIFF"):
        build_catalog(tmp_path / "arrays")
    (tmp_path / "readers").mkdir()
    (tmp_path / "readers" / TOY.name).write_text(TOY.read_text())
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path / "readers")])
    rows = build_catalog(tmp_path / "arrays", bands=["red", "green"]).table
    assert rows["label"].to_pylist() == ["town"] * 4
    batch = read_tiles(rows, bands=["green", "red"], size=16, fill=[0.0, 0.0])
    assert dict(zip(rows["tile_id"].to_pylist(), batch.status, strict=True)) == {
        **dict.fromkeys(arrays, "valid"),
        "town/broken.NPY": "failed",
    }
    [one] = build_catalog(tmp_path / "arrays" / "town" / "1.npy").table.to_pylist()
    assert (one["width"], one["height"], one["bands"]) == (24, 16, ["B0", "B1"])
    [whole] = read_tiles(
        build_catalog(tmp_path / "arrays" / "town" / "1.npy").table, bands=["B1", "B0"], size=16, fill=[0.0, 0.0]
    ).pixels
    assert whole.shape == (2, 16, 16)
    assert whole.mean() == pytest.approx(arrays["town/1.npy"].mean(), rel=0.05)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a/b.zarr", True),
        ("s3://b/c.ZARR/group/array#3", True),
        ("a.zarr.zip", False),
        ("a/zarr/b.tif", False),
        ("a#b.zarr/array#3", True),
        ("a.zarr#b", False),
    ],
)
def test_a_source_is_known_by_how_its_name_ends(source: str, found: bool) -> None:
    assert (readers.reader_of(source) is not None) == found
