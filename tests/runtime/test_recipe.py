import json
import re
from pathlib import Path

import pytest

from nec_ray.contracts import contract
from nec_ray.errors import BadRecipe, BadSource, NotFound
from nec_ray.runtime.recipe import Recipe, read_recipe, recipe_schema
from nec_ray.runtime.train_data import input_of
from nec_ray.tiles import build_catalog, builtin_scene

PACKAGED = Path(__file__).parents[2] / "nec_ray" / "data"
MINIMAL = '[data]\ncatalog = "c.parquet"\nsize = 32\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL + "[train]\nbeta = 0.5\n")
    return path


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(recipe: Path) -> None:
    found = read_recipe(recipe, ["train.adapt_epochs=3", "data.catalog=/a/b c.parquet", 'data.bands=["red", "nir"]'])
    assert (found.train.beta, found.train.adapt_epochs) == (0.5, 3)
    assert (found.data.catalog, found.data.bands) == ("/a/b c.parquet", ["red", "nir"])
    assert (found.train.mask_ratio, found.train.trainable) == (0.75, "paper")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.adapt_epoch=3", "train.adapt_epoch: no such key in this recipe"),
        ("model.size=huge", "model.size"),
        ("train.mask_ratio=1", "train.mask_ratio"),
        ("train.lr=-1", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("train.beta=lots", "train.beta"),
        ("data.size=33", r"data.size 33 is no multiple of model.patch 16"),
        ("train.workers=3", "train.batch_size 256 is no multiple of train.workers 3"),
        ("train.pretrain_epochs=0", "would freeze random weights"),
        ("train=1", "write it as section.key=value"),
        ("train.lr", "write it as section.key=value"),
        ("codecs.layers=1", "codecs: no such key in this recipe"),
        ("data.mean=[1, 2]", "data.mean and data.std go together, a number a band each"),
        ("data.std=[0]", "data.std"),
        ("data.mean=[nan]", r"data.mean.0: Input should be a finite number"),
        ("data.std=[inf]", r"data.std.0: Input should be a finite number"),
        ("data.mean=[true]", r"data.mean.0: Input should be a valid number"),
        ('data.bands=["red", "nir", "red"]', "data.bands: red is there twice"),
        ('data.bands=["red", ""]', r"data.bands.1: .* at least 1 character"),
        ("data.catalog=", "data.catalog: is blank"),
        ("model.init=", "model.init: .* at least 1 character"),
        ("model.layers=[10, 10]", r"model.layers \[10, 10\] are 20 channels, the model has 192"),
        ("model.layers=[true, 191]", "model.layers.0: Input should be a valid integer"),
        ("model.step=1e-30", "model.step"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0"),
        ("train.seed=9223372036854775808", "train.seed: Input should be less than 9223372036854775808"),
        ("train.weight_decay=inf", "train.weight_decay: Input should be a finite number"),
        ("train.lr=true", "train.lr: Input should be a valid number"),
        ("train.batch_size=true", "train.batch_size: Input should be a valid integer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_the_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        read_recipe(recipe, [override])
    assert "\n" not in str(caught.value)


def test_a_recipe_without_a_catalog_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[data]\nsize = 32\n")
    with pytest.raises(BadRecipe, match=r"data.catalog: must be given"):
        read_recipe(path)


@pytest.mark.parametrize("content", [b"[data\n", b"\xff\xfe\x00", b"data = 3\n"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(BadRecipe):
        read_recipe(path, ["data.size=32"])


def test_given_statistics_are_the_inputs_and_must_fit_the_bands(recipe: Path, tmp_path: Path) -> None:
    catalog = build_catalog(builtin_scene(), tile_size=64)  # red, green, blue
    given = ["data.mean=[1, 2.5, 3]", "data.std=[4, 5, 6]", "data.size=32"]
    spec = input_of(read_recipe(recipe, given), catalog)
    assert (spec.bands, spec.mean, spec.std) == (["red", "green", "blue"], [1, 2.5, 3], [4, 5, 6])
    with pytest.raises(BadSource, match=r"3 bands; data\.mean has 2 numbers"):
        input_of(read_recipe(recipe, ["data.mean=[1, 2]", "data.std=[4, 5]", "data.size=32"]), catalog)
    for wrong, message in (
        ('data.bands=["red"]', "a number a band each"),
        ("data.normalise=imagenet", "data.normalise imagenet or data.mean and data.std, not both"),
    ):
        with pytest.raises(BadRecipe, match=message):
            read_recipe(recipe, [*given, wrong])


def test_a_missing_file_or_a_folder_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no recipe there"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(BadRecipe, match="cannot be read"):
        read_recipe(tmp_path)


def test_the_schema_file_is_in_step_with_the_code() -> None:
    assert contract("recipe.schema.json") == json.loads(json.dumps(recipe_schema())), (
        "write recipe_schema() to schemas/recipe.schema.json"
    )


@pytest.mark.parametrize("name", ["demo_recipe.toml", "aid_recipe.toml", "rgb_recipe.toml", "mp_mae_recipe.toml"])
def test_packaged_recipes_are_valid(name: str) -> None:
    found = read_recipe(PACKAGED / name, ["data.catalog=/tmp/catalog.parquet"])
    assert Recipe.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.size=small"], "model.size small is none of mp_mae: atto, femto, pico, nano, tiny"),
        (["model.patch=4", "data.size=32"], "model.patch 4: mp_mae has 8, 16 or 32"),
        (["model.depth=3"], "model.depth is for model.family mae_vit"),
        (
            ["train.pretrain_epochs=5", 'data.bands=["B2"]'],
            "leave data.bands, data.normalise, data.mean and data.std out",
        ),
        (["model.targets=all"], "model.targets is for the pretraining of model.family mp_mae"),
        (["train.pretrain_epochs=5", "model.inputs=s3"], "model.inputs"),
        (["model.stages=[3, 4]"], "model.stages"),
        (["model.stages=[4, 4]"], "each once, coarse first"),
        (["model.stages=[5]"], "model.stages"),
        (["model.layers=[160, 320]"], "model.layers [160, 320] are 480 channels, the model has 320"),
        (["model.stages=[3]", "model.layers=[320]"], "the model has 160"),
        (["model.stages=[4, 3]", "model.layers=[160, 320]"], "one would hold channels of two stages"),
        (["model.stages=[4, 3]", "model.step=1"], "model.step is for one grid scale"),
        (["model.family=mae_vit"], "model.size atto is none of mae_vit"),
        (["model.family=mae_vit", "model.size=tiny", "model.stages=[4]"], "model.stages is for model.family mp_mae"),
    ],
)
def test_what_mp_mae_cannot_be_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "recipe.toml"
    model = '[model]\nfamily = "mp_mae"\nsize = "atto"\npatch = 8\ninit = "w.pth"\n'
    path.write_text(MINIMAL + model + "[train]\npretrain_epochs = 0\n")
    assert read_recipe(path, ["model.stages=[3]"]).model.stages == [3]
    assert read_recipe(path, ["model.stages=[4, 2]"]).model.stages == [4, 2]
    assert read_recipe(path, ["model.stages=[4, 2]", "model.layers=[300, 20, 80]"]).model.layers == [300, 20, 80]
    with pytest.raises(BadRecipe, match=re.escape(message)) as caught:
        read_recipe(path, overrides)
    assert "\n" not in str(caught.value)


def test_mp_mae_is_not_adapted_from_random_weights(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        MINIMAL + '[model]\nfamily = "mp_mae"\nsize = "atto"\n[train]\npretrain_epochs = 0\ntrainable = "all"\n'
    )
    with pytest.raises(BadRecipe, match=r"give them as model.init, or train.pretrain_epochs"):
        read_recipe(path)
    assert read_recipe(path, ["train.pretrain_epochs=5"]).pretrains_mp_mae


def test_mp_maes_mask_is_mmearths_where_none_is_given(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL + '[model]\nfamily = "mp_mae"\nsize = "atto"\n')
    assert read_recipe(path).train.mask_ratio == 0.6
    assert read_recipe(path, ["train.mask_ratio=0.5"]).train.mask_ratio == 0.5
    path.write_text(MINIMAL)
    assert read_recipe(path).train.mask_ratio == 0.75
