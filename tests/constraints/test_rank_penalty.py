"""A price on ranks: each layer's rank is the best of all, and a limit on all of them holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdpass.constraints import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.rank_budget import RankBudget
from tdpass.constraints.rank_penalty import RankPenalty
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.errors import BudgetError, UsageError
from tdpass.formats import FORMATS
from tdpass.formats.layer import dense_cost
from tdpass.site import Site

CONV = Site("c", "conv", (16, 8, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), extents=(((8, 8), (8, 8)),))
SITES = {"c": CONV, "l": Site("l", "linear", (24, 30), extents=(((1,), (1,)),))}
FORMS = {"c": "spatial_svd", "l": "svd"}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(site.shape, generator=generator, dtype=torch.float64)
        for name, site in SITES.items()
    }


def within(limit: float = math.inf, measure: str = "params") -> RankBudget:
    return RankBudget(SITES, FORMS, limit, measure)


def value(name: str, weight: Tensor, constraint: Constraint, strength: float, measure: str) -> float:
    """1/2 ||V - Z||^2 and the price of Z's rank."""
    site = SITES[name]
    cost = (
        FORMATS.get(constraint.format).cost(site, constraint.rank)
        if isinstance(constraint, InFormat)
        else dense_cost(site)
    )
    return float((weight - constraint.project(weight)).square().sum()) / 2 + strength * cost.get(measure)


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.05, 0.1, 1.0])
def test_no_other_rank_has_a_smaller_sum_of_loss_and_price(strength: float, measure: str) -> None:
    strength = strength if measure == "params" else strength / 50
    found = RankPenalty(within(measure=measure), strength).divide(weights())
    for name, weight in weights().items():
        ranks = range(1, min(weight.shape[0], 24) + 1)
        every = [InFormat(SITES[name], FORMS[name], (rank,)) for rank in ranks]
        best = min(value(name, weight, one, strength, measure) for one in (Unconstrained(), *every))
        assert value(name, weight, found[name], strength, measure) == pytest.approx(best, rel=1e-9)


def test_a_higher_price_buys_smaller_ranks_and_none_leaves_layers_dense() -> None:
    spent = []
    for strength in (0.0, 0.02, 0.05, 0.2, 100.0):
        found = RankPenalty(within(), strength).divide(weights())
        spent.append(
            sum(
                within().cost_of(name, one.rank if isinstance(one, InFormat) else None)
                for name, one in found.items()
            )
        )
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == sum(site.weights for site in SITES.values())
    assert spent[-1] == sum(within().cost_of(name, (1,)) for name in SITES)


def test_small_weights_give_up_their_ranks_first() -> None:
    scaled = {name: weight * {"c": 10.0, "l": 0.1}[name] for name, weight in weights().items()}
    found = RankPenalty(within(), 0.05).divide(scaled)
    assert isinstance(found["c"], Unconstrained)
    assert isinstance(found["l"], InFormat)
    assert found["l"].rank == (1,)


def test_a_limit_holds_where_the_price_alone_is_too_low() -> None:
    limit = 0.5 * sum(site.weights for site in SITES.values())
    spent = []
    for strength in (0.0, 100.0):
        found = RankPenalty(within(limit), strength).divide(weights())
        spent.append(
            sum(
                within().cost_of(name, one.rank if isinstance(one, InFormat) else None)
                for name, one in found.items()
            )
        )
    assert 0.9 * limit < spent[0] <= limit
    assert spent[1] == sum(within().cost_of(name, (1,)) for name in SITES)
    with pytest.raises(BudgetError, match="smallest reachable"):
        RankPenalty(within(10.0)).divide(weights())


@pytest.mark.parametrize("wrong", [-1.0, math.inf, math.nan])
def test_prices_are_numbers(wrong: float) -> None:
    with pytest.raises(UsageError, match="strength"):
        RankPenalty(within(), wrong)
