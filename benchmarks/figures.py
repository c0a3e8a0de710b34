"""What the figures of benchmarks share: a page of SVG that is legible on light and dark grounds."""

from __future__ import annotations

from tdpass.views.html import Html, tag


def figure(style: str, width: int, height: int, label: str, *parts: Html) -> Html:
    """The parts on a ground of that size, with their style and what they show in words."""
    return tag(
        "svg",
        tag("style", Html(style)),
        tag("rect", class_="ground", width=width, height=height),
        *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", role="img", aria_label=label,
    )  # fmt: skip
