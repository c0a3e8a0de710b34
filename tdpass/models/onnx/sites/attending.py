"""Attention of ONNX Runtime: one weight makes queries, keys and values, which then attend to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.kinds import PRODUCT
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import sizes
from tdpass.models.onnx.operators.ops import OnnxOps
from tdpass.models.onnx.sites.matchers import DeclinedNode, held_weight, matches
from tdpass.models.onnx.sites.weight_use import Slot, WeightUse

_BIAS, _MASK, _PAST, _ADDED = 2, 3, 4, 5
_MASKS = (2, 3)  # axes of masks that both operators read alike
_HIDDEN = -10000.0


@dataclass(frozen=True)
class Attending:
    """What the operator does with queries, keys and values of these sizes, side by side along the last axis.

    `mask` holds ones at what may be seen; `added` is added to products of queries and keys.
    """

    parts: tuple[int, int, int]
    heads: int
    scale: float
    hidden: float
    causal: bool
    mask: Slot | None
    added: Slot | None

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        """What it reads beside them."""
        return tuple(slot.value for slot in (self.mask, self.added) if slot is not None)

    def on(self, twins: Mapping[ir.Node, ir.Node]) -> Attending:
        """The same in a copy of the graph."""
        mask, added = self.mask, self.added
        return replace(
            self,
            mask=None if mask is None else mask.on(twins),
            added=None if added is None else added.on(twins),
        )

    def written(self, ops: OnnxOps, y: ir.Value) -> ir.Value:
        """It as a node that takes the three apart."""
        apart = [ops.part(y, -1, start, stop) for start, stop in pairwise(accumulate(self.parts, initial=0))]
        beside = [None if slot is None else slot.value for slot in (self.mask, self.added)]
        return ops.attention([*apart, None, *beside], self.heads, self.scale, self.hidden, causal=self.causal)

    def computed(self, y: Tensor, values: Mapping[ir.Value, Tensor]) -> Tensor:
        """It in torch."""
        q, k, v = (
            part.reshape((*part.shape[:-1], self.heads, -1)).transpose(1, 2)
            for part in torch.split(y, list(self.parts), -1)
        )
        scores = (q @ k.transpose(-1, -2)) * (self.scale or 1 / math.sqrt(q.shape[-1]))
        if self.added is not None:
            scores = scores + values[self.added.value]
        if self.mask is not None:
            mask = values[self.mask.value]
            seen = mask[:, None, None] if mask.dim() == _MASKS[0] else mask[:, None]
            scores = scores + torch.where(seen == 0, self.hidden, 0.0).to(scores)
        if self.causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, torch.finfo(scores.dtype).min)
        answers: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return answers


@matches("com.microsoft::Attention")
class AttentionMatcher:
    """`attention(x W + b)` of one sequence with itself, nothing of it from before."""

    def match(self, node: ir.Node, shapes: Shapes) -> WeightUse | None:
        tensor = held_weight(node, 1)
        if tensor is None:
            return None
        weight, attributes = Slot(node, 1), node.attributes
        given = {place: Slot(node, place) for place, value in enumerate(node.inputs) if value is not None}
        columns = sizes(tensor)[-1]
        said = tuple(attributes.get_ints("qkv_hidden_sizes", (columns // 3,) * 3))
        mask = given.get(_MASK)
        later = len(node.outputs) > 1 and any(value.uses() for value in node.outputs[1:])
        reasons = {
            "it goes on from what it saw before": later or _PAST in given,
            "it turns queries and keys by their positions": bool(attributes.get_int("do_rotary", 0)),
            "its mask has a form that only it reads": mask is not None
            and shapes.rank(mask.value) not in _MASKS,
            "its sizes are not those of queries, keys and values": len(said) != 3 or sum(said) != columns,
            "its bias is not a constant": _BIAS in given and held_weight(node, _BIAS) is None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise DeclinedNode(weight.value, reason)
        attending = Attending(
            (said[0], said[1], said[2]), attributes.get_int("num_heads", 1),
            attributes.get_float("scale", 0.0),
            attributes.get_float("mask_filter_value", _HIDDEN), bool(attributes.get_int("unidirectional", 0)),
            mask, given.get(_ADDED),
        )  # fmt: skip
        return WeightUse(
            Slot(node, 0), weight, PRODUCT, transposed=True, bias=given.get(_BIAS), following=attending
        )
