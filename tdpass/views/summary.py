"""What every view of a report shows.

Its rows, totals per format, headline figures and refusals, each worked out once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdpass.cost import Cost
from tdpass.form import DENSE
from tdpass.measures import Measure, Needs
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report, SiteRow
from tdpass.views.units import human, less, ratio, score, share, shown_measures, small

_CHECKS = {"same_class": "same class chosen"}


@dataclass(frozen=True)
class FormatTotal:
    """All sites that got one format."""

    format: str
    sites: int
    before: Cost
    after: Cost
    loss: float


@dataclass(frozen=True)
class Figure:
    """A headline number and whether it was measured or is what the planner expects."""

    value: float
    name: str
    measured: bool


def site_rows(report: Report, plan: RankPlan | None = None) -> list[SiteRow]:
    """The report's rows, with what only the plan says filled in.

    The plan's choices when nothing was done yet.
    """
    if not report.sites and plan is not None:
        return plan.rows()
    chosen = {} if plan is None else {choice.site: choice for choice in plan}
    return [
        replace(
            row,
            note=row.note or chosen[row.site].reason,
            guarantee=row.guarantee or chosen[row.site].guarantee,
        )
        if row.site in chosen
        else row
        for row in report.sites
    ]


def final_cost(report: Report, plan: RankPlan | None = None) -> Cost:
    """Cost of the compressed model: what was reached or, in a dry run, what is planned."""
    return plan.planned if report.final == Cost() and plan is not None else report.final


def original_cost(report: Report, plan: RankPlan | None = None) -> Cost:
    """Cost of the model that came in."""
    return plan.original if report.original == Cost() and plan is not None else report.original


def divergence(report: Report, rows: Sequence[SiteRow]) -> Figure | None:
    """How far the outputs moved: the first check that measured it, else the summed expectation.

    None when nothing says.
    """
    kind = divergence_name(report.divergence)
    if "divergence" in report.checks:
        return Figure(report.checks["divergence"], kind, measured=True)
    expected = sum(row.loss for row in rows)
    if not rows or (report.training and not expected):  # methods that train expect nothing of single sites
        return None
    return Figure(expected, loss_name(report.divergence), measured=False)


def divergence_name(name: str) -> str:
    """A measure as people write it; without a name, the plain word.

    Of several outputs, which is compared how.
    """
    measure, _, outputs = name.partition(" of ")
    if outputs:
        return f"divergence ({name.replace('_', ' ')})"
    return f"{measure.upper() if len(measure) <= 3 else measure.replace('_', ' ')} divergence".strip()


def loss_name(divergence: str) -> str:
    """What the losses of a plan are: without data there is no divergence, only errors of weights."""
    return divergence_name(divergence) if divergence else "summed squared weight error"


def checks(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Names and values of checks, in words."""
    shown = []
    for name, value in values.items():
        if name == "samples":
            shown.append(("samples compared", human(value)))
            continue
        entry, bracket, output = name.partition("[")
        words = _CHECKS.get(entry, entry.replace("_", " "))
        shown.append((f"{words}{bracket and ' '}{bracket}{output}", _check(entry, value)))
    return shown


def _check(entry: str, value: float) -> str:
    if entry == "same_class":
        return share(value, 1.0)
    return score(value) if entry.startswith("score_") else small(value)


def unfactored(row: SiteRow) -> bool:
    """Whether the layer has the shape it had: it is dense, or what became of it is in its weights."""
    return not row.rank and row.before == row.after


def by_format(rows: Sequence[SiteRow]) -> list[FormatTotal]:
    """Totals per format, factored ones by name and dense last."""
    names = sorted({row.form.family for row in rows}, key=lambda name: (name == DENSE.family, name))
    totals = []
    for name in names:
        group = [row for row in rows if row.form.family == name]
        before, after = sum((row.before for row in group), Cost()), sum((row.after for row in group), Cost())
        totals.append(FormatTotal(name, len(group), before, after, sum(row.loss for row in group)))
    return totals


def stored(report: Report, times: str = "x") -> str:
    """Sizes of packed tensors: as the literature counts them, without positions, and as they lie in the file.

    Empty where there are none.
    """
    size = report.stored
    if size is None:
        return ""
    figures = [("weight data", size.weight_data_bytes), ("stored", size.true_bytes)]
    shown = ", ".join(
        f"{name} {human(amount, 'B')} ({ratio(size.dense_bytes, amount, times)})" for name, amount in figures
    )
    shown = f"{shown} of {human(size.dense_bytes, 'B')}"
    return f"{shown}; {human(size.plain_bytes, 'B')} not packed" if size.plain_bytes else shown


def stored_whole(report: Report, times: str = "x") -> tuple[str, str, str]:
    """How many times smaller or larger all tensors are in the file, and from how many bytes to how many.

    Empty where none is packed.
    """
    size = report.stored
    if size is None:
        return "", "", ""
    before, after = size.dense_bytes + size.plain_bytes, size.true_bytes + size.plain_bytes
    return *less(before, after, ("smaller", "larger"), times), f"{human(before, 'B')} to {human(after, 'B')}"


def losses_known(rows: Sequence[SiteRow] | Sequence[FormatTotal]) -> bool:
    """Whether the plan went by what the network's outputs lose.

    One that went by weights alone has no losses to show.
    """
    return any(row.loss for row in rows)


def timed(rows: Sequence[SiteRow]) -> bool:
    """Whether the sites were timed, in a runtime."""
    return any(row.before.seconds > 0 and row.kernel for row in rows)


def modelled(rows: Sequence[SiteRow]) -> list[Measure]:
    """What a modelled target told of the sites."""
    known = [measure for measure in shown_measures() if measure.needs is Needs.TARGET]
    return (
        []
        if timed(rows)
        else [measure for measure in known if any(row.before.get(measure.name) for row in rows)]
    )


def refusals(report: Report, plan: RankPlan | None = None) -> dict[str, list[str]]:
    """Layers left alone, as reason -> names, the most frequent reason first."""
    return by_reason({**(plan.declined if plan is not None else {}), **report.declined})


def by_reason(declined: Mapping[str, str]) -> dict[str, list[str]]:
    """Reasons by name as reason -> names, the most frequent one first; the root of a model has no name."""
    reasons: dict[str, list[str]] = {}
    for name, reason in declined.items():
        reasons.setdefault(reason, []).append(name or "(the model itself)")
    return dict(sorted(reasons.items(), key=lambda item: -len(item[1])))


def reasons_by_site(rows: Sequence[SiteRow]) -> dict[str, list[str]]:
    """Why each site is as it is, as reason -> names, in the order of the rows."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            reasons.setdefault(row.note, []).append(row.site)
    return reasons
