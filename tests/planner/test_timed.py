"""Planning on measured time, on a target whose times are what the test says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.cost import Cost
from tdpass.errors import BudgetError, UsageError
from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS
from tdpass.models import Batch, Model
from tdpass.planner.candidates import Candidate
from tdpass.planner.stopwatch import RANKS_MEASURED, Stopwatch, anchors
from tdpass.site import Site
from tdpass.targets import TARGETS, Setting, Target, TimedTarget, Timing, open_target

Speed = Callable[[Site, Form], float]


def by_macs(site: Site, form: Form) -> float:
    """A machine on which time follows multiply-adds."""
    cost = FORMATS.get(form.format).cost(site, form.rank)
    return cost.macs * 1e-9


class FakeTarget(TimedTarget):
    """Times by a rule, and a record of what was asked."""

    name = "fake"

    def __init__(self, speed: Speed = by_macs, rest: float = 0.0, assembled: float | None = None) -> None:
        super().__init__()
        self.speed, self.rest, self.assembled = speed, rest, assembled
        self.asked: list[tuple[Site, Form, bool]] = []

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        return cls()

    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        self.asked += [(site, form, careful) for form in forms]
        times = [self.speed(site, form) for form in forms]
        return [Timing(seconds, "fake kernel" if math.isfinite(seconds) else "") for seconds in times]

    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        times = []
        for model in models:
            layers = [(site, model.layer(site.name)) for site in model.sites()]
            compressed = any(layer is not None for _, layer in layers)
            whole = self.rest + sum(
                self.speed(site, DENSE if layer is None else layer.form) for site, layer in layers
            )
            times.append(self.assembled if compressed and self.assembled is not None else whole)
        return times


def plan_of(model: nn.Module, images: Tensor, target: Target, **budget: float | str) -> tdpass.Artifact:
    return tdpass.make_plan(model, budget, images, target=target)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_budget_on_seconds_is_met_rest_included(share: float, residual: nn.Module, images: Tensor) -> None:
    target = FakeTarget(rest=2e-5)
    artifact = plan_of(residual, images, target, seconds=share)
    dense = sum(by_macs(site, DENSE) for site in artifact.opened.sites())
    assert artifact.report.original.seconds == pytest.approx(dense + 2e-5)
    assert artifact.plan.planned.seconds <= share * artifact.report.original.seconds * (1 + 1e-6)
    assert artifact.report.target == "fake, batch 1, 1 thread"
    for choice in artifact.plan:
        assert choice.dense_seconds == pytest.approx(choice.dense.macs * 1e-9)
        assert choice.seconds <= choice.dense_seconds
        assert choice.kernel == "fake kernel" or choice.form.inputs == 0


def test_a_budget_that_cannot_be_met_names_the_smallest_reachable_time(
    residual: nn.Module, images: Tensor
) -> None:
    target = FakeTarget(rest=1e-4)
    with pytest.raises(
        BudgetError,
        match=r"below the smallest reachable plan \(([\d.]+[mun]?s), of which 100us in layers that stay",
    ) as caught:
        plan_of(residual, images, target, latency="1us")
    least = str(caught.value).split("plan (")[1].split(",")[0]
    assert (
        plan_of(residual, images, target, latency=least).plan.planned.seconds
        <= 1.001 * tdpass.Budget.parse({"latency": least}).limits(Cost())["seconds"]
    )


def test_no_site_is_slower_than_dense_whatever_the_budget(residual: nn.Module, images: Tensor) -> None:
    def slow_above(site: Site, form: Form) -> float:
        ratio = by_macs(site, form) / by_macs(site, DENSE)
        return by_macs(site, DENSE) * (1.0 if form == DENSE else ratio * 2.5)

    artifact = plan_of(residual, images, FakeTarget(slow_above), macs=0.6)
    assert all(choice.kept_dense or choice.cost.macs * 2.5 < choice.dense.macs for choice in artifact.plan)
    assert any(not choice.kept_dense for choice in artifact.plan)


def test_what_is_slower_stays_dense_and_says_where_it_breaks_even(
    residual: nn.Module, images: Tensor
) -> None:
    def only_small(site: Site, form: Form) -> float:
        return 1.0 if form == DENSE else 0.5 if max(form.rank, default=0) <= 4 else 1.25

    artifact = plan_of(residual, images, FakeTarget(only_small), params=0.8)
    reasons = {choice.site: choice.reason for choice in artifact.plan if choice.kept_dense}
    assert any(
        "break-even at rank" in reason and "asked" in reason and "1.25 of the dense time" in reason
        for reason in reasons.values()
    )

    slower = FakeTarget(lambda site, form: 1.0 if form == DENSE else 1.1)
    with pytest.raises(BudgetError, match="on target fake only what is faster than dense counts"):
        tdpass.make_plan(residual, {"params": 0.8}, images, target=slower, formats=["channel_svd"])
    stays = plan_of(residual, images, slower, max_error=0.3)
    assert all(
        choice.kept_dense and "no measured rank of any format is faster than dense" in choice.reason
        for choice in stays.plan
    )


def test_a_format_that_no_runtime_serves_is_not_chosen(residual: nn.Module, images: Tensor) -> None:
    def without_chains(site: Site, form: Form) -> float:
        return by_macs(site, form) if form.format in ("dense", "channel_svd", "svd") else math.inf

    artifact = plan_of(residual, images, FakeTarget(without_chains), macs=0.7)
    assert {choice.format for choice in artifact.plan} <= {"dense", "channel_svd", "svd"}


def test_all_that_is_chosen_was_measured_with_care(residual: nn.Module, images: Tensor) -> None:
    target = FakeTarget()
    plan = plan_of(residual, images, target, seconds=0.5).plan
    sites = {site.name: site for site, _, _ in target.asked}
    careful = {(site.shape, form) for site, form, careful in target.asked if careful}
    for choice in plan:
        if not choice.kept_dense and choice.form.inputs != 0:
            assert (
                sites[choice.site].shape if choice.site in sites else choice.shape,
                choice.form,
            ) in careful
            assert choice.predicted == pytest.approx(choice.seconds, rel=0.2)


def test_interpolation_that_flatters_is_found_out(residual: nn.Module, images: Tensor) -> None:
    """Only ranks that are measured at once are as fast as they seem; all others take longer than dense."""
    scanned: set[tuple[Site, Form]] = set()

    class Flattering(FakeTarget):
        def time(
            self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
        ) -> list[Timing]:
            if not careful:
                scanned.update((site, form) for form in forms)
            late = [form != DENSE and (site, form) not in scanned for form in forms]
            return [
                Timing(2.0 if slow else by_macs(site, v), "") for slow, v in zip(late, forms, strict=True)
            ]

    artifact = plan_of(residual, images, Flattering(), macs=0.6)
    changed = [choice for choice in artifact.plan if not choice.kept_dense]
    assert changed
    assert all(choice.seconds < choice.dense_seconds for choice in changed)


def test_sites_of_equal_shape_are_measured_once(residual: nn.Module, images: Tensor) -> None:
    target = FakeTarget()
    plan_of(residual, images, target, macs=0.5)
    assert sum(site.shape == (12, 12, 3, 3) and form == DENSE for site, form, _ in target.asked) == 1


def test_layers_that_take_longer_than_the_whole_are_scaled(residual: nn.Module, images: Tensor) -> None:
    artifact = plan_of(residual, images, FakeTarget(rest=-5e-6), seconds=0.5)
    assert sum(choice.dense_seconds for choice in artifact.plan) == pytest.approx(
        artifact.report.original.seconds
    )
    assert any("scaled by" in note for row in artifact.report.passes for note in row.notes)


def test_a_compressed_model_that_is_not_faster_is_given_back_unchanged(
    residual: nn.Module, images: Tensor
) -> None:
    artifact = tdpass.compress(residual, {"macs": 0.5}, images, target=FakeTarget(assembled=9.0))
    assert all(choice.kept_dense for choice in artifact.plan)
    assert any(
        "takes 9s and the original" in note and "given back unchanged" in note
        for note in artifact.report.notes
    )
    assert artifact.report.final == artifact.report.original
    assert isinstance(artifact.model, nn.Module)
    assert artifact.model.state_dict().keys() == residual.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(artifact.model(images), residual(images))


def test_the_assembled_model_is_timed_and_reported(residual: nn.Module, images: Tensor) -> None:
    artifact = tdpass.compress(residual, {"macs": 0.5}, images, target=FakeTarget(rest=1e-5))
    assert artifact.report.final.seconds == pytest.approx(artifact.plan.planned.seconds)
    assert tdpass.RankPlan.from_json(artifact.plan.to_json()) == artifact.plan

    def by_format(site: Site, form: Form) -> float:
        return 2.0 if form == DENSE else 1.0

    given = tdpass.compress(residual, plan=artifact.plan, data=images, target=FakeTarget(by_format))
    assert 0 < given.report.final.seconds < given.report.original.seconds


def test_a_plan_from_before_there_were_times_can_be_read(residual: nn.Module, images: Tensor) -> None:
    import json

    plan = tdpass.make_plan(residual, {"macs": 0.5}, images).plan
    record = json.loads(plan.to_json())
    for choice in record["choices"]:
        del choice["kernel"], choice["predicted"], choice["cost"]["seconds"], choice["dense"]["seconds"]
    del record["original"]["seconds"]
    assert tdpass.RankPlan.from_json(json.dumps(record)) == plan


def test_seconds_need_a_target_and_a_target_needs_to_see_the_model(
    residual: nn.Module, images: Tensor
) -> None:
    with pytest.raises(BudgetError, match="target='cpu'"):
        tdpass.make_plan(residual, {"seconds": 0.5}, images)
    with pytest.raises(UsageError, match="example_inputs"):
        tdpass.make_plan(residual, {"params": 0.5}, target="cpu")
    for options in ({"batch": 0}, {"threads": 0}, {"batch": 1.5}, {"threads": True}):
        with pytest.raises(UsageError, match="whole number of at least 1"):
            tdpass.make_plan(residual, {"params": 0.5}, images, target=FakeTarget(), **options)


def test_a_model_of_a_fixed_batch_size_is_timed_at_that_size(
    residual: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdpass.models.signature.Signature.fixed_batch", lambda self: 4)
    with pytest.raises(
        UsageError, match=r"exactly 4 samples at a time and cannot be timed with 1; pass batch=4"
    ):
        plan_of(residual, images, FakeTarget(), macs=0.5)
    assert (
        tdpass.make_plan(
            residual, {"macs": 0.5}, images, target=FakeTarget(), batch=4
        ).report.original.seconds
        > 0
    )


def test_batches_are_cut_or_repeated() -> None:
    batch = Batch((torch.arange(3),), {"scale": torch.tensor(2.0)})
    assert [batch.resized(n).args[0].tolist() for n in (1, 3, 7)] == [[0], [0, 1, 2], [0, 1, 2, 0, 1, 2, 0]]
    assert batch.resized(7).kwargs["scale"].dim() == 0


def test_a_target_can_be_registered_and_named(
    monkeypatch: pytest.MonkeyPatch, residual: nn.Module, images: Tensor
) -> None:
    monkeypatch.setitem(TARGETS._entries, "fake", FakeTarget)
    assert isinstance(open_target("fake", "torch"), FakeTarget)
    assert tdpass.make_plan(residual, {"seconds": 0.6}, images, target="fake").report.original.seconds > 0


def test_the_real_target_end_to_end(residual: nn.Module, images: Tensor) -> None:
    options = {"formats": ["channel_svd", "spatial_svd"], "pipeline": "plan,factorize"}
    artifact = tdpass.compress(
        residual, {"max_error": 0.5}, images, target="cpu", batch=2, threads=1, **options
    )
    assert artifact.report.original.seconds > 0
    assert artifact.report.final.seconds > 0
    assert all(choice.kept_dense or choice.seconds < choice.dense_seconds for choice in artifact.plan)


def candidates(format_name: str, ranks: Sequence[tuple[int, ...]], site: Site) -> list[Candidate]:
    return [
        Candidate(Form(format_name, rank), FORMATS.get(format_name).cost(site, rank), 0.1) for rank in ranks
    ]


LINEAR = Site("fc", "linear", (256, 256), extents=(((4,), (4,)),))


def test_a_handful_of_ranks_on_the_grid_is_measured() -> None:
    found = anchors(candidates("svd", [(r,) for r in range(1, 128)], LINEAR))
    ranks = [form.rank[0] for form in found]
    assert len(ranks) <= RANKS_MEASURED
    assert ranks[0] == 1
    assert ranks[-1] == 127
    assert all(rank % 16 == 0 for rank in ranks[1:-1])


def test_times_between_measured_ranks_lie_on_a_line() -> None:
    watch = Stopwatch(FakeTarget(), 1, 1)
    every = candidates("svd", [(r,) for r in range(8, 128)], LINEAR)
    watch.scan(LINEAR, every)
    for candidate in every:
        assert watch.timing(LINEAR, candidate).seconds == pytest.approx(candidate.cost.macs * 1e-9)
    assert watch.break_even(LINEAR, "svd") == (127,)
    assert watch.break_even(LINEAR, "tucker2") is None
