"""The passes that ran, as a section of the HTML report."""

from __future__ import annotations

from itertools import accumulate

from tdpass.report import Report
from tdpass.views.html import Html, column, table, tag
from tdpass.views.units import human, seconds


def passes(report: Report) -> Html | None:
    """One row a pass: when it ran and how long, what was left after it, and what it says."""
    if not report.passes:
        return None
    whole = sum(row.seconds for row in report.passes) or 1.0
    starts = accumulate((row.seconds for row in report.passes), initial=0.0)
    headers = [
        column("Pass"),
        column("Result"),
        column("Time", number=True),
        tag("th", "", scope="col", class_="bars", aria_label="Timeline"),
    ]
    headers += [
        column("Parameters after", number=True),
        column("Size after", number=True),
        column("What it says"),
    ]
    rows = [
        tag(
            "tr",
            tag("th", tag("code", row.text), scope="row"),
            tag(
                "td",
                "changed" if row.changed else "no change",
                class_="keep" if row.changed else "keep muted",
            ),
            tag("td", seconds(row.seconds), class_="number"),
            tag("td", _span(start / whole, row.seconds / whole), class_="bars"),
            tag("td", human(row.after.params), class_="number"),
            tag("td", human(row.after.bytes, "B"), class_="number"),
            tag("td", *(tag("p", note) for note in row.notes), class_="why"),
        )
        for row, start in zip(report.passes, starts, strict=False)
    ]
    return tag(
        "div",
        tag("p", f"{seconds(whole)} in all", class_="muted"),
        table(headers, rows, "Passes"),
        class_="card",
    )


def _span(start: float, length: float) -> Html:
    left = min(100 * start, 99.0)
    track = tag("rect", class_="before", y=6, width="100%", height=6, rx=3)
    bar = tag(
        "rect",
        class_="accent",
        x=f"{left:.2f}%",
        y=4,
        width=f"{max(100 * length, 0.8):.2f}%",
        height=10,
        rx=2,
    )
    return tag("svg", track, bar, class_="bar", width="100%", height=18, aria_hidden="true")
