"""Planning on a target: what each candidate costs there, and the choice among those cheaper than dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tdpass.cost import Budget, Cost
from tdpass.errors import BudgetError
from tdpass.following import Progress, silent
from tdpass.form import DENSE, Form
from tdpass.measures import MEASURES, Needs
from tdpass.planner.candidates import Candidate, dense_candidate
from tdpass.planner.prices import Prices
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.select import cheapest
from tdpass.planner.table import Table
from tdpass.site import Site

TURNS = 6


@dataclass(frozen=True)
class TargetPlan:
    """A plan whose every choice has its final price, and the table it was chosen from."""

    plan: RankPlan
    table: Table


def price_table(table: Table, prices: Prices, tick: Progress = silent) -> None:
    """Price the dense layer of every site and its candidates, or as many as others can be judged by.

    Sites of equal shape once.
    """
    for done, site in enumerate(table.sites, start=1):
        prices.scan(site, [*table.candidates.get(site.name, []), *_joint_parts(table, site.name)])
        tick("pricing layers", done, len(table.sites))


def plan_on_target(
    table: Table, budget: Budget, original: Cost, prices: Prices, tick: Progress = silent
) -> TargetPlan:
    """The best choice among the candidates that are cheaper than dense.

    Choosing by the prices known so far and making sure of those chosen take turns until there is nothing left
    to make sure of; after a few turns only what is sure is left to choose from.  Raises `BudgetError` naming
    the smallest reachable.
    """
    sites = {site.name: site for site in table.sites}
    for turn in range(TURNS + 1):
        tick("pricing what was chosen", turn, TURNS)
        last = turn == TURNS
        priced = with_prices(table, prices, only_sure=last)
        try:
            plan = priced.plan(budget, original)
        except BudgetError as error:
            # what is reachable rests on interpolated times as well, and the message must not
            if (
                prices.measures[0] not in budget.measures
                or not prices.confirm_all(_cheapest(priced, budget, sites, prices.measures[0]))
                or last
            ):
                raise BudgetError(
                    f"{error}; on target {prices.target.name} only what {_better(prices)} than dense counts"
                ) from None
            continue
        if not prices.confirm_all(
            (sites[choice.site], choice.form) for choice in plan if not choice.kept_dense
        ):
            break
    tick("pricing what was chosen", TURNS, TURNS)
    return TargetPlan(replace(plan, choices=_explained(plan, table, budget, original, prices)), priced)


def with_prices(table: Table, prices: Prices, only_sure: bool = False) -> Table:
    """The table with the target's amounts in every cost, and only candidates clearly cheaper than dense."""
    sites = {site.name: site for site in table.sites}

    def priced(name: str, candidate: Candidate) -> Candidate | None:
        if only_sure and not prices.sure(sites[name], candidate.form):
            return None
        found = prices.priced(sites[name], candidate)
        return found if prices.pays(sites[name], found) else None

    candidates = {
        name: [kept for c in found if (kept := priced(name, c)) is not None]
        for name, found in table.candidates.items()
    }
    joint = []
    for option in table.joint:
        parts = {
            name: kept for name, part in option.parts.items() if (kept := priced(name, part)) is not None
        }
        if len(parts) == len(option.parts):
            joint.append(replace(option, parts=parts))
    dense = {site.name: prices.priced(site, dense_candidate(site)) for site in table.sites}
    return replace(table, candidates=candidates, joint=joint, priced=dense)


def _joint_parts(table: Table, name: str) -> list[Candidate]:
    return [option.parts[name] for option in table.joint if name in option.parts]


def _cheapest(
    table: Table, budget: Budget, sites: Mapping[str, Site], measure: str
) -> list[tuple[Site, Form]]:
    chosen = cheapest(table.options(budget), list(sites), measure)
    return [(sites[name], candidate.form) for name, candidate in chosen.items() if candidate.form != DENSE]


def _explained(
    plan: RankPlan, table: Table, budget: Budget, original: Cost, prices: Prices
) -> tuple[Choice, ...]:
    """The choices with what was predicted of them and where formats break even.

    The latter is said of sites left dense because of their price.
    """
    asked = _asked(table, budget, original)
    choices: list[Choice] = []
    for site, choice in zip(table.sites, plan, strict=True):
        if not choice.kept_dense:
            predicted = prices.predicted(site, choice.form)
            before, after = choice.dense.get(prices.measures[0]), choice.cost.get(prices.measures[0])
            reason = (
                f"{choice.reason}, {after / before:.0%} of the {_title(prices)}" if before else choice.reason
            )
            choices.append(replace(choice, predicted=predicted, reason=reason))
            continue
        wanted = asked.get(site.name) or _mildest(table.candidates.get(site.name, ()), budget)
        reason = "" if wanted is None else _too_dear(site, wanted, table, prices)
        choices.append(replace(choice, predicted=choice.cost.seconds, reason=reason or choice.reason))
    return tuple(choices)


def _asked(table: Table, budget: Budget, original: Cost) -> dict[str, Candidate]:
    """What would be chosen if what the target says did not count."""
    counted = replace(
        budget,
        bounds=tuple(bound for bound in budget.bounds if MEASURES.get(bound[0]).needs is not Needs.TARGET),
    )
    if not counted.bounds and counted.max_error is None:
        return {}
    try:
        plan = table.plan(counted, original)
    except BudgetError:
        return {}
    found = {(name, c.form): c for name, candidates in table.candidates.items() for c in candidates}
    found.update({(name, part.form): part for option in table.joint for name, part in option.parts.items()})
    return {choice.site: found[choice.site, choice.form] for choice in plan if not choice.kept_dense}


def _mildest(candidates: Iterable[Candidate], budget: Budget) -> Candidate | None:
    allowed = [
        candidate
        for candidate in candidates
        if budget.max_error is None or candidate.error <= budget.max_error
    ]
    return min(allowed, key=lambda candidate: candidate.loss, default=None)


def _compared(amount: float, dense: float, title: str) -> str:
    """A price beside the dense one, which is nothing for a table of which rows are only read."""
    if not math.isfinite(amount):
        return "a format that no runtime here can run"
    return f"{amount / dense:.2f} of the dense {title}" if dense else f"{title} that dense does not take"


def _too_dear(site: Site, asked: Candidate, table: Table, prices: Prices) -> str:
    """Why its price forbids what was asked for; empty where it does not."""
    measure, priced = prices.measures[0], prices.priced(site, asked)
    if prices.pays(site, priced):
        return ""
    amount, dense = priced.cost.get(measure), prices.priced(site, dense_candidate(site)).cost.get(measure)
    took = _compared(amount, dense, _title(prices))
    if asked.form.narrow:
        return f"{asked.form} takes {took}"
    rank, known = prices.break_even(site, asked.format), "measured rank" if prices.target.here else "rank"
    if rank is not None:
        return (
            f"{asked.format}: break-even at rank {_text(rank)}, asked {_text(asked.rank)}, which takes {took}"
        )
    if any(
        prices.pays(site, prices.priced(site, candidate)) for candidate in table.candidates.get(site.name, ())
    ):
        return (
            f"{asked.format}: no {known} {_better(prices)} than dense, asked {_text(asked.rank)}, "
            f"which takes {took}"
        )
    return f"no {known} of any format {_better(prices)} than dense: {asked.form} takes {took}"


def _title(prices: Prices) -> str:
    return MEASURES.get(prices.measures[0]).title.lower()


def _better(prices: Prices) -> str:
    """What a cheaper layer does."""
    measure = prices.measures[0]
    return "is faster" if measure == "seconds" else f"takes {MEASURES.get(measure).less}"


def _text(rank: Sequence[int]) -> str:
    return "x".join(map(str, rank))
