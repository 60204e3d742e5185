"""Invented data sets of GEO-Bench's format and size: So2Sat with 19,992 samples to train on, EuroSAT with 2,000.

Run from the clone: `python -m tests.evidence.geobench_size OUT`. Beside them lie checkpoints of random numbers, of the
names and shapes of MMEarth's, for the packaged recipes: what is proven is that the road carries sets of this size.
"""

import json
import sys
from pathlib import Path

import torch

from nec_ray.models.mmearth_weights import mmearth_tensors, parse_folder
from nec_ray.models.mp_mae import MpMae
from tests.tiles.geobench_files import S2_NAMES, SO2SAT_NAMES, write_dataset

CHECKPOINTS = ("pt-all_mod_atto_1M_128_uncertainty_112-16", "pt-S2_atto_1M_128_uncertainty_112-16")


def _cut(folder: Path, tested: int) -> None:
    """Leave as many samples to validate and to test as are published."""
    kept: set[str] = set()
    for path in folder.glob("*_partition.json"):
        splits = json.loads(path.read_text())
        splits = {name: names if name == "train" else names[:tested] for name, names in splits.items()}
        path.write_text(json.dumps(splits))
        kept = kept.union(*splits.values())
    for path in folder.glob("*.hdf5"):
        if path.stem not in kept:
            path.unlink()


def main(out: Path) -> None:
    """Make all of it in `out`, which must not be there."""
    sets = out / "geobench" / "classification_v1.0"
    sets.mkdir(parents=True)
    write_dataset(
        sets / "m-so2sat", "classification", samples=39_984, classes=17, size=32, names=SO2SAT_NAMES, noise=0.9
    )
    _cut(sets / "m-so2sat", 986)
    write_dataset(sets / "m-eurosat", "classification", samples=4000, classes=10, size=64, names=S2_NAMES, noise=0.9)
    torch.manual_seed(0)
    for name in CHECKPOINTS:
        weights = mmearth_tensors(MpMae(parse_folder(name).config()))
        (out / "weights" / name).mkdir(parents=True)
        encoder = {key: value for key, value in weights.items() if key.startswith("encoder.")}
        torch.save({"model": encoder}, out / "weights" / name / "checkpoint-199.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
