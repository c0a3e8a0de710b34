"""Tables for a terminal and for a pipe."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from tdpass.cost import Cost
from tdpass.form import DENSE, Form
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.report import CurvePoint, PassRow, Report, SiteRow, TrainingRow
from tdpass.site import Site
from tdpass.terminal import InspectRow, geometry, inspect_table, report_view, site_table
from tdpass.views import html_sites, summary
from tdpass.views.tables import Column, fitting, to_text, width_of, write
from tdpass.views.training import courses, scores, stages, starts
from tdpass.views.units import human, plain, ratio, seconds, small


def cost(params: int, positions: int = 100) -> Cost:
    return Cost(params, params * positions, 4 * params)


def report_of(sites: int = 3, prefix: str = "layer") -> Report:
    rows = [
        SiteRow(
            f"{prefix}{n}.conv",
            (16, 16, 3, 3),
            Form("spatial_svd", (5,)),
            cost(2304),
            cost(800),
            0.21,
            0.002,
            "<= 0.2500",
            f"reason number {n}",
        )
        for n in range(sites - 1)
    ]
    rows.append(
        SiteRow(f"{prefix}.head", (10, 64), DENSE, cost(640), cost(640), 0.0, 0.0, "", "no rank pays")
    )
    total, final = sum((row.before for row in rows), Cost()), sum((row.after for row in rows), Cost())
    report = Report(
        "model.onnx",
        "onnx",
        "macs=0.4",
        "outputs",
        "kl",
        "a machine",
        "2026-11-21T01:00:00+00:00",
        total,
        final,
        rows,
        {"emb": "an embedding"},
    )
    report.passes = [
        PassRow("plan{macs=0.4}", False, 12.5, final, ("10 candidates",)),
        PassRow("factorize", True, 0.25, final),
    ]
    report.curve = [CurvePoint(0.4, 0.39, 0.5, 0.01, chosen=True), CurvePoint(1.0, 1.0, 1.0, 0.0)]
    report.checks = {"divergence": 0.0123}
    report.note("two sites share a weight")
    return report


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = to_text(report_view(report_of(6, "encoder.block.attention.self.query."), None, width), width)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 100, 120, 160, None])
def test_everything_said_is_shown_at_every_width(width: int | None) -> None:
    report = report_of()
    text = " ".join(to_text(report_view(report, None, width), width).split())
    for row in report.sites:
        assert row.site in text
        assert row.note in text
    for word in (
        "spatial_svd",
        "0.21",
        "<= 0.2500",
        "16x16x3x3",
        "2.88x",
        "emb",
        "an embedding",
        "plan{macs=0.4}",
        "12.5 s",
        "two sites share a weight",
    ):
        assert word in text
    assert "KL divergence: 0.0123 measured" in text
    assert "3 sites: 2 spatial_svd, 1 dense" in text


def test_pipe_gets_one_line_per_site_without_colour_or_lines() -> None:
    report = report_of(40, "a.very.long.prefix.that.would.never.fit.into.eighty.columns.")
    stream = io.StringIO()
    write(report_view(report, None, None), stream)
    text = stream.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    for row in report.sites:
        (line,) = [line for line in text.splitlines() if line.startswith(row.site + " ")]
        assert row.note in line
    assert all(line == line.rstrip() for line in text.splitlines())


def test_columns_variable_sets_the_width_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert width_of(io.StringIO()) == 70
    monkeypatch.delenv("COLUMNS")
    assert width_of(io.StringIO()) is None


def test_terminal_gets_colour_unless_it_is_unwanted() -> None:
    shown = to_text(
        report_view(report_of(), None, 120),
        120,
        Console(force_terminal=True, color_system="standard", no_color=False),
    )
    assert "\x1b[1m" in shown


def test_hostile_names_cannot_reach_the_terminal() -> None:
    report = report_of()
    report.sites[0] = SiteRow(
        "\x1b[2J[red]boom[/red]\u202e", (2, 2), Form("svd", (1,)), cost(4), cost(4), 0.1, 0.1, note="a\nb\x07"
    )
    report.declined = {"[/]": "\x1b]0;title\x07"}
    text = to_text(report_view(report, None, None), None)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[red]boom[/red]" in text


def test_plan_stands_in_for_a_report_without_sites() -> None:
    plan = RankPlan(
        (Choice("fc", (8, 8), Form("svd", (2,)), cost(32), cost(64), 0.1, 0.01, "it pays", "= 0.1000"),),
        cost(100),
        "macs=0.5",
    )
    text = to_text(report_view(Report(model="m"), plan, None), None)
    assert "it pays" in text
    assert "= 0.1000" in text
    assert "68.0 %" in text
    assert "0.01 expected" in text


def test_empty_report_is_still_a_page() -> None:
    assert "Model" in to_text(report_view(Report(), None, 80), 80)


def test_equal_reasons_are_said_once() -> None:
    rows = [
        SiteRow(f"s{n}", (4, 4), DENSE, cost(16), cost(16), 0.0, 0.0, note="too small") for n in range(20)
    ]
    text = to_text(site_table(rows, 44), 44)
    assert "s0, s1, s2, s3 and 16 more: too small" in " ".join(text.split())


@pytest.mark.parametrize(("loss", "shown"), [(0.0, False), (0.002, True)])
def test_losses_that_nobody_measured_are_not_shown_as_zero(loss: float, shown: bool) -> None:
    row = SiteRow("fc", (8, 8), Form("svd", (2,)), cost(64), cost(32), 0.1, loss)
    for width in (None, 100, 60):
        assert ("Loss" in to_text(site_table([row], width), width)) is shown
    for page in (
        html_sites.site_table([row], {"svd": "c0"}),
        html_sites.format_table(summary.by_format([row]), {"svd": "c0"}),
    ):
        assert ("Loss" in str(page)) is shown


def test_inspect_table_marks_unknown_multiply_adds() -> None:
    site = Site("fc", "linear", (8, 8))
    row = InspectRow(site, Cost(64, 0, 256), {"svd": (3,)})
    text = to_text(inspect_table([row], Cost(256, 0, 1024), ["svd"], None), None)
    assert text.splitlines()[0].split() == [
        "Site",
        "Kind",
        "Shape",
        "Geometry",
        "Params",
        "Of",
        "all",
        "MACs",
        "Of",
        "all",
        "svd",
    ]
    assert text.splitlines()[1].split() == ["fc", "linear", "8x8", "64", "25.0", "%", "?", "-", "3"]


def test_geometry_says_only_what_is_unusual() -> None:
    plain_site = Site("c", "conv", (4, 4, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    odd = Site("c", "conv", (4, 4, 3, 3), (2, 1), ((0, 1), (0, 1)), (2, 2), extents=(((8, 8), (4, 8)),) * 2)
    assert geometry(plain_site) == "pad 1"
    assert geometry(odd) == "stride 2x1 pad (0, 1) dilation 2 2 calls"
    assert geometry(replace(plain_site, groups=4)) == "pad 1 4 groups"


def test_layout_falls_back_to_the_narrowest() -> None:
    wide, narrow = [Column[str]("title", lambda row: row * 10)], [Column[str]("t", lambda row: row)]
    assert fitting((wide, narrow), ["ab"], 30)[1] == 0
    assert fitting((wide, narrow), ["ab"], 10)[1] == 1


def test_refusals_are_grouped_by_reason_the_most_frequent_first() -> None:
    report = Report(declined={"a": "rare", "": "often", "c": "often"})
    assert summary.refusals(report) == {"often": ["(the model itself)", "c"], "rare": ["a"]}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (human(0), "0"),
        (human(999), "999"),
        (human(999.6), "1.00 k"),
        (human(125_485_312), "125 M"),
        (human(2**21, "B"), "2.10 MB"),
        (human(3, "B"), "3 B"),
        (human(-1500), "-1.50 k"),
        (ratio(0, 5), "-"),
        (ratio(5, 10), "0.50x"),
        (small(float("nan")), "not finite"),
        (small(-0.5), "-0.5"),
        (seconds(0.00012), "120 us"),
        (seconds(61), "61.0 s"),
        (seconds(3600), "60 min 00 s"),
        (plain("a\u00a0b\ud800"), "a b\ufffd"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize("width", [72, 100, 130, 180, None])
def test_times_are_shown_where_sites_were_timed(width: int | None) -> None:
    report = report_of()
    for index, row in enumerate(report.sites):
        after = 2.5e-3 if row.format == "dense" else 1e-3
        before, made = row.before.replace(seconds=2.5e-3), row.after.replace(seconds=after)
        report.sites[index] = replace(row, before=before, after=made, kernel="eager", predicted=9e-4)
    report.original, report.final = report.original.replace(seconds=0.02), report.final.replace(seconds=0.01)
    report.target = "cpu, batch 1, 1 thread"
    text = to_text(report_view(report, None, width), width)
    assert width is None or max(map(len, text.splitlines())) <= width
    for word in ("2.5 ms", "1 ms", "900 us", "eager", "20 ms", "10 ms", "50.0 %", "cpu, batch 1, 1 thread"):
        assert word in text
    assert "Predicted" not in to_text(report_view(report_of(), None, None), None)


def trained() -> Report:
    report = report_of()
    rows = [
        TrainingRow("method", epoch, 2.0 - epoch, 0.1, 3.0, None, {"layer0.conv": 0.25, "layer1.conv": 0.75})
        for epoch in range(2)
    ]
    rows += [TrainingRow("finetune", epoch, 0.3, 0.1, 1.0, 97.0 + epoch) for epoch in range(3)]
    rows += [TrainingRow("control", epoch, 0.1, 0.1, 1.0, 98.0) for epoch in range(5)]
    report.training = rows
    report.checks |= {
        "score_dense": 98.125,
        "score_before_finetuning": 60.0,
        "score_control": 98.25,
        "score_final": 97.875,
    }
    return report


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_training_is_shown_at_every_width(width: int | None) -> None:
    text = to_text(report_view(trained(), None, width), width)
    assert width is None or max(map(len, text.splitlines())) <= width
    for word in ("Training", "method", "finetune", "0.75", "layer1.conv", "3.0 s", "99.00"):
        assert word in text
    said = (
        "score: dense 98.12, before fine-tuning 60.00, control 98.25 (the dense network, trained as long), "
        "final 97.88"
    )
    assert said in " ".join(text.split())
    assert "score dense" not in text


def test_pipe_gets_one_line_per_stage() -> None:
    lines = to_text(report_view(trained(), None, None), None).splitlines()
    (line,) = [line for line in lines if line.startswith("method ")]
    assert line.split() == ["method", "2", "2", "1", "3.0", "s", "0.75", "layer1.conv"]


def test_nothing_is_said_of_training_where_there_was_none() -> None:
    report = report_of()
    report.checks["score_dense"] = 0.98765
    text = to_text(report_view(report, None, None), None)
    assert "Training" not in text
    assert "score:" not in text
    assert "score dense" in text
    assert "0.9877" in text


def test_a_run_without_fine_tuning_has_one_score_less() -> None:
    report = trained()
    report.training = [row for row in report.training if row.stage != "finetune"]
    assert [name for name, _ in scores(report)] == ["dense", "control", "final"]


def test_stages_of_a_resumed_run_keep_their_places() -> None:
    found = stages(
        [
            TrainingRow("pretrain", 4, 1.0, 0.1, 1.0),
            TrainingRow("method", 2, 1.0, 0.1, 1.0),
            TrainingRow("control", 0, 1.0, 0.1, 1.0),
        ]
    )
    assert [stage.epochs for stage in found] == [5, 3, 1]
    assert starts(found) == {"pretrain": 0, "method": 5, "control": 5}


def test_a_residual_that_is_not_finite_comes_first() -> None:
    rows = [TrainingRow("method", 0, 1.0, 0.1, 1.0, None, {"a": 0.0, "b": math.nan, "c": 5.0})]
    assert [course.name for course in courses(rows)] == ["b", "c", "a"]
    assert stages(rows)[0].farthest is not None
    assert "not finite" in to_text(report_view(Report(training=rows), None, None), None)
