"""Coders of embeddings: each against its definition written out, at bytes that decode."""

import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.errors import InputError
from nec_ray.evaluate.baselines import EmbeddingCoder, fit_binary, fit_pca, fit_quantised
from nec_ray.evaluate.baselines.blocks import Block, Form, fit_block, unsigned
from nec_ray.evaluate.baselines.quantised import AffineCoder

Floats = npt.NDArray[np.float32]
TOKENS, CHANNELS = 12, 20
FORMS: tuple[Form, ...] = ("plain", "planes", "packed")
ORDERS: list[tuple[int, ...]] = [(0, 1), (1, 0)]


@pytest.fixture(scope="module")
def tiles() -> Floats:
    """Channels of many widths that hang together, a heavy tail, and one that never changes."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(6, CHANNELS)) * np.geomspace(0.05, 4, CHANNELS)
    x = rng.standard_t(4, size=(60, TOKENS, 6)) @ mixed + 0.1 * rng.normal(size=(60, TOKENS, CHANNELS)) + 3
    x[:, :, 7] = 0.25
    return x.astype(np.float32)


def there_and_back(coder: EmbeddingCoder, tiles: Floats) -> Floats:
    return np.stack([coder.decode(coder.encode(tile)) for tile in tiles])


def inside(data: bytes) -> bytes:
    """What a zstd frame holds, by the streaming reader: the frame names no size."""
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
        return reader.read()


@given(st.data())
def test_blocks_bring_every_array_back(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([1, 2, 3, 5, 8, 16, 32]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    values = np.array(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))),
        unsigned(bits),
    ).reshape(shape)
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    for form in FORMS[: 3 if bits <= 8 else 2]:
        block = Block(bits, form, order)
        np.testing.assert_array_equal(block.decode(block.encode(values), shape), values)


def test_packed_bits_lie_without_gaps() -> None:
    values = np.array([[5, 0, 7], [2, 1, 4]], np.uint8)
    text = "".join(f"{value:03b}" for value in values.T.ravel())
    expected = int(text.ljust(24, "0"), 2).to_bytes(3, "big")
    assert inside(Block(3, "packed", (1, 0)).encode(values)) == expected
    planes = "".join("".join(f"{value:03b}"[bit] for value in values.ravel()) for bit in range(3))
    assert inside(Block(3, "planes", (0, 1)).encode(values)) == int(planes.ljust(24, "0"), 2).to_bytes(3, "big")


def test_the_smallest_arrangement_is_taken() -> None:
    rng = np.random.default_rng(1)
    runs = [np.repeat(rng.integers(0, 32, (1, 64)), 40, axis=0).astype(np.uint8) for _ in range(3)]
    found = fit_block(runs, 5, ORDERS)
    sizes = {
        (form, order): sum(len(Block(5, form, order).encode(tile)) for tile in runs)
        for form in FORMS
        for order in ORDERS
    }
    assert sizes[found.form, found.order] == min(sizes.values()) < max(sizes.values())


@pytest.mark.parametrize("ranges", ["tensor", "channel"])
@pytest.mark.parametrize("percentile", [100, 97])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_affine_integers_are_the_nearest_of_their_levels(
    tiles: Floats, bits: int, ranges: Any, percentile: float
) -> None:
    train, test = tiles[:40], tiles[40:]
    coder = fit_quantised(train, f"int{bits}", ranges, percentile)  # type: ignore[arg-type]
    columns = [train.ravel()] * CHANNELS if ranges == "tensor" else list(train.reshape(-1, CHANNELS).T)
    expected = np.empty_like(test)
    for c, column in enumerate(columns):
        low, high = np.quantile(column.astype(np.float64), [1 - percentile / 100, percentile / 100])
        levels = np.linspace(low, high, 2**bits)
        nearest = np.abs(test[:, :, c, None] - levels).argmin(axis=-1)
        expected[:, :, c] = levels[nearest]
    got = there_and_back(coder, test)
    step = expected.std() / 100  # a value half way between two levels may go either way
    assert np.mean(np.abs(got - expected) > step) < 1e-3
    assert np.array_equal(got[:, :, 7], expected[:, :, 7]) or ranges == "tensor"
    assert coder.shared_bytes == 4 * 2 * (1 if ranges == "tensor" else CHANNELS)


def test_floats_come_back_as_such(tiles: Floats) -> None:
    np.testing.assert_array_equal(there_and_back(fit_quantised(tiles, "float32"), tiles), tiles)
    wide = tiles.copy()
    wide[0, 0, :2] = [1e9, -1e9]
    half = there_and_back(fit_quantised(tiles, "float16"), wide)
    np.testing.assert_array_equal(half[1:], tiles[1:].astype(np.float16).astype(np.float32))
    assert half[0, 0, :2].tolist() == [65504, -65504]


def test_bytes_fall_with_the_bits_and_ranges_by_channel_lose_less(tiles: Floats) -> None:
    coders = {bits: fit_quantised(tiles[:40], f"int{bits}", "channel") for bits in (2, 3, 5, 8)}  # type: ignore[arg-type]
    sizes = [sum(len(coder.encode(tile)) for tile in tiles[40:]) / 20 for coder in coders.values()]
    assert sizes == sorted(sizes)
    for bits, size in zip(coders, sizes, strict=True):
        assert size < TOKENS * CHANNELS * bits / 8 + 20
    plain = fit_quantised(tiles[:40], "int5", "tensor")

    def worst(coder: EmbeddingCoder) -> float:
        """Mean squared error of the narrowest channel in its own variance."""
        error = ((there_and_back(coder, tiles[40:]) - tiles[40:]) ** 2)[:, :, 0].mean()
        return float(error / tiles[40:, :, 0].var())

    assert worst(coders[5]) < worst(plain) / 5


def test_principal_components_are_those_of_the_singular_values(tiles: Floats) -> None:
    train = tiles[:40]
    coder = fit_pca(train, 4, "float32")
    tokens = train.reshape(-1, CHANNELS).astype(np.float64)
    centred = tokens - tokens.mean(axis=0)
    u, values, vt = np.linalg.svd(centred, full_matrices=False)
    expected = (u[:, :4] * values[:4]) @ vt[:4] + tokens.mean(axis=0)
    got = there_and_back(coder, train).reshape(-1, CHANNELS)
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
    lost = ((got - tokens) ** 2).sum()
    assert lost == pytest.approx((values[4:] ** 2).sum(), rel=1e-3)
    assert coder.shared_bytes == 4 * (CHANNELS + 4 * CHANNELS)
    with pytest.raises(InputError, match="21 principal components of embeddings of 20 channels"):
        fit_pca(train, 21)


def test_quantised_components_stay_within_half_a_step_and_cost_a_byte_each(tiles: Floats) -> None:
    coder = fit_pca(tiles[:40], 4, "int8", "channel")
    exact = fit_pca(tiles[:40], 4, "float32")
    components = (tiles[:40] - exact.mean) @ exact.basis
    half = (components.max(axis=(0, 1)) - components.min(axis=(0, 1))) / 255 / 2
    moved = (there_and_back(coder, tiles[:40]) - there_and_back(exact, tiles[:40])) @ exact.basis
    assert np.all(np.abs(moved) <= half * 1.01)
    assert max(len(coder.encode(tile)) for tile in tiles) <= TOKENS * 4 + 20
    assert coder.shared_bytes == exact.shared_bytes + 4 * 2 * 4


def test_signs_are_taken_around_medians_and_stand_for_means(tiles: Floats) -> None:
    train, test = tiles[:40], tiles[40:]
    coder = fit_binary(train)
    got = there_and_back(coder, test)
    for c in range(CHANNELS):
        column = np.sort(train[:, :, c].ravel().astype(np.float64))
        median = (column[len(column) // 2 - 1] + column[len(column) // 2]) / 2
        sides = [column[column <= median].mean(), column[column > median].mean() if c != 7 else 0.25]
        expected = np.where(test[:, :, c] > np.float32(median), sides[1], sides[0])
        np.testing.assert_allclose(got[:, :, c], expected, rtol=1e-5)
    assert max(len(coder.encode(tile)) for tile in test) <= TOKENS * CHANNELS / 8 + 20
    assert coder.shared_bytes == 4 * 3 * CHANNELS


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_blocks_are_near_the_entropy_of_what_they_hold_and_below_deflate(bits: int) -> None:
    x = np.random.default_rng(2).laplace(size=(4, 196, 96)).astype(np.float32)
    coder = fit_quantised(x, f"int{bits}", "channel", 99.9)  # type: ignore[arg-type]
    assert isinstance(coder, AffineCoder)
    for tile in x:
        values = np.clip(np.rint((tile - coder.low) / coder.step), 0, 2**bits - 1).astype(np.uint8)
        share = np.bincount(values.ravel()) / values.size
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() * values.size / 8
        size = len(coder.encode(tile))
        assert 0.95 * entropy < size < 1.06 * entropy + 100
        assert size < 1.01 * len(zlib.compress(values.tobytes(), 9))
