"""Random torch nets and ONNX graphs, one per seed.

Full rank changes nothing on new data, and reports say what independent measurements find.

Seeds rather than a strategy with shrinking, whose mutations would repeat the same few nets; a failure says
what was drawn.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from frontends import FRONTENDS
from invariants import at_a_budget, at_full_rank

FEW, MANY = 12, 200
SEEDS = [seed if seed < FEW else pytest.param(seed, marks=pytest.mark.slow) for seed in range(MANY)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_at_full_rank_new_data_is_answered_as_by_the_original(frontend: str, seed: int) -> None:
    rng = Random(seed)
    case = FRONTENDS[frontend].draw(rng)
    at_full_rank(FRONTENDS[frontend], case, rng)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_at_a_budget_the_report_holds_what_is_measured_and_counted(
    frontend: str, seed: int, folder: Path
) -> None:
    rng = Random(seed)
    case = FRONTENDS[frontend].draw(rng)
    at_a_budget(FRONTENDS[frontend], case, rng, folder)
