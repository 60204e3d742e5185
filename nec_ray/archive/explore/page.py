"""The explorer's page, whole in one file or in parts, and what it may reach: nothing outside itself.

Nothing of an archive stands in the page as HTML: its data are base64, which the page's script unpacks, and shows as
text. The policy lets the browser run that one script and no other.
"""

import base64
import hashlib
from importlib import resources
from string import Template

_POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
PARTS_POLICY = f"{_POLICY}; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'"
"""Content-Security-Policy of the page that is served in parts."""


def part(name: str) -> str:
    """Text of one of the page's files: explore.html, explore.css, explore.js."""
    return resources.files("nec_ray.archive.explore").joinpath(name).read_text("utf-8")


def one_page(packed: bytes) -> str:
    """The page as one file of HTML, that opens from a disk.

    Args:
        packed: what `pack_columns` made.
    """
    style, script = part("explore.css"), part("explore.js")
    return Template(part("explore.html")).substitute(
        policy=f"{_POLICY}; script-src {_hash(script)}; style-src {_hash(style)}",
        style=f"<style>{style}</style>",
        data=f'<script type="application/octet-stream" id="tiles">{base64.b64encode(packed).decode()}</script>',
        script=f"<script>{script}</script>",
    )


def page_of_parts() -> str:
    """The page that takes style, script and data from beside it."""
    return Template(part("explore.html")).substitute(
        policy=PARTS_POLICY.replace("; frame-ancestors 'none'", ""),  # which counts in a header only
        style='<link rel="stylesheet" href="explore.css">',
        data='<script type="application/octet-stream" id="tiles" data-src="tiles.bin"></script>',
        script='<script src="explore.js"></script>',
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
