"""The site table of the HTML report: cost bars, chosen formats, errors and reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tdpass.cost import Cost
from tdpass.form import DENSE
from tdpass.measures import Measure
from tdpass.report import SiteRow
from tdpass.views.blocks import blocks
from tdpass.views.html import Html, column, join, spaced, table, tag
from tdpass.views.summary import FormatTotal, losses_known, modelled, timed, unfactored
from tdpass.views.units import cost_text, dims, form_sizes, ratio, seconds, small

SWITCHED = {"macs": "MACs", "params": "Parameters", "bytes": "Bytes"}  # what the reader chooses between
_COLOURS, _SHADES = 8, 5
_LEAST_BAR = 0.5
_IN_BLOCKS = 40


def colours(rows: Sequence[SiteRow]) -> dict[str, str]:
    """CSS classes of every form in use: a hue for its format, a shade for its number types and support.

    Layers that stay as they were are grey.
    """
    found = sorted({(row.form.format, row.form.family) for row in rows if row.form.family != DENSE.family})
    hues = list(dict.fromkeys(name for name, _ in found))
    shades = [family for _, family in found]
    first = {name: next(place for place, (each, _) in enumerate(found) if each == name) for name in hues}
    return {DENSE.family: "dense"} | {
        family: f"colour{hues.index(name) % _COLOURS} shade{(shades.index(family) - first[name]) % _SHADES}"
        for name, family in found
    }


def measured(name: str, *children: Html | str) -> Html:
    """What is shown only while that measure is chosen."""
    return tag("span", *children, class_=f"only-{name}")


def breakable(name: str) -> Html:
    """A long dotted name that may break after its separators."""
    return join(re.split(r"(?<=[./:])", name), "<wbr>")


def common_prefix(names: Sequence[str]) -> str:
    """What all names start with, up to a separator; empty where that would save little."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    prefix = "".join(re.split(r"(?<=[./])", first[:same])[:-1])
    return prefix if len(prefix) > 12 else ""


def site_anchor(place: int) -> str:
    """The id of the row of a site, by its place in the network."""
    return f"site-{place}"


def chip(name: str, colour: str) -> Html:
    """A format: a colour and its name, so that neither has to carry the meaning alone."""
    return tag("span", tag("span", class_=f"swatch {colour}", aria_hidden="true"), name, class_="chip")


def site_table(rows: Sequence[SiteRow], colour: Mapping[str, str]) -> Html:
    """One row per site, in the order of the network until the reader sorts it."""
    with_time, with_loss, told = timed(rows), losses_known(rows), modelled(rows)
    headers = [
        column("Site"),
        column("Format"),
        tag("th", "Cost", scope="col", class_="bars"),
        column("Before", number=True),
        column("After", number=True),
        column("Ratio", number=True),
        *((column("Time", number=True), column("Predicted", number=True)) if with_time else ()),
        *(column(measure.title, number=True) for measure in told),
        column("Error", number=True),
        *((column("Loss", number=True),) if with_loss else ()),
        column("Reason"),
    ]
    longest = {
        name: max((max(row.before.get(name), row.after.get(name)) for row in rows), default=0)
        for name in SWITCHED
    }
    prefix = common_prefix([row.site for row in rows])
    body = [
        _row(row, site_anchor(place), colour, longest, prefix, with_time, told, with_loss)
        for place, row in enumerate(rows)
    ]
    found = blocks([row.site[len(prefix) :] for row in rows])
    if len(rows) >= _IN_BLOCKS and len(found) > 1:
        for name, places in reversed(found):
            body.insert(places[0], _block(name, [rows[place] for place in places], len(headers)))
    return table(headers, body, "Sites", id="sites-table")


def _block(name: str, rows: Sequence[SiteRow], width: int) -> Html:
    """The line above the sites of a block: how many they are, and what they cost together."""
    costs = (
        (sum(row.before.get(each) for row in rows), sum(row.after.get(each) for row in rows))
        for each in SWITCHED
    )
    shown = (
        measured(each, f"{cost_text(each, before)} → {cost_text(each, after)}")
        for each, (before, after) in zip(SWITCHED, costs, strict=True)
    )
    words = tag("span", f"{len(rows)} {'site' if len(rows) == 1 else 'sites'}, ", *shown, class_="muted")
    return tag(
        "tr",
        tag("th", tag("code", breakable(name or "…")), " ", words, colspan=width, scope="rowgroup"),
        class_="block-row",
    )


def _row(
    row: SiteRow,
    anchor: str,
    colour: Mapping[str, str],
    longest: Mapping[str, float],
    prefix: str,
    with_time: bool,
    told: Sequence[Measure],
    with_loss: bool,
) -> Html:
    dense = unfactored(row)
    bars = [_bar(row, name, colour[row.form.family], longest[name]) for name in SWITCHED]
    bound = tag("span", row.guarantee.replace("<=", "≤"), class_="below") if row.guarantee else None
    return tag(
        "tr",
        tag(
            "th",
            site_name(row.site, prefix),
            tag("span", dims(row.shape, "×"), class_="below"),
            scope="row",
            data_key=row.site,
        ),
        tag(
            "td",
            chip(row.form.family, colour[row.form.family]),
            tag("span", form_sizes(row.form), class_="below"),
            data_key=row.form.family,
        ),
        tag("td", *bars, class_="bars"),
        *_amounts(row.before, row.after, dense),
        *(_times(row, dense) if with_time else ()),
        *(_modelled(row, measure.name, dense) for measure in told),
        tag(
            "td",
            "" if dense else small(row.error),
            bound,
            class_="number",
            data_key=0 if dense else row.error,
        ),
        *(
            (tag("td", "" if dense else small(row.loss), class_="number", data_key=0 if dense else row.loss),)
            if with_loss
            else ()
        ),
        tag("td", row.note, class_="why", data_key=row.note),
        id=anchor,
        class_="kept" if dense else None,
    )


def _times(row: SiteRow, dense: bool) -> list[Html]:
    """Cells for the measured time over the dense one and the runtime, and for what was predicted."""
    before, after = row.before.seconds, row.after.seconds
    shown = (
        spaced(seconds(before)) if dense else join([spaced(seconds(before)), " → ", spaced(seconds(after))])
    )
    faster = None if dense else tag("span", ratio(before, after, "×"), class_="below")
    kernel = tag("span", row.kernel, class_="below kernel") if row.kernel else None
    predicted = tag(
        "td",
        "" if dense else spaced(seconds(row.predicted)),
        class_="number",
        data_key=0 if dense else row.predicted,
    )
    return [tag("td", shown, faster, kernel, class_="number", data_key=after), predicted]


def _modelled(row: SiteRow, measure: str, dense: bool) -> Html:
    """A cell for what a modelled machine says of the layer, dense and as it is."""
    before, after = row.before.get(measure), row.after.get(measure)
    amounts = (
        [cost_text(measure, before)]
        if dense
        else [cost_text(measure, before), " → ", cost_text(measure, after)]
    )
    less = None if dense else tag("span", ratio(before, after, "×"), class_="below")
    return tag("td", join(map(spaced, amounts)), less, class_="number", data_key=after)


def site_name(site: str, prefix: str) -> Html:
    """A site by its name without what all of them start with."""
    # the prefix stays in the text, so that copying, searching and reading aloud give the whole name
    start = tag("span", prefix, class_="unseen") if prefix else None
    return tag(
        "span",
        start,
        breakable(site[len(prefix) :]),
        class_="name shortened" if prefix else "name",
        title=site if prefix else None,
    )


def _amounts(before: Cost, after: Cost, dense: bool) -> list[Html]:
    """Cells for before, after and ratio, each holding every measure and its sort key."""

    def cell(shown: Mapping[str, str], keys: Mapping[str, str]) -> Html:
        return tag(
            "td",
            *(measured(name, spaced(text)) for name, text in shown.items()),
            class_="number",
            **{f"data_{name}": key for name, key in keys.items()},
        )

    costs = {name: (before.get(name), after.get(name)) for name in SWITCHED}
    return [
        *(
            cell(
                {name: cost_text(name, pair[side]) for name, pair in costs.items()},
                {name: str(pair[side]) for name, pair in costs.items()},
            )
            for side in (0, 1)
        ),
        cell(
            {name: "" if dense else ratio(*pair, times="×") for name, pair in costs.items()},
            {name: f"{pair[0] / pair[1]:.6g}" if pair[1] else "0" for name, pair in costs.items()},
        ),
    ]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def _bar(row: SiteRow, name: str, colour: str, longest: float) -> Html:
    before, after = _percent(row.before.get(name), longest), _percent(row.after.get(name), longest)
    return tag(
        "svg",
        tag("rect", class_="before", width=f"{max(before, _LEAST_BAR):.2f}%", height=18, rx=2),
        tag("rect", class_=f"after {colour}", y=4, width=f"{max(after, _LEAST_BAR):.2f}%", height=10, rx=1),
        class_=f"bar only-{name}",
        width="100%",
        height=18,
        aria_hidden="true",
    )


def composition(
    totals: Sequence[FormatTotal], original: Cost, final: Cost, colour: Mapping[str, str]
) -> Html:
    """Two bars, the whole model before and after, divided by the format its sites were given."""
    bars = []
    for name, title in SWITCHED.items():
        whole = original.get(name)
        if not whole:
            bars.append(tag("p", f"{title} were not counted.", class_=f"only-{name}"))
            continue
        pieces = [
            (total.format, colour[total.format], total.before.get(name), total.after.get(name))
            for total in totals
        ]
        rest = [
            (
                "elsewhere",
                "elsewhere",
                whole - sum(piece[2] for piece in pieces),
                final.get(name) - sum(piece[3] for piece in pieces),
            )
        ]
        parts: list[Html | str] = []
        for label, index, cost in (("before", 2, whole), ("after", 3, final.get(name))):
            shown = [(piece[0], piece[1], piece[index]) for piece in (*pieces, *rest)]
            parts += [
                tag("span", label, class_="label"),
                _stack(shown, whole, f"{title} {label}"),
                tag("span", cost_text(name, cost), class_="number"),
            ]
        bars.append(tag("div", *parts, class_=f"stacks only-{name}"))
    return join(bars)


def _stack(pieces: Sequence[tuple[str, str, object]], whole: float, label: str) -> Html:
    place, rects, words = 0.0, [], []
    for name, colour, value in pieces:
        width = _percent(max(0, int(str(value))), whole)
        if width > 0:
            rects.append(
                tag(
                    "rect",
                    tag("title", f"{name}: {width:.1f} %"),
                    class_=colour,
                    x=f"{place:.2f}%",
                    width=f"{width:.2f}%",
                    height=26,
                )
            )
            words.append(f"{name} {width:.1f} %")
        place += width
    return tag(
        "svg",
        *rects,
        class_="stack",
        width="100%",
        height=26,
        role="img",
        aria_label=f"{label}, in percent of the original: {', '.join(words)}",
    )


def format_table(totals: Sequence[FormatTotal], colour: Mapping[str, str]) -> Html:
    """Sites, cost and, where they are known, losses per format; the legend of the colours."""
    with_loss = losses_known(totals)
    headers = [
        column("Format"),
        *(
            column(name, number=True)
            for name in ("Sites", "Before", "After", "Ratio", *(("Loss",) if with_loss else ()))
        ),
    ]
    rows = [
        tag(
            "tr",
            tag("th", chip(total.format, colour[total.format]), scope="row"),
            tag("td", f"{total.sites}", class_="number"),
            *_amounts(total.before, total.after, total.format == DENSE.family),
            *(
                (tag("td", "" if total.format == DENSE.family else small(total.loss), class_="number"),)
                if with_loss
                else ()
            ),
        )
        for total in totals
    ]
    return table(headers, rows, "Formats")
