"""The evaluate room: labels, heads trained and scored on pulled embeddings, predictions, pictures."""

from nec_ray.evaluate.consumer import compare_with_uncompressed, decoder_layer_of, train_head_on_archive
from nec_ray.evaluate.head import evaluate_embeddings, train_head
from nec_ray.evaluate.labels import Labels, read_labels
from nec_ray.evaluate.predict import predict

__all__ = [
    "Labels",
    "compare_with_uncompressed",
    "decoder_layer_of",
    "evaluate_embeddings",
    "predict",
    "read_labels",
    "train_head",
    "train_head_on_archive",
]
