"""Integer layers that lose alone and gain by the bytes handed on, by a planted table of times."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from tdpass.fusing import choose
from tdpass.kernels import native
from tdpass.layers.integer_chain import IntegerChain
from tdpass.layers.one_operator import OneOperator
from tdpass.models import open_model
from tdpass.models.base import Batch
from tdpass.models.torch.fused.fuse import chosen_operators
from tdpass.models.torch.fused.handed_bytes import handed_bytes
from tdpass.timings import Key, Row, TimingTable

pytestmark = [
    pytest.mark.skipif(bool(native.missing()), reason=native.missing()),
    pytest.mark.usefixtures("fresh_compiler"),
]
STEPS = "quantize,quantize-activations{calibration=minmax},fuse-kernels"


class Net(nn.Module):
    """A row of three, a block whose sum reads two layers, and one layer that no other is a neighbour of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.alone, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.a(x)), 2)
        h = F.relu(self.c(F.relu(self.b(h))) + h)
        return self.last(torch.sigmoid(self.alone(torch.sigmoid(self.d(h)))))


class Planted(TimingTable):
    """A table that has a time for everything, by a rule."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        super().__init__(None)
        self.rule = rule

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        return {key: Row(1e-6 * self.rule(key.format)) for key in keys}


def planted(saved: float) -> Callable[[str], float]:
    """Every layer loses 10 % as one operator; what makes, reads or adds bytes saves that much."""

    def rule(how: str) -> float:
        if how.endswith("bytes"):
            return 11.0 - saved
        return 10.0 if how.endswith("plain") else 11.0

    return rule


def made(saved: float, monkeypatch: pytest.MonkeyPatch) -> tdpass.Artifact:
    table = Planted(planted(saved))
    monkeypatch.setattr(choose, "times_kept", lambda: table)
    torch.manual_seed(0)
    data = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return tdpass.compress(Net().eval(), None, data, pipeline=STEPS, cache=False)


def chains(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, IntegerChain)}


def test_layers_are_chosen_for_the_bytes_that_they_hand_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chains(made(0.0, monkeypatch).model) == set()
    assert chains(made(0.5, monkeypatch).model) == set()
    artifact = made(2.0, monkeypatch)
    assert chains(artifact.model) == {"a", "b", "c", "d"}
    left = {path for path, why in artifact.report.declined.items() if "us as one operator" in why}
    assert left == {"alone", "last"}
    notes = [note for row in artifact.report.passes for note in row.notes]
    assert any("4 of the layers are one operator in graphs alone" in note for note in notes)


@torch.no_grad()
def test_by_themselves_they_run_as_they_are_and_in_graphs_as_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = made(2.0, monkeypatch).model, torch.randn(2, 4, 8, 8)
    ran: list[str] = []
    right = IntegerChain.packed_call

    def counted(layer: IntegerChain, x: Tensor) -> Tensor:
        ran.append(layer.operator)
        return right(layer, x)

    monkeypatch.setattr(IntegerChain, "packed_call", counted)
    plain = model(x)
    assert ran == []
    program = torch.export.export(model, (x,))
    assert sum("integer_chain" in str(node.target) for node in program.graph.nodes) == 4
    error = (program.module()(x) - plain).abs().max()
    assert float(error) <= 0.05 * float(plain.abs().max())


def test_a_model_that_was_fused_can_be_fused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `deploy` does with what `fuse-kernels` left: its chains hand bytes on, and are not chosen again."""
    model, declined = made(2.0, monkeypatch).model, dict[str, str]()
    again = chosen_operators(model, Batch((torch.randn(2, 4, 8, 8),), {}), declined.__setitem__)
    assert chains(again) == {"a", "b", "c", "d"}
    assert declined.keys() == {"alone", "last"}


def test_bytes_are_timed_on_calls_of_the_sizes_that_the_graph_has(monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: dict[str, set[tuple[torch.dtype, tuple[int, ...]]]] = {}

    def seconds(calls: choose.Calls, threads: int) -> dict[str, float]:
        for way, call in calls.items():
            y = call()
            assert isinstance(y, Tensor)
            made_of.setdefault(way, set()).add((y.dtype, tuple(y.shape)))
        return {way: {choose.PLAIN: 10.0, "floats": 11.0}.get(way, 9.0) for way in calls}

    monkeypatch.setattr(choose, "seconds_of", seconds)
    monkeypatch.setattr(choose, "times_kept", lambda: TimingTable(None))
    data = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = open_model(
        tdpass.compress(
            Net().eval(), None, data, pipeline=STEPS.replace("kernels", "kernels{measure=false}"), cache=False
        ).model,
        data,
    )
    layers = {path: part for path, part in model.module.named_modules() if isinstance(part, IntegerChain)}
    shared = handed_bytes(model.module, layers, Batch((data,)))
    assert [(set(each.parts), each.seconds) for each in shared] == [
        ({"a", "b", "c"}, 6.0),
        ({"b", "c"}, 4.0),
        ({"c", "d"}, 4.0),
    ]
    assert made_of["makes bytes"] == {
        (torch.uint8, (8, 8, 8, 8)),
        (torch.uint8, (8, 8, 4, 4)),
    }
    assert {dtype for dtype, _ in made_of["reads bytes"] | made_of["adds bytes"]} == {torch.float32}


def test_a_model_that_cannot_be_exported_is_chosen_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) < 1e9 else x

    table = Planted(planted(2.0))
    monkeypatch.setattr(choose, "times_kept", lambda: table)
    artifact = tdpass.compress(Branching().eval(), None, torch.randn(8, 4, 8, 8), pipeline=STEPS, cache=False)
    assert not any(isinstance(part, OneOperator) for part in artifact.model.modules())
    notes = [note for row in artifact.report.passes for note in row.notes]
    assert any("handing on bytes is not known" in note for note in notes)
