"""Python as people expect it: names, short texts, notebooks, types and progress.

Also a metric in a budget's place.
"""

from __future__ import annotations

import io
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tdpass
from tdpass.errors import BudgetError, UsageError
from tdpass.progress import ProgressBars
from tdpass.registry import Registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def made(residual: nn.Module, images: Tensor) -> tdpass.Artifact[nn.Module]:
    return tdpass.compress(residual, 0.6, images, effort="fast", cache=False, progress=False, strict=False)


def test_the_package_says_what_it_is_and_what_it_has() -> None:
    assert tdpass.__version__
    assert {"compress", "load", "Artifact", "train", "__version__"} <= set(tdpass.__all__)
    assert all(hasattr(tdpass, name) for name in tdpass.__all__)
    assert len(set(tdpass.__all__)) == len(tdpass.__all__)


def test_a_number_bounds_the_default_measure(made: tdpass.Artifact[nn.Module]) -> None:
    assert made.report.final.macs <= 0.6 * made.report.original.macs


def test_texts_are_short_and_say_how_much_is_left(made: tdpass.Artifact[nn.Module]) -> None:
    share = f"{made.report.final.macs / made.report.original.macs:.0%}"
    for value, start in (
        (made, "<Artifact: Residual, <RankPlan: 4 sites ("),
        (made.plan, "<RankPlan: 4 sites ("),
        (made.report, "<Report: Residual, "),
    ):
        assert repr(value).startswith(start)
        assert f"macs {share}" in repr(value)
        assert len(repr(value)) < 300
    assert repr(tdpass.Report()) == "<Report: no model, nothing counted of the original, 0 sites, 0 notes>"


def parameters(model: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


class Tags(HTMLParser):
    """The tags of a text, which must all be closed, and what stands between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.source = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)
        self.source = self.source or dict(attributes).get("srcdoc") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_notebooks_show_tables_and_the_whole_report(made: tdpass.Artifact[nn.Module]) -> None:
    for value, sites in ((made.plan, len(made.plan.choices)), (made.report, len(made.report.sites))):
        tags = Tags(value._repr_html_())
        assert tags.seen.count("tr") == sites + 1
        assert "stem" in tags.words
    frame = Tags(made._repr_html_())
    assert frame.seen == ["iframe"]
    assert frame.source.lstrip().lower().startswith("<!doctype html>")
    odd = tdpass.Report(model="a<b>&'\"")
    assert "a<b>&'\"" in "".join(Tags(odd._repr_html_()).words)


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    known = Registry[int]("format")
    known.add("tucker2", 1)
    with pytest.raises(
        UsageError, match=r"unknown format 'Tucker' \(did you mean 'tucker2'\?\); known: tucker2"
    ):
        known.get("Tucker")
    with pytest.raises(UsageError, match="unknown format 'xyz'; known: tucker2"):
        known.get("xyz")


def test_progress_is_shown_unless_it_is_silenced(
    monkeypatch: pytest.MonkeyPatch, residual: nn.Module, images: Tensor
) -> None:
    asked: list[bool] = []

    class Watched(ProgressBars):
        def __init__(self, file: io.TextIOBase, shown: bool = True) -> None:
            super().__init__(file, shown)
            asked.append(shown)

    monkeypatch.setattr("tdpass.progress.ProgressBars", Watched)
    calls: list[str] = []
    for progress in (True, False, lambda what, done, of: calls.append(what)):
        tdpass.make_plan(residual, {"macs": 0.6}, images, effort="fast", cache=False, progress=progress)
    assert asked == [True, False]
    assert "recording runs of the model" in calls


def test_a_pipe_gets_lines_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("tdpass.progress.time.monotonic", lambda: now[0])
    with ProgressBars(stream) as progress:
        for done in range(40):
            now[0] = float(done)
            progress("fit", done, 40)
        progress("fit", 40, 40)
    assert stream.getvalue().splitlines() == [
        f"fit: {done} of 40, about {40 - done} s left" for done in (2, 12, 22, 32)
    ]


def test_a_long_step_that_goes_on_from_its_middle_says_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("tdpass.progress.time.monotonic", lambda: now[0])
    with ProgressBars(stream) as progress:
        for done in range(500, 1000):
            now[0] = float(done - 500)
            progress("train", done, 1000)
    said = [int(line.split()[1]) - 500 for line in stream.getvalue().splitlines()]
    assert stream.getvalue().splitlines()[1] == "train: 512 of 1000, about 488 s left"
    assert [now for now in said if now < 100] == list(range(2, 100, 10))
    assert all(10 <= later - sooner <= max(10, 0.1 * later + 1) for sooner, later in pairwise(said))


def test_training_says_how_far_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.randn(2, 4), torch.tensor([0, 2])) for _ in range(3)]
    calls: list[tuple[str, int, int]] = []
    tdpass.train(model, data, pretrain=2, control=False, progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "train (pretrain)"] == [
        ("train (pretrain)", done, 6) for done in range(1, 7)
    ]


def test_the_smallest_model_that_keeps_a_metric() -> None:
    model, x = (
        nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)),
        torch.randn(64, 32, generator=torch.Generator().manual_seed(2)),
    )
    dense = model(x)
    scored: list[tuple[float, float]] = []

    def agreement(small: nn.Module) -> float:
        with torch.no_grad():
            value = 100 - 100 * float((small(x) - dense).norm() / dense.norm())
        scored.append((value, parameters(small)))
        return value

    found = tdpass.compress(
        model, data=x, metric=agreement, max_loss=60.0, effort="fast", progress=False, strict=False
    )
    kept = [size for value, size in scored if value >= 40]
    assert found.report.checks["metric"] >= 40
    assert parameters(found.model) == min(kept)
    assert found.report.final.macs < found.report.original.macs
    assert any("metric is at least 40" in note for note in found.report.notes)
    with pytest.raises(BudgetError, match="no smaller model keeps the metric"):
        tdpass.compress(model, data=x, metric=parameters, effort="fast", progress=False, strict=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "is no function"),
        ({"metric": len, "max_loss": -1.0}, "at least 0"),
        ({"metric": lambda model: float("nan")}, "finite number"),
        ({"metric": len, "budget": 0.5}, "leave budget= and plan= out"),
    ],
)
def test_a_metric_that_is_none_is_refused(
    options: dict[str, object], message: str, residual: nn.Module, images: Tensor
) -> None:
    with pytest.raises(UsageError, match=message):
        tdpass.compress(residual, data=images, progress=False, **options)


@pytest.mark.slow
def test_the_model_in_an_artifact_has_the_type_that_came_in(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = (
        "import tdpass, torch\n\nmade = tdpass.compress(torch.nn.Linear(4, 4), 0.5)\n"
        "reveal_type(made.model)\nmade.model(torch.zeros(4))\n"
    )
    (tmp_path / "use.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "use.py"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torch.nn.modules.linear.Linear" in run.stdout, run.stdout
    assert "error" not in run.stdout
