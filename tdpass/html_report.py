"""The report as one self-contained HTML page.

The page loads nothing: style and script are inline and allowed by hash in its own content security policy, charts are
inline SVG, and it reads and switches measures without script; script only adds sorting and a filter.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from itertools import accumulate
from string import Template
from typing import NamedTuple

from tdpass.cost import Cost
from tdpass.form import DENSE
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report, SiteRow
from tdpass.views import summary
from tdpass.views.html import Html, column, join, spaced, table, tag, text
from tdpass.views.html_arrays import arrays
from tdpass.views.html_comparison import comparison
from tdpass.views.html_curve import curve
from tdpass.views.html_network import strip
from tdpass.views.html_sites import SWITCHED, breakable, colours, common_prefix, composition, format_table, site_table
from tdpass.views.html_training import training
from tdpass.views.training import destroyed, other_checks, scores
from tdpass.views.units import cost_text, human, ratio, seconds, share, shown_measures, small

_NAMES_SHOWN = 6


class _Page(NamedTuple):
    """The files that a page is made of; `html` has a place for each of the others."""

    html: str
    css: str
    js: str

    @classmethod
    def read(cls) -> _Page:
        folder = files("tdpass") / "views" / "page"
        return cls(*((folder / f"page.{name}").read_text(encoding="utf-8") for name in cls._fields))

    def policy(self) -> str:
        """Nothing is loaded, and only this style and this script are allowed."""
        style, script = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in (self.css, self.js))
        return f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"


def render_html(report: Report, plan: RankPlan | None = None, against: Report | None = None) -> str:
    """The page; `plan` fills in what a report alone does not say, and stands in for it before anything was done.

    `against` is another report of the same model, to be shown beside this one.
    """
    rows = summary.site_rows(report, plan)
    original, final = summary.original_cost(report, plan), summary.final_cost(report, plan)
    colour = colours(rows)
    sections = {
        "overview": ("Where the cost went", _overview(report, rows, original, final, colour)),
        "training": ("Training", training(report)),
        "against": ("Against another", None if against is None else comparison(report, against)),
        "sites": (f"Sites ({len(rows)})", _sites(rows, colour)),
        "arrays": (f"Arrays ({sum(row.copies for row in report.arrays):,})", arrays(report.arrays)),
        "left-alone": ("Left alone", _left_alone(report, plan, rows, original)),
        "passes": ("Passes", _passes(report)),
        "checks": ("Checks", _checks(report)),
        "notes": ("Notes", tag("ul", *(tag("li", note) for note in report.notes)) if report.notes else None),
        "environment": ("Environment", _environment(report)),
    }
    shown = {name: (title, body) for name, (title, body) in sections.items() if body is not None}
    page = _Page.read()
    name = re.split(r"[/\\]", report.model)[-1] or "model"
    return Template(page.html).substitute(
        policy=text(page.policy()),
        style=page.css,
        script=page.js,
        title=text(f"{name} - tdpass report"),
        header=_header(report, rows, name),
        figures=_figures(report, rows, original, final),
        navigation=join(tag("a", anchor.replace("-", " ").capitalize(), href=f"#{anchor}") for anchor in shown),
        switch=_switch(original),
        sections=join(_section(anchor, title, body) for anchor, (title, body) in shown.items()),
    )


def _section(anchor: str, title: str, body: Html) -> Html:
    return tag("section", tag("h2", title, id=f"{anchor}-title"), body, id=anchor, aria_labelledby=f"{anchor}-title")


def _header(report: Report, rows: Sequence[SiteRow], name: str) -> Html:
    done = not report.dry_run
    broken = destroyed(report)
    facts = [fact for fact in (f"budget {report.budget}" if report.budget else "", report.frontend, _moment(report.created)) if fact]
    return join(
        [
            tag("p", "tdpass report" if done else "tdpass plan: a dry run, the model is untouched", class_="eyebrow"),
            tag("h1", breakable(name)),
            tag("p", " · ".join(facts), class_="muted") if facts else None,
            tag("p", tag("strong", broken), class_="alarm", role="alert") if broken else None,
        ]
    )


def _moment(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return created


def _figures(report: Report, rows: Sequence[SiteRow], original: Cost, final: Cost) -> Html:
    cards: list[Html] = []
    for measure in shown_measures():
        before, after = original.get(measure.name), final.get(measure.name)
        if not before:
            continue
        kept = tag("svg", *_kept_bar(before, after), class_="kept-bar", width="100%", height=6, aria_hidden="true")
        amounts = spaced(cost_text(measure.name, before)), " → ", spaced(cost_text(measure.name, after))
        change = tag("p", *amounts, tag("span", f"{share(after, before)} kept", class_="muted keep"))
        words = measure.less if after <= before else measure.more
        times = ratio(max(before, after), min(before, after), "×")
        cards.append(tag("li", tag("p", tag("strong", times), " ", words, class_="big"), kept, change))
    if report.stored is not None:
        whole, sizes = summary.smaller_file(report, "×")
        packed = f"pruned and quantized tensors: {summary.stored(report, '×')}"
        cards.append(tag("li", tag("p", tag("strong", whole), f" smaller file, {sizes}", class_="big"), tag("p", packed, class_="muted")))
    *others, final_score = scores(report) or [("", "")]
    if final_score[1]:
        words = " · ".join(f"{name} {value}" for name, value in others if "before" not in name)
        cards.append(tag("li", tag("p", tag("strong", final_score[1]), f" score, {final_score[0]}", class_="big"), tag("p", words, class_="muted")))
    moved = summary.divergence(report, rows)
    if moved is not None:
        expected = sum(row.loss for row in rows)
        words = f"measured; the plan expected {small(expected)}" if moved.measured and expected else "measured" if moved.measured else "expected by the plan"
        cards.append(tag("li", tag("p", tag("strong", small(moved.value)), f" {moved.name}", class_="big"), tag("p", words, class_="muted")))
    return tag("ul", *cards, class_="figures")


def _kept_bar(before: float, after: float) -> list[Html]:
    return [
        tag("rect", class_="before", width="100%", height=6, rx=3),
        tag("rect", class_="accent", width=f"{min(100.0, 100 * after / before):.2f}%", height=6, rx=3),
    ]


def _switch(original: Cost) -> Html:
    chosen = "macs" if original.macs else "params"
    choices = [
        tag("label", tag("input", type="radio", name="measure", id=f"measure-{name}", value=name, checked=name == chosen), tag("span", title))
        for name, title in SWITCHED.items()
    ]
    return tag("fieldset", tag("legend", "Cost shown as", class_="unseen"), *choices, class_="switch")


def _overview(report: Report, rows: Sequence[SiteRow], original: Cost, final: Cost, colour: Mapping[str, str]) -> Html | None:
    if not rows:
        return None
    totals = summary.by_format(rows)
    by_format = tag("div", tag("h3", "By format"), composition(totals, original, final, colour), format_table(totals, colour), class_="card")
    budget_curve = tag("div", tag("h3", "Budget against loss"), curve(report.curve, report.divergence), class_="card") if report.curve else None
    return join([tag("div", by_format, budget_curve, class_="columns"), strip(rows, colour)])


def _sites(rows: Sequence[SiteRow], colour: Mapping[str, str]) -> Html | None:
    if not rows:
        return None
    search = tag("label", "Filter ", tag("input", type="search", id="filter", placeholder="name, format or reason"), id="filter-box", hidden=True)
    key = tag("p", "Pale bar: before; solid bar: after; all bars on one scale.", class_="muted")
    prefix = common_prefix([row.site for row in rows])
    shared = tag("p", "… stands for ", tag("code", breakable(prefix)), class_="muted") if prefix else None
    count = tag("span", id="filter-count", class_="muted", role="status")
    return tag("div", tag("div", key, search, count, class_="tools"), shared, site_table(rows, colour), class_="card")


def _left_alone(report: Report, plan: RankPlan | None, rows: Sequence[SiteRow], original: Cost) -> Html | None:
    dense = [row for row in rows if row.form == DENSE]
    kept, refused = summary.reasons_by_site(dense), summary.refusals(report, plan)
    held = {row.site: row.before for row in dense}
    shares = {reason: _share_of(sum((held[name] for name in names), Cost()), original) for reason, names in kept.items()}
    elsewhere = _share_of(original - sum((row.before for row in rows), Cost()), original)
    cards = [_refusal_card("Sites kept dense", kept, _share_of(sum(held.values(), Cost()), original), shares)]
    cards.append(_refusal_card("Other layers", refused, elsewhere, {}))
    return join(cards) if any(cards) else None


def _refusal_card(title: str, reasons: Mapping[str, Sequence[str]], held: str, shares: Mapping[str, str]) -> Html | None:
    if not reasons:
        return None
    words = tag("p", f"They hold {held}.", class_="muted") if held else None
    return tag("div", tag("h3", f"{title} ({sum(map(len, reasons.values()))})"), words, _reasons(reasons, shares), class_="card")


def _share_of(part: Cost, whole: Cost) -> str:
    """What part of the model that is, in the measures that can be switched between."""
    known = [f"{share(part.get(name), whole.get(name))} of its {title}" for name, title in SWITCHED.items() if whole.get(name)]
    return " and ".join(known)


def _reasons(reasons: Mapping[str, Sequence[str]], shares: Mapping[str, str]) -> Html:
    items = []
    for reason, names in reasons.items():
        listed = join((tag("code", breakable(name)) for name in names), " ")
        if len(names) > _NAMES_SHOWN:
            listed = tag("details", tag("summary", f"{len(names)} layers"), listed)
        held = tag("span", f" ({shares[reason]})", class_="muted") if len(reasons) > 1 and shares.get(reason) else None
        items.append(join([tag("dt", reason, held), tag("dd", listed)]))
    return tag("dl", *items, class_="reasons")


def _passes(report: Report) -> Html | None:
    if not report.passes:
        return None
    whole = sum(row.seconds for row in report.passes) or 1.0
    starts = accumulate((row.seconds for row in report.passes), initial=0.0)
    headers = [column("Pass"), column("Result"), column("Time", number=True), tag("th", "", scope="col", class_="bars", aria_label="Timeline")]
    headers += [column("Parameters after", number=True), column("Size after", number=True), column("What it says")]
    rows = [
        tag(
            "tr",
            tag("th", tag("code", row.text), scope="row"),
            tag("td", "changed" if row.changed else "no change", class_="keep" if row.changed else "keep muted"),
            tag("td", seconds(row.seconds), class_="number"),
            tag("td", _span(start / whole, row.seconds / whole), class_="bars"),
            tag("td", human(row.after.params), class_="number"),
            tag("td", human(row.after.bytes, "B"), class_="number"),
            tag("td", *(tag("p", note) for note in row.notes), class_="why"),
        )
        for row, start in zip(report.passes, starts, strict=False)
    ]
    return tag("div", tag("p", f"{seconds(whole)} in all", class_="muted"), table(headers, rows, "Passes"), class_="card")


def _span(start: float, length: float) -> Html:
    left = min(100 * start, 99.0)
    track = tag("rect", class_="before", y=6, width="100%", height=6, rx=3)
    bar = tag("rect", class_="accent", x=f"{left:.2f}%", y=4, width=f"{max(100 * length, 0.8):.2f}%", height=10, rx=2)
    return tag("svg", track, bar, class_="bar", width="100%", height=18, aria_hidden="true")


def _checks(report: Report) -> Html | None:
    shown = summary.checks(other_checks(report))
    if not shown:
        return None
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value, class_="number")) for name, value in shown]
    return tag("div", table([column("Check"), column("Value", number=True)], rows, "Checks"), class_="card narrow")


def _environment(report: Report) -> Html | None:
    facts = {
        "Model": report.model,
        "Front end": report.frontend,
        "Budget": report.budget,
        "Metric": report.metric,
        "Divergence": report.divergence,
        "Machine": report.machine,
        "Target": report.target,
        "Created": _moment(report.created),
    }
    items = [join([tag("dt", name), tag("dd", breakable(value) if name == "Model" else value)]) for name, value in facts.items() if value]
    return tag("div", tag("dl", *items, class_="facts"), class_="card") if items else None
