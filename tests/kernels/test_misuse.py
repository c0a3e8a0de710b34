"""Operators called wrongly, on odd shapes and on numbers at the edge of their range."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES
from odd import ODD, WITH_ACTIVATION, one_to_one
from selection import mostly_slow
from setting import ENDINGS, arguments, assert_close, exact, run_native
from torch import Tensor

from tdpass.kernels.base import OPS

MISUSE = Path(__file__).parent / "misuse.py"
EDGES = (
    float("nan"),
    float("inf"),
    -float("inf"),
    3.3e38,
    -3.3e38,
    1e38,
    -1e38,
    1e-40,
    -1e-40,
    100.0,
    -100.0,
    88.2,
    -88.2,
    5.0,
    -5.0,
    0.0,
    -0.0,
)


def test_every_operator_has_odd_shapes() -> None:
    assert set(ODD) == set(CASES)


@pytest.mark.parametrize("name", mostly_slow(CASES, ["linear_chain_int8"]))
def test_misuse_is_refused_or_answered_as_the_reference_does(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(MISUSE), name],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    said = done.stdout.splitlines()
    wrong = [before for before, line in itertools.pairwise(said) if line.startswith("WRONG")]
    assert done.returncode == 0, f"{wrong or said[-1:]} ended with {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(CASES))
def test_odd_shapes_agree_with_the_reference(name: str, count: int) -> None:
    op = OPS.get(name)
    torch.manual_seed(count)
    chance = random.Random(count)
    for _ in range(count):
        case = ODD[name](chance)
        for dtype in case.dtypes:
            args = arguments(op, case, dtype)
            try:
                assert_close(run_native(op, args), exact(op, args), case.allowed(dtype))
            except AssertionError as error:
                raise AssertionError(f"{case.name} in {dtype}: {error}") from None


@pytest.mark.parametrize("activation", ENDINGS)
@pytest.mark.parametrize("name", WITH_ACTIVATION)
def test_numbers_at_the_edge_come_through_the_epilogue_as_they_should(name: str, activation: str) -> None:
    op = OPS.get(name)
    for case in one_to_one(name, torch.tensor(EDGES), activation):
        for dtype in case.dtypes:
            args = arguments(op, case, dtype)
            (got,), (wanted,) = run_native(op, args), exact(op, args)
            assert_same_kinds(got, wanted.to(dtype), case.name)


def assert_same_kinds(got: Tensor, wanted: Tensor, name: str) -> None:
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "NaN": torch.isnan,
        "infinite": torch.isposinf,
        "minus infinite": torch.isneginf,
    }
    for kind, find in kinds.items():
        assert torch.equal(find(got), find(wanted)), (
            f"{name}: {kind} in {got.tolist()}, should be {wanted.tolist()}"
        )
    finite = torch.isfinite(wanted)
    one, other = got[finite].double(), wanted[finite].double()
    assert bool(((one - other).abs() <= 1e-2 * other.abs() + 2e-6).all()), (
        f"{name}: {one.tolist()}, should be {other.tolist()}"
    )
