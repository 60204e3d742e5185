"""Codec directories: content-addressed, and refused when anything in them is not what it was."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nec_ray import load_codec
from nec_ray.errors import CorruptCodec, NotFound, UnsupportedFormat
from tests.codec.make import SCALES, laplacian_symbols, make_codec


@pytest.fixture
def codec_folder(tmp_path: Path) -> Path:
    make_codec(tmp_path / "codec", layers=(8, 16))
    return tmp_path / "codec"


def test_the_id_is_the_hash_of_codec_json(tmp_path: Path) -> None:
    codec_id = make_codec(tmp_path / "a")
    assert codec_id == hashlib.sha256((tmp_path / "a" / "codec.json").read_bytes()).hexdigest()
    assert make_codec(tmp_path / "b") == codec_id
    assert make_codec(tmp_path / "c", seed=1) != codec_id


def test_a_loaded_codec_brings_symbols_back(codec_folder: Path) -> None:
    codec = load_codec(codec_folder)
    symbols = laplacian_symbols(np.random.default_rng(0), SCALES, 5, 16)
    payloads = codec.compress(symbols)
    assert np.array_equal(codec.decompress(payloads), symbols)
    first = codec.layer_lengths(payloads)[:, 0].tolist()
    prefixes = [payload[:n] for payload, n in zip(payloads, first, strict=True)]
    assert np.array_equal(codec.decompress(prefixes, layers=1), symbols[:, :, :8])
    assert np.allclose(codec.dequantise(symbols) - symbols, codec.tables.median)


def test_pooled_vectors_rank_like_the_mean_embeddings(codec_folder: Path) -> None:
    codec = load_codec(codec_folder)
    symbols = laplacian_symbols(np.random.default_rng(7), SCALES, 60, 16)
    means = codec.dequantise(symbols).mean(axis=1)
    pooled = codec.pool(symbols).astype(float)
    exact = np.argsort(np.linalg.norm(means - means[0], axis=1))[:10]
    ranked = np.argsort(np.linalg.norm(pooled - pooled[0], axis=1))[:10]
    assert ranked[0] == 0
    assert len(set(exact) & set(ranked)) >= 9


@pytest.mark.parametrize("name", ["tables", "golden"])
def test_a_changed_file_is_refused(codec_folder: Path, name: str) -> None:
    path = codec_folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCodec, match=f"{name}.safetensors"):
        load_codec(codec_folder)


def test_a_changed_encoder_is_refused_when_it_is_needed(codec_folder: Path) -> None:
    (codec_folder / "encoder.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptCodec, match=r"encoder\.safetensors"):
        load_codec(codec_folder).tensors("encoder")


def test_golden_payloads_that_do_not_reproduce_are_refused(codec_folder: Path) -> None:
    golden = load_file(codec_folder / "golden.safetensors")
    golden["symbols"][0, 0, 0] += 1
    save_file(golden, codec_folder / "golden.safetensors")
    spec = json.loads((codec_folder / "codec.json").read_text())
    spec["files"]["golden.safetensors"] = hashlib.sha256((codec_folder / "golden.safetensors").read_bytes()).hexdigest()
    (codec_folder / "codec.json").write_text(json.dumps(spec))
    with pytest.raises(CorruptCodec, match="golden payloads decode to other symbols"):
        load_codec(codec_folder)


@pytest.mark.parametrize("name", ["tables", "golden"])
def test_a_file_larger_than_the_codec_can_need_is_not_even_read(codec_folder: Path, name: str) -> None:
    with (codec_folder / f"{name}.safetensors").open("r+b") as file:
        file.truncate(1 << 36)  # 64 GiB of a sparse file
    with pytest.raises(CorruptCodec, match=f"{name}.safetensors: 68,719,476,736 bytes, its codec needs at most"):
        load_codec(codec_folder)


def rewrite_golden(folder: Path, **changed: object) -> None:
    """Other golden arrays, with the hash in codec.json that fits them."""
    golden = load_file(folder / "golden.safetensors")
    golden.update({name: np.ascontiguousarray(array) for name, array in changed.items()})
    save_file(golden, folder / "golden.safetensors")
    spec = json.loads((folder / "codec.json").read_text())
    spec["files"]["golden.safetensors"] = hashlib.sha256((folder / "golden.safetensors").read_bytes()).hexdigest()
    (folder / "codec.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(
    "changed",
    [
        {"length": np.array([1.0])},
        {"length": np.zeros((2, 2), np.int64)},
        {"length": np.array(3)},
        {"length": np.array([2**63 - 1, 1, 1, 1])},
        {"length": np.array([-5, 5, 0, 0])},
        {"length": np.zeros(0, np.int64)},
        {"symbols": np.zeros((4, 16, 24), np.float32)},
        {"symbols": np.zeros((4, 16, 23), np.int32)},
        {"symbols": np.zeros((5, 16, 24), np.int32)},
        {"payload": np.zeros(10, np.int32)},
    ],
)
def test_golden_arrays_of_another_shape_are_refused_before_they_are_decoded(
    codec_folder: Path, changed: dict[str, object]
) -> None:
    rewrite_golden(codec_folder, **changed)
    with pytest.raises(CorruptCodec, match="golden payloads are not of its shape"):
        load_codec(codec_folder)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 150_000, "null", "7", '"x"', "{}"])
def test_a_codec_json_of_another_kind_is_refused(codec_folder: Path, text: str) -> None:
    (codec_folder / "codec.json").write_text(text)
    with pytest.raises(CorruptCodec, match=r"codec\.json"):
        load_codec(codec_folder)


def test_mutated_codec_files_give_a_typed_error_or_a_codec(codec_folder: Path) -> None:
    """With right hashes, so that what lies behind those is reached; one that loads is then put to work."""
    rng = np.random.default_rng(int(os.environ.get("NEC_FUZZ_SEED", "5")))
    spec = json.loads((codec_folder / "codec.json").read_text())
    originals = {name: (codec_folder / name).read_bytes() for name in ("tables.safetensors", "golden.safetensors")}
    text = json.dumps(spec).encode()
    refused: list[str] = []
    loaded = 0
    for _ in range(3000):
        name = str(rng.choice([*originals, "codec.json"]))
        data = bytearray(text if name == "codec.json" else originals[name])
        for _ in range(int(rng.integers(1, 4))):
            # In half of them the header, which says where the arrays are; else the arrays.
            at = int(rng.integers(0, min(len(data), 1200) if rng.random() < 0.5 else len(data)))
            data[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        for original, content in originals.items():
            (codec_folder / original).write_bytes(content)
        (codec_folder / name).write_bytes(data)
        if name != "codec.json":
            files = {**spec["files"], name: hashlib.sha256(data).hexdigest()}
            (codec_folder / "codec.json").write_text(json.dumps({**spec, "files": files}))
        try:
            codec = load_codec(codec_folder)
        except (CorruptCodec, UnsupportedFormat, NotFound) as error:
            refused.append(str(error))
            continue
        symbols = rng.integers(-300, 300, (2, codec.spec.tokens, codec.spec.channels)).astype(np.int32)
        assert np.array_equal(codec.decompress(codec.compress(symbols)), symbols)
        loaded += 1
    assert len(refused) > 100
    for message in refused:
        assert "\n" not in message
        assert str(codec_folder) in message or re.search(r"codec [0-9a-f]{12}", message), message
    assert loaded > 10


def test_a_codec_under_anothers_name_is_refused(codec_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("0" * 64)
    codec_folder.rename(folder)
    with pytest.raises(CorruptCodec, match="not the folder's name"):
        load_codec(folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format_version": 2}, UnsupportedFormat, "update nec_ray"),
        ({"format_version": 1.0}, CorruptCodec, "not a whole number"),
        ({"format_version": True}, CorruptCodec, "not a whole number"),
        ({"grid": [70000, 1]}, CorruptCodec, "tokens"),
        ({"channels": 25}, CorruptCodec, "add up"),
        ({"channels": "24"}, CorruptCodec, "channels"),
        ({"surprise": 1}, CorruptCodec, "surprise"),
        ({"layers": [{"channels": 24, "tokens": 17}]}, CorruptCodec, "grid"),
        ({"layers": [{"channels": 24, "tokens": 16, "table_sets": 3}]}, UnsupportedFormat, "update nec_ray"),
        ({"files": {"../x.safetensors": "0" * 64}}, CorruptCodec, "files"),
    ],
)
def test_a_codec_json_that_cannot_be_is_refused(
    codec_folder: Path, change: dict[str, object], error: type[Exception], says: str
) -> None:
    spec = json.loads((codec_folder / "codec.json").read_text())
    (codec_folder / "codec.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(error, match=says):
        load_codec(codec_folder)


def test_no_codec_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no codec there"):
        load_codec(tmp_path / "nothing")


def test_loading_needs_neither_torch_nor_ray(codec_folder: Path) -> None:
    code = (
        "import sys, nec_ray; nec_ray.load_codec(sys.argv[1]);"
        "sys.exit(','.join({'torch', 'ray', 'compressai', 'timm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(codec_folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
