"""Where the real data of the tile tests lie, and small rasters for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.transform import from_origin

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip("../shared/data is absent: this test needs its real imagery")
    return DATA


@pytest.fixture
def make_tiff(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, pixels: npt.NDArray[Any], *, crs: str | None = "EPSG:32621", **profile: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = pixels.shape
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=count,
            height=height,
            width=width,
            dtype=pixels.dtype,
            crs=crs,
            transform=from_origin(720_000, 7_100_000, 30, 30),
            **profile,
        ) as file:
            file.write(pixels)
        return path

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
