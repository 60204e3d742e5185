"""The models room: ViT MAE, bottleneck, NEC adaptation, embedding, heads. Everything here needs torch."""

from typing import TYPE_CHECKING, Any

__all__ = ["torch_dataset"]

if TYPE_CHECKING:
    from nec_ray.models.dataset import torch_dataset


def __getattr__(name: str) -> Any:
    if name == "torch_dataset":
        from nec_ray.models.dataset import torch_dataset

        return torch_dataset
    raise AttributeError(f"module 'nec_ray.models' has no attribute '{name}'")
