"""The knapsack against brute force."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest

from tdpass.cost import Cost
from tdpass.errors import BudgetError
from tdpass.form import DENSE, Form
from tdpass.planner.candidates import Candidate
from tdpass.planner.select import Option, _silenced, select


def _options(seed: int) -> tuple[list[Option], list[str]]:
    draw = np.random.default_rng(seed)
    sites = [f"s{k}" for k in range(4)]
    options = []
    for site in sites:
        options.append(Option({site: Candidate(DENSE, Cost(100, 1000, 400), 0.0)}, 0.0))
        for rank in range(1, 5):
            cost = Cost(int(draw.integers(5, 95)), int(draw.integers(50, 950)), 0)
            loss = float(draw.random())
            options.append(Option({site: Candidate(Form("svd", (rank,)), cost, loss, loss)}, loss))
    return options, sites


def _best(options: list[Option], sites: list[str], limits: dict[str, int], fixed: Cost) -> float | None:
    groups = [[o for o in options if set(o.parts) == {site}] for site in sites]
    joint = [o for o in options if len(o.parts) > 1]
    best = None
    whole = list(itertools.product(*groups))
    for option in joint:
        rest = [group for group, site in zip(groups, sites, strict=True) if site not in option.parts]
        whole += [(option, *chosen) for chosen in itertools.product(*rest)]
    for chosen in whole:
        total = sum((o.cost for o in chosen), fixed)
        if all(total.get(m) <= v for m, v in limits.items()):
            loss = sum(o.loss for o in chosen)
            best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [{"params": 200}, {"macs": 2200}, {"params": 260, "macs": 2300}])
def test_the_choice_is_the_best_there_is(seed: int, limits: dict[str, int]) -> None:
    options, sites = _options(seed)
    options.append(
        Option(
            {
                "s0": Candidate(Form("dense", (), inputs=0), Cost(), 1.0),
                "s1": Candidate(Form("dense", (), inputs=0), Cost(), 1.0),
            },
            0.3,
        )
    )
    fixed = Cost(10, 20, 0)
    chosen = select(options, sites, limits, fixed)
    assert set(chosen) == set(sites)
    losses = {
        id(part): option.loss / len(option.parts) for option in options for part in option.parts.values()
    }
    assert sum(losses[id(part)] for part in chosen.values()) == pytest.approx(
        _best(options, sites, limits, fixed)
    )


def test_an_impossible_budget_names_the_smallest_reachable() -> None:
    options, sites = _options(0)
    least = 10 + sum(min(o.cost.params for o in options if site in o.parts) for site in sites)
    with pytest.raises(
        BudgetError, match=f"budget of {least - 1:,} params is below the smallest reachable plan \\({least:,}"
    ):
        select(options, sites, {"params": least - 1}, Cost(10, 0, 0))
    assert select(options, sites, {"params": least}, Cost(10, 0, 0))


def test_what_the_solver_prints_stays_away_from_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with _silenced():
        os.write(1, b"HighsMipSolverData::noise")
    os.write(1, b"wanted")
    assert capfd.readouterr().out == "wanted"


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("seed", range(3))
def test_a_bound_on_seconds_is_kept_whatever_their_size(seed: int, scale: float) -> None:
    options, sites = _options(seed)
    timed = [
        Option(
            {
                name: replace(part, cost=part.cost.replace(seconds=part.cost.macs / 1000 * scale))
                for name, part in o.parts.items()
            },
            o.loss,
        )
        for o in options
    ]
    fixed = Cost(0, 0, 0, 0.1 * scale)
    chosen = select(timed, sites, {"seconds": 2.2 * scale}, fixed)
    spent = fixed + sum((part.cost for part in chosen.values()), Cost())
    assert spent.seconds <= 2.2 * scale * (1 + 1e-5)
    counted = select(options, sites, {"macs": 2100}, Cost())
    assert {name: part.rank for name, part in chosen.items()} == {
        name: part.rank for name, part in counted.items()
    }


def test_an_impossible_bound_on_seconds_names_the_smallest_reachable() -> None:
    parts = [
        Candidate(DENSE, Cost(seconds=3e-3), 0.0),
        Candidate(Form("svd", (1,)), Cost(seconds=1.5e-3), 1.0, 1.0),
    ]
    options = [Option({"s": part}, part.loss) for part in parts]
    with pytest.raises(
        BudgetError,
        match=r"budget of 1ms seconds is below the smallest reachable plan "
        r"\(1\.751ms, of which 250us in layers that stay",
    ):
        select(options, ["s"], {"seconds": 1e-3}, Cost(seconds=250e-6))
    assert select(options, ["s"], {"seconds": 1.751e-3}, Cost(seconds=250e-6))["s"].format == "svd"


def test_no_room_at_all_leaves_only_what_costs_nothing() -> None:
    options = [
        Option({"s": Candidate(DENSE, Cost(macs=1), 0.0)}, 0.0),
        Option({"s": Candidate(Form("dense", (), inputs=0), Cost(), 1.0)}, 1.0),
    ]
    assert select(options, ["s"], {"macs": 5}, Cost(macs=5))["s"].form.inputs == 0
