"""Torch functions for ONNX operators on sequences, which are lists of tensors.

Torch's exporter collects in them what a loop makes, as of embedding bags.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx.graph.functions import Operator, numbers, serves

Made = Any  # one output, which is a list
_MAKERS = frozenset({"SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase"})


def reads_sequence(node: ir.Node) -> bool:
    """Whether a node reads a sequence, which a session of a single node does not take."""
    read = [value for value in node.inputs if value is not None]
    makers = [maker for value in read if (maker := value.producer()) is not None]
    return any(maker.op_type in _MAKERS for maker in makers) or any(
        isinstance(value.type, ir.SequenceType) for value in read
    )


@serves("SequenceEmpty")
def _empty(_op: Operator) -> Made:
    return ([],)


@serves("SequenceConstruct")
def _construct(_op: Operator, *elements: Tensor) -> Made:
    return ([*elements],)


@serves("SequenceInsert")
def _insert(_op: Operator, held: list[Tensor], element: Tensor, place: Tensor | None = None) -> Made:
    at = len(held) if place is None else numbers(place)[0]
    return ([*held[:at], element, *held[at:]],)


@serves("SequenceErase")
def _erase(_op: Operator, held: list[Tensor], place: Tensor | None = None) -> Made:
    at = (-1 if place is None else numbers(place)[0]) % len(held)
    return ([*held[:at], *held[at + 1 :]],)


@serves("SequenceAt")
def _at(_op: Operator, held: list[Tensor], place: Tensor) -> Tensor:
    return held[numbers(place)[0]]


@serves("SequenceLength")
def _length(_op: Operator, held: list[Tensor]) -> Tensor:
    return torch.tensor(len(held))


@serves("ConcatFromSequence")
def _concat(op: Operator, held: list[Tensor]) -> Tensor:
    axis = op.integer("axis")
    return torch.stack(held, axis) if op.integer("new_axis") else torch.cat(held, axis)
