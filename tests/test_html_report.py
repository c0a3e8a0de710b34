"""The HTML report: self-contained, escaped, complete."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tdpass.cost import Cost
from tdpass.form import DENSE, Form
from tdpass.html_report import render_html
from tdpass.measures import MEASURES, Measure
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.report import ArrayBlock, ArrayRow, CurvePoint, PassRow, Report, SiteRow
from tdpass.views.blocks import blocks
from tdpass.views.html import tag
from tdpass.views.html_comparison import comparison
from tdpass.views.html_curve import curve
from tdpass.views.html_network import strip
from tdpass.views.html_sites import colours, common_prefix

VOID = {"meta", "input", "wbr", "link", "br"}
HOSTILE = "<script>alert('x')</script>\"'&$title\x1b[2J"


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    def count(self, name: str, **attributes: str) -> int:
        return sum(tag == name and attributes.items() <= attrs.items() for tag, attrs in self.tags)

    @property
    def text(self) -> str:
        return "".join(self.words)


def cost(params: int, positions: int = 64) -> Cost:
    return Cost(params, params * positions, 4 * params)


def report_of(sites: int, prefix: str = "layer", note: str = "lowest loss for its cost") -> Report:
    formats = ("svd", "tucker2", "tensor_train", "dense")
    rows = []
    for n in range(sites):
        name = formats[n % 4]
        after = cost(2304) if name == "dense" else cost(500 + n)
        form = DENSE if name == "dense" else Form(name, (n + 1,))
        rows.append(
            SiteRow(
                f"{prefix}{n}.conv", (16, 16, 3, 3), form, cost(2304), after, 0.1, 1e-4, "<= 0.2000", note
            )
        )
    total, final = sum((row.before for row in rows), Cost()), sum((row.after for row in rows), Cost())
    report = Report(
        "m.onnx",
        "onnx",
        "macs=0.4",
        "outputs",
        "kl",
        "machine",
        "2026-11-21T01:00:00+00:00",
        total,
        final,
        rows,
        {"emb": "an embedding"},
    )
    report.passes = [PassRow("plan", False, 3.0, final, ("planned",)), PassRow("factorize", True, 1.0, final)]
    report.curve = [CurvePoint(b / 10, b / 10, b / 10, 10.0**-b, chosen=b == 4) for b in range(1, 10)]
    report.checks = {"divergence": 0.0123, "argmax agreement": 0.98}
    report.note("a note")
    return report


@pytest.mark.parametrize("sites", [0, 1, 3, 300])
def test_parses_and_holds_every_site(sites: int) -> None:
    report = report_of(sites)
    page = Page(render_html(report))
    for row in report.sites:
        assert page.count("th", **{"data-key": row.site}) == 1
    assert page.count("h1") == 1
    assert page.count("main") == 1
    for word in (
        "emb",
        "an embedding",
        "a note",
        "argmax agreement",
        "factorize",
        "0.0123",
        "2026-11-21 01:00 UTC",
    ):
        assert word in page.text


def test_loads_nothing_from_anywhere() -> None:
    text = render_html(report_of(8))
    assert not re.search(r"https?:|//\w|@import|url\(|javascript:|data:", text)
    page = Page(text)
    assert not any({"src", "srcset", "action"} & attrs.keys() for _, attrs in page.tags)
    assert all(str(attrs.get("href", "#")).startswith("#") for _, attrs in page.tags)


def test_own_policy_allows_its_style_and_script_and_no_others() -> None:
    text = render_html(report_of(8))
    page = Page(text)
    (policy,) = [
        str(attrs["content"])
        for tag_name, attrs in page.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_everything_foreign_is_escaped() -> None:
    report = report_of(4, prefix=HOSTILE, note=HOSTILE)
    report.model = report.budget = report.metric = report.machine = report.created = report.frontend = (
        report.divergence
    ) = HOSTILE
    report.declined = {HOSTILE: HOSTILE}
    report.checks = {HOSTILE: 1.0}
    report.notes = [HOSTILE]
    report.passes = [PassRow(HOSTILE, True, 1.0, Cost(), (HOSTILE,))]
    rows = [SiteRow(HOSTILE, (2, 2), Form(HOSTILE, (1,)), cost(4), cost(2), 0.1, 0.1, HOSTILE, HOSTILE)]
    report.sites += rows
    text = render_html(report)
    page = Page(text)
    assert page.count("script") == 1
    assert "alert('x')" not in text
    assert "\x1b" not in text
    assert page.text.count("<script>alert('x')</script>\"'&$title\ufffd[2J") >= 10


def test_surrogates_can_be_written() -> None:
    render_html(Report(model="\ud800", notes=["\udfff"])).encode("utf-8")


def test_empty_report_is_a_page() -> None:
    assert "a dry run" in Page(render_html(Report(dry_run=True))).text


@pytest.mark.parametrize("measure", list(MEASURES), ids=lambda measure: measure.name)
def test_a_change_too_small_to_be_written_is_none(measure: Measure) -> None:
    def said(after: int) -> str:
        costs = [Cost.of({measure.name: value}) for value in (100_000, after)]
        return Page(render_html(Report(original=costs[0], final=costs[1]))).text

    assert all(f"no {measure.less}" in said(after) for after in (99_900, 100_000, 100_100))
    assert f"1.25× {measure.less}" in said(80_000)
    assert f"1.25× {measure.more}" in said(125_000)


def test_plan_stands_in_before_anything_was_done() -> None:
    choice = Choice("fc", (8, 8), Form("svd", (2,)), cost(32), cost(64), 0.1, 0.01, "it pays", "= 0.1000")
    page = Page(render_html(Report(model="m"), RankPlan((choice,), cost(100), declined={"emb": "no site"})))
    for word in ("fc", "it pays", "= 0.1000", "1.47×", "no site", "expected by the plan"):
        assert word in page.text


def test_parameters_are_shown_first_when_multiply_adds_are_unknown() -> None:
    report = Report(original=Cost(10, 0, 40), final=Cost(5, 0, 20))
    page = Page(render_html(report))
    (chosen,) = [attrs["id"] for name, attrs in page.tags if name == "input" and "checked" in attrs]
    assert chosen == "measure-params"


def test_every_table_has_headers_and_a_caption_and_scrolls() -> None:
    page = Page(render_html(report_of(8)))
    tables = page.count("table")
    assert tables >= 4
    assert page.count("caption") == tables
    assert page.count("div", **{"class": "scroll", "tabindex": "0", "role": "region"}) == tables
    assert all("scope" in attrs for name, attrs in page.tags if name == "th")


def test_pictures_have_words() -> None:
    page = Page(render_html(report_of(8)))
    pictures = [attrs for name, attrs in page.tags if name == "svg"]
    assert pictures
    assert all(
        attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs.get("aria-label"))
        for attrs in pictures
    )


def test_bar_lengths_are_the_costs() -> None:
    rows = [
        SiteRow("a", (1,), Form("svd", (1,)), cost(1000), cost(250), 0.1, 0.1),
        SiteRow("b", (1,), Form("svd", (1,)), cost(500), cost(500), 0.1, 0.1),
    ]
    page = Page(render_html(Report(sites=rows, original=cost(1500), final=cost(750))))
    widths = [
        attrs["width"] for name, attrs in page.tags if name == "rect" and attrs.get("height") in ("18", "10")
    ]
    assert widths == 3 * ["100.00%", "25.00%"] + 3 * ["50.00%", "50.00%"]  # multiply-adds, parameters, bytes


def test_what_a_modelled_machine_says_of_each_site_has_columns() -> None:
    before, after = (
        Cost(100, 1000, 400, cycles=5_000, joules=2e-3),
        Cost(50, 500, 200, cycles=2_000, joules=5e-4),
    )
    rows = [
        SiteRow("a", (2,), Form("svd", (1,)), before, after, 0.1, 0.1),
        SiteRow("b", (2,), DENSE, before, before, 0.0, 0.0),
    ]
    text = render_html(Report(sites=rows, original=before + before, final=before + after))
    table = text[text.index('id="sites-table"') :]
    for title in (">Cycles<", ">Energy<"):
        assert table.count(title) == 1
    for key in ('data-key="2000"', 'data-key="5000"', 'data-key="0.0005"', 'data-key="0.002"'):
        assert table.count(key) == 1, key
    for amount in ("5.00", "2.00", "2mJ", "500uJ"):
        assert amount in table
    assert (
        "cycles"
        not in render_html(
            Report(
                sites=[SiteRow("a", (2,), DENSE, cost(4), cost(4), 0.0, 0.0)], original=cost(4), final=cost(4)
            )
        ).lower()
    )


def test_colours_are_stable_and_always_named() -> None:
    rows = [
        SiteRow("a", (1,), Form(name, ()), cost(1), cost(1), 0.0, 0.0) for name in ("tucker2", "dense", "svd")
    ]
    assert colours(rows) == {"dense": "dense", "svd": "colour0 shade0", "tucker2": "colour1 shade0"}
    assert colours(rows[::-1]) == colours(rows)


def test_forms_of_one_format_are_shades_of_its_colour() -> None:
    """Number types and supports included; what stays as it was alone is grey."""
    forms = ("dense", "dense int8", "svd 4", "svd 4 int8", "svd 4 int4", "svd 8 int8", "dense 2:4")
    rows = [SiteRow("a", (1,), Form.parse(form), cost(1), cost(1), 0.0, 0.0) for form in forms]
    found = colours(rows)
    assert len(set(found.values())) == len(found) == 6
    assert found["dense"] == "dense"
    assert {found[name].split()[0] for name in ("svd", "svd int8", "svd int4")} == {"colour1"}
    assert {found[name].split()[0] for name in ("dense int8", "dense 2:4")} == {"colour0"}


def test_what_a_site_costs_is_there_in_every_measure_that_can_be_chosen() -> None:
    page = Page(render_html(report_of(3)))
    chosen = [
        str(attrs["id"]) for name, attrs in page.tags if name == "input" and attrs.get("type") == "radio"
    ]
    assert chosen == ["measure-macs", "measure-params", "measure-bytes"]
    keys = [attrs for name, attrs in page.tags if name == "td" and "data-macs" in attrs]
    assert all({"data-macs", "data-params", "data-bytes"} <= attrs.keys() for attrs in keys)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.encoder.layers.0.a", "model.encoder.layers.1.a"], "model.encoder.layers."),
        (["layer1.0", "layer1.1"], ""),
        (["model.encoder.layers.0"], ""),
        (["aaaaaaaaaaaaaaaaaaaa1", "aaaaaaaaaaaaaaaaaaaa2"], ""),
        (["same.name.twice.here", "same.name.twice.here"], "same.name.twice."),
        ([], ""),
    ],
)
def test_common_prefix(names: list[str], expected: str) -> None:
    assert common_prefix(names) == expected


def points(*losses: float) -> list[CurvePoint]:
    return [
        CurvePoint((n + 1) / len(losses), (n + 1) / len(losses), 1.0, loss, chosen=n == 1)
        for n, loss in enumerate(losses)
    ]


def test_curve_is_logarithmic_only_over_decades() -> None:
    assert ">0.01<" in curve(points(10.0, 0.1, 0.001), "kl")
    assert ">0.01<" not in curve(points(3.0, 2.0, 1.0), "kl")


def test_curve_shows_zero_loss_beside_logarithms() -> None:
    chart = curve(points(10.0, 0.1, 0.001, 0.0), "kl")
    assert ">0<" in chart
    assert "nan" not in chart
    assert "inf" not in chart


@pytest.mark.parametrize(
    "losses", [(0.0, 0.0, 0.0), (1e-9, 1e-9), (float("inf"), 1.0, 0.1), (1e300, 1.0, 1e-300), (5.0, 5.0)]
)
def test_curve_survives_odd_losses(losses: tuple[float, ...]) -> None:
    chart = curve(points(*losses), "")
    assert "nan" not in chart
    assert "inf" not in chart
    Page(chart)


def test_curve_needs_two_points() -> None:
    assert "No curve" in curve(points(1.0), "kl")
    assert "No curve" in curve([], "kl")


def test_chosen_point_is_marked_and_said() -> None:
    page = Page(curve(points(1.0, 0.1, 0.01), "kl"))
    assert page.count("circle", **{"class": "chosen"}) == 3  # one in the chart of each measure
    assert any(
        "chosen: 0.1 at 66.7 %" in str(attrs.get("aria-label")) for name, attrs in page.tags if name == "svg"
    )


def test_children_are_escaped_unless_they_are_markup() -> None:
    assert tag("p", "<b>", tag("i", "&"), None, title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'


def test_times_are_shown_where_sites_were_timed() -> None:
    report = report_of(3)
    report.sites = [
        replace(
            row,
            before=row.before.replace(seconds=2.5e-3),
            after=row.after.replace(seconds=1e-3),
            kernel=HOSTILE,
            predicted=9e-4,
        )
        for row in report.sites
    ]
    report.original, report.final = report.original.replace(seconds=0.02), report.final.replace(seconds=0.03)
    report.target = "cpu, batch 1, 1 thread"
    page = Page(render_html(report))
    for word in (
        "2.5 ms",
        "1 ms",
        "900 us",
        "2.50×",
        "20 ms",
        "30 ms",
        "1.50× slower",
        "cpu, batch 1, 1 thread",
    ):
        assert word in page.text
    assert "Predicted" not in Page(render_html(report_of(3))).text
    assert page.count("td", **{"data-key": "0.0009"}) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "fc"],
            ["", "layer1.0", "layer1.1", ""],
        ),
        (["a", "b", "c"], [""]),
        (["one"], [""]),
        ([], [""]),
        ([f"blocks.{n}.conv.{m}" for n in range(80) for m in range(2)], ["blocks"]),
        ([f"{n}.self.{part}" for n in range(12) for part in "qkv"], [f"{n}.self" for n in range(12)]),
        (
            [f"{n}.{part}.dense" for n in range(12) for part in ("query", "value", "output", "hidden")],
            [f"{n}" for n in range(12)],
        ),
    ],
)
def test_blocks_are_the_finest_that_are_few(names: list[str], expected: list[str]) -> None:
    found = blocks(names)
    assert [name for name, _ in found] == expected
    assert [place for _, places in found for place in places] == list(range(len(names)))


@pytest.mark.parametrize("sites", [1, 74, 300])
def test_every_cell_of_the_network_leads_to_the_row_of_its_site(sites: int) -> None:
    page = Page(render_html(report_of(sites)))
    rows = [str(attrs["id"]) for name, attrs in page.tags if name == "tr" and "id" in attrs]
    cells = [attrs for name, attrs in page.tags if name == "a" and attrs.get("class") == "cell"]
    assert [attrs["href"] for attrs in cells] == [f"#{row}" for row in rows]
    assert all(f"layer{place}.conv" in str(attrs["title"]) for place, attrs in enumerate(cells))
    assert page.count("tr", **{"class": "block-row"}) == 0  # one block says nothing


@pytest.mark.parametrize(("sites", "rows"), [(30, 0), (74, 8), (200, 20)])
def test_many_sites_stand_in_their_blocks(sites: int, rows: int) -> None:
    report = report_of(sites)
    report.sites = [replace(row, site=f"stage{n // 10}.{row.site}") for n, row in enumerate(report.sites)]
    page = Page(render_html(report))
    assert page.count("tr", **{"class": "block-row"}) == rows


def test_heights_in_the_network_are_roots_of_costs() -> None:
    rows = [SiteRow("a", (1,), Form("svd", (1,)), cost(1600), cost(400), 0.1, 0.1)]
    page = Page(strip(rows, colours(rows)))
    heights = [float(str(attrs["height"])) for name, attrs in page.tags if name == "rect"]
    assert heights == 3 * [64.0, 32.0]  # multiply-adds, parameters, bytes


def test_another_budget_says_what_it_would_change() -> None:
    svd, tucker = Form("svd", (4,)), Form("tucker2", (3, 4))
    curved = [
        CurvePoint(0.3, 0.3, 0.3, 0.2, forms={"a": svd, "b": svd}),
        CurvePoint(0.5, 0.5, 0.5, 0.1, chosen=True, forms={"a": tucker, "b": svd}),
        CurvePoint(0.9, 0.9, 0.9, 0.0, forms={"b": svd, HOSTILE: svd}),
    ]
    page = Page(curve(curved, "kl"))
    for word in (
        "30 %, loss 0.2: 1 site",
        "tucker2 3x4 → svd 4",
        "tucker2 3x4 → dense",
        "dense → svd 4",
    ):
        assert word in page.text
    places = {str(attrs["id"]) for name, attrs in page.tags if name == "ul"}
    assert {str(attrs["href"]) for name, attrs in page.tags if name == "a"} == {
        f"#{place}" for place in places
    }
    assert "would change" not in curve(points(1.0, 0.1), "kl")


def test_what_was_left_alone_says_what_it_holds() -> None:
    rows = [
        SiteRow("a", (1,), Form("svd", (1,)), cost(500), cost(250), 0.1, 0.1),
        SiteRow("b", (1,), DENSE, cost(300), cost(300), 0.0, 0.0, note="too small"),
        SiteRow("c", (1,), DENSE, cost(100), cost(100), 0.0, 0.0, note="sensitive"),
    ]
    report = Report(sites=rows, original=cost(1000), final=cost(750), declined={"emb": "an embedding"})
    text = Page(render_html(report)).text
    for word in (
        "They hold 40.0 % of its MACs",
        "(30.0 % of its MACs",
        "(10.0 % of its MACs",
        "They hold 10.0 % of its MACs",
    ):
        assert word in text


def test_two_reports_beside_each_other() -> None:
    report, other = report_of(4), replace(report_of(4), budget="macs=0.2")
    other.sites = [replace(other.sites[0], form=Form("svd", (9,)), after=cost(123)), *other.sites[1:3]]
    other.final = cost(1234)
    text = Page(render_html(report, against=other)).text
    for word in ("macs=0.2", "1 of 4 sites differ; 1 is in one of the two only", "svd 9"):
        assert word in text
    assert "Against another" not in Page(render_html(report)).text


def test_reports_of_one_budget_are_told_apart_and_many_sites_are_shown_when_asked_for() -> None:
    report, other = report_of(60), report_of(60)
    other.sites = [replace(row, form=Form("cp", (n + 1,))) for n, row in enumerate(other.sites)]
    page = Page(comparison(report, other))
    for word in ("this: macs=0.4", "the other: macs=0.4", "Form, this", "Form, the other"):
        assert word in page.text
    assert page.count("details") == 1
    assert Page(comparison(report, report_of(60))).count("details") == 0


def test_every_array_is_drawn_with_the_blocks_that_lie_in_it() -> None:
    blocks = (ArrayBlock(0, 0, 20, 8, 160), ArrayBlock(20, 8, 4, 16, 16))
    report = report_of(2)
    report.arrays = [
        ArrayRow("fc", 0, 32, 32, 4, blocks),
        ArrayRow("fc", 1, 32, 32, 4, blocks[:1]),
        ArrayRow(HOSTILE, 2, 128, 32, 1, ()),
    ]
    page = Page(render_html(report))
    drawn = [
        attrs
        for tag_name, attrs in page.tags
        if tag_name == "svg" and "array" in str(attrs.get("aria-label"))
    ]
    assert [attrs["viewbox"] for attrs in drawn] == ["0 0 32 32", "0 0 32 32", "0 0 32 128"]
    assert (
        drawn[0]["aria-label"] == "fc, array 0: 20 × 8 from line 0 and column 0, 160 weights, "
        "4 × 16 from line 20 and column 8, 16 weights"
    )
    placed = [attrs for tag_name, attrs in page.tags if tag_name == "rect" and "fill-opacity" in attrs]
    assert [
        (attrs["x"], attrs["y"], attrs["width"], attrs["height"], attrs["fill-opacity"]) for attrs in placed
    ] == [
        ("0", "0", "8", "20", "1.00"),
        ("8", "20", "16", "4", "0.44"),
        ("0", "0", "8", "20", "1.00"),
    ]
    assert (
        "8 arrays of 32 × 32 weights, 4 of each; 16.4 % of their cells hold one of 336 weights" in page.text
    )
    report.arrays = [ArrayRow("fc", number, 32, 32, 1, blocks) for number in range(130)]
    page = Page(render_html(report))
    assert (
        sum("array" in str(attrs.get("aria-label")) for tag_name, attrs in page.tags if tag_name == "svg")
        == 128
    )
    assert "and 2 more" in page.text
    report.arrays = []
    assert "#arrays" not in render_html(report)
