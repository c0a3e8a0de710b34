"""Layers whose matrices have few bits, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import Link
from tdpass.kernels.stage import Stage
from tdpass.models.onnx.fused.integers import read_grid
from tdpass.models.onnx.fused.links import NodeChain, NodeLink, NodeReader, label, layer_of, result
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.activations import other, sole_reader
from tdpass.models.onnx.graph.stored_integers import Integers, shifted_integers_of
from tdpass.models.onnx.graph.tensors import constant, held, sizes
from tdpass.models.onnx.operators.fused_integers import WeightOnlyOp
from tdpass.models.onnx.sites.weight_use import Slot

_NIBBLE, _EIGHT = 4, 8


@dataclass(frozen=True)
class _FewBits:
    """A matrix `[o, i]` of few bits, with `group` inputs to a scale.

    It has the factors V and U of what is added to its product.
    """

    bits: int
    group: int
    codes: ir.Value
    scale: ir.Value
    zeros: ir.Value | None = None
    rows: Integers | None = None
    factors: tuple[ir.Value, ...] = ()

    def stored(self, constants: Constants) -> list[ir.Value]:
        """Codes, scales and, where there are such, zero points as the operator takes them."""
        rows, group = self.rows, self.group
        if rows is None:
            return [self.codes, self.scale, *([] if self.zeros is None else [self.zeros])]
        points = None if rows.zeros is None else rows.zeros.to(rows.codes.dtype)
        beside = [(self.scale, "scales", rows.scales), (self.zeros, "zeros", points)]
        return [
            constants(self.codes, "rows", lambda: rows.codes.reshape(-1, group)),
            *(
                constants(source, how, partial(_firsts, part, group))
                for source, how, part in beside
                if source is not None and part is not None
            ),
        ]


class _FewBitsReader(NodeReader):
    """Reads layers that read numbers and whose matrices are four- or eight-bit integers, each by itself."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self.matrices: dict[ir.Node, _FewBits] = {}

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            found = self._nibbles(node) if node.op_type == "MatMulNBits" else self._bytes(node)
            if found is None:
                continue
            matrix, link = found
            thin = _product_beside(link.node)
            if thin is not None:
                nodes, factors = thin
                matrix, link = replace(matrix, factors=factors), replace(link, nodes=(*link.nodes, *nodes))
            self.matrices[link.node] = matrix
            yield link

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        return False

    def _nibbles(self, node: ir.Node) -> tuple[_FewBits, NodeLink] | None:
        kind, given = node.attributes, [*node.inputs, *(None,) * (6 - len(node.inputs))]
        inputs, outputs, group = (kind.get_int(name, 0) for name in ("K", "N", "block_size"))
        x, codes, scale, zeros, order, bias = given
        stored = (constant(codes), constant(scale))
        if node.domain != "com.microsoft" or kind.get_int("bits", _NIBBLE) != _NIBBLE or x is None:
            return None
        if _no_points(zeros) or order is not None or None in stored or inputs % group or group % _EIGHT:
            return None
        if codes is None or scale is None or stored[1] is None or stored[1].dtype != ir.DataType.FLOAT:
            return None
        slot = None if bias is None else Slot(node, 5)
        link: NodeLink = Link((node,), Slot(node, 0), Slot(node, 1), slot, 0, Stage(inputs, outputs))
        return _FewBits(_NIBBLE, group, codes, scale, zeros), link

    def _bytes(self, node: ir.Node) -> tuple[_FewBits, NodeLink] | None:
        weight = shifted_integers_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or weight.codes.dim() != 2 or read_grid(node) is not None:
            return None
        link = layer_of(node, tuple(weight.codes.shape))
        if link is None or link.axes:
            return None
        rows = weight.laid_out(lambda part: part.T) if link.transposed else weight
        group = _group_of(rows.scales, *([] if rows.zeros is None else [rows.zeros]))
        if group is None:
            return None
        return _FewBits(_EIGHT, group, rows.source, rows.scale_source, rows.zero_source, rows), link


def _firsts(beside: Tensor, group: int) -> Tensor:
    """The first number of each group."""
    return beside.reshape(-1, group)[:, 0]


def _no_points(zeros: ir.Value | None) -> bool:
    """Whether what stands for zero points is other than a constant of four-bit numbers."""
    held = constant(zeros)
    return zeros is not None and (held is None or held.dtype != ir.DataType.UINT8)


def _group_of(*beside: Tensor) -> int | None:
    """How many inputs share all of these numbers `[o, i]`; None where the kernel has no such groups."""
    inputs = beside[0].shape[1]
    differ = torch.stack([(part[:, 1:] != part[:, :-1]).any(0) for part in beside]).any(0)
    changes = differ.nonzero().flatten() + 1
    group = int(changes[0]) if len(changes) else inputs
    held = inputs % group == 0 and bool((changes % group == 0).all())
    return group if held and (group == inputs or group % _EIGHT == 0) else None


def _product_beside(node: ir.Node) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]] | None:
    """Two products with thin float16 matrices that read a layer's input, and their sum; with the matrices."""
    add = sole_reader(node.outputs[0], "Add")
    operand = None if add is None else other(add, node.outputs[0])
    outer = None if operand is None else operand.producer()
    inner = (
        None if outer is None or not outer.inputs or outer.inputs[0] is None else outer.inputs[0].producer()
    )
    if add is None or outer is None or inner is None or inner.inputs[0] is not node.inputs[0]:
        return None
    factors = [_half_matrix(each) for each in (inner, outer)]
    alone = sole_reader(inner.outputs[0]) is outer and sole_reader(outer.outputs[0]) is add
    if not alone or factors[0] is None or factors[1] is None:
        return None
    return (inner, outer, add), (factors[0], factors[1])


def _half_matrix(node: ir.Node) -> ir.Value | None:
    """The constant of float16 `[o, i]` whose cast a product without bias reads."""
    cast = node.inputs[1].producer() if len(node.inputs) == 2 and node.inputs[1] is not None else None
    if (
        node.op_type != "Gemm"
        or node.attributes.get_int("transB", 0) != 1
        or cast is None
        or cast.op_type != "Cast"
    ):
        return None
    tensor = constant(cast.inputs[0])
    return cast.inputs[0] if tensor is not None and tensor.dtype == ir.DataType.FLOAT16 else None


def weight_only_layers(model: ir.Model) -> Iterator[Part]:
    """The layers of the main graph whose matrices have few bits."""
    reader = _FewBitsReader(model)
    for chain in find_chains(reader, alone=True):
        if chain.bias is not None and constant(chain.bias.value) is None:
            continue
        matrix, (stage,) = reader.matrices[chain.links[0].node], chain.spec.stages
        beside = f" beside {sizes(held(matrix.factors[0]))[0]}" if matrix.factors else ""
        rest = () if chain.residual is None else (chain.residual.value,)
        yield Part(
            f"{chain.spec} int{matrix.bits}/{matrix.group}{'/zero' * (matrix.zeros is not None)}{beside}",
            label(chain),
            WeightOnlyOp(
                matrix.bits,
                matrix.zeros is not None,
                bool(matrix.factors),
                chain.bias is not None,
                chain.residual is not None,
                chain.activation,
            ),
            chain.nodes,
            (chain.x.value, *rest),
            (result(chain),),
            partial(_inputs, chain, matrix),
            {"K": stage.inputs, "N": stage.outputs, "block_size": matrix.group},
        )


def _inputs(chain: NodeChain, matrix: _FewBits, constants: Constants) -> list[ir.Value]:
    added = [slot.value for slot in (chain.bias, chain.residual) if slot is not None]
    ends = constants.bounds(matrix.codes, chain.activation)
    return [chain.x.value, *matrix.stored(constants), *matrix.factors, *added, *ends]
