"""The arrays of a machine that holds weights in cells: which parts of which array are used, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tdpass.report import ArrayBlock, ArrayRow
from tdpass.views.html import Html, join, tag
from tdpass.views.html_sites import breakable
from tdpass.views.units import share

_SHOWN = 128
_SIDE = 44


def arrays(rows: Sequence[ArrayRow]) -> Html | None:
    """A small map of every array, site by site; the fuller a block, the darker it is.

    None where there are no arrays.
    """
    if not rows:
        return None
    key = (
        "One square is one array, in as many copies as the site's line says: word lines run down, "
        "columns of weights across. "
    )
    sites = [_site(name, list(found)) for name, found in groupby(rows, key=lambda row: row.site)]
    return tag(
        "div", tag("p", f"{key}Darker blocks have fewer zeros.", class_="muted"), *sites, class_="card"
    )


def _site(name: str, rows: Sequence[ArrayRow]) -> Html:
    first, count = rows[0], sum(row.copies for row in rows)
    weights = sum(block.weights for row in rows for block in row.blocks)
    filled = share(weights, sum(row.rows * row.columns for row in rows))
    words = (
        f"{count:,} arrays of {first.rows} × {first.columns} weights, {first.copies} of each; "
        f"{filled} of their cells hold one of {weights:,} weights"
    )
    more = tag("span", f" and {len(rows) - _SHOWN:,} more", class_="muted") if len(rows) > _SHOWN else None
    return join(
        [
            tag("h3", breakable(name)),
            tag("p", words),
            tag("p", *(_array(row) for row in rows[:_SHOWN]), more, class_="arrays"),
        ]
    )


def _array(row: ArrayRow) -> Html:
    label = f"{row.site}, array {row.array}: {', '.join(map(_words, row.blocks)) or 'empty'}"
    return tag(
        "svg",
        tag("title", label),
        tag("rect", class_="before", width=row.columns, height=row.rows),
        *(_block(block) for block in row.blocks),
        viewBox=f"0 0 {row.columns} {row.rows}",
        width=max(6, round(_SIDE * min(1.0, row.columns / row.rows))),
        height=max(6, round(_SIDE * min(1.0, row.rows / row.columns))),
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def _block(block: ArrayBlock) -> Html:
    density = block.weights / (block.rows * block.columns)
    place = {"x": block.column, "y": block.row, "width": block.columns, "height": block.rows}
    return tag("rect", class_="accent", fill_opacity=f"{0.25 + 0.75 * min(1.0, density):.2f}", **place)


def _words(block: ArrayBlock) -> str:
    return (
        f"{block.rows} × {block.columns} from line {block.row} and column {block.column}, "
        f"{block.weights:,} weights"
    )
