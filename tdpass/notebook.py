"""Tables as notebooks show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table with a title above it."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>" for row in rows
    )
    return (
        f"<p><b>{escape(title)}</b></p><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"
    )


def page(text: str, height: int = 640) -> str:
    """A whole HTML document inside a notebook, apart from the notebook's own styles and scripts."""
    return (
        f'<iframe srcdoc="{escape(text)}" width="100%" height="{height}" style="border:0" '
        'sandbox="allow-scripts"></iframe>'
    )
