"""The runtime room, the only one that imports ray: training, encoding, the demo."""

from typing import TYPE_CHECKING, Any

__all__ = ["ray_dataset"]

if TYPE_CHECKING:
    from nec_ray.runtime.dataset import ray_dataset


def __getattr__(name: str) -> Any:
    if name == "ray_dataset":
        from nec_ray.runtime.dataset import ray_dataset

        return ray_dataset
    raise AttributeError(f"module 'nec_ray.runtime' has no attribute '{name}'")
