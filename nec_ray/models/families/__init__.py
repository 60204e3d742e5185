"""Families of foundation models, each a module of this package with a `FAMILY`; nothing else names them."""

import importlib
import pkgutil

from nec_ray.errors import InputError
from nec_ray.models.family import Family


def names() -> list[str]:
    """Of the families that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        raise InputError(f"no family of foundation models {name!r}; there are {', '.join(names())}")
    found: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return found
