"""U-Nets on an archive of two grid scales: `nec head`, `nec predict` and `nec evaluate`, from real tiles."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from nec_ray.archive import Archive, open_archive
from nec_ray.codec import Codec, InputSpec, Lineage, load_codec, of_tiles
from nec_ray.config import check
from nec_ray.errors import BadRecipe, CodecMismatch, InputError
from nec_ray.evaluate import evaluate_segmentation, predict, train_head_on_archive
from nec_ray.evaluate.compare import MASKS_PNG, RESULTS_JSON, compare
from nec_ray.evaluate.consumer import read_tile_masks
from nec_ray.evaluate.experiment import Experiment
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.report import REPORT_HTML
from nec_ray.evaluate.segment import predict_classes
from nec_ray.models.convnext import ConvNextConfig
from nec_ray.models.embed import Embedder
from nec_ray.models.export import export_codec
from nec_ray.models.head_files import load_head
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.segmentation import SegmentationHead
from nec_ray.models.stages import StageConfig
from nec_ray.models.threads import one_thread
from nec_ray.models.unet import UNetHead
from nec_ray.runtime.encode import encode
from nec_ray.tiles import build_catalog, builtin_scene, read_catalog, read_tiles, write_catalog
from tests.command import nec_here
from tests.runtime.make import random_codec

SIZES = ConvNextConfig(size=24, patch=8, bands=3, dim=4, depth_1=1, depth_2=1, depth_3=1, depth_4=1)
BANDS = ["red", "green", "blue"]


@dataclass(frozen=True)
class Work:
    folder: Path
    archive: Archive
    codec: Codec
    masks: Masks

    @property
    def labels(self) -> str:
        return str(self.folder / "labels.tif")

    def pulled(self, layers: int | None = None) -> Any:
        pull = self.archive.pull(layers=layers, tile_ids=self.masks.tile_ids)
        assert pull.tile_ids == self.masks.tile_ids
        return pull.embeddings


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """3 x 3 tokens of 32 channels in two layers, 6 x 6 of 16 in a third, of random weights; bright pixels as masks."""
    folder = tmp_path_factory.mktemp("unet")
    catalog = build_catalog(builtin_scene(), tile_size=24).select(
        "x_off BETWEEN 240 AND 383 AND y_off BETWEEN 240 AND 383"
    )
    write_catalog(catalog, folder / "catalog.parquet")
    pixels = read_tiles(catalog.table, bands=BANDS, size=24, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=24)
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mp_mae(StageConfig(SIZES, (4, 3), decoder_dim=8), [8, 24, 16])
    for name, weight in model.encoder.named_parameters():
        weight.data = 0.3 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0)
    lineage = Lineage(data="none", licence="none", beta=0.1, bits_per_symbol=0)
    export_codec(model, folder / "codec", input_spec=spec, lineage=lineage, calibration=pixels[:32])
    encode(folder / "catalog.parquet", folder / "archive", codec_url=str(folder / "codec"), local=True)
    with rasterio.open(builtin_scene()) as scene:
        green = scene.read(2)
        bright = 1 + (green > np.median(green[240:384, 240:384])).astype(np.uint8)
        profile = scene.profile | {"count": 1, "dtype": "uint8", "nodata": None}
    with rasterio.open(folder / "labels.tif", "w", **profile) as image:
        image.write(bright, 1)
    archive = open_archive(folder / "archive")
    masks = read_tile_masks(archive, str(folder / "labels.tif"), None, None)
    assert masks.masks.shape == (36, 24, 24)
    return Work(folder, archive, load_codec(folder / "codec"), masks)


@pytest.mark.parametrize(
    ("options", "shapes", "decoder"),
    [
        ({}, [(9, 32), (36, 16)], "unet"),
        ({"decoder": "nec"}, [(36, 48)], "nec"),
        ({"decoder_layer": "frozen"}, [(36, 48)], "nec"),
        ({"layers": 3, "decoder": "unet"}, [(9, 32), (36, 16)], "unet"),
        ({"layers": 1}, [(9, 8)], "nec"),
        ({"layers": 2, "decoder": "unet"}, [(9, 32)], "unet"),
    ],
)
def test_several_scales_have_a_u_net_and_a_coarse_prefix_what_is_asked_for(
    work: Work, tmp_path: Path, options: dict[str, Any], shapes: list[tuple[int, int]], decoder: str
) -> None:
    metrics = train_head_on_archive(
        work.archive, work.labels, tmp_path / "head", task="segmentation", epochs=1, **options
    )
    assert metrics["decoder"] == decoder
    head = load_head(tmp_path / "head", lambda: _first_layer(work))
    assert isinstance(head.module, UNetHead if decoder == "unet" else SegmentationHead)
    assert head.spec.shapes() == shapes
    assert head.spec.grid == {9: (3, 3), 36: (6, 6)}[shapes[-1][0]]
    # The file's map is what the head says of what was pulled, at each tile's place.
    predict(work.archive, tmp_path / "head", None, tmp_path / "map.tif")
    pull = work.archive.pull(layers=options.get("layers"))
    maps = np.concatenate(list(predict_classes(head.module, head.embeddings("here", pull))))
    side = 24 if pull.grid == (6, 6) else 12
    assert maps.shape == (36, side, side)
    with rasterio.open(tmp_path / "map.tif") as image:
        whole = image.read(1)
        assert whole.shape == (144, 144), "a quarter of the codec's finest token a pixel"
    for tile_id, said in zip(pull.tile_ids, maps, strict=True):
        y, x = (int(part) - 240 for part in tile_id.split("/y")[1].split("_x"))
        step = 24 // side
        np.testing.assert_array_equal(whole[y : y + 24, x : x + 24], said.repeat(step, 0).repeat(step, 1))
    if decoder == "unet" and len(shapes) == 2:
        with pytest.raises(CodecMismatch, match=r"embeddings of 9 x 32 .*, the head reads 9 x 32 and 36 x 16; pull"):
            head.embeddings("here", work.archive.pull(layers=2))


def _first_layer(work: Work) -> Any:
    from nec_ray.models.embed import first_decoder_layer

    return first_decoder_layer(work.codec)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": "u-net"}, "decoder 'u-net': use nec or unet"),
        ({"decoder": "unet", "decoder_layer": "frozen"}, "a U-Net reads each grid scale as it is; use decoder nec"),
        ({"decoder": "unet", "task": "classification"}, "decoder unet is for segmentation; leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(work: Work, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        train_head_on_archive(work.archive, work.labels, tmp_path / "head", **{"task": "segmentation"} | options)
    assert not (tmp_path / "head").exists()
    x = work.pulled()
    with pytest.raises(InputError, match="2 grid scales and 1 grids"):
        evaluate_segmentation(x, work.masks.masks, x, work.masks.masks, grid=(6, 6), epochs=1)


def test_the_command_takes_the_decoder(work: Work, tmp_path: Path) -> None:
    where = [
        "--labels",
        work.labels,
        "--task",
        "segmentation",
        "--where",
        "tile_id < 'landsat8_itaipu/y00312'",
        "--out",
        str(tmp_path / "h"),
    ]
    done = nec_here("head", work.archive.url, *where, "--layers", "1", "--decoder", "unet", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decoder"] == "unet"
    assert json.loads((tmp_path / "h" / "head.json").read_text())["scales"] == [{"grid": [3, 3], "channels": 8}]
    done = nec_here("head", work.archive.url, *where, "--decoder", "unet", "--decoder-layer", "trained")
    assert done.returncode == 1
    assert "use decoder nec, or no decoder layer" in done.stderr


def document(work: Work, **changes: Any) -> dict[str, Any]:
    here = {"archive": work.archive.url}
    pixels = here | {"catalog": str(work.folder / "catalog.parquet")}
    return {
        "title": "bright pixels",
        "labels": work.labels,
        "seeds": [4],
        "epochs": 1,
        "tasks": ["segmentation", "unet"],
        "methods": [
            {"kind": "nec", "name": "both scales", "curve": "NEC", **here},
            {"kind": "nec", "name": "coarse", "curve": "NEC", "layers": 2, **here},
            {"kind": "nec", "name": "decoder layer", "decoder_layer": "frozen", **here},
            {"kind": "uncompressed", "name": "float32", **pixels},
        ],
        **changes,
    }


def test_methods_of_several_scales_are_compared_by_both_decoders(work: Work, tmp_path: Path) -> None:
    done = compare(Experiment.model_validate(document(work)), tmp_path)
    assert done == json.loads((tmp_path / RESULTS_JSON).read_text())
    rows = {(row["method"], row["task"]): row for row in done["results"]}
    names = ["both scales", "coarse", "float32"]
    assert set(rows) == {(name, task) for name in names for task in ("segmentation", "unet")} | {
        ("decoder layer", "segmentation")
    }
    masks, test = work.masks, work.masks.is_test
    pixels = read_tiles(
        read_catalog(work.folder / "catalog.parquet").where_ids(masks.tile_ids).table, bands=BANDS, size=24, fill=[0.0]
    ).pixels
    grids = [(3, 3), (6, 6)]
    for name, x, mine in (
        ("both scales", work.pulled(), grids),
        ("coarse", work.pulled(2), grids[:1]),
        ("float32", Embedder(work.codec).latents(pixels), grids),
    ):
        for task, decoder in (("segmentation", "nec"), ("unet", "unet")):
            alone = evaluate_segmentation(
                of_tiles(x, ~test),
                masks.masks[~test],
                of_tiles(x, test),
                masks.masks[test],
                grid=mine[-1],
                grids=mine,
                decoder=decoder,  # type: ignore[arg-type]  # one of two
                classes=2,
                epochs=1,
                seed=4,
            ).scores
            row = rows[name, task]
            assert (row["accuracy"], row["mean_iou"]) == pytest.approx((alone.accuracy, alone.mean_iou))
    assert rows["float32", "unet"]["bytes_per_tile"] == 4 * (9 * 32 + 36 * 16)
    assert rows["coarse", "unet"]["bytes_per_tile"] < rows["both scales", "unet"]["bytes_per_tile"]
    # Bits of each channel's symbols, counted one by one over its own scale's tokens.
    bits, medians = done["bits_by_channel"][work.codec.id], work.codec.tables.median
    coarse, fine = work.pulled()
    for channel in (0, 31, 32, 47):
        values = coarse[:, :, channel] if channel < 32 else fine[:, :, channel - 32]
        counts = Counter((values - medians[channel]).round().ravel().tolist())
        total = sum(counts.values())
        entropy = -sum(n / total * log2(n / total) for n in counts.values())
        assert bits[channel] == pytest.approx(entropy, abs=1e-6)
    with Image.open(tmp_path / MASKS_PNG) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 4
    page = (tmp_path / REPORT_HTML).read_text()
    assert "mean IoU, U-Net" in page
    assert "mean IoU, segmentation" in page


def test_a_u_net_alone_also_behind_an_encoder_that_is_trained(work: Work, tmp_path: Path) -> None:
    random_codec(tmp_path / "one scale")
    pixels = {"archive": work.archive.url, "catalog": str(work.folder / "catalog.parquet")}
    methods: list[dict[str, Any]] = [
        {"kind": "raw", "name": "end to end", "bits": 8, "encoder": "trained", "codec": str(tmp_path / "one scale")},
        {"kind": "quantised", "name": "int8", "precision": "int8", "codec": str(tmp_path / "one scale")},
        {"kind": "nec", "name": "NEC"},
    ]
    given = document(work, tasks=["unet"], methods=[pixels | method for method in methods])
    done = compare(Experiment.model_validate(given), tmp_path / "out")
    assert [(row["method"], row["task"]) for row in done["results"]] == [
        ("end to end", "unet"),
        ("int8", "unet"),
        ("NEC", "unet"),
    ]
    for row in done["results"]:
        assert row["mean_iou"] == pytest.approx(np.mean(row["iou"]))
        assert row["accuracy"] > 0.3
    assert (tmp_path / "out" / MASKS_PNG).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "unet needs masks"),
        ({"tasks": ["unet", "knn"]}, "unet has masks, knn needs a label a tile"),
        ({"tasks": ["head"], "classes": "classes.json"}, "ask for the task segmentation or unet"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(
    work: Work, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRecipe) as caught:
        check(Experiment, document(work, tasks=["unet"]) | change, tmp_path / "config.toml", "evaluation")
    assert message in str(caught.value)
