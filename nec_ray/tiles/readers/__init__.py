"""Readers of imagery, each a module of this package with a `READER`; nothing else names them.

Every process that builds a catalog or reads pixels imports all of them: what they need is imported in their functions.
"""

import functools
import importlib
import pkgutil

from nec_ray.tiles.reader import Reader


def reader_of(source: str) -> Reader | None:
    """The reader of a path or URL, if it is of one of these."""
    return next((reader for reader in _readers(tuple(__path__)) if reader.takes(source)), None)


@functools.cache
def _readers(folders: tuple[str, ...]) -> list[Reader]:
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    return [importlib.import_module(f"{__name__}.{name}").READER for name in names]
