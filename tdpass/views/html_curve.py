"""The budget curve of the HTML report as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdpass.report import CurvePoint
from tdpass.views.html import Html, column, join, table, tag
from tdpass.views.html_sites import MEASURES
from tdpass.views.summary import loss_name
from tdpass.views.units import small

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 84, 30, 16, 58
_DECADES_FOR_LOG = 1.5
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def curve(points: Sequence[CurvePoint], divergence: str) -> Html:
    """Expected divergence against the share of the original cost, the chosen point marked, and the numbers behind it."""
    ordered = sorted((point for point in points if math.isfinite(point.loss)), key=lambda point: point.budget)
    if len(ordered) < 2:
        return tag("p", "No curve: only one budget was looked at.", class_="muted")
    return join([*(_Chart(ordered, name, divergence).svg() for name in MEASURES), _numbers(ordered)])


class _Chart:
    """Scales and marks of one chart."""

    def __init__(self, points: Sequence[CurvePoint], measure: str, divergence: str) -> None:
        self.measure, self.divergence, self.points = measure, divergence, points
        self.shares = [float(getattr(point, measure)) for point in points]
        positive = [point.loss for point in points if point.loss > 0]
        self.log = bool(positive) and math.log10(max(positive) / min(positive)) > _DECADES_FOR_LOG
        self.x_ticks = _steps(min(self.shares), max(*self.shares, 1.0), 6)
        if self.log:
            low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
            stride = math.ceil((high - low) / 6)
            low -= (low - high) % stride
            self.y_ticks = [10.0**power for power in range(low, high + 1, stride)]
        else:
            self.y_ticks = _steps(0.0, max(positive, default=1.0), 5)
        # a loss of zero has no logarithm: it stands on a line of its own below the lowest decade
        self.zero = self.log and len(positive) < len(points)
        self.floor = HEIGHT - BOTTOM - (26 if self.zero else 0)

    def x(self, share: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (WIDTH - LEFT - RIGHT) * (share - low) / (high - low)

    def y(self, loss: float) -> float:
        if self.log and loss <= 0:
            return HEIGHT - BOTTOM
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.log:
            low, high, loss = math.log(low), math.log(high), math.log(loss)
        part = (max(loss, low) - low) / (high - low)
        return self.floor - (self.floor - TOP) * part

    def svg(self) -> Html:
        title = MEASURES[self.measure]
        marks = list(zip(self.points, self.shares, strict=True))
        path = " ".join(f"{self.x(share):.1f},{self.y(point.loss):.1f}" for point, share in marks)
        chosen = [(point, share) for point, share in marks if point.chosen]
        ends = " to ".join(f"{small(point.loss)} at {_percent(share)}" for point, share in (marks[-1], marks[0]))
        label = f"{loss_name(self.divergence).capitalize()} expected, against {title} kept: from {ends}"
        if chosen:
            label += f"; chosen: {small(chosen[0][0].loss)} at {_percent(chosen[0][1])}"
        return tag(
            "svg",
            *self._axes(title),
            tag("polyline", class_="curve", points=path),
            *(self._dot(point, share) for point, share in marks if not point.chosen),
            *(part for point, share in chosen for part in self._chosen(point, share)),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            class_=f"chart only-{self.measure}",
            role="img",
            aria_label=label,
        )

    def _axes(self, title: str) -> list[Html]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts: list[Html] = []
        plainly = self.y_ticks[0] >= 1e-4 and self.y_ticks[-1] <= 1e4
        for value in self.y_ticks:
            y = f"{self.y(value):.1f}"
            parts.append(tag("line", class_="gridline", x1=LEFT, x2=right, y1=y, y2=y))
            parts.append(tag("text", _power(value) if self.log and not plainly else f"{value:.10g}", x=LEFT - 8, y=y, dy="0.35em", text_anchor="end"))
        if self.zero:
            parts.append(tag("text", "0", x=LEFT - 8, y=bottom, dy="0.35em", text_anchor="end"))
        parts += [tag("text", _percent(value), x=f"{self.x(value):.1f}", y=bottom + 22, text_anchor="middle") for value in self.x_ticks]
        parts.append(tag("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom))
        parts.append(tag("text", f"{title} kept, in percent of the original", class_="title", x=(LEFT + right) / 2, y=HEIGHT - 8, text_anchor="middle"))
        middle = (TOP + bottom) / 2
        name = f"expected {loss_name(self.divergence)}" if self.divergence else loss_name("")
        parts.append(tag("text", name, class_="title", transform=f"translate(18 {middle:g}) rotate(-90)", text_anchor="middle"))
        return parts

    def _dot(self, point: CurvePoint, share: float) -> Html:
        words = tag("title", f"{_percent(share)} of the {MEASURES[self.measure]}: {small(point.loss)}")
        return tag("circle", words, class_="dot", cx=f"{self.x(share):.1f}", cy=f"{self.y(point.loss):.1f}", r=3.5)

    def _chosen(self, point: CurvePoint, share: float) -> list[Html]:
        x, y = self.x(share), self.y(point.loss)
        # the curve falls to the right, so the space above and right of a point is free, and below and left of it
        free_right = x < LEFT + 0.62 * (WIDTH - LEFT - RIGHT)
        side, anchor = (14, "start") if free_right else (-14, "end")
        height = y - 12 if free_right and y > TOP + 40 else min(y + 4, HEIGHT - BOTTOM - 30)
        words = (("chosen", 0), (f"{small(point.loss)} at {_percent(share)}", 19))
        return [
            tag("line", class_="drop", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{y:.1f}", y2=HEIGHT - BOTTOM),
            tag("circle", class_="halo", cx=f"{x:.1f}", cy=f"{y:.1f}", r=9),
            tag("circle", class_="chosen", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5),
            *(tag("text", word, class_="callout", x=f"{x + side:.1f}", y=f"{height - 10 + down:.1f}", text_anchor=anchor) for word, down in words),
        ]


def _steps(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover the range."""
    span = high - low or 1.0
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def _power(value: float) -> str:
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _numbers(points: Sequence[CurvePoint]) -> Html:
    headers = [column(name, number=True) for name in ("Budget", "MACs", "Parameters", "Expected loss")]
    rows = [
        tag(
            "tr",
            *(tag("td", cell, class_="number") for cell in (f"{point.budget:g}", _percent(point.macs), _percent(point.params), small(point.loss))),
            class_="current" if point.chosen else None,
        )
        for point in points
    ]
    return tag("details", tag("summary", "The numbers"), table(headers, rows, "Budget curve"))
