"""Parts of an HTML page that is one file: tables, figures, embedded pictures, escaped text.

The page has no scripts and loads nothing, so it opens without a network. This module does not know
what a batch is.
"""

from __future__ import annotations

import base64
import io
import logging
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

PICTURE_PX = (900, 900)
"""Largest size of an embedded picture; a preview's text can still be read."""

JPEG_QUALITY = 80

STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --faint: #626c78; --page: #ffffff;
  --panel: #f4f6f8; --line: #d9dee4; --bad: #b3261e; --good: #1b7a43; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaee; --faint: #98a2ad; --page: #14171b;
  --panel: #1d2126; --line: #343b43; --bad: #ff8a80; --good: #7bd8a0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.note { color: var(--faint); margin: .3rem 0; }
dl { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
dl div { background: var(--panel); border-radius: .5rem; padding: .5rem .9rem; }
dt { color: var(--faint); font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; }
.bad { color: var(--bad); } .good { color: var(--good); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
div.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; background: var(--panel); border-radius: .5rem; overflow: hidden; }
figure img { width: 100%; display: block; }
figcaption { padding: .5rem .8rem; overflow-wrap: anywhere; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing but what is in it."""


def page(title: str, parts: Iterable[str]) -> str:
    """Join parts, which are HTML, to a page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """Return a heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    """Return a line of explanation."""
    return f'<p class="note">{escape(text)}</p>'


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Return a row of large values; each has a name, a value, and "good", "bad" or ""."""
    return (
        "<dl>"
        + "".join(
            f'<div><dt>{escape(name)}</dt><dd class="{kind}">{escape(value)}</dd></div>'
            for name, value, kind in pairs
        )
        + "</dl>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> str:
    """Return a table; numbers are aligned to the right, and have one decimal if they have any."""
    lines = [[_cell(value) for value in row] for row in rows]
    numbers = [cell.startswith('<td class="number"') for cell in lines[0]] if lines else []
    titles = "".join(
        f'<th class="{"number" if number else "text"}">{escape(name)}</th>'
        for name, number in zip(head, numbers or [False] * len(head), strict=True)
    )
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f"<table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = str(value) if isinstance(value, int) else f"{value:.1f}"
    return f'<td class="number">{text}</td>'


def figures(pictures: Iterable[tuple[Path, str]]) -> str:
    """Return pictures side by side; each has a file and a caption. Damaged ones are left out."""
    parts = []
    for file, caption in pictures:
        address = _embedded(file)
        if address is not None:
            parts.append(
                f'<figure><img src="{address}" alt="{escape(caption)}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    return f'<div class="pictures">{"".join(parts)}</div>'


def _embedded(file: Path) -> str | None:
    """Return a smaller copy of a picture as a data address; None if it can't be read."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(file) as picture:
            picture.thumbnail(PICTURE_PX, Image.Resampling.LANCZOS)
            picture.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        logger.warning("WARNING: %s can't be shown in the report: %s", file, error)
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
