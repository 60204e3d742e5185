"""Reading payloads where the index, the packs or the store are not as they should be."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray import open_archive
from nec_ray.archive.change import delete
from nec_ray.archive.compact import compact
from nec_ray.archive.exports import export
from nec_ray.archive.payloads import _LARGEST_GAP, _WASTE, References, _plan
from nec_ray.archive.verify import verify
from nec_ray.errors import CorruptIndex, CorruptPack, CorruptPayload, InputError
from tests.archive.make import Made, filled_archive, index_rows, pack


def wanted(offsets: list[int], lengths: list[int]) -> References:
    names = [f"t{i}" for i in range(len(offsets))]
    return References(names, ["a.pack"], np.zeros(len(names), np.int64), np.array(offsets), np.array(lengths))


@pytest.mark.parametrize("stride", [2_100, 2_400, 10_000, 800_000, 2_000_000])
def test_payloads_of_one_size_at_a_regular_stride_are_not_read_over_the_waste_allowed(stride: int) -> None:
    plan = _plan(wanted([stride * i for i in range(5_000)], [2_000] * 5_000))
    assert (plan.end - plan.start).sum() <= 5_000 * 2_000 * (1 + _WASTE)
    assert len(plan.start) == (3 if stride == 2_100 else 5_000)


@given(
    st.lists(st.one_of(st.integers(0, 2_000), st.integers(0, 2 * _LARGEST_GAP)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.one_of(st.just(2_000), st.integers(1, 100_000))), min_size=1, max_size=80),
)
def test_no_more_is_read_than_the_waste_allows(widths: list[int], tiles: list[tuple[int, int]]) -> None:
    gaps = np.array([widths[kind % len(widths)] for kind, _ in tiles])
    lengths = np.array([length for _, length in tiles])
    offsets = np.cumsum(gaps) + np.cumsum(lengths) - lengths
    plan = _plan(wanted(offsets.tolist(), lengths.tolist()))
    assert (plan.end - plan.start).sum() - lengths.sum() <= _WASTE * lengths.sum()


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 20)), min_size=1, max_size=40))
def test_nor_where_payloads_overlap(places: list[tuple[int, int]]) -> None:
    offsets, lengths = (list(column) for column in zip(*places, strict=True))
    plan = _plan(wanted(offsets, lengths))
    assert (plan.end - plan.start).sum() - sum(lengths) <= _WASTE * sum(lengths)


def with_a_row(folder: Path, **changed: Any) -> Made:
    """An archive whose row `the-evil` names another payload than it has: 38 good tiles beside it."""
    made = filled_archive(folder)
    [name] = made.store.names("packs")
    rows = index_rows(["the-evil"], made.codec.id)
    at = rows.schema.get_field_index("payload")
    field = rows.schema.field(at)
    payload = {"pack": name, "offset": 40, "layer_lengths": [10, 10], **changed}
    made.index.append(made.index.version(), rows.set_column(at, field, pa.array([payload], field.type)))
    return made


OUTSIDE = {"pack": "../../etc/passwd"}
FAR = {"offset": (1 << 63) - 5}
LONG = {"layer_lengths": [(1 << 31) - 1] * 3}
FOREIGN = {"pack": f"packs/{'a' * 64}/bb/{'b' * 64}.pack"}
NEGATIVE = {"offset": -1}
EMPTY: dict[str, Any] = {"layer_lengths": []}
NO_LENGTH = {"layer_lengths": [10, None]}


@pytest.mark.parametrize("changed", [OUTSIDE, FAR, LONG, FOREIGN, NEGATIVE, EMPTY, NO_LENGTH])
def test_verify_names_a_hostile_row_and_checks_the_others(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = with_a_row(tmp_path, **changed)
    report = verify(open_archive(made.url))
    assert {fault.tile_id for fault in report.faults} == {"the-evil"}
    assert (report.tiles, report.checked) == (41, 39)
    damaged = bytearray(made.store.read(made.store.names("packs")[0]))
    damaged[60] ^= 1
    Path(made.store.path(made.store.names("packs")[0])).write_bytes(damaged)
    assert len({fault.tile_id for fault in verify(open_archive(made.url)).faults}) == 2


@pytest.mark.parametrize("changed", [OUTSIDE, FAR, LONG, NEGATIVE, EMPTY, NO_LENGTH])
def test_a_pull_of_some_layers_names_the_hostile_row(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = with_a_row(tmp_path, **changed)
    with pytest.raises(CorruptIndex, match="tile the-evil: "):
        open_archive(made.url).pull(layers=1)


@pytest.mark.parametrize("changed", [OUTSIDE, FAR])
def test_compaction_names_archive_and_remedy_which_helps(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = with_a_row(tmp_path, **changed)
    made.index.append(made.index.version(), pack(made, ["other"]))  # two small packs to merge
    with pytest.raises(CorruptIndex, match=rf"{made.url}: tile the-evil: .*delete .*compact again"):
        compact(made.store, dry_run=changed is OUTSIDE)
    delete(made.store, "tile_id = 'the-evil'")
    assert compact(made.store).packs == 2
    assert not verify(open_archive(made.url)).faults


@pytest.mark.parametrize("function", ["nec_decode", "nec_pool"])
def test_sql_names_the_tile_whose_payload_is_damaged(tmp_path: Path, function: str) -> None:
    made = filled_archive(tmp_path)
    archive = open_archive(made.url)
    rows = archive.rows(["payload"], "tile_id = 't007'").to_pylist()
    path = Path(made.store.path(rows[0]["payload"]["pack"]))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[rows[0]["payload"]["offset"] + 9] ^= 4
    path.write_bytes(damaged)
    query = f"SELECT {function}(payload) FROM embeddings WHERE status = 'valid'"
    with pytest.raises(CorruptPayload, match=r"^tile t007: .*$") as caught:
        archive.sql(query).fetchall()
    assert "\n" not in str(caught.value)
    path.write_bytes(whole[: rows[0]["payload"]["offset"]])
    with pytest.raises(CorruptPack, match=r"^tile t\d\d\d: .*the object is shorter$"):
        archive.sql(query).fetchall()
    path.unlink()
    with pytest.raises(CorruptPack, match=r"^tile t\d\d\d: its pack .* is gone"):
        archive.sql(query).fetchall()


def test_sql_names_the_tile_of_a_hostile_row(tmp_path: Path) -> None:
    made = with_a_row(tmp_path, **FAR)
    with pytest.raises(CorruptIndex, match=r"^tile the-evil: "):
        open_archive(made.url).sql("SELECT nec_decode(payload) FROM embeddings WHERE status = 'valid'").fetchall()


@pytest.mark.parametrize("out", ["s3://bucket/catalog", "https://example.org/catalog"])
def test_exports_are_written_to_a_local_folder(tmp_path: Path, out: str) -> None:
    made = filled_archive(tmp_path)
    with pytest.raises(InputError, match="exports are written to a local folder"):
        export(open_archive(made.url), Path(out), format="stac")
