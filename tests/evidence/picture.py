"""The README's picture of results, nec_ray/docs/images/results.png, from aid.results.json."""

import json
from pathlib import Path

from nec_ray.evaluate.rate_accuracy import draw_rate_accuracy

HERE = Path(__file__).parent
CURVES = {
    "NEC, decoder layer trained with the head": "NEC in layers, trained decoder layer",
    "NEC, the head alone": "NEC",
    "embeddings: PCA, 8 bit": "PCA, 8 bit",
    "embeddings: 2 to 8 bits by channel": "uniform by channel",
    "pixels: JPEG 2000": "JPEG 2000",
    "uncompressed embeddings": "uncompressed",
}
document = json.loads((HERE / "aid.results.json").read_text())
methods = document["experiment"]["methods"]
curves = {
    shown: [m["name"] for m in methods if (m.get("curve") or m["name"]) == curve] for shown, curve in CURVES.items()
}
rows = [row for row in document["summary"] if row["task"] == "head"]
rows = [{**row, "majority": None} for row in rows if any(row["method"] in names for names in curves.values())]
draw_rate_accuracy(rows, curves, "", HERE.parents[1] / "nec_ray/docs/images/results.png", [("head", "accuracy")])
