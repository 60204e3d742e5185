"""Entropy models, each a module of this package with an `ENTROPY`; nothing else names them."""

import importlib
import pkgutil

from nec_ray.errors import InputError
from nec_ray.models.entropy import EntropyModel


def names() -> list[str]:
    """Of the entropy models that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def entropy_model(name: str) -> EntropyModel:
    """The entropy model of a name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        raise InputError(f"no entropy model {name!r}; there are {', '.join(names())}")
    found: EntropyModel = importlib.import_module(f"{__name__}.{name}").ENTROPY
    return found
