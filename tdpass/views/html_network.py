"""The network as a strip of the HTML report.

One cell a site, as tall as its cost, in the colour of its form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.report import SiteRow
from tdpass.views.blocks import blocks
from tdpass.views.html import Html, tag
from tdpass.views.html_sites import SWITCHED, breakable, common_prefix, site_anchor
from tdpass.views.units import human

_WIDTH, _HEIGHT = 14, 64
_LEAST = 2.0
_FEW = 24  # sites that have room for cells of twice the width


def strip(rows: Sequence[SiteRow], colour: Mapping[str, str]) -> Html:
    """Every site in the order of the network, under the name of its block.

    A cell leads to the row of its site.
    """
    most = {name: max((row.before.get(name) for row in rows), default=0) for name in SWITCHED}
    prefix = common_prefix([row.site for row in rows])
    width = _WIDTH if len(rows) > _FEW else 2 * _WIDTH
    parts = []
    for block, places in blocks([row.site[len(prefix) :] for row in rows]):
        cells = (_cell(rows[place], place, colour[rows[place].form.family], most, width) for place in places)
        label = tag("span", breakable(block), class_="block-name") if block else None
        parts.append(tag("div", tag("div", *cells, class_="cells"), label, class_="block"))
    key = tag(
        "p",
        "One column a site: its height is the root of its cost, pale before and solid after. Click one to "
        "see it.",
        class_="muted",
    )
    details = tag("div", id="site-details", class_="details", role="status", hidden=True)
    return tag(
        "div", tag("h3", "The network"), tag("div", *parts, class_="strip"), key, details, class_="card"
    )


def _cell(row: SiteRow, place: int, colour: str, most: Mapping[str, float], width: int) -> Html:
    words = f"{row.site}: {row.form}, {human(row.before.macs)} to {human(row.after.macs)} multiply-adds"
    columns = (_column(row, name, colour, most[name], width) for name in SWITCHED)
    return tag("a", *columns, class_="cell", href=f"#{site_anchor(place)}", title=words, aria_label=words)


def _column(row: SiteRow, name: str, colour: str, most: float, width: int) -> Html:
    def bar(cost: float, css: str, inset: int) -> Html:
        height = max(_LEAST, _HEIGHT * (cost / most) ** 0.5) if most else _LEAST
        return tag(
            "rect",
            class_=css,
            x=inset,
            y=f"{_HEIGHT - height:.1f}",
            width=width - 2 * inset,
            height=f"{height:.1f}",
            rx=1,
        )

    bars = bar(row.before.get(name), "before", 0), bar(row.after.get(name), colour, 2)
    return tag("svg", *bars, class_=f"only-{name}", width=width, height=_HEIGHT, aria_hidden="true")
