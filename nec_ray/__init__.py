"""nec_ray: learned compression of foundation-model embeddings, as a distributed workflow.

`import nec_ray` is light: it loads neither torch nor ray; what is heavy is imported where it is used.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

__version__ = _version("nec-ray")
__all__ = ["__version__", "load_codec", "open_archive"]

if TYPE_CHECKING:
    from nec_ray.archive import open_archive
    from nec_ray.codec import load_codec


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "open_archive":
        from nec_ray.archive import open_archive

        return open_archive
    if name == "load_codec":
        from nec_ray.codec import load_codec

        return load_codec
    raise AttributeError(f"module 'nec_ray' has no attribute '{name}'")
