"""What was left as it was, why, and what share of the model it holds, as a section of the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdpass.cost import Cost
from tdpass.form import DENSE
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report, SiteRow
from tdpass.views import summary
from tdpass.views.html import Html, join, tag
from tdpass.views.html_sites import SWITCHED, breakable
from tdpass.views.units import share

_NAMES_SHOWN = 6


def left_alone(report: Report, plan: RankPlan | None, rows: Sequence[SiteRow], original: Cost) -> Html | None:
    """Sites kept dense and layers that are no sites, by their reasons; nothing where there are none."""
    dense = [row for row in rows if row.form == DENSE]
    kept, refused = summary.reasons_by_site(dense), summary.refusals(report, plan)
    held = {row.site: row.before for row in dense}
    shares = {
        reason: _share_of(sum((held[name] for name in names), Cost()), original)
        for reason, names in kept.items()
    }
    elsewhere = _share_of(original - sum((row.before for row in rows), Cost()), original)
    cards = [_refusal_card("Sites kept dense", kept, _share_of(sum(held.values(), Cost()), original), shares)]
    cards.append(_refusal_card("Other layers", refused, elsewhere, {}))
    return tag("div", *cards, class_="columns") if any(cards) else None


def _refusal_card(
    title: str, reasons: Mapping[str, Sequence[str]], held: str, shares: Mapping[str, str]
) -> Html | None:
    if not reasons:
        return None
    words = tag("p", f"They hold {held}.", class_="muted") if held else None
    return tag(
        "div",
        tag("h3", f"{title} ({sum(map(len, reasons.values()))})"),
        words,
        _reasons(reasons, shares),
        class_="card",
    )


def _share_of(part: Cost, whole: Cost) -> str:
    """What part of the model that is, in the measures that can be switched between."""
    known = [
        f"{share(part.get(name), whole.get(name))} of its {title if name == 'macs' else title.lower()}"
        for name, title in SWITCHED.items()
        if whole.get(name)
    ]
    return " and ".join(filter(None, (", ".join(known[:-1]), *known[-1:])))


def _reasons(reasons: Mapping[str, Sequence[str]], shares: Mapping[str, str]) -> Html:
    items = []
    for reason, names in reasons.items():
        listed = join((tag("code", breakable(name)) for name in names), " ")
        if len(names) > _NAMES_SHOWN:
            listed = tag("details", tag("summary", f"{len(names)} layers"), listed)
        held = (
            tag("span", f" ({shares[reason]})", class_="muted")
            if len(reasons) > 1 and shares.get(reason)
            else None
        )
        items.append(join([tag("dt", reason, held), tag("dd", listed)]))
    return tag("dl", *items, class_="reasons")
