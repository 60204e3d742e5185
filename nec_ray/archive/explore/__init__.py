"""The explorer: a map of an archive's tiles in a web page, without network: written as one file, or served on loopback.

The page's parts are `explore.html`, `explore.css` and `explore.js` beside this file, without a build step. Its data are
the columns of `columns.py`, of all tiles at once; everything else, the similar tiles too, happens in the browser.
"""

from nec_ray.archive.explore.columns import MOST_TILES, pack_columns
from nec_ray.archive.explore.page import one_page
from nec_ray.archive.explore.server import Server

__all__ = ["MOST_TILES", "Server", "one_page", "pack_columns"]
