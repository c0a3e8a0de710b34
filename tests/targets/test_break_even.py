"""From which sparsity on a layer pays: found between measured points, kept, or read from a table.

No test here looks at a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tdpass.errors import UsageError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer, cost_of
from tdpass.kernels import native
from tdpass.kernels.base import use_reference
from tdpass.kinds import KINDS
from tdpass.site import Site
from tdpass.targets import BreakEvenRow, BreakEvenTable, Setting, Target, Timing, open_break_even, open_target
from tdpass.targets.break_even import STAIRCASE, crossing
from tdpass.targets.layers import example_input, make_layer
from tdpass.targets.runtimes import RUNTIMES
from tdpass.targets.sparse import SparseTarget, pruned_weight, sparse_calls

CONV = Site(
    "conv", "conv", (32, 16, 3, 3), (2, 1), ((0, 1), (1, 1)), (1, 1), True, extents=(((8, 6), (4, 6)),)
)
CONV1D = Site("conv1d", "conv", (8, 8, 5), (1,), ((2, 2),), (1,), extents=(((15,), (15,)),))
LINEAR = Site("linear", "linear", (40, 64), extents=(((3,), (3,)),))
SITES = [CONV, CONV1D, LINEAR]


class Scripted(SparseTarget):
    """Dense layers take a second.

    A sparse one `slope` seconds per share of its weights that is stored, and `fixed` in any case.
    """

    name = "scripted"
    device = "a script"
    slope, fixed, clocked = 2.0, 0.2, 0

    @classmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        raise NotImplementedError

    def clock(self, calls, threads, rounds):
        self.clocked += 1
        # a moment in which everything takes three times as long changes no ratio
        return [3.0**self.clocked * self.seconds_of(call) for call in calls]

    def seconds_of(self, call) -> float:
        blocks = getattr(call, "held", None)
        return 1.0 if blocks is None else self.fixed + self.slope * int((blocks.values != 0).sum()) / 4608


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    monkeypatch.setattr(native, "library", object)
    monkeypatch.setattr(native, "isa", lambda: "none")
    monkeypatch.setattr(native, "version", lambda: "1")

    def make(folder: Path | None = None, **numbers: float) -> Scripted:
        target = Scripted([RUNTIMES.get("eager")], folder)
        vars(target).update(numbers)
        return target

    return make


@pytest.mark.parametrize("truth", [0.1, 0.42, 0.55, 0.73, 0.9, 0.97, 0.993])
def test_the_crossing_of_a_falling_ratio_is_found_in_few_looks(truth: float) -> None:
    looks = []

    def ratio(sparsity: float) -> float:
        looks.append(sparsity)
        return 1 + math.log((1 - sparsity) / (1 - truth))

    assert crossing(ratio) == pytest.approx(truth)
    assert len(looks) == len(set(looks)) <= 5


def test_a_ratio_without_a_crossing() -> None:
    assert crossing(lambda _: 1.01) is None
    assert crossing(lambda _: math.nan) is None
    assert crossing(lambda _: math.inf) is None
    assert crossing(lambda _: 0.5) == STAIRCASE[0]
    assert crossing(lambda sparsity: 1.0 if sparsity == STAIRCASE[-1] else 1.5) == pytest.approx(
        STAIRCASE[-1]
    )


def test_a_layer_breaks_even_where_its_time_is_that_of_the_dense_one(
    scripted: Callable[..., Scripted],
) -> None:
    target = scripted()
    found = target.break_even_sparsity(CONV)
    assert found is not None
    assert 0.5 < found <= 0.6 + 1e-3
    assert target.sparse_over_dense(CONV, "weight", [0.0, 0.9], Setting()) == pytest.approx(
        [2.2, 0.4], abs=1e-3
    )
    assert scripted(fixed=1.1).break_even_sparsity(CONV) is None
    assert scripted(slope=0.5).break_even_sparsity(CONV) == 0.0


def test_what_is_known_is_not_measured_again(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    first = scripted(tmp_path)
    answers = [first.break_even_sparsity(CONV, group) for group in ("weight", "block")]
    again = scripted(tmp_path)
    assert [
        again.break_even_sparsity(replace(CONV, name="another"), group) for group in ("weight", "block")
    ] == answers
    assert first.clocked > 0 == again.clocked
    again.break_even_sparsity(CONV, "weight", Setting(2))
    assert again.clocked > 0


def test_calls_of_a_site_count_each(scripted: Callable[..., Scripted]) -> None:
    target, twice = scripted(), replace(CONV, extents=CONV.extents * 2)
    assert target.sparse_over_dense(twice, "weight", [0.9], Setting()) == target.sparse_over_dense(
        CONV, "weight", [0.9], Setting()
    )


@pytest.mark.parametrize("group", ["filter", "channel", "row"])
def test_groups_that_leave_a_dense_layer_are_timed_as_what_is_emitted(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    """A layer takes its multiply-adds, and 0.3 more where outputs or inputs have to be put in place."""

    def time(site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False) -> list[Timing]:
        shares = [cost_of(site, form).macs / cost_of(site, DENSE).macs for form in forms]
        return [Timing(share + 0.3 * (share < 1), "eager") for share in shares]

    target = scripted()
    monkeypatch.setattr(target, "time", time)
    assert target.sparse_over_dense(CONV, group, [0.25, 0.5, 0.75], Setting()) == pytest.approx(
        [1.05, 0.8, 0.55]
    )
    found = target.break_even_sparsity(CONV, group)
    assert found is not None
    assert 0.25 < found < 0.4
    assert BreakEvenTable(()).break_even_sparsity(CONV, group) == 0.0


def test_what_cannot_be_asked(scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    target = scripted()
    with pytest.raises(
        UsageError, match="group 'heads' is not known; what is zero at once is one of weight, row"
    ):
        target.break_even_sparsity(CONV, "heads")
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        target.sparse_over_dense(CONV, "weight", [1.0], Setting())
    with pytest.raises(UsageError, match="not seen running"):
        target.break_even_sparsity(replace(CONV, extents=()))
    with pytest.raises(UsageError, match="target scripted has no sparse operators; use target cpu"):
        Target.break_even_sparsity(target, CONV)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(UsageError, match="has no sparse operators here"):
        target.break_even_sparsity(CONV)


def test_layers_that_the_operators_do_not_serve_never_break_even(scripted: Callable[..., Scripted]) -> None:
    cube = Site(
        "cube", "conv", (4, 4, 3, 3, 3), (1,) * 3, ((1, 1),) * 3, (1,) * 3, extents=(((4, 4, 4), (4, 4, 4)),)
    )
    assert scripted().break_even_sparsity(cube) is None
    assert scripted().break_even_sparsity(LINEAR, setting=Setting(dtype=torch.float64)) is None


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
@pytest.mark.parametrize("group", ["weight", "block", "kernel", "column"])
def test_the_layer_that_is_timed_is_the_pruned_one(site: Site, group: str) -> None:
    layer = make_layer(site, DENSE, torch.float32)
    assert layer.form == DENSE
    weight, x = pruned_weight(layer.factors["kernel"], group, 0.8), example_input(layer, 2)
    assert 0.7 <= float((weight == 0).float().mean()) <= 0.9
    assert bool((pruned_weight(layer.factors["kernel"], group, 0.5) != 0)[weight != 0].all())
    calls = sparse_calls(site, group, 0.8, Setting(2))
    assert len(calls) == (2 if site.kind == "conv" else 1)
    with use_reference():
        answers = [call() for call in calls]
    expected = Layer(site, DENSE, {"kernel": weight}, layer.bias)(x)
    assert all(torch.allclose(answer.reshape(expected.shape), expected, atol=1e-4) for answer in answers)


@pytest.mark.parametrize("site", [CONV, LINEAR], ids=lambda site: site.name)
def test_this_machine_gives_an_answer(site: Site) -> None:
    if native.library() is None:
        pytest.skip(native.missing())
    found = open_break_even("cpu").break_even_sparsity(site)
    assert found is None or 0 <= found < 1


TABLE = """
- {kind: conv, sparsity: 0.9}
- {kind: conv, shape: [any, any, 3, 3], sparsity: 0.8}
- {kind: conv, shape: [64, 64, 3, 3], sparsity: 0.7}
- {kind: conv, shape: [16, any, 5, 5], sparsity: 0.3}
- {kind: conv, shape: [256, 64, 5, 5], sparsity: never}
- {kind: conv, group: filter, sparsity: 0.1}
- {kind: linear, group: block, shape: [any, 1024], sparsity: 0.5}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "edge.yaml").write_text(TABLE)
    return tmp_path / "edge.yaml"


@pytest.mark.parametrize(
    ("kind", "shape", "group", "sparsity"),
    [
        ("conv", (64, 64, 3, 3), "weight", 0.7),
        ("conv", (128, 64, 3, 3), "weight", 0.8),
        ("conv", (32, 8, 7, 7), "weight", 0.9),
        ("conv", (32, 64, 5), "weight", 0.9),
        ("conv", (8, 8, 3, 3), "filter", 0.1),
        ("linear", (10, 20), "block", 0.5),
        ("linear", (10, 20), "channel", 0.0),
    ],
)
def test_the_nearest_row_of_a_table_counts(table: Path, kind, shape, group: str, sparsity: float) -> None:
    assert open_break_even(f"table:{table}").break_even_sparsity(Site("a", kind, shape), group) == sparsity


def test_sizes_are_compared_by_their_ratio() -> None:
    rows = [
        BreakEvenRow("linear", sparsity, shape=shape)
        for sparsity, shape in ((0.2, (16, 64)), (0.4, (256, 64)), (None, (256, None)))
    ]
    table = BreakEvenTable(tuple(rows))
    for o, i, sparsity in (
        (20, 64, 0.2),
        (63, 64, 0.2),
        (65, 64, 0.4),
        (256, 64, 0.4),
        (512, 65, None),
        (256, 4096, None),
        (16, 60, 0.2),
    ):
        assert table.break_even_sparsity(Site("a", "linear", (o, i))) == sparsity


def test_a_table_that_says_nothing_of_a_layer_asks_for_a_row(table: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"says nothing of 'fc'; add a row \{kind: linear, group: weight, shape: \[any, any\]",
    ):
        BreakEvenTable.load(table).break_even_sparsity(Site("fc", "linear", (10, 20)))
    with pytest.raises(UsageError, match="group 'heads' is not known"):
        BreakEvenTable.load(table).break_even_sparsity(CONV, "heads")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", "it is a YAML list of rows"),
        ("kind: conv", "holds no list of rows"),
        ("[]", "holds no list of rows"),
        ("- conv", "row 1 .* 'conv' is not one"),
        ("- {kind: conv, sparsity: 0.5}\n- {kind: conv}", "row 2"),
        ("- {kind: conv, sparsity: 0.5, threads: 2}", "row 1"),
        ("- {kind: lstm, sparsity: 0.5}", "kind 'lstm' is not known"),
        ("- {kind: conv, group: heads, sparsity: 0.5}", "group 'heads' is none of weight"),
        ("- {kind: conv, sparsity: 80}", "sparsity 80 is not from 0 to 1"),
        ("- {kind: conv, sparsity: true}", "sparsity True"),
        ("- {kind: conv, sparsity: ~}", "sparsity None"),
        ("- {kind: linear, shape: [4, 4, 3], sparsity: 0.5}", "not that of a linear weight"),
        ("- {kind: conv, shape: 64x64x3x3, sparsity: 0.5}", "shape '64x64x3x3'"),
        ("- {kind: conv, shape: [0, 4, 3, 3], sparsity: 0.5}", "not that of a conv weight"),
    ],
)
def test_a_bad_table_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        BreakEvenTable.load(path)
    assert str(path) in str(caught.value)
    assert f"a row is {{kind: {' or '.join(KINDS.names())}, group" in str(caught.value)


def test_a_machine_is_named_or_given(table: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the break-even table nowhere\.yaml"):
        open_break_even("table:nowhere.yaml")
    assert isinstance(open_break_even("cpu"), SparseTarget)
    given = BreakEvenTable.load(table)
    assert open_break_even(given) is given
    target = open_target("cpu", "torch")
    assert open_break_even(target) is target
