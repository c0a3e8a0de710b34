"""Every document is read through its schema.

Damage of any kind is one clear error, never another value or a raw exception.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutations import damaged_bytes, texts

from tdpass.cost import Cost
from tdpass.crossbars.mapping import ArrayMap, MappedMatrix
from tdpass.crossbars.placement import Place
from tdpass.documents import DOCUMENTS, Document, yaml_value
from tdpass.errors import InvalidModelError, PlanError, TdpassError, UsageError
from tdpass.form import DENSE, Form
from tdpass.html_report import render_html
from tdpass.methods.kept_tasks import Growing, _Kept
from tdpass.methods.recipe import Recipe
from tdpass.models.torch.saving.structure import Replacement, Structure
from tdpass.packing import StoredSize
from tdpass.pipeline import Pipeline
from tdpass.planner.cache import CandidateCache
from tdpass.planner.candidates import Candidate
from tdpass.planner.joint import JointOption
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.report import CurvePoint, PassRow, Report, SiteRow, TrainingRow
from tdpass.targets.break_even import BreakEvenTable
from tdpass.targets.crossbar import CrossbarArray
from tdpass.terminal import report_view
from tdpass.training.pieces import Piece
from tdpass.views.tables import to_text

FAST, THOROUGH = 60, 500
WHOLE, SMALL = Cost(128, 1280, 512), Cost(48, 480, 192)
PLAN = RankPlan(
    (
        Choice("fc", (16, 8), Form("svd", (2,)), SMALL, WHOLE, 0.1, 0.01, "why", "= 0.1", "ab"),
        Choice(
            "conv",
            (4, 4, 3, 3),
            Form("pruned", (2, 4)),
            Cost(72, 720, 288),
            Cost(144, 1440, 576),
            channels=(0, 3),
        ),
        Choice("last", (4, 4), DENSE, Cost(16, 16, 64, 1e-3), Cost(16, 16, 64, 1e-3)),
    ),
    Cost(300, 3000, 1200),
    "macs=0.5",
    declined={"bn": "no weight"},
)
REPORT = Report(
    model="net",
    budget="macs=0.5",
    original=PLAN.original,
    final=PLAN.planned,
    sites=[*PLAN.rows()],
    declined={"bn": "no weight"},
    passes=[PassRow("plan", True, 0.5, WHOLE, ("a note",))],
    curve=[CurvePoint(0.5, 0.5, 0.4, 0.1, True)],
    training=[TrainingRow("method", 0, 0.5, 0.1, 2.0, 90.0, {"fc": 0.1})],
    checks={"divergence": 0.1},
    notes=["n"],
    stored=StoredSize(9, 3, 12, 2, 20, 36),
)
CANDIDATE = Candidate(Form("svd", (2,)), SMALL, 0.1, 0.2, "= 0.1")
RECIPE = Recipe(
    "a:b",
    "a:c",
    method={
        "admm-tt": {"budget": {"params": 0.6}, "rounds": 2, "rho": {"geometric": {"start": 0.1, "end": 1.0}}}
    },
    settings={"lr": 0.1, "clip": 1.0},
)
SAMPLES: dict[str, Any] = {
    "tdpass plan": PLAN,
    "tdpass report": REPORT,
    "table of candidates": [CANDIDATE],
    "table of joint options": [JointOption({"fc": CANDIDATE}, 0.5, (1, 2))],
    "training recipe": RECIPE,
    "map of crossbar arrays": ArrayMap(
        CrossbarArray.load("admm_32x32"),
        (MappedMatrix("fc", 0, 0, 8, 16, 0.5, (Place(0, 0, 2, (0, 3), (1, 2), (2,)),)),),
        1,
        "ab",
    ),
    "tdpass structure": Structure(
        2, (Replacement(("fc", "twin"), Form("svd", (2,)), bias=True),), ("bn",), ("last",), {"a": "b"}
    ),
    "table of tensors": {"fc.weight": Piece((4, 2), (2, 0), "float32")},
    "list of the parts of a checkpoint": {"facts-0.json": "ab"},
    "state of a training run": {"steps": 3, "rounds": [{"epoch": 0}]},
    "table of prices of a training run": {
        name: {"dense": 1e-3, "svd 2": math.inf, "tucker2 4x3": 2.5e-4} for name in ("fc", "conv", "")
    },
    "file of tasks": _Kept(Growing(2, 1, "equal", ("fc",)), 3),
    "start of a training run": {
        f"{stage}.{key}": value
        for stage in "abcd"
        for key, value in {"lr": 0.1, "clip": None, "keep": 300, "name": "sgd"}.items()
    },
}
PIPELINE = [
    {"plan": {"macs": 0.4, "joint": False}},
    "factorize",
    {"refit": {"ridge": 0.01}},
    {"verify": {"limit": 0.5}},
]
TABLE = [
    {"kind": "conv", "group": "weight", "shape": [64, "any", 3, 3], "sparsity": 0.5},
    {"kind": "linear", "sparsity": "never"},
]


def plain(document: Document[Any]) -> Any:
    return json.loads(document.text(SAMPLES[document.noun]))


def show(noun: str, value: Any) -> None:
    """What a user does with a document that was read."""
    if noun == "tdpass report":
        render_html(value, None)
        to_text(report_view(value, None, 100), 100)
    if noun == "tdpass plan":
        render_html(REPORT, value)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.noun)
def test_what_is_written_is_read(document: Document[Any]) -> None:
    assert document.parse(document.text(SAMPLES[document.noun]), "it") == SAMPLES[document.noun]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.noun)
@pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_damaged_documents_are_one_clear_error(document: Document[Any], count: int) -> None:
    whole = document.text(SAMPLES[document.noun])
    broken = [
        *texts(plain(document), count),
        *(part.decode("utf-8", "replace") for part in damaged_bytes(whole.encode(), count)),
    ]
    complaints = []
    for text in broken:
        try:
            show(document.noun, document.parse(text, "it"))
        except document.error as error:
            complaints.append(str(error))
    assert len(complaints) > (
        count if document.noun != "state of a training run" else 0
    )  # of which the run knows what it means
    assert all(text.startswith(f"it is not a {document.noun}: ") for text in complaints)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("choices", 0, "rank"), [0]),
        (("choices", 0, "rank"), [9]),
        (("choices", 0, "rank"), [2.0]),
        (("choices", 0, "rank"), [3]),
        (("choices", 0, "cost", "params"), 31),
        (("choices", 0, "cost", "bytes"), 191),
        (("choices", 0, "dense", "params"), True),
        (("choices", 0, "dense", "macs"), -1),
        (("choices", 0, "error"), float("nan")),
        (("choices", 0, "shape"), [16, 9]),
        (("choices", 0, "site"), "conv"),
        (("choices", 0, "losss"), 0.5),
        (("choices", 2, "cost", "macs"), 15),
        (("original", "params"), 100),
        (("version",), 2),
        (("declined", "bn"), 3),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(place: tuple[Any, ...], value: object) -> None:
    tree = json.loads(PLAN.to_json())
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(PlanError, match="it is not a tdpass plan: "):
        RankPlan.from_json(json.dumps(tree), "it")


def test_an_error_names_the_place_the_value_and_what_is_allowed() -> None:
    text = PLAN.to_json().replace('"rank": [\n    2\n   ]', '"rank": "two"')
    with pytest.raises(
        PlanError, match=r"choices\[0\]\.rank is 'two': Expected `array`, got `str`; write one with"
    ):
        RankPlan.from_json(text)
    with pytest.raises(PlanError, match="key 'budget' is given twice"):
        RankPlan.from_json(PLAN.to_json().replace('"budget"', '"budget": "",\n"budget"'))
    with pytest.raises(InvalidModelError, match="No such file"):
        Report.load("nowhere.json")


def test_files_of_earlier_versions_of_the_schema_are_read() -> None:
    tree = json.loads(PLAN.to_json())
    for choice in tree["choices"]:
        for later in ("kernel", "predicted", "channels", "fingerprint", "guarantee"):
            del choice[later]
        for part in ("cost", "dense"):
            del choice[part]["seconds"]
    assert RankPlan.from_json(json.dumps(tree)).choices[0].rank == (2,)
    report = json.loads(REPORT.to_json())
    for later in ("training", "stored", "target", "dry_run"):
        del report[later]
    assert DOCUMENTS.get("tdpass report").parse(json.dumps(report), "it").sites == REPORT.sites


@pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["pipeline", "recipe", "break-even table"])
def test_damaged_yaml_is_one_clear_error(kind: str, count: int, tmp_path: Path) -> None:
    tree = {
        "pipeline": PIPELINE,
        "recipe": plain(DOCUMENTS.get("training recipe")),
        "break-even table": TABLE,
    }[kind]
    read = {"pipeline": Pipeline.parse, "recipe": Recipe.load, "break-even table": BreakEvenTable.load}[kind]
    path = tmp_path / "it.yaml"
    read(_written(path, yaml.safe_dump(tree).encode()))
    whole = yaml.safe_dump(tree).encode()
    for broken in [
        *(text.encode("utf-8", "replace") for text in texts(tree, count)),
        *damaged_bytes(whole, count),
        *(tag.encode() for tag in TAGS),
    ]:
        with suppress(TdpassError):
            read(_written(path, broken))


TAGS = (
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!bool x",
    "!!python/object/apply:os.system [ls]",
    "a: &a [*a]",
    "2020-99-99",
    "? [a]\n: b",
    "a: 1\na: 2",
    "- .nan",
)
PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in PAIRS
)


@pytest.mark.parametrize("text", [*TAGS, BOMB, "[" * 3000, "1" * 5000])
def test_yaml_that_is_no_plain_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="it is not plain YAML"):
        yaml_value(text)


@pytest.mark.parametrize(
    "text", ["plan{macs=[}", "plan{macs=[1]}", "refit{ridge=!!int x}", "verify{limit=.nan}"]
)
def test_values_of_options_are_read_as_strictly(text: str) -> None:
    with pytest.raises(UsageError):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"admm-tt": [1]}},
        {"method": {"admm-tt": {"budget": 3}}},
        {"method": {"admm-tt": {"budget": {"params": 0.5}, "rounds": "many"}}},
        {"method": {"admm-tt": {"budget": {"params": 0.5}, "include": 3}}},
        {"settings": {"clip": -1}},
        {"settings": {"momentum": "high"}},
        {"settings": {"bf16": 1}},
        {"finetuning": {"schedule": {"cosine": {"start": []}}}},
        {"rounds_per_epoch": 0},
        {"example": [2, -1]},
        {"seed": -1},
        {"control": "no"},
    ],
)
def test_recipes_of_wrong_types_and_ranges_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe.parse({**plain(DOCUMENTS.get("training recipe")), **change})


@pytest.mark.parametrize("count", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_a_damaged_entry_of_the_planning_cache_is_no_entry(count: int, tmp_path: Path) -> None:
    cache, key = CandidateCache(tmp_path), "ab" * 20
    cache.put(key, [CANDIDATE])
    assert cache.get(key) == [CANDIDATE]
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    whole = path.read_bytes()
    for broken in damaged_bytes(whole, count):
        if broken != whole:
            _written(path, broken)
            found = cache.get(key)  # damage to a space between is none to the content
            assert found is None or found == [CANDIDATE]
            assert path.exists() == (found is not None)
    other = path.with_name(f"{'ab' * 19}cd.json")
    _written(other, whole)
    assert cache.get("ab" * 19 + "cd") is None


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_rows_hold_what_the_plan_says() -> None:
    assert isinstance(REPORT.sites[0], SiteRow)
    assert PLAN.planned == Cost(300 - 80 - 72, 3000 - 800 - 720, 1200 - 320 - 288)


def test_numbers_to_base_60_are_text() -> None:
    assert yaml_value("{support: 2:4, time: 1:30.5, plain: 24, share: 0.5}") == {
        "support": "2:4",
        "time": "1:30.5",
        "plain": 24,
        "share": 0.5,
    }
