"""A page in one HTML file that needs nothing else: pictures are in it, text is escaped.

No scripts and nothing from outside; the page's own policy forbids the browser to load anything.
"""

import base64
import tempfile
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1a1a1a;background:#fff}
main{max-width:1180px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;line-height:1.2;margin:.4em 0}h2{font-size:1.25rem;margin:1.8em 0 .4em}h3{font-size:1rem}
p{max-width:75ch}p,h1,h2,h3{overflow-wrap:anywhere}.facts{color:#444}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px}
figure{margin:0}figcaption{font-size:.9rem;color:#444}img{max-width:100%;height:auto;display:block}
.wide{overflow-x:auto;border:1px solid #ccc;margin:.6em 0}
.wide:focus-visible{outline:3px solid #0072B2}
.wide img{max-width:none}
table{border-collapse:collapse;font-size:.9rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap;vertical-align:top}
th{background:#f2f2f2}thead th{white-space:normal;vertical-align:bottom;min-width:6em}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:600;background:#fff;white-space:normal;min-width:15em;overflow-wrap:anywhere;
position:sticky;left:0}
td.text{text-align:left;white-space:normal;min-width:14em;overflow-wrap:anywhere}
code{font-size:.85em;overflow-wrap:anywhere}
pre{overflow-x:auto;background:#f6f6f6;padding:10px;font-size:.8rem}
@media (max-width:600px){main{padding:10px}th,td{padding:.3em .45em}tbody th{min-width:8em;max-width:9.5em}}
"""

Draw = Callable[[Path], object]
"""Draws a PNG file."""


def write_page(title: str, body: str, out: Path) -> Path:
    """Write a page, whole or not at all.

    Args:
        title: of the page, as text.
        body: HTML.
        out: HTML file to write.
    """
    temporary = out.with_name(f".{out.name}")
    temporary.write_text(_page(title, body), encoding="utf-8")
    temporary.replace(out)
    return out


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table whose first column names the rows; wide ones scroll within the page.

    Args:
        caption: above it.
        heads: of the columns.
        rows: cells as text.
        text: columns that hold sentences.
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = []
    for first, *cells in rows:
        line = f'<th scope="row">{escape(first)}</th>'
        for number, cell in enumerate(cells, 1):
            kind = ' class="text"' if number in text and len(cell) > 12 else ""
            line += f"<td{kind}>{escape(cell)}</td>"
        lines.append(f"<tr>{line}</tr>")
    label = escape(caption, quote=True)
    return (
        f'<h3>{escape(caption)}</h3>\n<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def picture(draw: Draw, what: str, note: str) -> str:
    """A drawing with what it shows below it."""
    with tempfile.TemporaryDirectory(prefix="nec-report-") as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        shown = image(path.read_bytes(), what)
    return f"<figure>{shown}<figcaption>{escape(what)}. {escape(note)}</figcaption></figure>"


def image(png: bytes, alt: str) -> str:
    """A PNG in the page."""
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
