"""Losses against loops over numpy arrays; what is missing must not be felt anywhere."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from nec_ray.errors import InputError
from nec_ray.models.pretext import (
    Output,
    TaskWeighting,
    mmearth_outputs,
    normalise_patches,
    random_crop,
    task_loss,
)

PATCH, SIDE = 2, 3
RADAR = Output("radar", "pixel", "continuous", 2)
OPTICAL = Output("optical", "pixel", "continuous", 2, patch_normalised=True)
COVER = Output("cover", "pixel", "categorical", 2, 3)
CLIMATE = Output("climate", "image", "continuous", 4)
BIOME = Output("biome", "image", "categorical", 1, 5)


def random_target(output: Output, rng: np.random.Generator, batch: int = 3) -> npt.NDArray[np.float64]:
    """With a fifth missing: NaN, whatever the kind."""
    shape = (batch, output.channels) + ((SIDE * PATCH, SIDE * PATCH) if output.level == "pixel" else ())
    values = rng.normal(size=shape) if output.kind == "continuous" else rng.integers(0, output.classes, shape)
    return np.where(rng.random(shape) < 0.2, np.nan, values)


def as_tensor(output: Output, target: npt.NDArray[np.float64]) -> Tensor:
    if output.kind == "continuous":
        return torch.from_numpy(target.astype(np.float32))
    return torch.from_numpy(np.where(np.isnan(target), -1, target).astype(np.int64))


def loss_by_loops(
    output: Output, predicted: npt.NDArray[np.float64], target: npt.NDArray[np.float64], masked: npt.NDArray[np.bool_]
) -> float:
    errors = []
    per_value = max(1, output.classes)

    def compare(numbers: npt.NDArray[np.float64], value: float) -> None:
        if math.isnan(value):
            return
        if output.kind == "continuous":
            errors.append((float(numbers[0]) - value) ** 2)
        else:
            errors.append(math.log(sum(math.exp(n) for n in numbers)) - float(numbers[int(value)]))

    for sample in range(len(target)):
        if output.level == "image":
            for channel in range(output.channels):
                start = channel * per_value
                compare(predicted[sample, start : start + per_value], target[sample, channel])
            continue
        for token in np.flatnonzero(masked[sample]).tolist():
            top, left = PATCH * (token // SIDE), PATCH * (token % SIDE)
            values = target[sample, :, top : top + PATCH, left : left + PATCH]
            if output.patch_normalised:
                there = values[~np.isnan(values)]
                values = (values - there.mean()) / np.sqrt(there.var(ddof=1) + 1e-6)
            for row in range(PATCH):
                for column in range(PATCH):
                    for channel in range(output.channels):
                        start = ((row * PATCH + column) * output.channels + channel) * per_value
                        compare(predicted[sample, token, start : start + per_value], values[channel, row, column])
    return float(np.mean(errors))


def random_case(
    output: Output, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    target = random_target(output, rng)
    places = (SIDE**2, PATCH**2 * output.width) if output.level == "pixel" else (output.width,)
    return rng.normal(size=(3, *places)), target, rng.random((3, SIDE**2)) < 0.6


@pytest.mark.parametrize("output", [RADAR, OPTICAL, COVER, CLIMATE, BIOME], ids=lambda o: o.name)
def test_a_tasks_loss_is_the_mean_over_what_is_there(output: Output) -> None:
    predicted, target, masked = random_case(output)
    loss, there = task_loss(
        output, torch.from_numpy(predicted), as_tensor(output, target), torch.from_numpy(masked), PATCH
    )
    assert bool(there)
    assert float(loss) == pytest.approx(loss_by_loops(output, predicted, target, masked), rel=1e-4)


@pytest.mark.parametrize("output", [RADAR, OPTICAL, COVER, CLIMATE, BIOME], ids=lambda o: o.name)
def test_a_sample_without_the_modality_contributes_nothing(output: Output) -> None:
    """The same loss as without the sample, and no gradient towards it: trained towards 0 it would have one."""
    predicted, target, masked = random_case(output, seed=1)
    target[1] = np.nan
    given = torch.from_numpy(predicted).float().requires_grad_()
    loss, _ = task_loss(output, given, as_tensor(output, target), torch.from_numpy(masked), PATCH)
    torch.autograd.backward(loss)
    assert given.grad is not None
    assert not given.grad[1].any()
    assert given.grad[[0, 2]].any()
    assert given.grad.isfinite().all()
    others = [0, 2]
    alone, _ = task_loss(
        output, given[others].detach(), as_tensor(output, target[others]), torch.from_numpy(masked[others]), PATCH
    )
    assert float(loss.detach()) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("output", [RADAR, OPTICAL, COVER, CLIMATE, BIOME], ids=lambda o: o.name)
def test_a_batch_without_the_modality_has_no_loss_and_finite_gradients(output: Output) -> None:
    predicted, target, masked = random_case(output)
    given = torch.from_numpy(predicted).float().requires_grad_()
    missing = as_tensor(output, np.full_like(target, np.nan))
    loss, there = task_loss(output, given, missing, torch.from_numpy(masked), PATCH)
    assert not bool(there)
    assert float(loss.detach()) == 0
    torch.autograd.backward(loss)
    assert given.grad is not None
    assert not given.grad.any()


def test_visible_patches_count_for_nothing() -> None:
    predicted, target, masked = random_case(RADAR)
    given = torch.from_numpy(predicted).requires_grad_()
    loss, _ = task_loss(RADAR, given, as_tensor(RADAR, target), torch.from_numpy(masked), PATCH)
    torch.autograd.backward(loss)
    assert given.grad is not None
    assert (given.grad != 0).any(2).numpy().tolist() == masked.tolist()


def test_a_patch_of_one_present_value_or_none_is_not_divided_by_nothing() -> None:
    patches = torch.tensor([[[math.nan, math.nan, math.nan], [5.0, math.nan, math.nan], [1.0, 3.0, math.nan]]])
    found = normalise_patches(patches)[0]
    assert found[0].isnan().all()
    assert float(found[1, 0]) == 0
    np.testing.assert_allclose(found[2, :2], [-1 / math.sqrt(2 + 1e-6), 1 / math.sqrt(2 + 1e-6)], rtol=1e-6)


def test_uncertainty_weighting_leaves_an_absent_task_out_of_sum_and_weight() -> None:
    weighting = TaskWeighting(3, "uncertainty")
    assert weighting.log_vars is not None
    weighting.log_vars.data = torch.tensor([0.5, -1.0, 2.0])
    losses = [torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.3)]
    whole = weighting(losses, [torch.tensor(True), torch.tensor(False), torch.tensor(True)])
    expected = 2.0 * math.exp(-0.5) + 0.5 + 0.3 * math.exp(-2.0) + 2.0
    assert float(whole.detach()) == pytest.approx(expected)
    torch.autograd.backward(whole)
    # d/ds exp(-s) L + s = 1 - exp(-s) L
    gradient = [1 - 2.0 * math.exp(-0.5), 0.0, 1 - 0.3 * math.exp(-2.0)]
    assert weighting.log_vars.grad is not None
    np.testing.assert_allclose(weighting.log_vars.grad.tolist(), gradient, rtol=1e-6)


def test_a_task_without_loss_that_was_there_keeps_its_weight() -> None:
    """A loss of exactly 0 is a perfect prediction, not an absent task, as the released code takes it."""
    weighting = TaskWeighting(1, "uncertainty")
    torch.autograd.backward(weighting([torch.tensor(0.0)], [torch.tensor(True)]))
    assert weighting.log_vars is not None
    assert weighting.log_vars.grad is not None
    assert weighting.log_vars.grad.tolist() == [1.0]


def test_equal_weighting_is_the_sum_of_what_is_there() -> None:
    weighting = TaskWeighting(3, "equal")
    assert not list(weighting.parameters())
    losses = [torch.tensor(2.0), torch.tensor(7.0), torch.tensor(0.5)]
    assert float(weighting(losses, [torch.tensor(True), torch.tensor(False), torch.tensor(True)])) == 2.5


def test_tables_3_and_4_of_the_paper() -> None:
    pixel = {"sentinel1", "aster", "canopy_height_eth", "dynamic_world", "esa_worldcover"}
    image = {"biome", "eco_region", "era5", "lat", "lon", "month"}
    chosen = {targets: {o.name for o in mmearth_outputs(targets)} for targets in ("s2", "pixel", "image", "all")}
    assert chosen == {
        "s2": {"sentinel2"},
        "pixel": {"sentinel2"} | pixel,
        "image": {"sentinel2"} | image,
        "all": {"sentinel2"} | pixel | image,
    }
    assert [o.name for o in mmearth_outputs("all")] == [
        "sentinel2", "sentinel1", "aster", "era5", "dynamic_world", "canopy_height_eth", "lat", "lon", "biome",
        "eco_region", "month", "esa_worldcover",
    ]  # fmt: skip
    classes = {o.name: (o.channels, o.classes) for o in mmearth_outputs("all") if o.kind == "categorical"}
    assert classes == {"dynamic_world": (1, 9), "biome": (1, 14), "eco_region": (1, 846), "esa_worldcover": (1, 11)}
    width = {o.name: o.width for o in mmearth_outputs("all")}
    assert width == {
        "sentinel2": 12, "sentinel1": 8, "aster": 2, "canopy_height_eth": 2, "dynamic_world": 9, "esa_worldcover": 11,
        "biome": 14, "eco_region": 846, "era5": 12, "lat": 2, "lon": 2, "month": 2,
    }  # fmt: skip
    assert [o.channels for o in mmearth_outputs("s2", "rgb")] == [3]
    assert [o.name for o in mmearth_outputs("all") if o.patch_normalised] == ["sentinel2"]


def test_a_crop_takes_the_same_window_of_every_pixel_modality() -> None:
    """Each pixel holds where it is: windows are told from their corners."""
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    whole = torch.stack([rows, columns]).expand(64, -1, -1, -1)
    given = {"optical": whole.float(), "cover": whole.long(), "climate": torch.arange(64.0)[:, None]}
    cropped = random_crop(given, 7, torch.Generator().manual_seed(0))
    assert torch.equal(cropped["climate"], given["climate"])
    assert torch.equal(cropped["optical"].long(), cropped["cover"])
    corners = set()
    for sample in cropped["cover"]:
        top, left = sample[:, 0, 0].tolist()
        assert torch.equal(sample, whole[0, :, top : top + 7, left : left + 7])
        corners.add((top, left))
    assert {c[0] for c in corners} == {c[1] for c in corners} == {0, 1, 2, 3}
    with pytest.raises(InputError, match="cannot be cropped to 11"):
        random_crop(given, 11)


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (RADAR, torch.zeros(3, 1, 6, 6)),
        (RADAR, torch.zeros(3, 2, 6, 6).double()),
        (COVER, torch.zeros(3, 2, 6, 6)),
        (CLIMATE, torch.zeros(2, 4)),
        (BIOME, torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_targets_of_another_shape_or_type_are_refused(output: Output, target: Tensor) -> None:
    predicted, _, masked = random_case(output)
    with pytest.raises(InputError, match=output.name):
        task_loss(output, torch.from_numpy(predicted), target, torch.from_numpy(masked), PATCH)


def test_classes_are_of_categorical_modalities_alone() -> None:
    for kind, classes in (("continuous", 3), ("categorical", 0)):
        with pytest.raises(InputError, match="cannot be"):
            Output("x", "pixel", kind, 1, classes)  # type: ignore[arg-type]
