"""The evaluate room: labels, heads trained and scored on pulled embeddings, predictions, pictures.

Its names load on first use: heads need torch, benchmarks and labels do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nec_ray.evaluate.consumer import compare_with_uncompressed, decoder_layer_of, train_head_on_archive
    from nec_ray.evaluate.head import evaluate_embeddings, train_head
    from nec_ray.evaluate.labels import Labels, read_labels
    from nec_ray.evaluate.masks import Masks, read_masks
    from nec_ray.evaluate.prediction import predict
    from nec_ray.evaluate.segment import evaluate_segmentation, train_segmentation_head

__all__ = [
    "Labels",
    "Masks",
    "compare_with_uncompressed",
    "decoder_layer_of",
    "evaluate_embeddings",
    "evaluate_segmentation",
    "predict",
    "read_labels",
    "read_masks",
    "train_head",
    "train_head_on_archive",
    "train_segmentation_head",
]
_HOME = {
    "Labels": "labels",
    "Masks": "masks",
    "compare_with_uncompressed": "consumer",
    "decoder_layer_of": "consumer",
    "evaluate_embeddings": "head",
    "evaluate_segmentation": "segment",
    "predict": "prediction",
    "read_labels": "labels",
    "read_masks": "masks",
    "train_head": "head",
    "train_head_on_archive": "consumer",
    "train_segmentation_head": "segment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nec_ray.evaluate' has no attribute '{name}'")
    return getattr(import_module(f"nec_ray.evaluate.{_HOME[name]}"), name)
