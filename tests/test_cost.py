"""Costs and budgets."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from tdpass.cost import Bound, Budget, Cost, amount
from tdpass.errors import BudgetError, PlanError, UsageError
from tdpass.measures import MEASURES, Measure, Needs, register_measure
from tdpass.pipeline import Pipeline
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report
from tdpass.terminal import report_view
from tdpass.views.tables import to_text


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.4, 400),
        (1, 1000),
        ("0.4", 400),
        ("40%", 400),
        ("2k", 2000),
        ("1.5M", 1_500_000),
        ("2KiB", 2048),
        ("300B", 300),
        ("1G", 10**9),
    ],
)
def test_bounds_are_read(value: float | str, limit: int) -> None:
    assert Bound.parse("macs", value).limit(1000) == limit


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.4, 0.8),
        ("40%", 0.8),
        ("3ms", 3e-3),
        ("250us", 250e-6),
        ("250 \u00b5s", 250e-6),
        ("0.01s", 0.01),
        ("1s", 1.0),
        ("2e-3s", 2e-3),
    ],
)
def test_bounds_on_time_are_read(value: float | str, limit: float) -> None:
    assert Bound.parse("seconds", value).limit(2.0) == pytest.approx(limit)


@pytest.mark.parametrize(
    "value", [0, 1.5, "3", "3M", "3MB", "0ms", "-1ms", "3 minutes", "ms", "fast", True, None]
)
def test_a_senseless_bound_on_time_says_what_to_write(value: object) -> None:
    with pytest.raises(BudgetError, match="such as '3ms'"):
        Bound.parse("seconds", value)  # type: ignore[arg-type]


def test_latency_is_another_word_for_seconds() -> None:
    budget = Budget.parse({"latency": "3ms", "macs": 0.5})
    assert budget == Budget.parse({"seconds": "3ms", "macs": 0.5})
    assert budget.limits(Cost(1, 100, 1, 0.5)) == {"seconds": 3e-3, "macs": 50}
    assert str(budget) == "seconds=3ms, macs=0.5"
    with pytest.raises(BudgetError, match="given twice"):
        Budget.parse({"latency": "3ms", "seconds": 0.4})


@pytest.mark.parametrize("seconds", [2.5, 0.25, 3.25e-3, 4.5e-6, 1e-8])
def test_an_amount_of_time_can_be_read_again(seconds: float) -> None:
    assert Bound.parse("seconds", amount("seconds", seconds)).limit(0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, 120_000_000, "120", "fast", "", "150%", True, None, [0.4], float("nan")]
)
def test_an_ambiguous_or_senseless_bound_is_an_error_that_says_what_to_write(value: object) -> None:
    with pytest.raises(BudgetError, match="fraction in \\(0, 1\\]"):
        Bound.parse("macs", value)  # type: ignore[arg-type]


def test_several_bounds_at_once() -> None:
    budget = Budget.parse({"macs": 0.5, "bytes": "2MiB", "max_error": 0.1})
    assert budget.limits(Cost(10, 100, 10**9)) == {"macs": 50, "bytes": 2 * 2**20}
    assert budget.max_error == 0.1
    assert str(budget) == "macs=0.5, bytes=2,097,152, max_error=0.1"


@pytest.mark.parametrize("spec", [{}, {"flops": 0.5}, {"max_error": 2}, {"max_error": "a"}])
def test_unknown_or_empty_budgets_are_errors(spec: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(spec)  # type: ignore[arg-type]


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(1, 1, 1) - Cost(0, 3, 0) == Cost(2, 0, 4)
    assert (Cost(seconds=0.5) + Cost(seconds=0.25) - Cost(seconds=0.125)).get("seconds") == 0.625


@pytest.mark.parametrize(
    "share", [0.4, np.float32(0.4), np.float64(0.4), np.array(0.4)[()], Fraction(2, 5), "40%"]
)
@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
def test_any_kind_of_number_is_a_bound_and_a_single_one_bounds_the_default(
    share: object, measure: str
) -> None:
    assert Budget.parse({measure: share}).limits(Cost(1000, 1000, 1000)) == {measure: 400}
    assert Budget.parse(share, default=measure).limits(Cost(1000, 1000, 1000)) == {measure: 400}


@pytest.mark.parametrize("spec", [True, None, [0.4], 0, 1.5, float("nan"), "many"])
def test_what_is_no_budget_is_an_error_that_says_what_to_write(spec: object) -> None:
    with pytest.raises(BudgetError, match=r"write|empty|outside|fraction"):
        Budget.parse(spec)  # type: ignore[arg-type]


@pytest.fixture
def coins() -> Iterator[str]:
    """A measure that only this test knows."""
    register_measure(
        Measure(
            "coins",
            "Coins",
            "cheaper",
            "dearer",
            "5ct",
            {"eur": 1.0, "ct": 0.01},
            whole=False,
            needs=Needs.TARGET,
            aliases=("money",),
        )
    )
    yield "coins"
    del MEASURES._entries["coins"]


def test_a_measure_that_is_registered_is_known_everywhere(coins: str) -> None:
    cost = Cost(1, coins=0.5) + Cost(coins=0.25) - Cost(params=1)
    assert cost == Cost(coins=0.75)
    assert cost != Cost(coins=0.5)
    budget = Budget.parse({"money": "50ct", "macs": 0.5})
    assert budget.limits(Cost(macs=10, coins=2.0)) == {"coins": 0.5, "macs": 5}
    assert str(budget) == "coins=50ct, macs=0.5"
    assert str(Pipeline.parse("plan{coins=0.5,joint=false}")) == "plan{coins=0.5,joint=false}"
    plan = RankPlan((), Cost(1, 2, 4, coins=0.5))
    assert RankPlan.from_json(plan.to_json()) == plan
    assert "coins" in plan.to_json()
    shown = to_text(report_view(Report(original=Cost(coins=2.0), final=Cost(coins=0.5)), None, None), None)
    assert "Coins" in shown
    assert "4.00x" in shown


def test_a_measure_that_is_not_registered_is_an_error_that_lists_those_that_are() -> None:
    for attempt in (lambda: Cost(coins=1), lambda: Cost().get("coins"), lambda: Budget.parse({"coins": 0.5})):
        with pytest.raises((UsageError, BudgetError), match=r"'coins'; known: .*joules"):
            attempt()
    with pytest.raises(PlanError, match=r"measure 'coins' is not known; known: .*joules"):
        RankPlan.from_json(RankPlan((), Cost()).to_json().replace('"params"', '"coins"'))
    with pytest.raises(UsageError, match="'latency' is registered twice"):
        register_measure(Measure("latency", "", "", "", "", {}))


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_every_measure_reads_its_example_and_what_it_writes_and_stands_in_files(measure: Measure) -> None:
    value = measure.read(measure.example)
    assert value is not None
    if not measure.whole:
        assert measure.read(measure.write(value)) == pytest.approx(value)
    cost = Cost.of({measure.name: int(value) if measure.whole else value})
    assert cost.get(measure.name) == value
    read = RankPlan.from_json(RankPlan((), cost).to_json()).original
    for same in (
        copy.deepcopy(cost),
        pickle.loads(pickle.dumps(cost)),
        read,
        cost.replace(params=cost.params),
    ):
        assert same == cost
        assert hash(same) == hash(cost)
    assert Pipeline.parse([{"plan": {measure.name: measure.example}}]).passes[0].options() == {
        measure.name: measure.example
    }
    for wrong in (-1, True, "1", None, *([0.5] if measure.whole else [])):
        with pytest.raises(ValueError, match=f"{measure.name} is {wrong!r}: expected"):
            Cost.of_plain({measure.name: wrong})


def test_a_file_holds_only_the_measures_that_are_there() -> None:
    assert Cost(1, 2, 3).plain() == {"params": 1, "macs": 2, "bytes": 3, "seconds": 0.0}
    assert Cost(1, 2, 3, joules=1e-3).plain() == {
        "params": 1,
        "macs": 2,
        "bytes": 3,
        "seconds": 0.0,
        "joules": 1e-3,
    }
    assert Cost.of_plain({"params": 1}) == Cost(1)


@pytest.mark.parametrize(
    ("measure", "text", "value"),
    [
        ("joules", "5mJ", 5e-3),
        ("area", "2 mm2", 2.0),
        ("cycles", "3k", 3000),
        ("bytes", "2MiB", 2**21),
        ("joules", "1e3 pJ", 1e-9),
    ],
)
def test_amounts_are_read_in_the_units_of_their_measure(measure: str, text: str, value: float) -> None:
    assert Bound.parse(measure, text).limit(1.0) == pytest.approx(value)


@pytest.mark.parametrize(
    ("measure", "text"),
    [("joules", "5MJ"), ("joules", "5"), ("area", "2m2"), ("cycles", "3ms"), ("bytes", "2 bits")],
)
def test_an_amount_in_another_unit_says_what_to_write(measure: str, text: str) -> None:
    with pytest.raises(BudgetError, match=f"such as '{MEASURES.get(measure).example}'"):
        Bound.parse(measure, text)
