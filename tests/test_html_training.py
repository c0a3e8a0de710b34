"""The training section of the HTML report, and the charts it is drawn with."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tdpass.html_report import render_html
from tdpass.report import Report, TrainingRow
from tdpass.views.html_axes import Frame, Heights, steps
from tdpass.views.html_lines import Line, LineChart
from tdpass.views.html_training import training

HOSTILE = "<script>alert('x')</script>\"'&$title\x1b[2J"


class Section:
    """Checks that elements nest, and finds what the tests look at."""

    def __init__(self, markup: str | None) -> None:
        assert markup is not None
        self.root = ElementTree.fromstring(f"<div>{markup.replace('<wbr>', '')}</div>")
        self.text = "".join(self.root.itertext())

    def find(self, tag: str, style: str | None = None) -> list[ElementTree.Element]:
        return [element for element in self.root.iter(tag) if style is None or element.get("class") == style]


def trained(weights: int = 5, epochs: int = 6, name: str = "layer{}.conv") -> Report:
    rows = [TrainingRow("pretrain", epoch, 2.0 - epoch / 4, 0.1, 1.5, 50.0 + epoch) for epoch in range(3)]
    for epoch in range(epochs):
        residuals = {name.format(n): 0.9 ** (n + 1) * 0.5**epoch for n in range(weights)}
        rows.append(TrainingRow("method", epoch, 0.5, 0.1, 2.0, 90.0 + epoch, residuals))
    rows += [TrainingRow("finetune", epoch, 0.2, 0.1, 1.0, 97.0 + epoch) for epoch in range(2)]
    rows += [TrainingRow("control", epoch, 0.1, 0.1, 1.0, 98.0) for epoch in range(epochs + 2)]
    scores = {
        "score_dense": 98.125,
        "score_before_finetuning": 90.5,
        "score_control": 98.25,
        "score_final": 98.0,
    }
    return Report("m", training=rows, checks={"divergence": 0.01, **scores})


def test_nothing_is_said_of_training_where_there_was_none() -> None:
    assert training(Report()) is None
    untrained, page = render_html(Report(checks={"score_dense": 0.5})), render_html(trained())
    assert "#training" not in untrained
    assert "score dense" in untrained
    assert 'href="#training"' in page
    assert "98.00</strong> score, final" in page
    assert "score dense" not in page  # among the checks, once more


def test_stages_scores_and_the_farthest_weights_are_shown() -> None:
    section = Section(training(trained()))
    for word in (
        "pretrain",
        "method",
        "finetune",
        "the dense network, trained as long",
        "98.12",
        "98.25",
        "98.00",
        "0.0281",
        "2.0 s",
    ):
        assert word in section.text
    shown = [code.text for code in section.find("code")]
    assert shown == [
        "layer0.conv",
        *(f"layer{n}.conv" for n in range(3)),
        *(f"layer{n}.conv" for n in range(5)),
    ]  # stage, legend, numbers
    assert "the 2 others" in section.text
    assert [mark.text for mark in section.find("text", "callout")] == ["1", "2", "3"]
    assert len(section.find("svg", "chart over-epochs")) == 3
    assert len(section.find("polyline", "line thin")) == 2
    assert all(
        picture.get("aria-hidden") == "true" or picture.get("aria-label") for picture in section.find("svg")
    )


def test_the_control_runs_beside_what_it_is_compared_to() -> None:
    section = Section(training(trained()))

    def ends(style: str) -> tuple[str, str]:
        places = [
            pair.split(",")[0]
            for pair in section.find("polyline", f"line {style}")[0].get("points", "").split()
        ]
        return places[0], places[-1]

    assert ends("colour1 dashed") == (ends("colour0")[0], ends("colour2")[1])


def test_many_weights_become_a_band() -> None:
    section = Section(training(trained(weights=60)))
    assert len(section.find("polygon", "band")) == 1
    assert not section.find("polyline", "line thin")
    assert "the 57 others" in section.text


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e308, 5e-324, 1.0])
@pytest.mark.parametrize("everywhere", [False, True])
def test_odd_numbers_do_not_break_it(value: float, everywhere: bool) -> None:
    report = trained(epochs=4)
    rows = report.training
    for index, row in enumerate(rows):
        if row.residuals and (everywhere or index == 5):
            rows[index] = replace(
                row,
                residuals=dict.fromkeys(row.residuals, value)
                if everywhere
                else {**row.residuals, "layer1.conv": value},
            )
    rows[-1] = replace(rows[-1], loss=value, score=value)
    render_html(report)
    for element in Section(training(report)).root.iter():
        for key in ("points", "x", "y", "cx", "cy", "x1", "x2", "y1", "y2"):
            assert all(
                math.isfinite(float(number)) for number in element.get(key, "0").replace(",", " ").split()
            )


@pytest.mark.parametrize(("weights", "epochs"), [(0, 3), (1, 1), (2, 1)])
def test_short_runs_have_pictures(weights: int, epochs: int) -> None:
    section = Section(training(trained(weights, epochs)))
    assert len(section.find("svg", "chart over-epochs")) == 2 + (weights > 0)
    assert ("Largest residual" in section.text) == (weights > 0)


def test_names_are_escaped() -> None:
    report = trained(5, name=HOSTILE + "{}")
    report.training = [
        replace(row, stage=HOSTILE) if row.stage == "finetune" else row for row in report.training
    ]
    report.checks = {f"score_{HOSTILE}": 1.0}
    section, page = Section(training(report)), render_html(report)
    assert not section.find("script")
    assert HOSTILE.replace("\x1b", "\ufffd") in section.text
    assert page.count("<script") == 1
    assert "\x1b" not in page


def test_training_survives_json(tmp_path: Path) -> None:
    report = trained()
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    report.training = [TrainingRow("method", 0, math.nan, 0.1, 1.0, None, {"fc": math.nan, "out": 0.0})]
    report.save(tmp_path / "report.json")
    (row,) = Report.load(tmp_path / "report.json").training
    assert math.isnan(row.loss)
    assert math.isnan(row.residuals["fc"])
    assert row.residuals["out"] == 0.0


def test_lines_break_where_an_epoch_is_missing() -> None:
    line = Line([(1, 1.0), (2, 0.5), (3, math.nan), (4, 0.25), (6, 0.1), (7, 0.0)], "thin")
    assert list(line.pieces()) == [[(1, 1.0), (2, 0.5)], [(4, 0.25)], [(6, 0.1), (7, 0.0)]]
    picture = Section(LineChart([line], Frame(), log=True).svg("loss", "words"))
    assert len(picture.find("polyline")) == 2
    assert len(picture.find("circle")) == 1


def test_marks_of_lines_that_end_together_stand_apart() -> None:
    frame = Frame()
    lines = [Line([(1, 1.0), (2, n / 1000)], "thin", str(n)) for n in range(3)]
    marks = Section(LineChart(lines, frame).svg("loss", "words")).find("text", "callout")
    heights = [float(mark.get("y", "nan")) for mark in marks]
    assert [mark.text for mark in marks] == ["2", "1", "0"]
    assert all(b - a >= 15 for a, b in pairwise(heights))
    assert heights[-1] <= frame.floor


def test_long_runs_draw_no_more_points_than_are_seen() -> None:
    picture = Section(
        LineChart([Line([(epoch, 1.0 / epoch) for epoch in range(1, 5000)], "thin")], Frame()).svg(
            "loss", "words"
        )
    )
    points = picture.find("polyline")[0].get("points", "").split()
    assert 300 < len(points) <= 402
    assert points[-1].startswith(f"{Frame().edge:.1f},")


@pytest.mark.parametrize(
    "values",
    [[98.93], [1e-14, 2e-14], [-3.0, -1.0], [0.0], [1e300, -1e300], [1e-3, 0.0, 5.0], [3e-5, 9e-5], []],
)
def test_heights_lie_in_the_frame(values: list[float]) -> None:
    frame = Frame()
    for heights in (
        Heights(values, frame),
        Heights(values, frame, least=None),
        Heights(values, frame, log=True),
    ):
        assert all(frame.top <= heights.at(value) <= frame.floor for value in [*values, *heights.ticks])
        assert len({heights.text(tick) for tick in heights.ticks}) == len(heights.ticks) >= 2


def test_ticks_between_powers_of_ten_say_so() -> None:
    heights = Heights([3e-5, 9e-5], Frame(), log=True)
    assert [heights.text(tick) for tick in heights.ticks] == [
        "2\u00b710\u207b\u2075",
        "5\u00b710\u207b\u2075",
        "10\u207b\u2074",
    ]


def test_steps_are_round() -> None:
    assert steps(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert steps(1, 60, 7) == [0, 10, 20, 30, 40, 50, 60]
