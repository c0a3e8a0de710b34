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
from tdpass.supports import SUPPORTS as SUPPORT_KINDS

RANKS = [(), (1,), (96,), (16, 24), (2, 4, 5, 5, 4, 2)]
TYPES = [*(name + "16" * (name == "levels") for name in NUMBERS.names()), "int8/tensor", "int4/64", "int8/64/zero"]
STORED = [(), *((text,) for text in TYPES), ("bfloat16", "int8/tensor")]
SUPPORTS = ["", *(cls.example for cls in SUPPORT_KINDS), "rows/3,columns/12.5%"]
VERSION_1 = {
    "version": 1,
    "choices": [
        {"site": "fc", "shape": [16, 8], "format": "svd", "rank": [2], "cost": {"params": 48, "macs": 480, "bytes": 192},
         "dense": {"params": 128, "macs": 1280, "bytes": 512}, "error": 0.1, "loss": 0.01},
        {"site": "last", "shape": [4, 4], "format": "dense", "rank": [], "cost": {"params": 16, "macs": 16, "bytes": 64},
         "dense": {"params": 16, "macs": 16, "bytes": 64}},
    ],
    "original": {"params": 300, "macs": 3000, "bytes": 1200},
}  # fmt: skip


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
    assert Form.parse("dense levels16 unstructured/500") == Form("dense", (), ("levels16",), "unstructured/500")


@pytest.mark.parametrize("text", ["", "svd 12x", "svd 0", "svd twelve", "svd 12 int8 2:4 2:4", "svd 12 2:4 int8", "dense 2:4:8", "dense int8, float16",
         "dense unstructured", "dense rows/0"])
def test_other_text_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(PlanError, match="is not understood; write a format"):
        Form.parse(text)


def test_files_of_version_1_are_read_and_nothing_new_is_written_without_need() -> None:
    plan = RankPlan.from_json(json.dumps(VERSION_1))
    assert [choice.form for choice in plan] == [Form("svd", (2,)), DENSE]
    written = json.loads(plan.to_json())["choices"]
    assert [{key: choice[key] for key in ("format", "rank")} for choice in written] == [{"format": "svd", "rank": [2]}, {"format": "dense", "rank": []}]
    assert not any(key in choice for choice in written for key in ("form", "numbers", "support"))


def test_a_form_stands_in_a_report_among_the_fields_of_its_row(tmp_path) -> None:
    row = SiteRow("fc", (8, 8), Form("svd", (2,), ("int8",), "2:4"), Cost(64, 64, 256), Cost(32, 32, 32), 0.1, 0.1)
    report = Report(sites=[row])
    (record,) = json.loads(report.to_json())["sites"]
    assert [record[key] for key in ("format", "rank", "numbers", "support")] == ["svd", [2], ["int8"], "2:4"]
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


@pytest.mark.parametrize("change", [{"rank": [0]}, {"rank": "2"}, {"format": 3}, {"numbers": "int8"}, {"form": {}}, {"support": 3}])
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
