"""The budget curve of the HTML report as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdpass.form import DENSE
from tdpass.report import CurvePoint
from tdpass.views.html import Html, column, join, table, tag
from tdpass.views.html_axes import Frame, Heights, axes, steps
from tdpass.views.html_sites import SWITCHED
from tdpass.views.summary import loss_name
from tdpass.views.units import small

FRAME = Frame()
_COUNTED = ("macs", "params")  # what a point of the curve says


def curve(points: Sequence[CurvePoint], divergence: str) -> Html:
    """Expected divergence over the share of the original cost, the chosen point marked, and the numbers."""
    ordered = sorted((point for point in points if math.isfinite(point.loss)), key=lambda point: point.budget)
    if len(ordered) < 2:
        return tag("p", "No curve: only one budget was looked at.", class_="muted")
    return join(
        [
            *(_Chart(ordered, name, divergence).svg(name) for name in _COUNTED),
            *(
                join([_Chart(ordered, _COUNTED[-1], divergence).svg(name), _instead(name)])
                for name in SWITCHED
                if name not in _COUNTED
            ),
            _others(ordered),
            _numbers(ordered),
        ]
    )


class _Chart:
    """Scales and marks of one chart."""

    def __init__(self, points: Sequence[CurvePoint], measure: str, divergence: str) -> None:
        self.measure, self.divergence, self.points = measure, divergence, points
        self.shares = [float(getattr(point, measure)) for point in points]
        self.heights = Heights([point.loss for point in points], FRAME)
        self.x_ticks = steps(min(self.shares), max(*self.shares, 1.0), 6)

    def x(self, share: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return FRAME.left + (FRAME.edge - FRAME.left) * (share - low) / (high - low)

    def y(self, loss: float) -> float:
        return self.heights.at(loss)

    def svg(self, shown_for: str) -> Html:
        """The chart, shown while that measure is chosen."""
        title = SWITCHED[self.measure]
        marks = list(zip(self.points, self.shares, strict=True))
        path = " ".join(f"{self.x(share):.1f},{self.y(point.loss):.1f}" for point, share in marks)
        chosen = [(point, share) for point, share in marks if point.chosen]
        marks_below = [(self.x(value), _percent(value)) for value in self.x_ticks]
        beside = f"expected {loss_name(self.divergence)}" if self.divergence else loss_name("")
        ends = " to ".join(
            f"{small(point.loss)} at {_percent(share)}" for point, share in (marks[-1], marks[0])
        )
        label = f"{loss_name(self.divergence).capitalize()} expected, against {title} kept: from {ends}"
        if chosen:
            label += f"; chosen: {small(chosen[0][0].loss)} at {_percent(chosen[0][1])}"
        return tag(
            "svg",
            *axes(FRAME, self.heights, marks_below, f"{title} kept, in percent of the original", beside),
            tag("polyline", class_="curve", points=path),
            *(
                self._dot(place, share)
                for place, share in enumerate(self.shares)
                if not self.points[place].chosen
            ),
            *(part for point, share in chosen for part in self._chosen(point, share)),
            viewBox=f"0 0 {FRAME.width} {FRAME.height}",
            class_=f"chart only-{shown_for}",
            role="img",
            aria_label=label,
        )

    def _dot(self, place: int, share: float) -> Html:
        point = self.points[place]
        words = tag("title", f"{_percent(share)} of the {SWITCHED[self.measure]}: {small(point.loss)}")
        dot = tag(
            "circle", words, class_="dot", cx=f"{self.x(share):.1f}", cy=f"{self.y(point.loss):.1f}", r=3.5
        )
        return tag("a", dot, href=f"#{_anchor(place)}", tabindex=-1) if point.forms else dot

    def _chosen(self, point: CurvePoint, share: float) -> list[Html]:
        x, y = self.x(share), self.y(point.loss)
        # the curve falls to the right, so the space above and right of a point is free, and below and left of
        # it
        free_right = x < FRAME.left + 0.62 * (FRAME.edge - FRAME.left)
        side, anchor = (14, "start") if free_right else (-14, "end")
        height = y - 12 if free_right and y > FRAME.top + 40 else min(y + 4, FRAME.floor - 30)
        words = (("chosen", 0), (f"{small(point.loss)} at {_percent(share)}", 19))
        return [
            tag("line", class_="drop", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{y:.1f}", y2=FRAME.floor),
            tag("circle", class_="halo", cx=f"{x:.1f}", cy=f"{y:.1f}", r=9),
            tag("circle", class_="chosen", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5),
            *(
                tag(
                    "text",
                    word,
                    class_="callout",
                    x=f"{x + side:.1f}",
                    y=f"{height - 10 + down:.1f}",
                    text_anchor=anchor,
                )
                for word, down in words
            ),
        ]


def _instead(measure: str) -> Html:
    words = f"Points of the curve count {SWITCHED[_COUNTED[-1]].lower()}, not {SWITCHED[measure].lower()}."
    return tag("p", words, class_=f"muted only-{measure}")


def _anchor(place: int) -> str:
    return f"budget-{place}"


def _others(points: Sequence[CurvePoint]) -> Html | None:
    """What another budget on the curve would change, site by site; a point of the curve opens its own."""
    chosen = next((point for point in points if point.chosen), None)
    if chosen is None or not chosen.forms:
        return None
    listed = [
        _change(place, point, chosen)
        for place, point in enumerate(points)
        if point.forms and not point.chosen
    ]
    return tag("div", tag("h4", "Another share of the MACs would change"), *listed, class_="budgets")


def _change(place: int, point: CurvePoint, chosen: CurvePoint) -> Html:
    names = [*chosen.forms, *(name for name in point.forms if name not in chosen.forms)]
    pairs = ((name, chosen.forms.get(name, DENSE), point.forms.get(name, DENSE)) for name in names)
    unlike = [
        tag("li", tag("code", name), f": {before} → {after}")
        for name, before, after in pairs
        if before != after
    ]
    said = (
        f"{_percent(point.macs)}, loss {small(point.loss)}: {len(unlike)} "
        f"{'site' if len(unlike) == 1 else 'sites'}"
    )
    return tag("details", tag("summary", said), tag("ul", *unlike, id=_anchor(place)), name="budget")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _numbers(points: Sequence[CurvePoint]) -> Html:
    headers = [column(name, number=True) for name in ("Budget", "MACs", "Parameters", "Expected loss")]
    rows = [
        tag(
            "tr",
            *(
                tag("td", cell, class_="number")
                for cell in (
                    f"{point.budget:g}",
                    _percent(point.macs),
                    _percent(point.params),
                    small(point.loss),
                )
            ),
            class_="current" if point.chosen else None,
        )
        for point in points
    ]
    return tag("details", tag("summary", "The numbers"), table(headers, rows, "Budget curve"))
