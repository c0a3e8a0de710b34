"""Axes of the charts of the HTML report: where values stand, and the lines and numbers that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tdpass.views.html import Html, tag

_DECADES_FOR_LOG = 1.5
_LARGEST = 1e300  # beyond it a tick would not be a float
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and the margins around the plot in it."""

    width: int = 560
    height: int = 340
    left: int = 84
    right: int = 30
    top: int = 16
    bottom: int = 58

    @property
    def floor(self) -> int:
        """The height of the horizontal axis."""
        return self.height - self.bottom

    @property
    def edge(self) -> int:
        """Where the plot ends on the right."""
        return self.width - self.right


class Heights:
    """The vertical axis: heights of finite values in a frame, and its ticks.

    Logarithmic over many decades, or where `log` says so; a zero then stands on a line of its own below all
    others.  A linear axis reaches down to `least`, where there is one.
    """

    def __init__(
        self,
        values: Sequence[float],
        frame: Frame,
        *,
        log: bool | None = None,
        least: float | None = 0.0,
        count: int = 5,
    ) -> None:
        self.frame = frame
        positive = [min(max(value, 1 / _LARGEST), _LARGEST) for value in values if value > 0]
        decades = math.log10(max(positive)) - math.log10(min(positive)) if positive else 0.0
        wide = decades > _DECADES_FOR_LOG
        self.log = bool(positive) and min(values) >= 0 and (wide if log is None else log)
        if self.log:
            round_values = _halves(min(positive), max(positive))
            self.low, self.high = round_values[0], round_values[-1]
            self.ticks = _powers(self.low, self.high) if wide else round_values
        else:
            low, high = (
                max(min(value, _LARGEST), -_LARGEST)
                for value in (min(values, default=0.0), max(values, default=1.0))
            )
            if least is not None:
                low, high = min(low, least), high if high > least else least + 1.0
            self.ticks = steps(low, high, count)
            self.low, self.high = self.ticks[0], self.ticks[-1]
        self.zero = self.log and len(positive) < len(values)
        self.floor = frame.floor - (26 if self.zero else 0)

    def at(self, value: float) -> float:
        """The height of a value."""
        if self.log and value <= 0:
            return self.frame.floor
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.floor - (self.floor - self.frame.top) * (value - low) / (high - low)

    def text(self, value: float) -> str:
        """A tick as text."""
        plainly = self.ticks[0] >= 1e-4 and self.ticks[-1] <= 1e4
        return f"{value:.10g}" if plainly or not self.log else _power(value)


def axes(
    frame: Frame, heights: Heights, marks: Iterable[tuple[float, str]], below: str, beside: str
) -> list[Html]:
    """Grid lines with values, `marks` (place and text) along the horizontal axis, and what both axes show."""
    parts: list[Html] = []
    for value in heights.ticks:
        y = f"{heights.at(value):.1f}"
        parts.append(tag("line", class_="gridline", x1=frame.left, x2=frame.edge, y1=y, y2=y))
        parts.append(tag("text", heights.text(value), x=frame.left - 8, y=y, dy="0.35em", text_anchor="end"))
    if heights.zero:
        parts.append(tag("text", "0", x=frame.left - 8, y=frame.floor, dy="0.35em", text_anchor="end"))
    parts += [tag("text", mark, x=f"{x:.1f}", y=frame.floor + 22, text_anchor="middle") for x, mark in marks]
    parts.append(tag("line", class_="axis", x1=frame.left, x2=frame.edge, y1=frame.floor, y2=frame.floor))
    parts.append(
        tag(
            "text",
            below,
            class_="title",
            x=(frame.left + frame.edge) / 2,
            y=frame.height - 8,
            text_anchor="middle",
        )
    )
    middle = (frame.top + frame.floor) / 2
    parts.append(
        tag(
            "text",
            beside,
            class_="title",
            transform=f"translate(18 {middle:g}) rotate(-90)",
            text_anchor="middle",
        )
    )
    return parts


def steps(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover the range."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else 0.1 * size or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * index:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within a range, seven at most."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / 7))]


def _halves(low: float, high: float) -> list[float]:
    """Ones, twos and fives of the decades that cover the range."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    first = max(index for index, value in enumerate(every) if value <= low)
    last = min(index for index, value in enumerate(every) if value >= high)
    return every[first : max(last, first + 1) + 1]


def _power(value: float) -> str:
    factor, _, exponent = f"{value:.0e}".partition("e")
    return ("" if factor == "1" else f"{factor}\u00b7") + "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
