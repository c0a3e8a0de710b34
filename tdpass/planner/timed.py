"""Planning on measured time: what each candidate takes, and the choice among those that are faster than dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tdpass.cost import Budget, Cost
from tdpass.errors import BudgetError
from tdpass.form import DENSE, Form
from tdpass.planner.candidates import Candidate
from tdpass.planner.planning import Table
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.select import cheapest
from tdpass.planner.stopwatch import Stopwatch
from tdpass.site import Site

TURNS = 6

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TimedPlan:
    """A plan whose every choice was measured with care, and the table it was chosen from."""

    plan: RankPlan
    table: Table


def measure_table(table: Table, watch: Stopwatch, tick: Tick = lambda what, done, of: None) -> None:
    """Measure the dense layer of every site and a handful of ranks of each format; sites of equal shape once."""
    for done, site in enumerate(table.sites, start=1):
        watch.scan(site, [*table.candidates.get(site.name, []), *_joint_parts(table, site.name)])
        tick("timing layers", done, len(table.sites))


def plan_on_time(table: Table, budget: Budget, original: Cost, watch: Stopwatch, tick: Tick = lambda what, done, of: None) -> TimedPlan:
    """The best choice among the candidates that are faster than dense.

    Choosing by interpolated times and measuring what was chosen take turns until all that is chosen was measured; after a
    few turns only what was measured is left to choose from.  Raises `BudgetError` naming the smallest reachable.
    """
    sites = {site.name: site for site in table.sites}
    for turn in range(TURNS + 1):
        tick("timing what was chosen", turn, TURNS)
        last = turn == TURNS
        timed = with_times(table, watch, only_measured=last)
        try:
            plan = timed.plan(budget, original)
        except BudgetError as error:
            # what is reachable rests on interpolated times as well, and the message must not
            if "seconds" not in budget.measures or not watch.confirm_all(_fastest(timed, budget, sites)) or last:
                raise BudgetError(f"{error}; on target {watch.target.name} only what is faster than dense counts") from None
            continue
        if not watch.confirm_all((sites[choice.site], choice.form) for choice in plan if not choice.kept_dense):
            break
    tick("timing what was chosen", TURNS, TURNS)
    return TimedPlan(replace(plan, choices=_explained(plan, table, budget, original, watch)), timed)


def with_times(table: Table, watch: Stopwatch, only_measured: bool = False) -> Table:
    """The table with seconds in every cost, and without the candidates that are not clearly faster than the dense layer."""
    sites = {site.name: site for site in table.sites}

    def timed(name: str, candidate: Candidate) -> Candidate | None:
        if only_measured and not watch.measured(sites[name], candidate.form):
            return None
        timing = watch.timing(sites[name], candidate)
        if not watch.faster(sites[name], timing):
            return None
        return replace(candidate, cost=candidate.cost.replace(seconds=timing.seconds), kernel=timing.kernel)

    candidates = {name: [kept for c in found if (kept := timed(name, c)) is not None] for name, found in table.candidates.items()}
    joint = []
    for option in table.joint:
        parts = {name: kept for name, part in option.parts.items() if (kept := timed(name, part)) is not None}
        if len(parts) == len(option.parts):
            joint.append(replace(option, parts=parts))
    dense = {site.name: watch.dense(site) for site in table.sites}
    return replace(table, candidates=candidates, joint=joint, dense_times=dense)


def _joint_parts(table: Table, name: str) -> list[Candidate]:
    return [option.parts[name] for option in table.joint if name in option.parts]


def _fastest(table: Table, budget: Budget, sites: Mapping[str, Site]) -> list[tuple[Site, Form]]:
    chosen = cheapest(table.options(budget), list(sites), "seconds")
    return [(sites[name], candidate.form) for name, candidate in chosen.items() if candidate.form != DENSE]


def _explained(plan: RankPlan, table: Table, budget: Budget, original: Cost, watch: Stopwatch) -> tuple[Choice, ...]:
    """The choices with what was predicted of them and, for sites left dense because of time, where their format breaks even."""
    asked = _asked(table, budget, original)
    choices: list[Choice] = []
    for site, choice in zip(table.sites, plan, strict=True):
        if not choice.kept_dense:
            predicted = watch.predicted(site, choice.form)
            reason = f"{choice.reason}, {choice.seconds / choice.dense_seconds:.0%} of the time" if choice.dense_seconds else choice.reason
            choices.append(replace(choice, predicted=predicted, reason=reason))
            continue
        wanted = asked.get(site.name) or _mildest(table.candidates.get(site.name, ()), budget)
        reason = "" if wanted is None else _too_slow(site, wanted, table, watch)
        choices.append(replace(choice, predicted=choice.cost.seconds, reason=reason or choice.reason))
    return tuple(choices)


def _asked(table: Table, budget: Budget, original: Cost) -> dict[str, Candidate]:
    """What would be chosen if time did not count."""
    untimed = replace(budget, bounds=tuple(bound for bound in budget.bounds if bound[0] != "seconds"))
    if not untimed.bounds and untimed.max_error is None:
        return {}
    try:
        plan = table.plan(untimed, original)
    except BudgetError:
        return {}
    found = {(name, c.form): c for name, candidates in table.candidates.items() for c in candidates}
    found.update({(name, part.form): part for option in table.joint for name, part in option.parts.items()})
    return {choice.site: found[choice.site, choice.form] for choice in plan if not choice.kept_dense}


def _mildest(candidates: Iterable[Candidate], budget: Budget) -> Candidate | None:
    allowed = [candidate for candidate in candidates if budget.max_error is None or candidate.error <= budget.max_error]
    return min(allowed, key=lambda candidate: candidate.loss, default=None)


def _too_slow(site: Site, asked: Candidate, table: Table, watch: Stopwatch) -> str:
    """Why time forbids what was asked for; empty where it does not."""
    timing = watch.timing(site, asked)
    if watch.faster(site, timing):
        return ""
    dense = watch.dense(site).seconds
    took = f"{timing.seconds / dense:.2f} of the dense time" if timing.kernel else "a format that no runtime here can run"
    rank = watch.break_even(site, asked.format)
    if rank is not None:
        return f"{asked.format}: break-even at rank {_text(rank)}, asked {_text(asked.rank)}, which takes {took}"
    if any(watch.faster(site, watch.timing(site, candidate)) for candidate in table.candidates.get(site.name, ())):
        return f"{asked.format}: no measured rank is faster than dense, asked {_text(asked.rank)}, which takes {took}"
    return f"no measured rank of any format is faster than dense: {asked.form} takes {took}"


def _text(rank: Sequence[int]) -> str:
    return "x".join(map(str, rank))
