"""The figure of accuracy against measured time, as an SVG that is legible on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from benchmarks.figures import figure
from tdpass.views.html import Html, tag

WIDE, HIGH, LEFT, TOP, RIGHT, FOOT = 520, 320, 56, 24, 210, 48
COLOURS = ("#0757b0", "#1a7f37", "#8250df", "#b3400a", "#9a6700", "#57606a", "#cf222e", "#0a7d8c", "#6e5494")
STYLE = """
svg { --ground: #ffffff; --ink: #1f2328; --faint: #d0d7de; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ground: #0d1117; --ink: #e6edf3; --faint: #3d444d; } }
.ground { fill: var(--ground); } text { fill: var(--ink); } .grid { stroke: var(--faint); } .line { fill: none; stroke-width: 2; }
.peer { stroke-dasharray: 5 3; } .dense { fill: var(--ink); }
"""
TRAINED = ", trained"
Row = Mapping[str, str]
Point = tuple[float, float]


def draw(rows: Sequence[Row]) -> Html:
    """A line per method over the share of the dense network's time, peers dashed; dense and trained are points."""
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "dense"]
    points = {method: sorted(_point(row) for row in rows if row["method"] == method) for method in methods}
    dense = [_point(row) for row in rows if row["method"] == "dense"]
    every = [*dense, *(point for line in points.values() for point in line)]
    lowest = 10 * min(int(accuracy // 10) for _, accuracy in every)
    longest = max(1.05, *(time for time, _ in every))

    def place(point: Point) -> Point:
        time, accuracy = point
        return LEFT + WIDE * time / longest, TOP + HIGH * (100 - accuracy) / (100 - lowest)

    width, height = LEFT + WIDE + RIGHT, TOP + HIGH + FOOT
    return figure(
        STYLE,
        width,
        height,
        "Accuracy against measured time, a line per method",
        *_axes(lowest, longest, place),
        *_lines(points, [place(point) for point in dense], place),
    )


def _point(row: Row) -> Point:
    return float(row["milliseconds"]) / float(row["dense_milliseconds"]), float(row["accuracy"])


def _axes(lowest: int, longest: float, place: Callable[[Point], Point]) -> Iterator[Html]:
    for accuracy in range(lowest, 101, 10):
        x, y = place((0.0, accuracy))
        yield tag("line", class_="grid", x1=f"{x:.1f}", x2=f"{x + WIDE:.1f}", y1=f"{y:.1f}", y2=f"{y:.1f}")
        yield tag("text", f"{accuracy}", x=f"{x - 8:.1f}", y=f"{y:.1f}", dy="0.35em", text_anchor="end")
    for step in range(int(longest * 5) + 1):
        x, y = place((step / 5, lowest))
        yield tag("line", class_="grid", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=f"{y:.1f}")
        yield tag("text", f"{step / 5:g}", x=f"{x:.1f}", y=f"{y + 16:.1f}", text_anchor="middle")
    yield _words("measured time, share of the dense network's", x=LEFT + WIDE / 2, y=TOP + HIGH + 38)
    middle = TOP + HIGH / 2
    yield _words("test accuracy, %", transform=f"translate(16 {middle:g}) rotate(-90)")


def _words(words: str, **where: object) -> Html:
    return tag("text", words, text_anchor="middle", **where)


def _lines(
    points: Mapping[str, Sequence[Point]], dense: Sequence[Point], place: Callable[[Point], Point]
) -> Iterator[Html]:
    ends: list[tuple[float, str, str]] = []
    for colour, (method, line) in zip(COLOURS * 2, points.items(), strict=False):
        peer = " peer" if method.startswith("peer ") else ""
        placed = [place(point) for point in line]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        yield tag("polyline", tag("title", method), class_=f"line{peer}", stroke=colour, points=text)
        hollow = {"fill": "none", "stroke": colour, "stroke_width": 2, "r": 4}
        mark = hollow if method.endswith(TRAINED) else {"fill": colour, "r": 3}
        for x, y in placed:
            yield tag("circle", tag("title", method), cx=f"{x:.1f}", cy=f"{y:.1f}", **mark)
        ends.append((placed[-1][1], method.removeprefix("peer "), colour))
    for x, y in dense:
        yield tag("circle", tag("title", "dense"), class_="dense", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5)
        ends.append((y, "dense", "var(--ink)"))
    for y, (_, words, colour) in zip(_apart([end for end, _, _ in sorted(ends)]), sorted(ends), strict=True):
        style = f"fill: {colour}"
        yield tag("text", words, x=LEFT + WIDE + 12, y=f"{y:.1f}", dy="0.35em", style=style)


def _apart(heights: Sequence[float], least: float = 15.0) -> list[float]:
    """Heights in order, each at least so far below the one before."""
    found = list(heights[:1])
    for before, height in pairwise(heights):
        found.append(max(height, found[-1] + least, before))
    return found
