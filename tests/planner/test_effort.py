"""How long planning may take, and what is left out for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tdpass
from tdpass.errors import UsageError
from tdpass.formats.metric import Metric
from tdpass.models import Batch
from tdpass.planner import losses, planning
from tdpass.planner.candidates import SiteFits, enumerate_candidates
from tdpass.planner.effort import EFFORTS, Allowance, Deadline, seconds_to_fit
from tdpass.planner.planning import Dense, Tabulation
from tdpass.planner.table import Table
from tdpass.site import Site


class Clock:
    """Processor time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def net() -> tuple[nn.Module, torch.Tensor]:
    """A trained-like classifier, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    return model.eval(), torch.randn(96, 3, 8, 8)


def table(effort: str, formats: tuple[str, ...] = ()) -> Table:
    """The table of candidates of the small network."""
    model, data = net()
    opened = tdpass.open_model(model)
    batch = tdpass.models.Batch((data,))
    opened.observe(batch)
    tape = opened.record(batch)
    divergence = tdpass.Divergence()
    fitted = divergence.fit([divergence.outputs(tape.play().finish())])
    dense = Dense(opened.weight, opened.bias)
    return Tabulation(opened.sites(), dense, [tape], fitted, formats, effort=EFFORTS[effort]).table()


def test_parts_share_time_by_weight_and_leave_what_they_do_not_use() -> None:
    clock = Clock()
    allowance = Allowance(100.0, {"a": 1.0, "b": 3.0, "c": 1.0}, clock)
    first = allowance.take("a")
    assert first.left == pytest.approx(20.0)
    assert first.part(0.25).left == pytest.approx(5.0)
    clock.now = 4.0
    assert allowance.take("b").left == pytest.approx(0.75 * 96)
    clock.now = 200.0
    late = allowance.take("c")
    assert late.left == 0.0
    assert Deadline().left == float("inf")


def test_fast_estimates_every_loss_and_the_others_measure() -> None:
    formats = ("svd", "channel_svd")
    share = {
        name: [c.estimated for cs in table(name, formats).candidates.values() for c in cs] for name in EFFORTS
    }
    assert all(share["fast"])
    assert not any(share["normal"])
    assert 0 < len(share["fast"]) < len(share["normal"]) <= len(share["thorough"])


def test_the_metric_orders_losses_as_measuring_does() -> None:
    """Estimates of all sites together, against measured losses of the same candidates."""
    formats = ("svd", "channel_svd")
    measured = {
        (name, c.format, c.rank): c.loss
        for name, cs in table("thorough", formats).candidates.items()
        for c in cs
    }
    estimated = {
        (name, c.format, c.rank): c.loss for name, cs in table("fast", formats).candidates.items() for c in cs
    }
    both = sorted(measured.keys() & estimated.keys())
    assert len(both) >= 8
    ranks = [
        torch.tensor([losses[key] for key in both]).argsort().argsort().double()
        for losses in (measured, estimated)
    ]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9


@pytest.mark.parametrize(
    "effort",
    [
        "fast",
        pytest.param("normal", marks=pytest.mark.slow),
        pytest.param("thorough", marks=pytest.mark.slow),
    ],
)
def test_every_effort_meets_the_budget_and_says_what_it_measured(effort: str) -> None:
    model, data = net()
    found = tdpass.make_plan(model, {"macs": 0.5}, data, effort=effort, cache=False)
    assert found.plan.planned.macs <= 0.5 * found.plan.original.macs
    notes = " ".join(note for row in found.report.passes for note in row.notes)
    assert f"effort {effort}: " in notes


def test_tables_of_one_effort_do_not_serve_another(tmp_path: object) -> None:
    model, data = net()
    for effort, measured in (("fast", 0), ("normal", 1)):
        found = tdpass.make_plan(
            model, {"macs": 0.5}, data, formats=("svd", "channel_svd"), effort=effort, cache=tmp_path
        )  # type: ignore[arg-type]
        (note,) = [note for row in found.report.passes for note in row.notes if "measured" in note]
        assert (not note.startswith(f"effort {effort}: 0 ")) == bool(measured)


def test_the_pass_option_goes_before_the_argument() -> None:
    model, data = net()
    found = tdpass.make_plan(
        model, {"macs": 0.5}, data, pipeline="plan{effort=fast}", effort="thorough", cache=False
    )
    assert any(
        note.startswith("effort fast: 0 losses measured") for row in found.report.passes for note in row.notes
    )


@pytest.mark.parametrize("arguments", [{"effort": "hasty"}, {"pipeline": "plan{effort=hasty}"}])
def test_an_unknown_effort_is_refused_with_those_there_are(arguments: dict[str, str]) -> None:
    model, data = net()
    with pytest.raises(UsageError, match="'hasty' is not one of: fast, normal, thorough"):
        tdpass.make_plan(model, {"macs": 0.5}, data, cache=False, **arguments)  # type: ignore[arg-type]


def test_progress_begins_at_once_and_says_how_long_it_may_take() -> None:
    model, data = net()
    seen: list[tuple[str, int, int]] = []
    tdpass.make_plan(
        model,
        {"macs": 0.5},
        data,
        formats=("svd", "channel_svd"),
        cache=False,
        progress=lambda *step: seen.append(step),
    )
    assert seen[0] == ("recording runs of the model", 0, 2)
    (said,) = {what for what, done, _ in seen if what.startswith("planning") and done == 0}
    assert re.fullmatch(r"planning, about \d+ s of one core", said)


FEW = ("svd", "tucker2", "channel_svd")


def _estimated(plan: tdpass.RankPlan) -> list[str]:
    return [choice.site for choice in plan if "estimated" in choice.reason]


@pytest.mark.parametrize("options", ["", "{pivot=true}"])
def test_what_a_plan_chooses_is_measured_where_there_was_no_time_before(
    options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = net()
    monkeypatch.setattr(losses, "SWEEP_SECONDS", 0.0)  # of each site one loss alone

    def planned(folder: Path) -> tdpass.RankPlan:
        pipeline = f"plan{options}"
        return tdpass.compress(
            model, {"macs": 0.3}, x, formats=FEW, pipeline=pipeline, cache=folder, progress=False
        ).plan

    with monkeypatch.context() as patch:
        patch.setattr(planning, "_SETTLE_SHARE", 0.0)
        assert len(_estimated(planned(tmp_path / "hasty"))) > 1
    first = planned(tmp_path / "settled")
    assert any(not choice.kept for choice in first)
    assert not _estimated(first)
    assert planned(tmp_path / "settled").choices == first.choices  # what was measured is kept
    assert not _estimated(planned(tmp_path / "hasty"))  # and may be measured later


def convolution(channels: int) -> Site:
    return Site("conv", "conv", (channels, channels, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize("effort", list(EFFORTS))
def test_what_planning_is_expected_to_take_follows_the_model_and_its_pace(effort: str) -> None:
    small, wide = [convolution(16)] * 4, [convolution(512)] * 4
    quick, slow = (EFFORTS[effort].of(10**7, pace) for pace in (1e-10, 1e-9))
    runs = (3 * 64 + 6 * 64) * 10**7 * 1e-10
    assert slow.expected(64, small) - quick.expected(64, small) >= 8.99 * runs
    assert quick.expected(512, small) > quick.expected(64, small)
    assert quick.expected(64, wide) > quick.expected(64, small)
    assert quick.expected(64, wide) <= runs + quick.limit
    assert EFFORTS["fast"].of(10**7, 1e-10).expected(64, small) <= quick.expected(64, small)
    assert seconds_to_fit(convolution(512)) == pytest.approx(8 * 512 * 4608 * 5120 / 2e10)


def test_fast_uses_the_samples_that_there_is_time_for() -> None:
    calls = [Batch((torch.zeros(16, 2),)) for _ in range(32)]
    used = {
        (name, macs): sum(call.size for call in EFFORTS[name].of(macs).for_calibration(calls))
        for name in EFFORTS
        for macs in (10**6, 10**8, 10**11)
    }
    assert [used["fast", macs] for macs in (10**6, 10**8, 10**11)] == [128, 112, 32]
    assert {count for (name, _), count in used.items() if name != "fast"} == {512}
    model, data = net()
    checks = tdpass.compress(
        model, {"params": 0.9}, torch.cat([data, data]), effort="fast", cache=False, strict=False
    ).report.checks
    assert checks["samples"] == 128


@pytest.mark.parametrize(
    ("ends", "tried"), [(0, {"channel_svd": 1}), (2, {"channel_svd": 2, "input_svd": 2})]
)
def test_past_the_deadline_as_many_ranks_are_tried_as_the_effort_says(
    ends: int, tried: dict[str, int]
) -> None:
    torch.manual_seed(0)
    site = convolution(16)
    fits = SiteFits(site, torch.randn(site.shape), None, Metric(), rough=True)
    found = enumerate_candidates(fits, list(tried | {"input_svd": 2}), 6, deadline=Deadline(0.0), ends=ends)
    assert {name: sum(each.format == name for each in found) for name in {c.format for c in found}} == tried


def test_a_fit_that_would_not_be_done_in_time_is_not_begun_in_haste() -> None:
    site = convolution(64)
    fits = SiteFits(site, torch.randn(site.shape), None, Metric(), rough=True)
    short = Deadline(0.5 * seconds_to_fit(site), Clock())
    found = enumerate_candidates(fits, ["channel_svd", "tucker2"], 6, deadline=short, ends=0)
    assert [candidate.format for candidate in found] == ["channel_svd"]
    enough = Deadline(100.0, Clock())
    found = enumerate_candidates(fits, ["channel_svd", "tucker2"], 3, deadline=enough, ends=0)
    assert {candidate.format for candidate in found} == {"channel_svd", "tucker2"}
