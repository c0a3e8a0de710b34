"""What methods do before and after training is shown as it goes on, not their training alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import training_run

import tdpass

SAID = {
    "haloc": {"pricing forms", "reading calibration data"},
    "batude": {"choosing ranks"},
    "lc": {"choosing ranks"},
    "cascaded-projection": {"projecting channels", "reading calibration data"},
    "admm-tt": {"choosing ranks"},
    "plan{macs=0.5},factorize": {"recording runs of the model", "reading calibration data"},
}
# each with its phases as short as they can be
SHORT: dict[str, dict[str, Any]] = {
    "haloc": {"budget": {"macs": 0.5}, "warm": 1, "search": 1, "tune": 0, "ranks": 2, "samples": 16},
    "batude": {"budget": {"macs": 0.5}, "rounds": 1, "rho": 0.05},
    "lc": {"penalty": 1.0, "rounds": 1, "rho": 0.1},
    "cascaded-projection": {"width": 0.5, "rounds": 1},
    "admm-tt": {"budget": {"params": 0.5}, "rounds": 1, "rho": 0.1},
}


@pytest.mark.parametrize("method", SAID)
def test_planning_is_shown_before_training(method: str) -> None:
    told = defaultdict[str, list[tuple[int, int]]](list)
    tdpass.train(
        training_run.network(),
        training_run.data(),
        {method: SHORT[method]} if method in SHORT else method,
        finetune=int(method not in SHORT),
        control=False,
        example_inputs=torch.zeros(2, 1, 8, 8),
        calibration=training_run.data().inputs[:16],
        progress=lambda what, done, of: told[what].append((done, of)),
    )
    names = list(told)
    first = next(place for place, what in enumerate(names) if what.startswith("train ("))
    assert SAID[method] <= set(names[:first])
    for what in SAID[method]:
        assert told[what][-1][0] == told[what][-1][1] > 0  # where bars are taken away
