"""Layers whose weights a support keeps without their zeros, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from tdpass.fusing.find import find_chains
from tdpass.models.onnx.fused.chains import conv_attributes_of
from tdpass.models.onnx.fused.links import NodeChain, NodeLink, NodeReader, label, layer_of, result
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.activations import sole_reader
from tdpass.models.onnx.graph.folding import makers, sources
from tdpass.models.onnx.graph.tensors import constant
from tdpass.models.onnx.operators.fused_sparse import SparseOp
from tdpass.models.onnx.sites.weight_use import Slot

_PLACES = "CumSum"  # counts what a support keeps, and so says where each number that is stored belongs


class _SparseReader(NodeReader):
    """Reads layers of one group whose weights are made of the numbers that a support keeps, each by itself."""

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            if weight is None or not _has_support(weight):
                continue
            known = self._sizes[0].get(weight.name or "") or (0,)
            link = layer_of(node, tuple(size or 0 for size in known))
            link = None if link is None else _by_rows(link)
            if link is not None and link.stage is not None and link.stage.groups == 1:
                yield link

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        return False


def _has_support(weight: ir.Value) -> bool:
    """Whether nodes make it of constants alone, and put what is stored in its places."""
    if constant(weight) is not None or weight.dtype not in (None, ir.DataType.FLOAT):
        return False
    placed = any(node.op_type == _PLACES for node in makers(weight))
    return placed and all(
        constant(each) is not None or each.producer() is not None for each in sources(weight)
    )


def _by_rows(link: NodeLink) -> NodeLink | None:
    """The layer with its matrix as `[o, i]`, before it is turned for a product; None where that is not known."""
    if not link.transposed:
        return link
    turn = link.weight.value.producer()
    if turn is None or turn.op_type != "Transpose":
        return None
    alone = sole_reader(turn.outputs[0]) is link.node
    nodes = (turn, *link.nodes) if alone else link.nodes
    return replace(link, nodes=nodes, weight=Slot(turn, 0), transposed=False)


def sparse_layers(model: ir.Model) -> Iterator[Part]:
    """The layers of the main graph whose weights have supports."""
    for chain in find_chains(_SparseReader(model), alone=True):
        rest = () if chain.residual is None else (chain.residual.value,)
        spec = chain.spec
        yield Part(
            f"{spec} sparse of {_stored(chain)}",
            label(chain),
            SparseOp(spec.linear, spec.bias, spec.residual, spec.activation),
            chain.nodes,
            (chain.x.value, *rest),
            (result(chain),),
            partial(_inputs, chain),
            conv_attributes_of(spec),
        )


def _stored(chain: NodeChain) -> str:
    """Sizes of the constants that the weight is made of: how much is kept, and by which tiles."""
    found = map(constant, dict.fromkeys(sources(chain.links[0].weight.value)))
    return " ".join(str(tensor.size) for tensor in found if tensor is not None)


def _inputs(chain: NodeChain, constants: Constants) -> list[ir.Value]:
    weight = chain.links[0].weight.value
    added = [slot.value for slot in (chain.bias, chain.residual) if slot is not None]
    return [chain.x.value, weight, *added, *constants.bounds(weight, chain.activation)]
