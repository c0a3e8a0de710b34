"""ADMM, schedules, batches, held weights, the watch on residuals."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdpass.constraints.integer import IntegerLevels
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.sparse import Sparse
from tdpass.errors import TrainingError, UsageError
from tdpass.training.admm import Admm
from tdpass.training.averaging import Average
from tdpass.training.batches import Batches
from tdpass.training.curvature import Curvature
from tdpass.training.distillation import Distillation
from tdpass.training.fixed_weights import FixedWeights, ProgressiveFixing
from tdpass.training.loop import Loop, cross_entropy
from tdpass.training.phases import Phase, Phased
from tdpass.training.residuals import Watch
from tdpass.training.rules import fixed
from tdpass.training.schedules import Constant, Cosine, Geometric, Steps, as_schedule
from tdpass.training.settings import Settings
from tdpass.training.surgery import Surgery
from tdpass.training.terms import Hooks, Term


def solve(
    optimizer: torch.optim.Optimizer,
    weight: nn.Parameter,
    goal: torch.Tensor,
    term: Term,
    rounds: int,
    every: int,
) -> None:
    """min ||W - goal||^2 / 2 with a term, by the optimizer."""
    hooks = Hooks(optimizer, [term], lambda step: step % every == 0, rounds)
    for _ in range(rounds * every):
        optimizer.zero_grad()
        (0.5 * (weight - goal).square().sum()).backward()
        optimizer.step()
    hooks.remove()


@pytest.mark.parametrize("decoupled", [False, True])
def test_admm_finds_the_nearest_point_of_the_set(decoupled: bool) -> None:
    goal = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(6, 8))
    constraint = Sparse(10)
    term = Admm({"w": weight}, [fixed({"w": constraint})], 1.0, decoupled)
    solve(torch.optim.SGD([weight], lr=0.2), weight, goal, term, rounds=60, every=20)
    torch.testing.assert_close(
        constraint.project(weight.detach()), constraint.project(goal), rtol=1e-3, atol=1e-3
    )
    assert term.residuals()["w"] < 1e-2


def test_two_sets_compose() -> None:
    goal = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(goal.clone())
    levels = IntegerLevels(4).frozen(Sparse(12).project(goal))
    term = Admm(
        {"w": weight}, [fixed({"w": Sparse(12)}), fixed({"w": levels})], Geometric(0.1, 10.0), decoupled=True
    )
    solve(torch.optim.SGD([weight], lr=0.2), weight, goal, term, rounds=120, every=10)
    found = weight.detach()
    kept = Sparse(12).project(found)
    assert float((found - kept).norm() / found.norm()) < 0.01
    assert float((kept - levels.project(kept)).norm() / kept.norm()) < 0.01


def test_rho_rescales_the_duals() -> None:
    weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    term = Admm({"w": weight}, [fixed({"w": Sparse(3)})], Geometric(1.0, 4.0))
    term.begin_round(0.0)
    assert term.splits[0][0].u.abs().sum() == 0  # the weight has not moved yet
    term.begin_round(0.0)
    dual = term.splits[0][0].u.clone()
    assert dual.abs().sum() > 0
    term.begin_round(1.0)
    gap = weight.detach() - term.splits[0][0].z
    torch.testing.assert_close(term.splits[0][0].u, dual / 4 + gap)


def test_hooks_leave_the_optimizer_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hooks = Hooks(optimizer, [FixedWeights({"w": weight})], lambda step: True, 1)
    hooks.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_curvature_is_the_mean_square_of_gradients() -> None:
    weight = nn.Parameter(torch.zeros(3))
    curvature = Curvature({"w": weight})
    gradients = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        curvature.before_step(optimizer)
    torch.testing.assert_close(curvature.squares["w"], gradients.square().mean(0))
    again = Curvature({"w": weight})
    again.load_state(curvature.state())
    weight.grad = torch.ones(3)
    for one in (curvature, again):
        one.before_step(optimizer)
    assert torch.equal(again.squares["w"], curvature.squares["w"])


def test_surgery_takes_weights_back() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.5, 0.1]))
    surgery = Surgery({"w": weight}, fixed({"w": Sparse(1)}))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    hooks = Hooks(optimizer, [surgery], lambda step: step % 2 == 0, 4)
    seen = []
    for _ in range(8):
        weight.grad = torch.tensor([0.0, 0.0, -1.0])
        optimizer.step()
        seen.append(weight.tolist())
    assert seen[0] == pytest.approx([1.0, 0.0, 0.0])  # the value of the third is 0.2 by now
    torch.testing.assert_close(surgery.values["w"], torch.tensor([1.0, 0.5, 0.9]))
    for _ in range(3):
        weight.grad = torch.tensor([0.0, 0.0, -1.0])
        optimizer.step()
    assert weight.tolist() == pytest.approx([0.0, 0.0, 1.2])
    hooks.remove()
    again = Surgery({"w": weight}, fixed({"w": Sparse(1)}))
    again.load_state(surgery.state())
    assert again.residuals() == surgery.residuals()
    assert torch.equal(again.masks["w"], surgery.masks["w"])


def test_held_weights_stay_and_the_others_move() -> None:
    weight = nn.Parameter(torch.tensor([0.0, 1.0, -2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    solve(optimizer, weight, torch.ones(3) * 5, FixedWeights({"w": weight}), rounds=3, every=4)
    assert weight[0] == 0
    assert torch.all(weight[1:] > torch.tensor([1.0, -2.0]))


def test_fixing_ends_on_levels_and_never_moves_what_is_fixed() -> None:
    goal = torch.randn(10, 10, generator=torch.Generator().manual_seed(2))
    weight = nn.Parameter(Sparse(60).project(goal))
    levels = UniformLevels(4).frozen(weight.detach())
    term = ProgressiveFixing({"w": weight}, {"w": levels}, first=0.3)
    fixed_before = torch.zeros(10, 10, dtype=torch.bool)
    optimizer = torch.optim.SGD([weight], lr=0.05)
    for progress in (0.0, 0.5, 1.0):
        values = weight.detach().clone()
        with torch.no_grad():
            term.begin_round(progress)
        assert torch.all(term.masks["w"] | ~fixed_before)
        assert torch.equal(weight.detach()[fixed_before], values[fixed_before])
        fixed_before = term.masks["w"].clone()
        hooks = Hooks(optimizer, [], lambda step: False, 1)
        weight.grad = weight.detach() - goal * 2
        optimizer.step()
        term.after_step(optimizer)
        hooks.remove()
    assert torch.equal(weight.detach(), levels.project(weight.detach()))
    assert int(weight.count_nonzero()) == 60


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(2.0), (2.0, 2.0, 2.0)),
        (Geometric(1.0, 100.0), (1.0, 10.0, 100.0)),
        (Geometric(1.0, 100.0, until=0.5), (1.0, 100.0, 100.0)),
        (Cosine(2.0), (2.0, 1.0, 0.0)),
        (Cosine(2.0, floor=0.5), (2.0, 1.5, 1.0)),
        (Steps(1.0, 0.1, (0.5, 0.9)), (1.0, 0.1, 0.01)),
    ],
)
def test_schedules(schedule: object, values: tuple[float, ...]) -> None:
    assert [schedule.value(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_schedules_are_read_from_recipes() -> None:
    assert as_schedule(0.5, "rho") == Constant(0.5)
    assert as_schedule({"geometric": {"start": 1, "end": 2}}, "rho") == Geometric(1, 2)
    assert as_schedule({"steps": {"start": 1, "factor": 0.1, "at": [0.5]}}, "lr") == Steps(1, 0.1, (0.5,))
    for wrong in ({"nonsense": {}}, {"cosine": {"from": 1}}, {"cosine": 3}, {}, -1.0, float("nan"), True):
        with pytest.raises(UsageError, match=r"rho"):
            as_schedule(wrong, "rho")


def test_batches_repeat_with_seed_and_epoch() -> None:
    data = Batches(
        torch.arange(20.0),
        torch.arange(20),
        6,
        change=lambda x, generator: x + torch.rand(x.shape, generator=generator),
    )
    first = [x.clone() for x, _ in data]
    assert len(first) == len(data) == 3
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, data, strict=True))
    data.set_epoch(1)
    assert not all(torch.equal(a, b) for a, (b, _) in zip(first, data, strict=True))
    with pytest.raises(UsageError, match="do not fit"):
        Batches(torch.zeros(3), torch.zeros(4))


def test_watch_stops_a_growing_residual() -> None:
    watch = Watch(patience=3)
    for value in (0.5, 0.4, 0.9, 1.0, 1.1):
        watch.check({"fc": value})
    with pytest.raises(TrainingError, match=r"'fc'.*grew from 0.4 to 2.*raise rho"):
        watch.check({"fc": 2.0})
    with pytest.raises(TrainingError, match="'fc' is no longer finite"):
        Watch().check({"fc": float("nan")})


def test_phases_follow_each_other_and_restart_the_rate() -> None:
    begun: list[str] = []
    phased = Phased(
        [
            Phase(name, rounds, lambda name=name: [begun.append(name) or Term()])
            for name, rounds in (("a", 2), ("skipped", 0), ("b", 1))
        ]
    )
    for index in range(4):
        phased.begin_round(index / 3)
    assert begun == ["a", "b"]
    rate = phased.rate(Cosine(1.0))
    assert [rate(share / 6) for share in range(6)] == pytest.approx(
        [1.0, Cosine(1.0).value(0.25), 0.5, Cosine(1.0).value(0.75), 1.0, 0.5]
    )


def test_phases_end_with_the_average_of_their_weights() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    phased = Phased([Phase("a", 1, tuple), Phase("b", 1, tuple)])
    phased.average = Average(model, 0.5)
    ends = []
    for _ in range(2):
        phased.begin_round(0.0)
        ends.append(model.weight.detach().clone())
        seen = [model.weight.detach().clone()]
        for step in range(3):
            with torch.no_grad():
                model.weight += step + 1
            seen.append(model.weight.detach().clone())
            phased.after_step(optimizer)
    phased.end()
    expected, decays = seen[0], [1 / 11, 2 / 12, 3 / 13]
    for decay, weight in zip(decays, seen[1:], strict=True):
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), expected)
    torch.testing.assert_close(expected - ends[1], ends[1] - ends[0])
    with pytest.raises(UsageError, match="decay between 0 and 1"):
        Average(model, 1.0)


@pytest.mark.parametrize("wrong", [{"optimizer": "lion"}, {"lr": 0}, {"momentumm": 0.9}])
def test_settings_refuse_what_they_do_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Settings.parse(wrong)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = nn.Linear(4, 2)
    data = [(torch.full((8, 4), 1e30), torch.zeros(8, dtype=torch.long))] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(TrainingError, match="no longer finite"):
        Loop("method", model, data, optimizer, cross_entropy(), 2, lambda progress: 1.0).run()


@pytest.mark.parametrize("data", [iter([]), [torch.zeros(3)], []])
def test_data_that_is_not_understood(data: object) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(UsageError):
        Loop(
            "method", model, data, torch.optim.SGD(model.parameters()), F.mse_loss, 1, lambda progress: 1.0
        ).run()


class Wrapped(nn.Module):
    """A linear classifier of named inputs whose scores come in what `wrap` makes of them."""

    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, pixels: torch.Tensor) -> object:
        return self.wrap(self.linear(pixels))


def trained(wrap: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """The weight after an epoch against labels and a teacher."""
    torch.manual_seed(0)
    model, teacher = Wrapped(wrap), Wrapped(wrap)
    data = [(UserDict(pixels=torch.randn(8, 4)), torch.arange(8) % 3) for _ in range(3)]
    Loop(
        "method",
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=0.1),
        cross_entropy(),
        1,
        lambda progress: 1.0,
        (Distillation(teacher, 0.5),),
    ).run()
    return model.linear.weight.detach()


def test_scores_are_the_outputs_or_the_logits_in_them() -> None:
    plain = trained(lambda scores: scores)
    assert torch.equal(trained(lambda scores: {"logits": scores}), plain)
    assert torch.equal(trained(lambda scores: SimpleNamespace(logits=scores)), plain)
    with pytest.raises(UsageError, match="returned a dict"):
        trained(lambda scores: {"scores": scores})
