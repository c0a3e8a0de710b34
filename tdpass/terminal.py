"""Reports, plans and lists of sites for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from tdpass.cost import Cost
from tdpass.form import DENSE, Form
from tdpass.measures import Measure
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report, SiteRow
from tdpass.site import Site
from tdpass.views import summary
from tdpass.views.tables import Column, Part, fitting, grid, heading, item, pairs
from tdpass.views.training import destroyed, other_checks
from tdpass.views.training_table import scores_line, training_table
from tdpass.views.units import (
    cost_text,
    dims,
    form_sizes,
    human,
    in_form,
    plain,
    ranks,
    ratio,
    seconds,
    share,
    shown_measures,
    small,
)

_NAMES_SHOWN = 4


@dataclass(frozen=True)
class InspectRow:
    """A site, its form, what it costs in that, and each format's largest rank that is cheaper than dense."""

    site: Site
    cost: Cost
    paying: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    form: Form = DENSE

    @property
    def kind(self) -> str:
        """The layer's kind, and the form that it is in where that is not dense."""
        return self.site.kind if self.form == DENSE else f"{self.site.kind} {self.form}"


def report_view(report: Report, plan: RankPlan | None, width: int | None) -> list[Part]:
    """A whole report, the totals last, where the eye is when the command ends; `width` is None in a pipe."""
    rows = summary.site_rows(report, plan)
    broken = destroyed(report)
    alarm: list[Part] = [Text(plain(broken), style="bold red")] if broken else []
    parts: list[Part] = [*alarm]
    if rows:
        parts += site_table(rows, width)
    parts += refusals(summary.refusals(report, plan), width)
    if report.passes:
        parts += ["", heading("Passes"), _passes(report, width)]
    parts += training_table(report, width)
    checks = summary.checks(other_checks(report))
    if checks:
        parts += ["", heading("Checks"), grid(("Check", "Value"), checks, width, numbers=(1,), wraps=(0,))]
    if report.notes:
        parts += ["", heading("Notes"), *(item(note) for note in report.notes)]
    return [*parts, "", *alarm, *_totals(report, plan, rows, width)]


def site_table(rows: Sequence[SiteRow], width: int | None) -> list[Part]:
    """Every site before and after: one line each where the width allows, else two.

    Reasons below where they do not fit.
    """
    reason = Column[SiteRow]("Reason", lambda row: plain(row.note), least=32)
    timed, modelled = summary.timed(rows), summary.modelled(rows)
    loss = (
        [Column[SiteRow]("Loss", lambda row: "" if summary.unfactored(row) else small(row.loss), number=True)]
        if summary.losses_known(rows)
        else []
    )
    one_line, two_lines = (
        [*_single_line_columns(timed, modelled), *loss],
        [*_two_line_columns(timed, arrows=True), *loss],
    )
    layouts = (
        [*one_line, reason],
        one_line,
        [*two_lines, reason],
        two_lines,
        [*_two_line_columns(timed, arrows=False), *loss],
    )
    table, chosen = fitting(layouts, rows, width, dim=lambda row: row.form == DENSE)
    reasons = summary.reasons_by_site(rows)
    if reason in layouts[chosen] or not reasons:
        return [table]
    return [table, "", heading("Reasons"), *_grouped(reasons)]


def inspect_table(
    rows: Sequence[InspectRow], model: Cost, formats: Sequence[str], width: int | None
) -> list[Part]:
    """Every site of a model with its cost, its share of the model's, and where each format starts to pay."""

    def paying(name: str) -> Callable[[InspectRow], str]:
        return lambda row: ranks(row.paying.get(name, ()))

    def part(measure: str) -> Callable[[InspectRow], str]:
        return lambda row: share(
            row.cost.get(measure), model.get(measure) if row.site.seen or measure != "macs" else 0
        )

    def macs(row: InspectRow) -> str:
        return human(row.cost.macs) if row.site.seen else "?"

    right = [
        Column[InspectRow]("Params", lambda row: human(row.cost.params), number=True),
        Column[InspectRow]("Of all", part("params"), number=True),
        Column[InspectRow]("MACs", macs, number=True),
        Column[InspectRow]("Of all", part("macs"), number=True),
        *(Column[InspectRow](name, paying(name), number=True) for name in formats),
    ]
    one_line = [
        Column[InspectRow]("Site", lambda row: plain(row.site.name)),
        Column[InspectRow]("Kind", lambda row: row.kind),
        Column[InspectRow]("Shape", lambda row: dims(row.site.shape)),
        Column[InspectRow]("Geometry", lambda row: geometry(row.site)),
        *right,
    ]

    def site(row: InspectRow) -> str:
        return f"{plain(row.site.name)}\n{row.kind} {dims(row.site.shape)} {geometry(row.site)}".rstrip()

    without_share = [right[0], right[2], *right[4:]]
    whole_name, any_name = Column("Site", site), Column("Site", site, least=16)
    return [
        fitting(
            (one_line, [whole_name, *right], [whole_name, *without_share], [any_name, *without_share]),
            rows,
            width,
        )[0]
    ]


def geometry(site: Site) -> str:
    """Stride, padding, dilation and groups where not 1, 0, 1, 1, and how often a sample uses a weight."""
    words = []
    if any(step != 1 for step in site.stride):
        words.append(f"stride {_same(site.stride)}")
    if any(pair != (0, 0) for pair in site.padding):
        flat = [before if before == after else (before, after) for before, after in site.padding]
        words.append(f"pad {_same(flat)}")
    if any(step != 1 for step in site.dilation):
        words.append(f"dilation {_same(site.dilation)}")
    if site.groups > 1:
        words.append(f"{site.groups} groups")
    if len(site.extents) > 1:
        words.append(f"{len(site.extents)} calls")
    return " ".join(words)


def refusals(reasons: Mapping[str, Sequence[str]], width: int | None) -> list[Part]:
    """Layers left alone, grouped by reason in a terminal and one a line in a pipe."""
    if not reasons:
        return []
    lines = [(name, reason) for reason, names in reasons.items() for name in names]
    shown: list[Part] = [grid(("Layer", "Reason"), lines, width)] if width is None else _grouped(reasons)
    return ["", heading(f"Left alone ({len(lines)})"), *shown]


def _same(sizes: Sequence[object]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


def _single_line_columns(timed: bool, modelled: Sequence[Measure]) -> list[Column[SiteRow]]:
    """Everything on one line; times where sites were timed, else what a model of a machine says."""

    def changed(measure: str) -> Callable[[SiteRow], str]:
        return lambda row: _change(measure, row.before, row.after)

    def times(measure: str) -> Callable[[SiteRow], str]:
        return lambda row: (
            "" if summary.unfactored(row) else ratio(row.before.get(measure), row.after.get(measure))
        )

    return [
        Column("Site", lambda row: plain(row.site)),
        Column("Shape", lambda row: dims(row.shape)),
        Column("Format", lambda row: in_form(row.form)),
        *(_time_columns() if timed else ()),
        *(Column[SiteRow](measure.title, changed(measure.name), number=True) for measure in modelled),
        Column("MACs", changed("macs"), number=True),
        Column("", times("macs"), number=True),
        Column("Params", changed("params"), number=True),
        Column("", times("params"), number=True),
        Column("Error", lambda row: "" if summary.unfactored(row) else small(row.error), number=True),
        Column("Guarantee", lambda row: plain(row.guarantee)),
    ]


def _time_columns() -> list[Column[SiteRow]]:
    """Dense time, the one predicted, the one measured, by how much that is faster, and in which runtime."""

    def dense(row: SiteRow) -> bool:
        return summary.unfactored(row)

    return [
        Column("Dense", lambda row: seconds(row.before.seconds), number=True),
        Column("Predicted", lambda row: "" if dense(row) else seconds(row.predicted), number=True),
        Column("Measured", lambda row: "" if dense(row) else seconds(row.after.seconds), number=True),
        Column(
            "", lambda row: "" if dense(row) else ratio(row.before.seconds, row.after.seconds), number=True
        ),
        Column("Kernel", lambda row: plain(row.kernel)),
    ]


def _two_line_columns(timed: bool, arrows: bool) -> list[Column[SiteRow]]:
    """Name over shape, format over rank, cost over ratio.

    Without arrows the cost before stands over the cost after.
    """

    def time(row: SiteRow) -> str:
        before, after = seconds(row.before.seconds), seconds(row.after.seconds)
        if summary.unfactored(row):
            return before
        measured = f"{before} -> {after}" if arrows else f"{before}\n{after}"
        return f"{measured}\n{seconds(row.predicted)} {plain(row.kernel)}"

    def cost(measure: str) -> Callable[[SiteRow], str]:
        def cell(row: SiteRow) -> str:
            before, after = row.before.get(measure), row.after.get(measure)
            if summary.unfactored(row):
                return human(before)
            return (
                f"{_change(measure, row.before, row.after)}\n{ratio(before, after)}"
                if arrows
                else f"{human(before)}\n{human(after)} {ratio(before, after)}"
            )

        return cell

    below = "ratio" if arrows else "after"
    return [
        Column("Site\nshape", lambda row: f"{plain(row.site)}\n{dims(row.shape)}", least=16),
        Column("Format\nrank", lambda row: f"{plain(row.form.family)}\n{form_sizes(row.form)}", least=12),
        *(
            (
                Column(
                    "Time\npredicted, kernel" if arrows else "Time\nafter\npredicted,\nkernel",
                    time,
                    number=True,
                    least=10,
                ),
            )
            if timed
            else ()
        ),
        Column(f"MACs\n{below}", cost("macs"), number=True),
        Column(f"Params\n{below}", cost("params"), number=True),
        Column(
            "Error\nbound",
            lambda row: "" if summary.unfactored(row) else f"{small(row.error)}\n{plain(row.guarantee)}",
            number=True,
        ),
    ]


def _change(measure: str, before: Cost, after: Cost) -> str:
    texts = [cost_text(measure, cost.get(measure)) for cost in (before, after)]
    return texts[0] if before.get(measure) == after.get(measure) else " -> ".join(texts)


def _grouped(reasons: Mapping[str, Sequence[str]]) -> list[Part]:
    return [item(f"{_some(names)}: {reason}") for reason, names in reasons.items()]


def _some(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_SHOWN + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES_SHOWN])} and {len(names) - _NAMES_SHOWN} more"


def _passes(report: Report, width: int | None) -> Part:
    lines = [
        (
            row.text,
            "changed" if row.changed else "no change",
            seconds(row.seconds),
            human(row.after.params),
            "; ".join(row.notes),
        )
        for row in report.passes
    ]
    return grid(
        ("Pass", "Result", "Time", "Params after", "Notes"), lines, width, numbers=(2, 3), wraps=(0, 4)
    )


def _totals(report: Report, plan: RankPlan | None, rows: Sequence[SiteRow], width: int | None) -> list[Part]:
    before, after = summary.original_cost(report, plan), summary.final_cost(report, plan)
    facts = [
        ("budget", report.budget),
        ("metric", report.metric),
        ("divergence", report.divergence),
        ("machine", report.machine),
        ("target", report.target),
    ]
    parts: list[Part] = [
        heading(report.model or "Model"),
        pairs([(name, value) for name, value in facts if value]),
        "",
    ]
    lines = []
    for measure in shown_measures():
        old, new = before.get(measure.name), after.get(measure.name)
        if old:
            lines.append(
                (
                    measure.title,
                    cost_text(measure.name, old),
                    cost_text(measure.name, new),
                    ratio(old, new),
                    share(new, old),
                )
            )
    after_title = "Planned" if report.dry_run else "After"
    parts.append(
        grid(("Total", "Before", after_title, "Smaller", "Kept"), lines, width, numbers=(1, 2, 3, 4))
    )
    if report.stored is not None:
        times, word, sizes = summary.stored_whole(report)
        parts.append(Text(f"all tensors as stored: {times} {word}, {sizes}"))
        parts.append(Text(f"pruned and quantized tensors: {summary.stored(report)}"))
    moved = summary.divergence(report, rows)
    if moved is not None:
        parts.append(
            Text(f"{plain(moved.name)}: {small(moved.value)} {'measured' if moved.measured else 'expected'}")
        )
    if rows:
        counts = ", ".join(f"{total.sites} {plain(total.format)}" for total in summary.by_format(rows))
        parts.append(Text(f"{len(rows)} {'site' if len(rows) == 1 else 'sites'}: {counts}"))
    scored = scores_line(report)
    if scored:
        parts.append(Text(scored))
    return parts
