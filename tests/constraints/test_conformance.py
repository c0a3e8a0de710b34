"""What every registered constraint promises, on examples of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tdpass.constraints import CONSTRAINTS, Constraint
from tdpass.constraints.composed import Composed
from tdpass.constraints.device_levels import DeviceLevels
from tdpass.constraints.in_block import InBlock
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.integer import IntegerLevels
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.n_of_m import NOfM
from tdpass.constraints.one_sign import OneSign
from tdpass.constraints.power_of_two import PowerOfTwoLevels
from tdpass.constraints.sparse import Sparse
from tdpass.constraints.support import Support
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.errors import InvalidModelError
from tdpass.formats import FORMATS
from tdpass.site import Site

CONV = Site("conv", "conv", (12, 10, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
LINEAR = Site("linear", "linear", (24, 36))
# Alternating least squares ends near, not at, the factors that a weight has.
SEARCHED = {"cp": 0.05, "block_term": 0.05, "tensor_ring": 0.05}


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal numbers on decaying directions of every mode, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    for axis, size in enumerate(shape):
        scale = torch.arange(1, size + 1).rsqrt().reshape([-1 if k == axis else 1 for k in range(len(shape))])
        weight = weight * scale
    weight.view(-1)[::7] = 0
    return weight


STATES = tuple(0.1 + 0.06 * k for k in range(16))
MEASURED = (0.11, 0.3, 0.42, 1.0)


def mask_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.4


EXAMPLES: dict[str, list[tuple[Constraint, tuple[int, ...]]]] = {
    "unconstrained": [(Unconstrained(), CONV.shape)],
    "in_format": [
        (InFormat(CONV, "tucker2", (5, 4)), CONV.shape),
        (InFormat(CONV, "tucker2", (12, 10)), CONV.shape),
        (InFormat(CONV, "channel_svd", (3,)), CONV.shape),
        (InFormat(CONV, "input_svd", (3,)), CONV.shape),
        (InFormat(CONV, "spatial_svd", (6,)), CONV.shape),
        (InFormat(CONV, "tensor_train", (4, 5)), CONV.shape),
        (InFormat(CONV, "tensor_train", (2, 4, 5, 3)), CONV.shape),
        (InFormat(CONV, "cp", (6,)), CONV.shape),
        (InFormat(CONV, "block_term", (2, 3, 3)), CONV.shape),
        (InFormat(LINEAR, "svd", (5,)), LINEAR.shape),
        (InFormat(LINEAR, "tensor_train", (6,)), LINEAR.shape),
        (InFormat(LINEAR, "tensor_train", (3, 5)), LINEAR.shape),
        (InFormat(LINEAR, "tensor_ring", (2, 2, 2, 2)), LINEAR.shape),
        *(
            (InFormat(CONV, form, rank).near(weight_of(CONV.shape)), CONV.shape)
            for form, rank in {"cp": (6,), "block_term": (2, 3, 3)}.items()
        ),
        (InFormat(LINEAR, "tensor_ring", (2, 2, 2, 2)).near(weight_of(LINEAR.shape)), LINEAR.shape),
    ],
    "sparse": [
        *(
            (Sparse(count, group), CONV.shape)
            for group, count in {
                "weight": 100,
                "row": 5,
                "column": 30,
                "filter": 4,
                "channel": 3,
                "kernel": 25,
            }.items()
        ),
        (Sparse(9, "block", (5, 16)), CONV.shape),
        (Sparse(10**6), CONV.shape),
        (Sparse(7), LINEAR.shape),
    ],
    "n_of_m": [(NOfM(2, 4), LINEAR.shape), (NOfM(3, 7), CONV.shape)],
    "support": [(Support(mask_of(CONV.shape)), CONV.shape)],
    "uniform_levels": [
        (constraint, CONV.shape)
        for constraint in (
            UniformLevels(1),
            UniformLevels(8),
            UniformLevels(4, 0.1),
            UniformLevels(4, 0.1, 0.3),
        )
    ],
    "power_of_two_levels": [
        (PowerOfTwoLevels(1), CONV.shape),
        (PowerOfTwoLevels(4), CONV.shape),
        (PowerOfTwoLevels(3, -1), CONV.shape),
    ],
    "device_levels": [
        (DeviceLevels(STATES), CONV.shape),
        (DeviceLevels(MEASURED), CONV.shape),
        (DeviceLevels(MEASURED, 0.7), LINEAR.shape),
    ],
    "in_block": [
        (InBlock(20), CONV.shape),
        (InBlock(9, "row", (4, 16)), CONV.shape),
        (InBlock(40, "column", (5, 7)), LINEAR.shape),
    ],
    "one_sign": [(OneSign(4), LINEAR.shape), (OneSign(8), CONV.shape), (OneSign(1), CONV.shape)],
    "composed": [
        (Composed((Support(mask_of(CONV.shape)), DeviceLevels(STATES, 0.9))), CONV.shape),
        (Composed((InBlock(30), OneSign(4))), LINEAR.shape),
    ],
    "integer_levels": [
        (IntegerLevels(8), CONV.shape),
        (IntegerLevels(4), LINEAR.shape),
        (IntegerLevels(3, torch.full((12,), 0.1)), CONV.shape),
    ],
}
CASES = [
    pytest.param(constraint, shape, id=f"{name}-{constraint}-{len(shape)}d")
    for name, found in EXAMPLES.items()
    for constraint, shape in found
]
each_case = pytest.mark.parametrize(("constraint", "shape"), CASES)


def tolerance(constraint: Constraint) -> float:
    return SEARCHED.get(constraint.format, 1e-5) if isinstance(constraint, InFormat) else 1e-6


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def test_every_constraint_is_tried() -> None:
    assert set(EXAMPLES) == set(CONSTRAINTS.names())
    assert all(
        type(constraint) is CONSTRAINTS.get(name)
        for name, found in EXAMPLES.items()
        for constraint, _ in found
    )


def test_every_format_with_factors_of_one_site_is_tried() -> None:
    tried = {constraint.format for constraint, _ in EXAMPLES["in_format"] if isinstance(constraint, InFormat)}
    assert tried == {form.name for form in FORMATS if form.offered and (form.fits(CONV) or form.fits(LINEAR))}


@each_case
def test_a_projection_is_allowed_so_projecting_it_changes_nothing(
    constraint: Constraint, shape: tuple[int, ...]
) -> None:
    once = constraint.project(weight_of(shape))
    assert distance(constraint.project(once), once) <= tolerance(constraint) * float(once.norm())


@each_case
def test_no_other_allowed_weight_that_is_tried_is_nearer(
    constraint: Constraint, shape: tuple[int, ...]
) -> None:
    weight = weight_of(shape)
    mine = constraint.project(weight)
    # the searched formats and the quasi-optimal ones may lose to a neighbour by a little
    slack = 1.02 if isinstance(constraint, InFormat) else 1 + 1e-4
    for seed in range(5):
        noise = weight_of(shape, seed + 1)
        for other in (weight + 0.02 * noise, weight + 0.3 * noise, noise, 1.05 * weight):
            # zeros are the pruned state of a level set, so they are no choice of the projection
            allowed = constraint.project(torch.where(weight == 0, 0, other))
            assert distance(weight, mine) <= slack * distance(weight, allowed) + 1e-6


@each_case
def test_the_result_is_like_the_input_and_the_input_is_as_it_was(
    constraint: Constraint, shape: tuple[int, ...]
) -> None:
    missed = distance(constraint.project(weight_of(shape)), weight_of(shape))
    for dtype, near in ((torch.float32, 0.0), (torch.float64, 1e-4), (torch.bfloat16, 0.02)):
        weight = weight_of(shape).to(dtype).requires_grad_()
        before = weight.detach().clone()
        made = constraint.project(weight)
        assert (made.shape, made.dtype, made.device) == (weight.shape, dtype, weight.device)
        assert not made.requires_grad
        assert distance(made, before) == pytest.approx(missed, abs=near * float(before.norm()))
        made.add_(1)
        assert torch.equal(weight, before)


@each_case
def test_memory_layout_does_not_matter_and_results_repeat(
    constraint: Constraint, shape: tuple[int, ...]
) -> None:
    weight = weight_of(shape)
    spread = torch.empty(*reversed(shape)).permute(*reversed(range(len(shape)))).copy_(weight)
    assert not spread.is_contiguous()
    first = constraint.project(weight)
    assert torch.equal(constraint.project(weight), first)
    torch.testing.assert_close(constraint.project(spread), first, rtol=1e-4, atol=1e-5)


@each_case
def test_frozen_keeps_an_allowed_weight_and_its_structure(
    constraint: Constraint, shape: tuple[int, ...]
) -> None:
    allowed = constraint.project(weight_of(shape))
    frozen = constraint.frozen(allowed)
    assert distance(frozen.project(allowed), allowed) <= tolerance(constraint) * float(allowed.norm())
    moved = frozen.project(torch.where(allowed == 0, 0, allowed + 0.05 * weight_of(shape, 3)))
    assert distance(frozen.project(moved), moved) <= tolerance(constraint) * float(moved.norm())
    assert distance(frozen.frozen(moved).project(moved), moved) <= tolerance(constraint) * float(moved.norm())
    if isinstance(constraint, Sparse | NOfM):
        revived = frozen.project(torch.where(allowed == 0, 100.0, allowed))
        assert bool((revived[~constraint.mask(allowed)] == 0).all())


@each_case
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_weights_of_one_value_are_projected(
    constraint: Constraint, shape: tuple[int, ...], value: float
) -> None:
    made = constraint.project(torch.full(shape, value))
    assert bool(made.isfinite().all())
    if value == 0:
        assert not made.any()
        assert not constraint.frozen(made).project(made).any()


@each_case
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(
    constraint: Constraint, shape: tuple[int, ...], value: float
) -> None:
    weight = weight_of(shape)
    weight.view(-1)[3] = value
    with pytest.raises(InvalidModelError, match="finite"):
        constraint.project(weight)


@each_case
def test_its_text_is_short(constraint: Constraint, shape: tuple[int, ...]) -> None:
    assert 0 < len(str(constraint)) <= 40
    assert "\n" not in str(constraint)
