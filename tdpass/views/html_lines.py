"""Lines over epochs for the HTML report, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tdpass.views.html import Html, tag
from tdpass.views.html_axes import Frame, Heights, axes, steps

_MOST_POINTS = 400
_APART = 15.0  # between the marks of two lines

Point = tuple[int, float]


@dataclass(frozen=True)
class Line:
    """Values by epoch, set in a CSS class; `mark` stands at its end, `hint` appears under the pointer."""

    points: Sequence[Point]
    style: str
    mark: str = ""
    hint: str = ""

    def pieces(self) -> Iterator[list[Point]]:
        """Runs of epochs without a gap; what is not finite is one."""
        run: list[Point] = []
        for epoch, value in self.points:
            if not math.isfinite(value):
                continue
            if run and epoch != run[-1][0] + 1:
                yield run
                run = []
            run.append((epoch, value))
        if run:
            yield run


class LineChart:
    """Lines, and a band behind them, over the epochs of a run.

    `borders` are the epochs after which a stage ends.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        frame: Frame,
        *,
        band: Sequence[Line] = (),
        log: bool | None = None,
        least: float | None = 0.0,
    ) -> None:
        self.lines, self.band, self.frame = lines, band, frame
        points = [point for line in (*lines, *band) for piece in line.pieces() for point in piece]
        self.empty = not points
        self.heights = Heights([value for _, value in points], frame, log=log, least=least, count=4)
        epochs = [epoch for epoch, _ in points] or [1]
        self.first, self.last = min(epochs), max(epochs)

    def x(self, epoch: float) -> float:
        """The place of an epoch; one alone stands in the middle."""
        part = (epoch - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return self.frame.left + (self.frame.edge - self.frame.left) * part

    def svg(self, beside: str, label: str, borders: Sequence[int] = ()) -> Html:
        """The picture, and in `label` what it says."""
        ticks = [
            value
            for value in steps(self.first, self.last, 7)
            if self.first <= value <= self.last and value == int(value)
        ]
        marks = [(self.x(value), f"{value:.0f}") for value in ticks or [self.first]]
        inside = [border for border in borders if self.first <= border < self.last]
        return tag(
            "svg",
            self._band() if self.band else None,
            *axes(self.frame, self.heights, marks, "epoch", beside),
            *(self._border(border + 0.5) for border in inside),
            *(part for line in self.lines for part in self._line(line)),
            *self._marks(),
            viewBox=f"0 0 {self.frame.width} {self.frame.height}",
            class_="chart over-epochs",
            role="img",
            aria_label=label,
        )

    def _places(self, points: Sequence[Point]) -> str:
        return " ".join(
            f"{self.x(epoch):.1f},{self.heights.at(value):.1f}" for epoch, value in _thinned(points)
        )

    def _line(self, line: Line) -> Iterator[Html]:
        hint = tag("title", line.hint) if line.hint else None
        for piece in line.pieces():
            if len(piece) > 1:
                yield tag("polyline", hint, class_=f"line {line.style}", points=self._places(piece))
            else:
                ((epoch, value),) = piece
                yield tag(
                    "circle",
                    hint,
                    class_=f"line {line.style} alone",
                    cx=f"{self.x(epoch):.1f}",
                    cy=f"{self.heights.at(value):.1f}",
                    r=2.5,
                )

    def _band(self) -> Html:
        """Between the least and the largest value of each epoch."""
        by_epoch: dict[int, list[float]] = {}
        for line in self.band:
            for epoch, value in (point for piece in line.pieces() for point in piece):
                by_epoch.setdefault(epoch, []).append(value)
        above = Line([(epoch, max(values)) for epoch, values in sorted(by_epoch.items())], "")
        shapes = []
        for piece in above.pieces():
            below = [(epoch, min(by_epoch[epoch])) for epoch, _ in piece]
            shapes.append(
                tag("polygon", class_="band", points=f"{self._places(piece)} {self._places(below[::-1])}")
            )
        return tag("g", *shapes)

    def _border(self, epoch: float) -> Html:
        return tag(
            "line",
            class_="border",
            x1=f"{self.x(epoch):.1f}",
            x2=f"{self.x(epoch):.1f}",
            y1=self.frame.top,
            y2=self.frame.floor,
        )

    def _marks(self) -> Iterator[Html]:
        """Marks at the ends of lines, moved apart where these end close together."""
        ends = []
        for line in self.lines:
            pieces = list(line.pieces())
            if line.mark and pieces:
                epoch, value = pieces[-1][-1]
                ends.append((self.heights.at(value), self.x(epoch), line.mark))
        ends.sort()
        above = -math.inf
        for index, (y, x, mark) in enumerate(ends):
            above = max(min(y, self.frame.floor - _APART * (len(ends) - 1 - index)), above + _APART)
            yield tag("text", mark, class_="callout", x=f"{x + 9:.1f}", y=f"{above:.1f}", dy="0.35em")


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Not many more points than the picture can show, first and last among them."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points if stride < 2 else [*points[:-1:stride], points[-1]]
