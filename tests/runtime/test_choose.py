"""Which codec a run encodes with where none is named: the archive's own, or the one that nec_ray brings along."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nec_ray.archive.layout import install_codec
from nec_ray.codec import load_codec
from nec_ray.errors import InputError
from nec_ray.runtime.choose import RGB_CODEC, choose_codec
from nec_ray.runtime.recipe import read_recipe
from nec_ray.storage import Store
from nec_ray.tiles import OrderedTiles, build_catalog, builtin_scene, write_catalog
from tests.runtime.make import random_codec


def tiles_of(source: Path, folder: Path, tile_size: int | None = None) -> OrderedTiles:
    folder.mkdir()
    write_catalog(build_catalog(source, tile_size=tile_size), folder / "catalog.parquet")
    return OrderedTiles(folder / "catalog.parquet", folder)


@pytest.fixture
def photos(tmp_path: Path) -> OrderedTiles:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return tiles_of(tmp_path / "images", tmp_path / "photos")


def test_a_new_archive_of_8_bit_rgb_takes_the_built_in_codec(photos: OrderedTiles, tmp_path: Path) -> None:
    assert choose_codec(None, Store(tmp_path / "archive"), photos).id == load_codec(RGB_CODEC).id


def test_the_built_in_codec_is_what_its_card_says() -> None:
    codec, card = load_codec(RGB_CODEC), (RGB_CODEC.parent / "rgb_codec.md").read_text(encoding="utf-8")
    assert f"`{codec.id[:8]}...`" in card
    assert codec.transform is not None
    *first, last = [str(layer.channels) for layer in codec.spec.layers]
    assert f"{', '.join(first)} and {last} channels" in card
    recipe = read_recipe(RGB_CODEC.parent / "rgb_recipe.toml")
    assert recipe.model.layers == [layer.channels for layer in codec.spec.layers]
    assert (recipe.train.beta, recipe.data.size) == (codec.spec.lineage.beta, codec.spec.input.size)
    assert f"a step of {recipe.model.step:g} standard deviations" in card
    assert sum(file.stat().st_size for file in RGB_CODEC.iterdir()) < 12_000_000


def test_of_other_tiles_a_codec_must_be_named(tmp_path: Path) -> None:
    """The scene has bands of these names, of 16 bits: its numbers mean something else."""
    scene = tiles_of(builtin_scene(), tmp_path / "scene", tile_size=64)
    with pytest.raises(InputError, match=r"8-bit tiles of red, green, blue; name one for these tiles with --codec"):
        choose_codec(None, Store(tmp_path / "archive"), scene)


def test_an_archives_own_codec_goes_before_the_built_in_one(photos: OrderedTiles, tmp_path: Path) -> None:
    store = Store(tmp_path / "archive")
    first = random_codec(tmp_path / "first")
    install_codec(store, first)
    assert choose_codec(None, store, photos).id == first.id
    install_codec(store, random_codec(tmp_path / "second", seed=1))
    with pytest.raises(InputError, match="holds several codecs; name one with --codec"):
        choose_codec(None, store, photos)
