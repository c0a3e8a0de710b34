"""Costs and budgets."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tdpass.cost import Bound, Budget, Cost, amount
from tdpass.errors import BudgetError


@pytest.mark.parametrize(
    ("value", "limit"),
    [(0.4, 400), (1, 1000), ("0.4", 400), ("40%", 400), ("2k", 2000), ("1.5M", 1_500_000), ("2KiB", 2048), ("300B", 300), ("1G", 10**9)],
)
def test_bounds_are_read(value: float | str, limit: int) -> None:
    assert Bound.parse("macs", value).limit(1000) == limit


@pytest.mark.parametrize(
    ("value", "limit"), [(0.4, 0.8), ("40%", 0.8), ("3ms", 3e-3), ("250us", 250e-6), ("250 \u00b5s", 250e-6), ("0.01s", 0.01), ("1s", 1.0), ("2e-3s", 2e-3)]
)
def test_bounds_on_time_are_read(value: float | str, limit: float) -> None:
    assert Bound.parse("seconds", value).limit(2.0) == pytest.approx(limit)


@pytest.mark.parametrize("value", [0, 1.5, "3", "3M", "3MB", "0ms", "-1ms", "3 minutes", "ms", "fast", True, None])
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


@pytest.mark.parametrize("value", [0, -1, 1.5, 120_000_000, "120", "fast", "", "150%", True, None, [0.4], float("nan")])
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


@pytest.mark.parametrize("share", [0.4, np.float32(0.4), np.float64(0.4), np.array(0.4)[()], Fraction(2, 5), "40%"])
@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
def test_any_kind_of_number_is_a_bound_and_a_single_one_bounds_the_default(share: object, measure: str) -> None:
    assert Budget.parse({measure: share}).limits(Cost(1000, 1000, 1000)) == {measure: 400}  # type: ignore[dict-item]
    assert Budget.parse(share, default=measure).limits(Cost(1000, 1000, 1000)) == {measure: 400}  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [True, None, [0.4], 0, 1.5, float("nan"), "many"])
def test_what_is_no_budget_is_an_error_that_says_what_to_write(spec: object) -> None:
    with pytest.raises(BudgetError, match=r"write|empty|outside|fraction"):
        Budget.parse(spec)  # type: ignore[arg-type]
