"""The report as one self-contained HTML page.

The page loads nothing: style and script are inline and allowed by hash in its own content security policy,
charts are inline SVG, and it reads and switches measures without script; script only adds sorting and a
filter.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from string import Template
from typing import NamedTuple

from tdpass.cost import Cost
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report, SiteRow
from tdpass.views import summary
from tdpass.views.html import Html, join, tag, text
from tdpass.views.html_arrays import arrays
from tdpass.views.html_comparison import comparison
from tdpass.views.html_curve import curve
from tdpass.views.html_figures import figures
from tdpass.views.html_left_alone import left_alone
from tdpass.views.html_network import strip
from tdpass.views.html_passes import passes
from tdpass.views.html_sites import (
    SWITCHED,
    breakable,
    colours,
    common_prefix,
    composition,
    format_table,
    site_table,
)
from tdpass.views.html_training import training
from tdpass.views.training import destroyed, other_checks


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
        style, script = (
            base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            for content in (self.css, self.js)
        )
        return (
            f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri "
            "'none'; form-action 'none'"
        )


def render_html(report: Report, plan: RankPlan | None = None, against: Report | None = None) -> str:
    """The page; `plan` adds what a report alone does not say, or stands in before anything was done.

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
        "left-alone": ("Left alone", left_alone(report, plan, rows, original)),
        "passes": ("Passes", passes(report)),
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
        figures=figures(report, rows, original, final),
        navigation=join(
            tag("a", anchor.replace("-", " ").capitalize(), href=f"#{anchor}") for anchor in shown
        ),
        switch=_switch(original),
        sections=join(_section(anchor, title, body) for anchor, (title, body) in shown.items()),
    )


def _section(anchor: str, title: str, body: Html) -> Html:
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), body, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def _header(report: Report, rows: Sequence[SiteRow], name: str) -> Html:
    done = not report.dry_run
    broken = destroyed(report)
    facts = [
        fact
        for fact in (
            f"budget {report.budget}" if report.budget else "",
            report.frontend,
            _moment(report.created),
        )
        if fact
    ]
    return join(
        [
            tag(
                "p",
                "tdpass report" if done else "tdpass plan: a dry run, the model is untouched",
                class_="eyebrow",
            ),
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


def _switch(original: Cost) -> Html:
    chosen = "macs" if original.macs else "params"
    choices = [
        tag(
            "label",
            tag(
                "input",
                type="radio",
                name="measure",
                id=f"measure-{name}",
                value=name,
                checked=name == chosen,
            ),
            tag("span", title),
        )
        for name, title in SWITCHED.items()
    ]
    return tag("fieldset", tag("legend", "Cost shown as", class_="unseen"), *choices, class_="switch")


def _overview(
    report: Report, rows: Sequence[SiteRow], original: Cost, final: Cost, colour: Mapping[str, str]
) -> Html | None:
    if not rows:
        return None
    totals = summary.by_format(rows)
    by_format = tag(
        "div",
        tag("h3", "By format"),
        composition(totals, original, final, colour),
        format_table(totals, colour),
        class_="card",
    )
    budget_curve = (
        tag("div", tag("h3", "Budget against loss"), curve(report.curve, report.divergence), class_="card")
        if report.curve
        else None
    )
    return join([tag("div", by_format, budget_curve, class_="columns"), strip(rows, colour)])


def _sites(rows: Sequence[SiteRow], colour: Mapping[str, str]) -> Html | None:
    if not rows:
        return None
    search = tag(
        "label",
        "Filter ",
        tag("input", type="search", id="filter", placeholder="name, format or reason"),
        id="filter-box",
        hidden=True,
    )
    key = tag("p", "Pale bar: before; solid bar: after; all bars on one scale.", class_="muted")
    prefix = common_prefix([row.site for row in rows])
    shared = tag("p", "… stands for ", tag("code", breakable(prefix)), class_="muted") if prefix else None
    count = tag("span", id="filter-count", class_="muted", role="status")
    return tag(
        "div", tag("div", key, search, count, class_="tools"), shared, site_table(rows, colour), class_="card"
    )


def _checks(report: Report) -> Html | None:
    shown = summary.checks(other_checks(report))
    if not shown:
        return None
    tiles = (tag("div", tag("dt", name), tag("dd", value)) for name, value in shown)
    return tag("div", tag("dl", *tiles, class_="tiles"), class_="card")


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
    items = [
        join([tag("dt", name), tag("dd", breakable(value) if name == "Model" else value)])
        for name, value in facts.items()
        if value
    ]
    return tag("div", tag("dl", *items, class_="facts"), class_="card") if items else None
