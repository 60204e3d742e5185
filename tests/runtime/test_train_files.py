"""What a run keeps: metrics and checkpoints."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.optimise import parameter_groups
from nec_ray.runtime.train_files import FIELDS, Metrics, read_metrics
from nec_ray.storage import Store
from tests.models.conftest import CONFIG


@pytest.mark.parametrize("remote", [False, True])
def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path, remote: bool) -> None:
    """CSV and TensorBoard's events; `memory://` stands for a store that has no folders of its own."""
    url = f"memory:/{tmp_path}" if remote else str(tmp_path)
    row = {"phase": "adapt", "bits": 0.5, "lr": 1e-3, "samples_s": 9.0}
    first = Metrics(url, 0)
    for epoch in (1, 2, 3):
        first.append({**row, "epoch": epoch, "mse": 1.0 / epoch})
    first.close()
    store = Store(url)
    store.replace("metrics.csv", store.read("metrics.csv") + b"4,ada")
    assert len(read_metrics(f"{url}/metrics.csv")) == 3
    again = Metrics(url, 2)
    again.append({**row, "epoch": 3, "mse": 7.0})
    again.close()
    rows = read_metrics(f"{url}/metrics.csv")
    assert [(row["epoch"], row["mse"]) for row in rows] == [("1", "1.0"), ("2", "0.5"), ("3", "7.0")]
    assert list(rows[0]) == list(FIELDS)
    files = [name for name in store.names("tensorboard") if "tfevents" in name]
    assert len(files) == 2
    assert all(b"samples_s" in store.read(name) for name in files)


def test_checkpoints_of_this_shape_load_without_the_pickle_machine() -> None:
    """What the loop saves loads with weights_only, and weights_only refuses a checkpoint that would run code."""
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    model(torch.randn(2, 3, 32, 32), mask_ratio=0.5, beta=0.1).loss.backward()
    optimiser.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": 3}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    assert state["epoch"] == 3

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 3",)

    hostile = io.BytesIO()
    torch.save({"model": Runs()}, hostile)
    hostile.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(hostile, weights_only=True)
