"""Each projection against the optimum found by trying everything, or against the format's own factors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tdpass.constraints.composed import Composed
from tdpass.constraints.device_levels import DeviceLevels
from tdpass.constraints.in_block import InBlock
from tdpass.constraints.in_format import InFormat
from tdpass.constraints.integer import IntegerLevels
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.magnitudes import Magnitudes
from tdpass.constraints.n_of_m import NOfM
from tdpass.constraints.one_sign import OneSign
from tdpass.constraints.order_statistics import largest_first, nth_largest
from tdpass.constraints.power_of_two import PowerOfTwoLevels
from tdpass.constraints.sparse import Group, Sparse
from tdpass.constraints.spectral import SPECTRAL
from tdpass.constraints.support import Support
from tdpass.errors import PlanError, UsageError
from tdpass.formats import FORMATS, Rank
from tdpass.site import Site

WIDE = Site("wide", "conv", (96, 64, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
LARGE = Site("large", "conv", (192, 160, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
TALL = Site("tall", "conv", (40, 4, 3), (1,), ((1, 1),), (1,))
LINEAR = Site("linear", "linear", (120, 96))
GROUPS: dict[Group, list[tuple[slice, ...]]] = {
    "weight": [(slice(o, o + 1), slice(c, c + 1)) for o in range(3) for c in range(8)],
    "row": [(slice(o, o + 1), slice(None)) for o in range(3)],
    "filter": [(slice(o, o + 1), slice(None)) for o in range(3)],
    "column": [(slice(None), slice(c, c + 1)) for c in range(8)],
    "channel": [(slice(None), slice(2 * i, 2 * i + 2)) for i in range(4)],
    "kernel": [(slice(o, o + 1), slice(2 * i, 2 * i + 2)) for o in range(3) for i in range(4)],
    "block": [(slice(2 * o, 2 * o + 2), slice(3 * c, 3 * c + 3)) for o in range(2) for c in range(3)],
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(shape: tuple[int, ...]) -> Tensor:
    weight = normal(*shape)
    for axis, size in enumerate(shape):
        mixing = torch.linalg.qr(normal(size, size, seed=axis + 1))[0] * torch.arange(1, size + 1) ** -0.7
        weight = torch.tensordot(weight, mixing, dims=([axis], [1])).movedim(-1, axis)
    return weight


def squared(weight: Tensor, other: Tensor) -> float:
    return float((weight.double() - other.double()).square().sum())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_groups_are_kept(group: Group, keep: int) -> None:
    weight = normal(3, 4, 2)  # as a matrix 3 x 8
    best = float("inf")
    for kept in itertools.combinations(GROUPS[group], keep):
        trial = torch.zeros(3, 8)
        for place in kept:
            trial[place] = weight.flatten(1)[place]
        best = min(best, squared(weight, trial.reshape(weight.shape)))
    made = Sparse(keep, group, (2, 3)).project(weight)
    assert squared(weight, made) == pytest.approx(best, rel=1e-6)
    assert sum(bool(made.flatten(1)[place].any()) for place in GROUPS[group]) == keep


def test_a_metric_says_which_groups_are_the_best() -> None:
    weight, metric = normal(4, 6), normal(4, 6, seed=1).square()
    made = Sparse(7, metric=metric).project(weight)
    chosen = (weight.square() * metric).flatten().topk(7).indices
    assert made.flatten().nonzero().flatten().tolist() == chosen.sort().values.tolist()
    rows = Sparse(2, "row", metric=metric).project(weight).any(1)
    assert (
        rows.nonzero().flatten().tolist()
        == (weight.square() * metric).sum(1).topk(2).indices.sort().values.tolist()
    )


def test_of_equal_groups_the_first_are_kept() -> None:
    weight = torch.tensor([[1.0, -1.0, 2.0, 1.0]])
    assert Sparse(3).project(weight).tolist() == [[1.0, -1.0, 2.0, 0.0]]
    assert NOfM(2, 4).project(weight).tolist() == [[1.0, 0.0, 2.0, 0.0]]
    assert Sparse(2).mask(torch.zeros(2, 2)).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 3), (2, 5)])
def test_the_best_n_of_m_are_kept_and_a_short_run_at_the_end_too(n: int, m: int) -> None:
    weight = normal(2, 7)
    made = NOfM(n, m).project(weight)
    for row, kept in zip(weight, made, strict=True):
        for start in range(0, 7, m):
            run, left = row[start : start + m], kept[start : start + m]
            best = max(
                sum(float(run[k]) ** 2 for k in some)
                for some in itertools.combinations(range(len(run)), min(n, len(run)))
            )
            assert int(left.count_nonzero()) == min(n, len(run))
            assert float(left.square().sum()) == pytest.approx(best)
            assert torch.equal(left[left != 0], run[left != 0])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_interval_of_uniform_levels_is_the_best_of_all(count: int, seed: int) -> None:
    weight = normal(7, seed=seed).double()
    size = weight.abs()
    best = float("inf")
    for places in itertools.product(range(1, count + 1), repeat=7):
        a = torch.tensor(places).double()
        best = min(best, squared(size, a * (a @ size) / (a @ a)))
    assert squared(weight, UniformLevels(count).project(weight)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("count", [1, 4, 128])
def test_the_interval_of_many_weights_is_as_good_as_a_fine_scan(count: int) -> None:
    weight = normal(30_000)
    widest = float(weight.abs().max()) / count
    scanned = min(
        squared(weight, UniformLevels(count, widest * share).project(weight))
        for share in torch.linspace(0.1, 1.1, 200).tolist()
    )
    made = UniformLevels(count).project(weight)
    assert squared(weight, made) <= 1.001 * scanned
    assert Magnitudes.of(weight).interval(count)[1] == pytest.approx(squared(weight, made), rel=1e-3)


@pytest.mark.parametrize("count", [3, 8, 100])
def test_weights_on_a_few_of_the_levels_are_left_there(count: int) -> None:
    for top in range(1, count + 1):
        places = 1 + torch.arange(50) % top
        weight = 0.037 * places * torch.where(normal(50) < 0, -1, 1)
        torch.testing.assert_close(UniformLevels(count).project(weight), weight, rtol=1e-5, atol=0)


def test_zero_is_no_level() -> None:
    weight = torch.tensor([[0.0, 0.01, -0.01, 1.0, -2.6, 9.0]])
    assert UniformLevels(3, 1.0).project(weight).tolist() == [[0.0, 1.0, -1.0, 1.0, -3.0, 3.0]]
    assert PowerOfTwoLevels(3, 1).project(weight).tolist() == [[0.0, 0.5, -0.5, 1.0, -2.0, 2.0]]


def test_a_fixed_share_puts_the_nearest_of_each_level_on_it() -> None:
    weight = torch.tensor([[0.9, 1.2, 1.01, -1.3, 0.0, 2.2, 0.0]])
    expected = torch.tensor([[0.9, 1.2, 1.0, -1.0, 0.0, 2.0, 0.0]])
    torch.testing.assert_close(UniformLevels(2, 1.0, 0.3).project(weight), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_powers_of_two_are_the_best_ones(count: int) -> None:
    weight = normal(200)
    made = PowerOfTwoLevels(count).project(weight)
    errors = []
    for top in range(-12, 5):
        levels = torch.tensor([2.0 ** (top - k) for k in range(count)])
        nearest = levels[(weight.abs()[:, None] - levels).abs().argmin(1)]
        errors.append(squared(weight.abs(), nearest))
    assert squared(weight, made) == pytest.approx(min(errors), rel=1e-6)


@pytest.mark.parametrize(("bits", "columns"), [(2, 6), (4, 40), (8, 40), (4, 1500), (8, 1500)])
def test_integer_scales_are_as_good_as_a_fine_scan_in_each_channel(bits: int, columns: int) -> None:
    weight = normal(5, columns) * torch.tensor([[1.0], [10.0], [0.01], [3.0], [1e-4]])
    constraint = IntegerLevels(bits)
    made = constraint.project(weight)
    for row, found in zip(weight, made, strict=True):
        scans = (
            float(row.abs().max()) / constraint.top * share
            for share in torch.linspace(0.3, 1.2, 300).tolist()
        )
        best = min(
            squared(row, (row / scale).round().clamp(-constraint.top, constraint.top) * scale)
            for scale in scans
        )
        assert squared(row, found) <= 1.05 * best
        assert len(found.unique()) <= 2 * constraint.top + 1


RANKS: list[tuple[str, Site, Rank]] = [
    ("channel_svd", WIDE, (30,)),
    ("input_svd", WIDE, (20,)),
    ("spatial_svd", WIDE, (60,)),
    ("tucker2", WIDE, (40, 30)),
    ("tucker2", WIDE, (90, 10)),
    ("tucker2", LARGE, (80, 50)),
    ("tensor_train", WIDE, (30, 40)),
    ("tensor_train", WIDE, (4, 20, 30, 6)),
    ("svd", LINEAR, (30,)),
    ("tensor_train", LINEAR, (30,)),
    ("tensor_train", LINEAR, (10, 12)),
    ("tucker2", TALL, (5, 2)),
    ("tucker2", TALL, (9, 2)),
    ("channel_svd", TALL, (5,)),
    ("tensor_train", TALL, (3, 11)),
]


@pytest.mark.parametrize(
    ("name", "site", "rank"), RANKS, ids=[f"{name}-{site.name}-{rank}" for name, site, rank in RANKS]
)
def test_the_quick_projection_is_as_near_as_the_factors_of_the_format(
    name: str, site: Site, rank: Rank
) -> None:
    weight, form = decaying(site.shape), FORMATS.get(name)
    constraint = InFormat(site, name, rank)
    rebuilt = form.reconstruct(form.factorize(weight, site, rank), site)
    made = constraint.project(weight)
    assert squared(weight, made) ** 0.5 <= 1.001 * squared(weight, rebuilt) ** 0.5
    # and what it made is in the format
    again = form.reconstruct(constraint.factors(made), site)
    assert squared(made, again) ** 0.5 <= 1e-5 * float(weight.norm())


def test_every_quick_projection_is_compared_with_its_format() -> None:
    assert {name for name, _, _ in RANKS} == set(SPECTRAL)


def test_small_singular_values_are_not_lost() -> None:
    """A Gram matrix in float32 would lose what is below 3e-4 of the largest."""
    u, v = (torch.linalg.qr(normal(40, 40, seed=seed).double())[0] for seed in (1, 2))
    weight = (u[:, :6] * 10.0 ** -torch.arange(6.0)) @ v[:6]
    made = InFormat(Site("w", "linear", (40, 40)), "svd", (6,)).project(weight.float())
    assert squared(weight, made) ** 0.5 < 1e-6


@pytest.mark.parametrize(
    ("name", "site", "rank"),
    [("cp", WIDE, (8,)), ("block_term", WIDE, (4, 2, 2)), ("tensor_ring", LINEAR, (3, 3, 3, 3))],
)
def test_a_search_goes_on_from_where_it_starts(name: str, site: Site, rank: Rank) -> None:
    form = FORMATS.get(name)
    held = {key: normal(*shape, seed=len(key)).double() for key, shape in form.shapes(site, rank).items()}
    allowed = form.reconstruct(held, site)
    constraint = InFormat(site, name, rank, held)
    assert squared(constraint.project(allowed), allowed) ** 0.5 <= 1e-6 * float(allowed.norm())
    moved = allowed + 0.05 * allowed.norm() * normal(*site.shape, seed=4) / site.weights**0.5
    assert squared(constraint.project(moved), moved) < squared(allowed, moved)
    assert constraint.near(moved) is constraint
    assert InFormat(site, name, rank).near(moved) == constraint


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"svd does not fit site 'wide'.*tucker2"):
        InFormat(WIDE, "svd", (3,))
    with pytest.raises(PlanError, match="rank"):
        InFormat(WIDE, "tucker2", (97, 1))
    with pytest.raises(UsageError, match="unknown format"):
        InFormat(WIDE, "no_such", (1,))
    with pytest.raises(PlanError, match="has shape"):
        InFormat(WIDE, "tucker2", (9, 9)).project(normal(96, 64))
    with pytest.raises(PlanError, match="mask of shape"):
        Support(torch.ones(2, 3, dtype=torch.bool)).project(normal(3, 2))
    with pytest.raises(PlanError, match="5 scales"):
        IntegerLevels(8, torch.ones(5)).project(normal(3, 2))
    for make in (
        lambda: Sparse(0),
        lambda: Sparse(1, "rows"),
        lambda: Sparse(1, "block", (0, 4)),
        lambda: NOfM(3, 2),
        lambda: NOfM(0, 2),
        lambda: UniformLevels(0),
        lambda: UniformLevels(2, 0.0),
        lambda: UniformLevels(2, float("nan")),
        lambda: UniformLevels(2, fixed=0.3),
        lambda: PowerOfTwoLevels(0),
        lambda: IntegerLevels(9),
    ):
        with pytest.raises(UsageError):
            make()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_order_statistics_are_those_of_torch(kind: torch.dtype) -> None:
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).to(kind)
    values[3:6] = values[0, 0]  # ties
    ordered = values.flatten().sort(descending=True).values
    for count in (1, 17, 199, 200):
        assert torch.equal(nth_largest(values, count), ordered[count - 1])
        assert torch.equal(largest_first(values, count), ordered[:count])


@pytest.mark.parametrize("side", ["row", "column"])
def test_groups_in_blocks_are_kept_by_norm(side: str) -> None:
    weight = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    constraint = InBlock(5, side, (3, 5))
    matrix, found = weight.flatten(1), {}
    for top, left in itertools.product(range(0, 7, 3), range(0, 12, 5)):
        rows, columns = range(top, min(top + 3, 7)), range(left, min(left + 5, 12))
        groups = (
            [[(r, c) for r in rows] for c in columns]
            if side == "column"
            else [[(r, c) for c in columns] for r in rows]
        )
        found |= {tuple(group): sum(float(matrix[place]) ** 2 for place in group) for group in groups}
    best = {place for group in sorted(found, key=lambda group: -found[group])[:5] for place in group}
    kept = constraint.project(weight).flatten(1)
    assert {tuple(place) for place in kept.nonzero().tolist()} == best


def test_a_fragment_keeps_the_sign_with_more_energy() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0], [-1.0, -1.0, 2.0, -0.25, 0.0]])
    kept = OneSign(3).project(weight)
    assert kept.tolist() == [[0.0, -2.0, 0.0, 3.0, 0.0], [0.0, 0.0, 2.0, -0.25, 0.0]]
    frozen = OneSign(3).frozen(kept)
    assert frozen.project(-kept).count_nonzero() == 0
    with pytest.raises(PlanError, match="do not fit a weight"):
        frozen.project(torch.ones(3, 5))


@pytest.mark.parametrize("magnitudes", [(0.1, 0.4, 1.0), tuple(0.1 + 0.06 * k for k in range(16))])
def test_the_scale_of_device_levels_is_as_good_as_a_fine_scan(magnitudes: tuple[float, ...]) -> None:
    weight = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    mine = float((weight - DeviceLevels(magnitudes).project(weight)).square().sum())
    scanned = min(
        float((weight - DeviceLevels(magnitudes, scale).project(weight)).square().sum())
        for scale in torch.linspace(0.2, 6.0, 3000).tolist()
    )
    assert mine <= 1.0005 * scanned


def test_no_device_state_is_zero_and_weights_beyond_its_range_go_to_the_ends() -> None:
    levels = DeviceLevels((0.1, 0.5, 1.0), 2.0)
    assert levels.project(torch.tensor([0.0, 0.01, -0.01, 9.0, -9.0, 0.7])).tolist() == pytest.approx(
        [0.0, 0.2, -0.2, 2.0, -2.0, 1.0]
    )
    assert levels.places(torch.tensor([0.0, 0.2, -2.0, 1.0])).tolist() == [0, 1, 3, 2]
    for wrong in ((0.0, 1.0), (1.0,), (1.0, 0.5)):
        with pytest.raises(UsageError, match="zero is no state"):
            DeviceLevels(wrong)


def test_sets_compose_to_what_is_in_all_of_them() -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(2))
    parts = InBlock(30, "column", (4, 8)), OneSign(8), DeviceLevels((0.2, 0.6, 1.0))
    made = Composed(parts).project(weight)
    fixed = Composed(parts).frozen(made)
    assert torch.equal(made, fixed.project(made))
    assert all(torch.allclose(part.frozen(made).project(made), made) for part in parts)
    assert 0 < len({round(float(value), 5) for value in made[made != 0].abs()}) <= 3
