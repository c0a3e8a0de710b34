"""Integer layers of an ONNX model that lose alone and gain beside each other, by planted times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx_nets import model_of, node, weight
from test_onnx_fuse_integers import fused_types, ignore, put

import tdpass
from tdpass.fusing import choose
from tdpass.kernels import native
from tdpass.models.base import Batch
from tdpass.models.onnx.fused import fuse
from tdpass.models.onnx.model import OnnxModel
from tdpass.timings import Key, Row, TimingTable

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
STEPS = "plan{params=0.6},factorize,quantize,quantize-activations{calibration=minmax},fuse-kernels"
IMAGES = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(1))


def net() -> onnx.ModelProto:
    """Two layers in a row, and behind a sigmoid one that no other is a neighbour of."""
    nodes, constants, value = [], dict[str, np.ndarray](), "x"
    for name, after in (("a", "Relu"), ("b", "Sigmoid"), ("c", "Identity")):
        constants |= {f"{name}.weight": weight(16, 16, 3, 3), f"{name}.bias": weight(16)}
        nodes.append(node("Conv", f"{value} {name}.weight {name}.bias", f"{name}_sum", pads=[1] * 4))
        value = "y" if name == "c" else f"{name}_made"
        nodes.append(node(after, f"{name}_sum", value))
    return model_of(nodes, constants, ("N", 16, 6, 6), opset=21)


class Planted(TimingTable):
    """A table that has a time for everything, by a rule."""

    def __init__(self, rule: Callable[[str], float]) -> None:
        super().__init__(None)
        self.rule, self.rows = rule, list[str]()

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        asked = list(keys)
        self.rows += [key.geometry for key in asked if key.format.endswith("in a row True True")]
        return {key: Row(1e-6 * self.rule(key.format)) for key in asked}


def planted(saved: float) -> Callable[[str], float]:
    """Every layer loses 5 % as one operator; two in a row save that much if both are, and lose 1 if one is."""
    rows = {"False False": 20.0, "True False": 22.0, "False True": 22.0, "True True": 21.0 - saved}

    def rule(how: str) -> float:
        alone = 10.0 if how.endswith("plain") else 10.5
        return next((seconds for chosen, seconds in rows.items() if how.endswith(f"row {chosen}")), alone)

    return rule


def chosen(
    saved: float, whole: Callable[[frozenset[str]], float], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, tdpass.Artifact, Planted]:
    def seconds(calls: Mapping[frozenset[str], object], *_: object) -> dict[frozenset[str], float]:
        return {choice: whole(choice) for choice in calls}

    table = Planted(planted(saved))
    monkeypatch.setattr(choose, "times_kept", lambda: table)
    monkeypatch.setattr(fuse, "seconds_of", seconds)
    made = tdpass.compress(net(), None, IMAGES, pipeline=STEPS, formats=["tucker2"], cache=False)
    chains = [each.op_type for each in made.model.graph.node if each.domain == "com.tdpass"]
    return len(chains), made, table


def not_all(choice: frozenset[str]) -> float:
    """A model that any choice makes faster but that of all three layers, which is offered, too."""
    return 10.0 - len(choice) if len(choice) < 3 else 11.0


@pytest.mark.parametrize(("saved", "wanted"), [(0.0, 0), (0.9, 0), (3.0, 2)])
def test_layers_are_chosen_for_what_they_save_in_a_row(
    saved: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, made, table = chosen(saved, not_all, monkeypatch)
    assert count == wanted
    assert len(table.rows) == 1
    left = [why for why in made.report.declined.values() if "as one operator" in why]
    assert len(left) == 3 - wanted


def test_a_choice_that_the_model_is_no_faster_for_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(3.0, lambda choice: 10.0 + len(choice), monkeypatch)[0] == 0


@pytest.mark.parametrize(("beside", "wanted"), [(19.0, 1), (20.5, 0)])
def test_a_convolution_that_stays_is_a_neighbour_too(
    beside: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two in a row one is factored: its time with the other before it is what counts, not that alone.

    A third, behind a sigmoid, loses by itself.
    """

    ends = {"False False": 20.0, "False True": beside, "plain": 10.0}

    def rule(how: str) -> float:
        return next((seconds for end, seconds in ends.items() if how.endswith(end)), 10.5)

    def seconds(calls: Mapping[frozenset[str], object], *_: object) -> dict[frozenset[str], float]:
        return {choice: (10.0, 9.0, 11.0)[len(choice)] for choice in calls}

    monkeypatch.setattr(choose, "times_kept", lambda: Planted(rule))
    monkeypatch.setattr(fuse, "seconds_of", seconds)
    model = put(OnnxModel.open(net()), {"b": "tucker2 5x6", "c": "tucker2 5x6"})
    assert model.fuse(ignore, ignore, Batch((IMAGES,))) is bool(wanted)
    assert len(fused_types(model)) == wanted
