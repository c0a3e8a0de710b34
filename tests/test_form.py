"""A form has a text that reads back, and stands in files among the fields of what it belongs to."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from tdpass.cost import Cost
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats import FORMATS
from tdpass.numbers import NUMBERS
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.report import Report, SiteRow
from tdpass.site import Site
from tdpass.supports import SUPPORTS as SUPPORT_KINDS

SITE = Site("conv1d", "conv", (16, 24, 3), (1,), ((1, 1),), (1,))
RANKS = [(), (1,), (96,), (16, 24), (2, 4, 5, 5, 4, 2)]
TYPES = [
    *(name + "16" * (name == "levels") for name in NUMBERS.names()),
    "int8/tensor",
    "int4/64",
    "int8/64/zero",
]
STORED = [(), *((text,) for text in TYPES), ("bfloat16", "int8/tensor")]
SUPPORTS = ["", *(cls.example for cls in SUPPORT_KINDS), "rows/3,columns/12.5%"]
VERSION_1 = {
    "version": 1,
    "choices": [
        {
            "site": "fc",
            "shape": [16, 8],
            "format": "svd",
            "rank": [2],
            "cost": {"params": 48, "macs": 480, "bytes": 192},
            "dense": {"params": 128, "macs": 1280, "bytes": 512},
            "error": 0.1,
            "loss": 0.01,
        },
        {
            "site": "last",
            "shape": [4, 4],
            "format": "dense",
            "rank": [],
            "cost": {"params": 16, "macs": 16, "bytes": 64},
            "dense": {"params": 16, "macs": 16, "bytes": 64},
        },
    ],
    "original": {"params": 300, "macs": 3000, "bytes": 1200},
}


@pytest.mark.parametrize("name", FORMATS.names())
def test_every_form_reads_back_from_its_text(name: str) -> None:
    for rank, numbers, support in itertools.product(RANKS, STORED, SUPPORTS):
        form = Form(name, rank, numbers, support)
        assert Form.parse(str(form)) == form
        assert Form.parse(form.family) == replace(form, rank=())


def test_the_text_is_what_people_write() -> None:
    assert Form.parse("tucker2 16x24 int8") == Form("tucker2", (16, 24), ("int8",))
    assert Form.parse("dense 2:4") == Form("dense", (), support="2:4")
    assert Form.parse("svd 96 int4/64") == Form("svd", (96,), ("int4/64",))
    assert Form.parse(" dense ") == DENSE
    assert str(Form("svd", (12,), ("int8", "float16"), "rows/3")) == "svd 12 int8,float16 rows/3"
    assert Form.parse("dense levels16 unstructured/500") == Form(
        "dense", (), ("levels16",), "unstructured/500"
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(12, None), (None, 6), (12, 6), (0, None)])
def test_channels_that_are_left_stand_in_the_text_and_narrow_the_site(
    inputs: int | None, outputs: int | None
) -> None:
    for form in (
        Form("dense", (), inputs=inputs, outputs=outputs),
        Form("svd", (3,), ("int8",), "2:4", inputs, outputs),
    ):
        assert Form.parse(str(form)) == form
        assert form.family.startswith("narrow ")
        shape = (16 if outputs is None else outputs, 24 if inputs is None else inputs, 3)
        assert form.on(SITE).shape == shape
        assert form.on(form.on(SITE)) == form.on(SITE)
    assert str(Form("svd", (3,), ("int8",), inputs=12, outputs=6)) == "svd 3 in 12 out 6 int8"


@pytest.mark.parametrize("form", [Form("dense", (), inputs=25), Form("dense", (), outputs=17)])
def test_a_site_has_no_more_channels_than_it_has(form: Form) -> None:
    with pytest.raises(PlanError, match="it has 24 channels in and 16 out"):
        form.on(SITE)


def test_channels_of_groups_cannot_be_left_out_one_by_one() -> None:
    grouped = replace(SITE, shape=(16, 6, 3), groups=4)
    assert Form("dense", (), inputs=0).on(grouped).weights == 0
    for form in (Form("dense", (), inputs=12), Form("dense", (), outputs=8)):
        with pytest.raises(PlanError, match="in 4 groups"):
            form.on(grouped)


def test_names_of_version_1_are_what_they_stood_for() -> None:
    assert Form("pruned", (6, 12)) == Form("dense", (), inputs=12, outputs=6)
    assert Form("constant", ()) == Form("dense", (), inputs=0)
    told = json.loads(json.dumps(VERSION_1))
    pruned = {
        "format": "pruned",
        "rank": [4, 8],
        "channels": [0, 2, 3, 9],
        "cost": {"params": 32, "macs": 320, "bytes": 128},
    }
    told["choices"][0] |= pruned
    told["choices"][1] |= {"format": "constant", "cost": {"params": 4, "macs": 0, "bytes": 16}}
    plan = RankPlan.from_json(json.dumps(told))
    assert [(choice.form, choice.joint) for choice in plan] == [
        (Form("dense", (), inputs=8, outputs=4), "prune-channels"),
        (Form("dense", (), inputs=0), "drop-branch"),
    ]
    assert RankPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "svd 12x",
            "svd 0",
            "svd twelve",
            "svd 12 int8 2:4 2:4",
            "svd 12 2:4 int8",
            "dense 2:4:8",
            "dense int8, float16",
        ],
        *["dense unstructured", "dense rows/0", "dense in", "dense out 012"],
    ],
)
def test_other_text_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(PlanError, match="is not understood; write a format"):
        Form.parse(text)


def test_files_of_version_1_are_read_and_nothing_new_is_written_without_need() -> None:
    plan = RankPlan.from_json(json.dumps(VERSION_1))
    assert [choice.form for choice in plan] == [Form("svd", (2,)), DENSE]
    written = json.loads(plan.to_json())["choices"]
    assert [{key: choice[key] for key in ("format", "rank")} for choice in written] == [
        {"format": "svd", "rank": [2]},
        {"format": "dense", "rank": []},
    ]
    assert not any(key in choice for choice in written for key in ("form", "numbers", "support"))


def test_a_form_stands_in_a_report_among_the_fields_of_its_row(tmp_path) -> None:
    row = SiteRow(
        "fc", (8, 8), Form("svd", (2,), ("int8",), "2:4"), Cost(64, 64, 256), Cost(32, 32, 32), 0.1, 0.1
    )
    report = Report(sites=[row])
    (record,) = json.loads(report.to_json())["sites"]
    assert [record[key] for key in ("format", "rank", "numbers", "support")] == ["svd", [2], ["int8"], "2:4"]
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    "change", [{"rank": [0]}, {"rank": "2"}, {"format": 3}, {"numbers": "int8"}, {"form": {}}, {"support": 3}]
)
def test_a_damaged_form_is_an_error_that_names_its_place_in_the_file(change: dict[str, object]) -> None:
    tree = json.loads(json.dumps(VERSION_1))
    tree["choices"][0].update(change)
    (key,) = change
    with pytest.raises(PlanError, match=rf"choices\[0\]\.{key}|unknown key '{key}' at \$\.choices\[0\]"):
        RankPlan.from_json(json.dumps(tree))
    del tree["choices"][1]["format"]
    with pytest.raises(PlanError, match="is not a tdpass plan"):
        RankPlan.from_json(json.dumps(tree))


def test_choices_say_format_and_rank() -> None:
    choice = Choice("fc", (16, 8), Form("svd", (2,)), Cost(), Cost())
    assert (choice.format, choice.rank, choice.kept_dense) == ("svd", (2,), False)
