"""Pieces of the demo's page: pictures inside the page, and tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence


def format_bytes(num_bytes: int) -> str:
    """1.25 MB rather than 1250000."""
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def image_tag(encoded: bytes, alt: str, kind: str = "jpeg") -> str:
    """A picture inside the page."""
    data = base64.b64encode(encoded).decode("ascii")
    return f'<img loading="lazy" alt="{html.escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    """A table that scrolls where the window is narrow; cells are HTML."""

    def cells(tag: str, values: Sequence[str]) -> str:
        classes = [' class="text"' if index in text_columns else "" for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(classes, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", header)}</tr>{body}</table></div>'
