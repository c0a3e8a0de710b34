"""Budgets that layers share: limits hold, and the division is the best or beats the obvious one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from tdpass.constraints import Constraint
from tdpass.constraints.allocation import Options, allocate
from tdpass.constraints.group_budget import GroupBudget
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.level_budget import LevelBudget
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.rank_budget import RankBudget
from tdpass.constraints.sparse import Sparse
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.constraints.weight_budget import WeightBudget
from tdpass.errors import BudgetError, PlanError, UsageError
from tdpass.formats import FORMATS, Rank
from tdpass.formats.layer import dense_cost
from tdpass.site import Site


def conv(name: str, o: int, i: int, size: int) -> Site:
    return Site(
        name, "conv", (o, i, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), extents=(((size, size), (size, size)),)
    )


SITES = {
    site.name: site
    for site in (conv("a", 16, 12, 16), conv("b", 32, 16, 8), conv("c", 32, 32, 8), conv("d", 64, 32, 4))
}
LINEARS = {
    name: Site(name, "linear", shape, extents=(((1,), (1,)),))
    for name, shape in {"p": (40, 60), "q": (60, 40), "r": (30, 30)}.items()
}


def weights_of(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Weights whose spectra fall at different speeds."""
    found = {}
    for number, (name, site) in enumerate(sites.items()):
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(site.shape, generator=generator)
        for axis, size in enumerate(site.shape):
            mixing = torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * torch.arange(
                1, size + 1
            ) ** (-0.2 - 0.3 * number)
            weight = torch.tensordot(weight, mixing, dims=([axis], [1])).movedim(-1, axis)
        found[name] = weight * 10.0 ** (number - 2)
    return found


def lost(weights: Mapping[str, Tensor], constraints: Mapping[str, Constraint]) -> float:
    """Summed squared relative distance of the projections."""
    return sum(
        float((weight - constraints[name].project(weight)).square().sum() / weight.square().sum())
        for name, weight in weights.items()
    )


def spent(budget: RankBudget, constraints: Mapping[str, Constraint]) -> float:
    return sum(
        budget.cost_of(name, one.rank if isinstance(one, InFormat) else None)
        for name, one in constraints.items()
    )


def dense(sites: Mapping[str, Site], measure: str) -> float:
    return sum(dense_cost(site).get(measure) for site in sites.values())


@pytest.mark.parametrize("name", ["tucker2", "tensor_train", "spatial_svd", "channel_svd", "input_svd"])
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("share", [0.7, 0.3, 0.1])
def test_ranks_meet_the_limit_and_lose_less_than_uniform_ones(name: str, measure: str, share: float) -> None:
    weights, form = weights_of(SITES), FORMATS.get(name)
    budget = RankBudget(SITES, name, share * dense(SITES, measure), measure)
    made = budget.divide(weights)
    assert list(made) == list(weights)
    assert spent(budget, made) <= budget.limit

    def uniform(scale: float) -> dict[str, Constraint]:
        tops = {key: form.ranks(site)[-1] for key, site in SITES.items()}
        return {
            key: InFormat(SITES[key], name, tuple(max(1, int(scale * r)) for r in top))
            for key, top in tops.items()
        }

    same = next(
        found
        for found in (uniform(scale / 100) for scale in range(100, 0, -1))
        if spent(budget, found) <= budget.limit
    )
    assert lost(weights, made) < lost(weights, same)


def test_nearly_all_of_a_limit_is_used() -> None:
    budget = RankBudget(SITES, "tucker2", 0.4 * dense(SITES, "macs"))
    assert spent(budget, budget.divide(weights_of(SITES))) >= 0.98 * budget.limit


def test_ranks_of_matrices_are_the_best_of_all() -> None:
    weights = weights_of(LINEARS)
    budget = RankBudget(LINEARS, "svd", 2500, "params", dense=False)
    made = budget.divide(weights)
    energy = {name: torch.linalg.svdvals(weight.double()).square() for name, weight in weights.items()}
    tails = {
        name: [float(values[r:].sum() / values.sum()) for r in range(len(values) + 1)]
        for name, values in energy.items()
    }
    prices = {name: sum(site.shape) for name, site in LINEARS.items()}
    best = min(
        sum(tails[name][r] for name, r in zip(LINEARS, rank, strict=True))
        for rank in itertools.product(*(range(1, min(site.shape) + 1) for site in LINEARS.values()))
        if sum(prices[name] * r for name, r in zip(LINEARS, rank, strict=True)) <= 2500
    )
    assert lost(weights, made) == pytest.approx(best, rel=0.02)


def test_layers_stay_dense_where_factors_would_cost_more() -> None:
    weights = weights_of(SITES)
    free = RankBudget(SITES, "tucker2", dense(SITES, "macs")).divide(weights)
    assert all(isinstance(one, Unconstrained) for one in free.values())
    for share in (0.9, 0.6, 0.3):
        budget = RankBudget(SITES, "tucker2", share * dense(SITES, "macs"))
        made = budget.divide(weights)
        assert any(isinstance(one, InFormat) for one in made.values())
        assert all(
            budget.cost_of(name, one.rank) < budget.cost_of(name, None)
            for name, one in made.items()
            if isinstance(one, InFormat)
        )
    factored = RankBudget(SITES, "tucker2", 0.9 * dense(SITES, "macs"), dense=False).divide(weights)
    assert all(isinstance(one, InFormat) for one in factored.values())


def test_a_layer_whose_factors_never_pay_stays_dense() -> None:
    sites = {"tiny": Site("tiny", "linear", (1, 9)), "b": SITES["b"]}
    budget = RankBudget(sites, {"tiny": "svd", "b": "tucker2"}, 2000, "params")
    made = budget.divide({"tiny": torch.ones(1, 9), "b": weights_of(SITES)["b"]})
    assert isinstance(made["tiny"], Unconstrained)
    assert isinstance(made["b"], InFormat)


def test_no_rank_is_more_than_the_others_can_use() -> None:
    """All input channels but one matter little, so one is left: nine taps are no more than nine outputs."""
    weight = (
        torch.randn(32, 1, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.01 * weights_of(SITES)["c"]
    )
    made = RankBudget({"c": SITES["c"]}, "tucker2", 410, "params").divide({"c": weight})["c"]
    assert isinstance(made, InFormat)
    assert made.rank == (9, 1)
    train = RankBudget({"c": SITES["c"]}, "tensor_train", 410, "params").divide({"c": weight})["c"]
    assert isinstance(train, InFormat)
    assert train.rank == (1, 9)


def test_a_measured_price_is_used() -> None:
    def seconds(site: Site, rank: Rank | None) -> float:
        """Layer a is all that takes time, and less of it only in steps of eight ranks."""
        return (1.0 if rank is None else 0.1 * math.ceil(rank[0] / 8)) if site.name == "a" else 0.0

    made = RankBudget(SITES, "channel_svd", 0.1, seconds).divide(weights_of(SITES))
    assert isinstance(made["a"], InFormat)
    assert made["a"].rank == (8,)
    assert all(isinstance(made[name], Unconstrained) for name in "bcd")


def test_kept_ranks_resist_small_changes_of_the_weights() -> None:
    weights, budget = weights_of(SITES), RankBudget(SITES, "tucker2", 0.3 * dense(SITES, "macs"))
    before = ranks(budget.divide(weights))
    noisy = {
        name: weight
        + 0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
        for name, weight in weights.items()
    }
    moved, held = (
        ranks(RankBudget(SITES, "tucker2", budget.limit, keep=keep, hysteresis=3.0).divide(noisy))
        for keep in ({}, before)
    )
    assert moved != before
    assert sum(held[name] != rank for name, rank in before.items()) < sum(
        moved[name] != rank for name, rank in before.items()
    )
    with pytest.raises(PlanError, match="to keep"):
        RankBudget(SITES, "tucker2", budget.limit, keep={"a": (3,)}).divide(weights)


def ranks(made: Mapping[str, Constraint]) -> dict[str, Rank]:
    return {name: one.rank for name, one in made.items() if isinstance(one, InFormat)}


def test_singular_values_below_the_soft_threshold_are_free_to_drop() -> None:
    u, v = (
        torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(seed)))[0]
        for seed in (1, 2)
    )
    weight = (u * torch.tensor([5.0, 4.0, 3.0, *[0.1] * 27])) @ v
    made = {
        shrink: RankBudget({"r": LINEARS["r"]}, "svd", 900, "params", shrink=shrink).divide({"r": weight})[
            "r"
        ]
        for shrink in (0.0, 0.2, 3.5)
    }
    assert isinstance(made[0.0], Unconstrained)
    assert [made[shrink].rank for shrink in (0.2, 3.5)] == [(3,), (2,)]


def test_the_least_rank_holds_and_a_zero_weight_has_it() -> None:
    zero = {**weights_of(LINEARS), "p": torch.zeros(40, 60)}
    made = RankBudget(LINEARS, "svd", 1500, "params", least=2).divide(zero)
    assert made["p"].rank == (2,)
    assert all(one.rank[0] >= 2 for one in made.values())


def test_a_sensitive_layer_gets_more_rank() -> None:
    sites = {name: conv(name, 16, 16, 3) for name in "ab"}
    weights = weights_of(sites)
    limit = 0.4 * dense(sites, "macs")
    plain = ranks(RankBudget(sites, "tucker2", limit).divide(weights))
    favoured = ranks(RankBudget(sites, "tucker2", limit, sensitivity={"a": 100.0}).divide(weights))
    assert sum(favoured["a"]) > sum(plain["a"])
    assert sum(favoured["b"]) < sum(plain["b"])
    for wrong in ({"a": -1.0}, {"c": 1.0}):
        with pytest.raises(UsageError, match="sensitivities"):
            RankBudget(sites, "tucker2", limit, sensitivity=wrong)


def test_rank_budgets_that_cannot_be_met_are_refused() -> None:
    weights = weights_of(SITES)
    least = sum(FORMATS.get("tucker2").cost(site, (1, 1)).macs for site in SITES.values())
    assert ranks(RankBudget(SITES, "tucker2", least).divide(weights)) == dict.fromkeys(SITES, (1, 1))
    with pytest.raises(
        BudgetError, match=f"budget of {least - 1:,} macs is below the smallest reachable .{least:,} macs"
    ):
        RankBudget(SITES, "tucker2", least - 1).divide(weights)
    with pytest.raises(PlanError, match="differ in a"):
        RankBudget(SITES, "tucker2", 1e6).divide(
            {name: weight for name, weight in weights.items() if name != "a"}
        )
    with pytest.raises(PlanError, match="has shape"):
        RankBudget(SITES, "tucker2", 1e6).divide({**weights, "a": weights["b"]})
    with pytest.raises(PlanError, match="no spectrum"):
        RankBudget(SITES, "cp", 1e6)
    with pytest.raises(PlanError, match="does not fit"):
        RankBudget(LINEARS, "tucker2", 1e6)
    with pytest.raises(PlanError, match="no activation sizes"):
        RankBudget({"x": Site("x", "linear", (4, 4))}, "svd", 10)
    with pytest.raises(UsageError, match="measure"):
        RankBudget(SITES, "tucker2", 1e6, "flops")
    with pytest.raises(UsageError, match="hysteresis"):
        RankBudget(SITES, "tucker2", 1e6, hysteresis=0.5)


LAYERS = {
    "a": torch.tensor([[3.0, -1.0, 0.5, 0.2]]),
    "b": torch.tensor([[10.0, 11.0], [-12.0, 13.0]]),
    "c": torch.tensor([[0.01, 0.1, -0.001]]),
}


def kept(budget: WeightBudget, weights: Mapping[str, Tensor] = LAYERS) -> dict[str, int]:
    made = budget.divide(weights)
    return {
        name: one.keep if isinstance(one, Sparse) else weights[name].numel() for name, one in made.items()
    }


@pytest.mark.parametrize("keep", range(3, 12))
@pytest.mark.parametrize("score", ["magnitude", "relative", "lamp"])
def test_the_weights_of_largest_score_are_kept(score: str, keep: int) -> None:
    scores = []
    for name, weight in LAYERS.items():
        values = weight.reshape(-1).double()
        for w in values:
            larger = values[values.abs() >= w.abs()].square().sum()
            scores.append(
                (
                    float(
                        {
                            "magnitude": w.abs(),
                            "relative": w.abs() / values.square().mean().sqrt(),
                            "lamp": w.square() / larger,
                        }[score]
                    ),
                    name,
                )
            )
    best = {name: max(pair[0] for pair in scores if pair[1] == name) for name in LAYERS}
    order = sorted(scores, key=lambda pair: (pair[0] < best[pair[1]], -pair[0]))[
        :keep
    ]  # each layer keeps one
    assert kept(WeightBudget(keep, score)) == {
        name: sum(pair[1] == name for pair in order) for name in LAYERS
    }


def test_a_metric_stands_for_what_weights_are_worth() -> None:
    name = next(iter(LAYERS))
    assert sum(kept(WeightBudget(6, metric={name: torch.zeros_like(LAYERS[name])})).values()) == 6
    assert kept(WeightBudget(6, metric={name: torch.zeros_like(LAYERS[name])}))[name] == 1
    metric = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(4))
        for name, weight in LAYERS.items()
    }
    worth = {name: weight * metric[name].sqrt() for name, weight in LAYERS.items()}
    assert kept(WeightBudget(6, metric=metric)) == kept(WeightBudget(6), worth)


def test_bounds_and_dense_layers_of_a_weight_budget() -> None:
    assert kept(WeightBudget(8, dense=("c",), most={"b": 2})) == {"a": 3, "b": 2, "c": 3}
    assert kept(WeightBudget(7, least={"a": 4})) == {"a": 4, "b": 2, "c": 1}
    assert kept(WeightBudget(100)) == {"a": 4, "b": 4, "c": 3}
    assert kept(WeightBudget(100, most={"b": 2})) == {"a": 4, "b": 2, "c": 3}
    assert isinstance(WeightBudget(8, dense=("c",)).divide(LAYERS)["c"], Unconstrained)
    equal = {"x": torch.ones(2, 3), "y": torch.ones(2, 3)}
    assert kept(WeightBudget(7), equal) == {"x": 6, "y": 1}


def test_weight_budgets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(
        BudgetError, match=r"budget of 5 weights is below the smallest reachable \(6, of which 4"
    ):
        WeightBudget(5, dense=("a",)).divide(LAYERS)
    assert kept(WeightBudget(6, dense=("a",))) == {"a": 4, "b": 1, "c": 1}
    with pytest.raises(PlanError, match="known weights"):
        WeightBudget(5, dense=("z",)).divide(LAYERS)
    with pytest.raises(UsageError, match="at least 3 and at most 2"):
        WeightBudget(9, least=3, most={"a": 2}).divide(LAYERS)
    with pytest.raises(UsageError, match="score"):
        WeightBudget(9, "norm")


@pytest.mark.parametrize("share", [1.2, 2.5, 4.0, 7.9])
def test_bits_are_within_the_limit_and_beat_equal_ones(share: float) -> None:
    weights = weights_of(SITES)
    weights["a"] = weights["a"].clone().flatten()[:200].reshape(20, 10)
    weights["b"] = Sparse(300).project(weights["b"])
    survivors = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    limit = int(share * sum(survivors.values()))
    made = LevelBudget(limit).divide(weights)
    assert all(isinstance(one, UniformLevels) for one in made.values())
    assert sum(one.bits * survivors[name] for name, one in made.items()) <= limit
    equal = {name: UniformLevels(2 ** (int(share) - 1)) for name in weights}
    assert lost(weights, made) < lost(weights, equal)


def test_bits_are_the_best_of_all_where_layers_are_of_one_size() -> None:
    weights = {
        name: torch.randn(20, 5, generator=torch.Generator().manual_seed(k)) ** (2 * k + 1)
        for k, name in enumerate("abc")
    }
    choices = {
        name: [lost({name: weight}, {name: UniformLevels(2 ** (b - 1))}) for b in range(1, 9)]
        for name, weight in weights.items()
    }
    for total in range(3, 25):
        best = min(
            sum(choices[name][b - 1] for name, b in zip("abc", bits, strict=True))
            for bits in itertools.product(range(1, 9), repeat=3)
            if sum(bits) <= total
        )
        assert lost(weights, LevelBudget(100 * total).divide(weights)) == pytest.approx(best, rel=0.02)


def test_a_sensitive_layer_gets_more_bits() -> None:
    weights = {name: torch.randn(20, 5, generator=torch.Generator().manual_seed(1)) for name in "ab"}
    bits = {name: one.bits for name, one in LevelBudget(800, {"b": 100.0}).divide(weights).items()}
    assert bits["b"] > bits["a"]
    assert sum(bits.values()) == 8


def test_bit_budgets_that_cannot_be_met_are_refused() -> None:
    weights = {"a": torch.ones(3, 4), "b": torch.zeros(3, 4)}
    assert LevelBudget(12).divide(weights)["a"] == UniformLevels(1)
    with pytest.raises(BudgetError, match=r"budget of 11 bits is below the smallest reachable \(12 bits"):
        LevelBudget(11).divide(weights)
    with pytest.raises(PlanError, match="known weights"):
        LevelBudget(99, {"z": 1.0}).divide(weights)
    with pytest.raises(UsageError, match="bits"):
        LevelBudget(99, bits=(0, 4))
    with pytest.raises(UsageError, match="sensitivities"):
        LevelBudget(99, {"a": -1.0})


@pytest.mark.parametrize("seed", range(8))
def test_an_allocation_is_within_one_step_of_the_best(seed: int) -> None:
    random = np.random.default_rng(seed)
    options = {name: Options(random.integers(1, 40, 6).astype(float), random.random(6)) for name in "abcd"}
    for limit in (60.0, 90.0, 120.0):
        fitting = [
            sum(option.losses[k] for option, k in zip(options.values(), choice, strict=True))
            for choice in itertools.product(range(6), repeat=4)
            if sum(option.costs[k] for option, k in zip(options.values(), choice, strict=True)) <= limit
        ]
        chosen = allocate(options, limit, str)
        assert sum(options[name].costs[k] for name, k in chosen.items()) <= limit
        step = max(float(np.ptp(option.losses)) for option in options.values())
        assert sum(options[name].losses[k] for name, k in chosen.items()) < min(fitting) + 0.25 * step


def test_an_allocation_skips_options_above_the_hull() -> None:
    """A dense layer at cost 10, and factors that cost more than that until much is lost."""
    option = Options(np.array([14.0, 12.0, 6.0, 4.0, 10.0]), np.array([0.01, 0.05, 0.3, 0.9, 0.0]))
    assert option.hull() == [3, 2, 4]
    assert [allocate({"x": option}, limit, str)["x"] for limit in (20.0, 10.0, 9.0, 6.0, 5.0, 4.0)] == [
        4,
        4,
        2,
        2,
        3,
        3,
    ]


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("keep", [200, 700, 1500])
def test_groups_of_many_layers_share_one_total_of_weights(side: str, keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"a": (40, 30), "b": (10, 5, 3, 3), "c": (6, 50)}.items()
    }
    weights["b"] *= 0.01
    found = GroupBudget(keep, side, (8, 8)).divide(weights)
    kept = {name: int(found[name].project(weight).count_nonzero()) for name, weight in weights.items()}
    assert keep - 16 <= sum(kept.values()) <= keep
    assert min(kept.values()) > 0
    # a scale of a layer changes nothing, what its weights are worth to the loss does
    scaled = GroupBudget(keep, side, (8, 8)).divide({**weights, "a": 9 * weights["a"]})
    assert scaled == found
    metric = {
        name: torch.full(weight.shape, 100.0 if name == "c" else 0.01) for name, weight in weights.items()
    }
    worth = GroupBudget(keep, side, (8, 8), metric=metric).divide(weights)
    assert int(worth["c"].project(weights["c"]).count_nonzero()) > kept["c"]
    half = GroupBudget(1300, side, (8, 8), least=0.5).divide(weights)
    assert all(
        int(half[name].project(weight).count_nonzero()) >= 0.45 * weight.numel()
        for name, weight in weights.items()
    )
    with pytest.raises(BudgetError, match="below the smallest reachable"):
        GroupBudget(10, side, (8, 8), least=0.5).divide(weights)
