"""The training section of the HTML report.

Scores, stages, and how residual, loss and score went over the epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tdpass.report import Report
from tdpass.views.html import Html, column, join, table, tag, text
from tdpass.views.html_axes import Frame
from tdpass.views.html_lines import Line, LineChart, Point
from tdpass.views.html_sites import breakable
from tdpass.views.training import CONTROL, CONTROL_IS, Course, Stage, courses, scores, stages, starts
from tdpass.views.units import human, seconds, small

_LARGE, _LOW = Frame(right=34), Frame(height=230)
_WORST = 3
_MOST_LINES = 40  # more weights become a band
_WORST_STYLES = ("colour1", "colour3", "colour5")
_STAGE_STYLES = {"pretrain": "dense", "method": "colour0", "finetune": "colour2", CONTROL: "colour1 dashed"}
_OTHER_STYLES = ("colour4", "colour6", "colour7")


def training(report: Report) -> Html | None:
    """The whole section; None where nothing was trained."""
    if not report.training:
        return None
    found, weights = stages(report.training), courses(report.training)
    numbers = tag("div", _scores(scores(report)), _stage_table(found), class_="card")
    far = (
        tag(
            "div",
            tag("h3", "Distance of the weights to their constraints"),
            *_residuals(weights, found),
            class_="card",
        )
        if weights
        else None
    )
    course = tag("div", *_losses(found), class_="card")
    return join([numbers, tag("div", far, course, class_="columns below-card")])


def _scores(shown: Sequence[tuple[str, str]]) -> Html | None:
    if not shown:
        return None
    items = [
        tag(
            "li",
            tag("span", name, class_="muted"),
            tag("strong", value),
            title=CONTROL_IS if name == CONTROL else None,
        )
        for name, value in shown
    ]
    return tag("ul", tag("li", tag("span", "Score", class_="muted")), *items, class_="scores")


def _stage_table(found: Sequence[Stage]) -> Html:
    scored, constrained = any(stage.score for stage in found), any(stage.farthest for stage in found)
    known = any(stage.memory for stage in found)
    optional = (
        ("Last score", scored),
        ("Time per epoch", True),
        ("Memory held", known),
        ("Largest residual", constrained),
    )
    names = ["Epochs", "First loss", "Last loss", *(name for name, shown in optional if shown)]
    headers = [
        column("Stage"),
        *(column(name, number=True) for name in names),
        *([column("Weight")] if constrained else []),
    ]
    rows = []
    for stage in found:
        cells = [str(stage.epochs), *stage.losses, *([stage.score] if scored else []), seconds(stage.seconds)]
        cells += [human(stage.memory, "B")] if known else []
        farthest = stage.farthest
        if constrained:
            cells.append("" if farthest is None else small(farthest[1]))
        weight = (
            tag("td", None if farthest is None else tag("code", farthest[0]), class_="keep")
            if constrained
            else None
        )
        rows.append(
            tag(
                "tr",
                tag("th", stage.name, scope="row"),
                *(tag("td", cell, class_="number") for cell in cells),
                weight,
            )
        )
    return table(headers, rows, "Stages")


def _residuals(weights: Sequence[Course], found: Sequence[Stage]) -> list[Html | None]:
    """The picture, whose lines of largest residual are named below it, and the numbers behind it."""
    worst, rest = weights[:_WORST], weights[_WORST:]
    thin = [Line(course.points, "thin", hint=_went(course)) for course in rest]
    named = [
        Line(course.points, style, str(rank + 1), _went(course))
        for rank, (course, style) in enumerate(zip(worst, _WORST_STYLES, strict=False))
    ]
    many = len(thin) > _MOST_LINES
    chart = LineChart([*([] if many else thin), *named[::-1]], _LARGE, band=thin if many else (), log=True)
    if chart.empty:
        return [tag("p", "No residual is finite.", class_="muted"), _numbers(weights)]
    label = (
        f"Relative distance to the constraint over epochs, of {len(weights)} weights; farthest at "
        f"the end: {'; '.join(map(_went, worst))}"
    )
    keys = [
        (line.style, join([tag("strong", line.mark), " ", tag("code", breakable(c.name)), f": {_ends(c)}"]))
        for line, c in zip(named, worst, strict=True)
    ]
    if rest:
        keys.append(
            ("band" if many else "thin", text(f"the {len(rest)} others" if len(rest) > 1 else _went(rest[0])))
        )
    return [chart.svg("‖W − Z‖ / ‖W‖", label, _borders(found)), _legend(keys), _numbers(weights)]


def _went(course: Course) -> str:
    return f"{course.name} {_ends(course)}"


def _ends(course: Course) -> str:
    return f"{small(course.points[0][1])} → {small(course.last)}"


def _numbers(weights: Sequence[Course]) -> Html:
    headers = [column("Weight"), *(column(name, number=True) for name in ("First", "Last", "Least"))]
    rows = []
    for course in weights:
        cells = (course.points[0][1], course.last, min(value for _, value in course.points))
        rows.append(
            tag(
                "tr",
                tag("th", tag("code", breakable(course.name)), scope="row"),
                *(tag("td", small(value), class_="number") for value in cells),
            )
        )
    return tag("details", tag("summary", "The numbers"), table(headers, rows, "Residuals"))


def _losses(found: Sequence[Stage]) -> list[Html | None]:
    """Loss per epoch and, where there is one, score per epoch, a line for each stage."""
    before = starts(found)
    spare = iter(_OTHER_STYLES * len(found))
    styles = {stage.name: _STAGE_STYLES.get(stage.name) or next(spare) for stage in found}

    def lines(values: dict[str, list[Point]]) -> list[Line]:
        return [Line(points, styles[name], hint=name) for name, points in values.items() if points]

    losses = {
        stage.name: [(before[stage.name] + row.epoch + 1, row.loss) for row in stage.rows] for stage in found
    }
    scored = {
        stage.name: [
            (before[stage.name] + row.epoch + 1, row.score) for row in stage.rows if row.score is not None
        ]
        for stage in found
    }
    parts: list[Html | None] = [
        _legend(
            [
                (
                    styles[stage.name],
                    text(f"{CONTROL}: {CONTROL_IS}" if stage.name == CONTROL else stage.name),
                )
                for stage in found
            ]
        )
    ]
    pictures = [
        (
            "Loss per epoch",
            LineChart(lines(losses), _LOW),
            {stage.name: " to ".join(stage.losses) for stage in found},
        )
    ]
    # the climb from nothing would leave no height to tell the other stages apart
    later = {name: points for name, points in scored.items() if name != "pretrain" and points}
    pictures.append(
        (
            "Score per epoch",
            LineChart(lines(later or scored), _LOW, log=False, least=None),
            {stage.name: stage.score for stage in found},
        )
    )
    for title, chart, said in pictures:
        if not chart.empty:
            label = f"{title}: {'; '.join(f'{name} {value}' for name, value in said.items())}"
            parts += [
                tag("h3", f"{title}, after pre-training" if chart.first > 1 else title),
                chart.svg(title.split()[0].lower(), label, _borders(found)),
            ]
    if CONTROL in styles and len(found) > 1:
        parts.append(
            tag(
                "p",
                "The control learns from labels alone: where the other stages distil, compare scores, not "
                "losses.",
                class_="muted",
            )
        )
    return parts


def _borders(found: Sequence[Stage]) -> list[int]:
    before = starts(found)
    return [before[stage.name] + stage.epochs for stage in found if stage.name != CONTROL]


def _legend(keys: Sequence[tuple[str, Html]]) -> Html:
    def swatch(style: str) -> Html:
        shape = (
            tag("rect", class_=style, width=22, height=10)
            if style == "band"
            else tag("line", class_=f"line {style}", x2=22, y1=5, y2=5)
        )
        return tag("svg", shape, width=22, height=10, aria_hidden="true")

    return tag("ul", *(tag("li", swatch(style), " ", words) for style, words in keys), class_="legend")
