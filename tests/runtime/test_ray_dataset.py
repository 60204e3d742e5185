"""An archive as a Ray data set: every tile once, with the exact embeddings of the version that is pinned."""

from pathlib import Path

import numpy as np
import pytest

from nec_ray import open_archive
from nec_ray.archive.change import delete
from nec_ray.errors import CorruptPayload, InputError
from nec_ray.runtime import ray_dataset
from tests.archive.make import damage, filled_archive


@pytest.mark.slow
def test_a_ray_data_set_holds_the_tiles_of_the_pinned_version(tmp_path: Path, local_ray: None) -> None:
    made = filled_archive(tmp_path)
    archive = open_archive(made.url)
    delete(made.store, "tile_id < 't020'")  # later than the version that is open
    data = ray_dataset(archive, "label = 'water'", layers=1, tiles=8, within=(0, 0, 1, 0.35), time="2020")
    assert data.count() == 19
    rows = data.take_all()
    expected = [tile_id for tile_id in made.symbols if int(tile_id[1:]) % 2 == 0]
    assert sorted(row["tile_id"] for row in rows) == sorted(expected)
    for row in rows:
        embedding = made.symbols[row["tile_id"]][:, :8] + made.codec.tables.median[:8]
        np.testing.assert_allclose(row["embedding"], embedding)
        assert row["embedding"].dtype == np.float32
    batch = next(iter(data.iter_batches(batch_size=5, batch_format="numpy")))
    assert batch["embedding"].shape == (5, 16, 8)
    damage(made, "t030")
    with pytest.raises(Exception, match="tile t030: layer 1") as caught:
        ray_dataset(archive, tiles=40).materialize()
    assert isinstance(caught.value, CorruptPayload)
    with pytest.raises(InputError, match="no valid tile fits"):
        ray_dataset(archive, "false")
