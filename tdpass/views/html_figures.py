"""The headline figures of the HTML report, a card each."""

from __future__ import annotations

from collections.abc import Sequence

from tdpass.cost import Cost
from tdpass.report import Report, SiteRow
from tdpass.views import summary
from tdpass.views.html import Html, spaced, tag
from tdpass.views.training import scores
from tdpass.views.units import cost_text, less, share, shown_measures, small


def figures(report: Report, rows: Sequence[SiteRow], original: Cost, final: Cost) -> Html:
    """What was saved of every measure, the size of the file, the score, and how far the outputs moved."""
    cards: list[Html] = []
    for measure in shown_measures():
        before, after = original.get(measure.name), final.get(measure.name)
        if not before:
            continue
        kept = tag(
            "svg", *_kept_bar(before, after), class_="kept-bar", width="100%", height=6, aria_hidden="true"
        )
        amounts = spaced(cost_text(measure.name, before)), " → ", spaced(cost_text(measure.name, after))
        change = tag("p", *amounts, tag("span", f"{share(after, before)} kept", class_="muted keep"))
        times, words = less(before, after, (measure.less, measure.more), "×")
        cards.append(tag("li", tag("p", tag("strong", times), " ", words, class_="big"), kept, change))
    if report.stored is not None:
        times, words, sizes = summary.stored_whole(report, "×")
        packed = f"pruned and quantized tensors: {summary.stored(report, '×')}"
        cards.append(
            tag(
                "li",
                tag("p", tag("strong", times), f" {words} file, {sizes}", class_="big"),
                tag("p", packed, class_="muted"),
            )
        )
    *others, final_score = scores(report) or [("", "")]
    if final_score[1]:
        words = " · ".join(f"{name} {value}" for name, value in others if "before" not in name)
        cards.append(
            tag(
                "li",
                tag("p", tag("strong", final_score[1]), f" score, {final_score[0]}", class_="big"),
                tag("p", words, class_="muted"),
            )
        )
    moved = summary.divergence(report, rows)
    if moved is not None:
        expected = sum(row.loss for row in rows)
        words = "measured" if moved.measured else "expected by the plan"
        if moved.measured and expected:
            words += f"; the plan expected {small(expected)}"
        cards.append(
            tag(
                "li",
                tag("p", tag("strong", small(moved.value)), f" {moved.name}", class_="big"),
                tag("p", words, class_="muted"),
            )
        )
    return tag("ul", *cards, class_="figures")


def _kept_bar(before: float, after: float) -> list[Html]:
    return [
        tag("rect", class_="before", width="100%", height=6, rx=3),
        tag("rect", class_="accent", width=f"{min(100.0, 100 * after / before):.2f}%", height=6, rx=3),
    ]
