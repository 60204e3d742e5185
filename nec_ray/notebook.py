"""How objects show themselves in notebooks."""

import html
from collections.abc import Iterable


def facts_html(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """A title and a table of facts; what they say is text, whatever is in it."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    return f"<p><b>{html.escape(title)}</b></p><table>{rows}</table>"
