"""Two reports of one model beside each other, as a section of the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tdpass.report import Report, SiteRow
from tdpass.views import summary
from tdpass.views.html import Html, column, join, spaced, table, tag
from tdpass.views.html_sites import common_prefix, site_name
from tdpass.views.training import scores
from tdpass.views.units import cost_text, human, share, shown_measures, small

_WHO = ("this", "the other")
_MANY = 40  # sites that differ, from which on they are shown when asked for


def comparison(report: Report, other: Report) -> Html:
    """What both reached, and the sites where they differ."""
    return join([_figures(report, other), _sites(report, other)])


def _figures(report: Report, other: Report) -> Html:
    pair = (report, other)
    rows = []
    for measure in shown_measures():
        if all(each.original.get(measure.name) for each in pair):
            reached = [(each.final.get(measure.name), each.original.get(measure.name)) for each in pair]
            kept = (tag("span", f"{share(after, before)} kept", class_="below") for after, before in reached)
            amounts = (spaced(cost_text(measure.name, after)) for after, _ in reached)
            rows.append(_line(measure.title, [join(pair) for pair in zip(amounts, kept, strict=True)]))
    moved = [summary.divergence(each, summary.site_rows(each)) for each in pair]
    if all(figure is not None for figure in moved):
        rows.append(_line("Divergence", [small(figure.value) for figure in moved if figure is not None]))
    found = [dict(scores(each)) for each in pair]
    scored = sorted(found[0].keys() & found[1].keys())
    rows += [_line(f"Score, {name}", [each[name] for each in found]) for name in scored]
    headers = [
        column(""),
        *(
            column(": ".join(filter(None, (who, each.budget))), number=True)
            for who, each in zip(_WHO, pair, strict=True)
        ),
    ]
    return tag("div", table(headers, rows, "Two reports"), class_="card")


def _line(title: str, cells: Iterable[Html | str]) -> Html:
    return tag("tr", tag("th", title, scope="row"), *(tag("td", cell, class_="number") for cell in cells))


def _sites(report: Report, other: Report) -> Html:
    ours, theirs = ({row.site: row for row in summary.site_rows(each)} for each in (report, other))
    prefix = common_prefix(list(ours))
    unlike = [name for name in ours if name in theirs and ours[name].form != theirs[name].form]
    missing = len(ours.keys() ^ theirs.keys())
    rows = [
        tag(
            "tr",
            tag("th", site_name(name, prefix), scope="row"),
            *_cells(name, ours),
            *_cells(name, theirs),
        )
        for name in unlike
    ]
    headers = [
        column("Site"),
        *(
            column(title, number=number)
            for who in _WHO
            for title, number in ((f"Form, {who}", False), ("Multiply-adds", True))
        ),
    ]
    said = f"{len(unlike)} of {len(ours)} sites differ" + (
        f"; {missing} {'is' if missing == 1 else 'are'} in one of the two only" if missing else ""
    )
    if len(rows) < _MANY:
        shown = table(headers, rows, "Sites that differ") if rows else None
        return tag("div", tag("p", said, class_="muted"), shown, class_="card")
    listed = tag("details", tag("summary", said), table(headers, rows, "Sites that differ"))
    return tag("div", listed, class_="card")


def _cells(name: str, rows: Mapping[str, SiteRow]) -> list[Html]:
    return [tag("td", str(rows[name].form)), tag("td", human(rows[name].after.macs), class_="number")]
