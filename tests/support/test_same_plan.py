"""A plan made through one front end applies to the same layer through every other, and answers alike.

Every kind of layer in the table that can be exported is tried, whatever the exporter calls its weights.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from itertools import permutations
from typing import Any

import onnx_layers  # noqa: F401 - before those of torch, as the page has them
import pytest
import torch
import torch_layers  # noqa: F401 - fills the table
from cells import CELLS, FRONT_ENDS, Cell

import tdpass
from tdpass.models import open_model
from tdpass.planner.rank_plan import RankPlan

# a branch by what is read, bfloat16 convolutions that ONNX Runtime lacks, and projections that the exporter
# writes into the state of its LSTM, whose nodes cannot run
_NOT_EXPORTED = {
    "chosen by a branch": ("torch.export", "onnx"),
    "bfloat16": ("onnx",),
    "LSTM with projections": ("onnx",),
}
_QUICK = ("MultiheadAttention", "weight_norm", "Linear")
LAYERS = [layer for layer, front_end in CELLS if front_end == "torch" and CELLS[layer, "torch"].sites]
WAYS = [
    pytest.param(layer, made, used, marks=() if layer in _QUICK else pytest.mark.slow)
    for layer in LAYERS
    for made, used in permutations(FRONT_ENDS, 2)
    if not {made, used} & {*_NOT_EXPORTED.get(layer, ())}
]


def exported(cell: Cell) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(cell.make(), cell.fed(), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


@cache
def opened(layer: str, front_end: str) -> Any:
    if front_end == "onnx":
        return exported(CELLS[layer, "torch"])
    return CELLS[layer, front_end].make()


@cache
def planned(layer: str, front_end: str) -> tdpass.Artifact[Any]:
    return compressed(layer, front_end, budget={"params": 0.7}, pipeline="divide,plan,factorize")


def compressed(layer: str, front_end: str, **options: Any) -> tdpass.Artifact[Any]:
    model = copy.deepcopy(opened(layer, front_end))
    example = CELLS[layer, "torch"].fed()
    return tdpass.compress(model, example_inputs=example, progress=False, cache=False, **options)


def answers(artifact: tdpass.Artifact[Any], layer: str) -> list[torch.Tensor]:
    returned: Any = open_model(artifact.model).run(CELLS[layer, "torch"].batch)
    return list(returned.values()) if isinstance(returned, dict) else [returned]


def changed(plan: RankPlan) -> list[str]:
    return sorted(f"{choice.shape} {choice.form}" for choice in plan if not choice.kept_dense)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("layer", "made", "used"), WAYS)
def test_a_plan_of_one_front_end_applies_to_the_others(layer: str, made: str, used: str) -> None:
    first = planned(layer, made)
    again = compressed(layer, used, plan=first.plan, pipeline="factorize")
    assert changed(again.plan) == changed(first.plan) != []
    halves = {torch.float16, torch.bfloat16} & {tensor.dtype for tensor in CELLS[layer, "torch"].fed()}
    close = 1e-2 if halves else 1e-4
    for ours, theirs in zip(answers(again, layer), answers(first, layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
