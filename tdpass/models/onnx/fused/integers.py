"""Chains of layers that read bytes and whose weights are int8, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from tdpass.fusing.find import find_chains
from tdpass.models.onnx.fused.chains import conv_attributes_of
from tdpass.models.onnx.fused.links import (
    NodeChain,
    NodeLink,
    NodeReader,
    label,
    layer_of,
    outputs_of,
    result,
)
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.activations import sole_reader
from tdpass.models.onnx.graph.stored_integers import Grid, Integers, integers_of
from tdpass.models.onnx.graph.tensors import constant
from tdpass.models.onnx.operators.fused_integers import Int8ChainOp


class _Int8Reader(NodeReader):
    """Reads layers whose weights are int8 with a scale per output channel, and that read bytes."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self.weights: dict[ir.Node, Integers] = {}

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            weight = integers_of(node.inputs[1]) if len(node.inputs) > 1 else None
            if weight is None or read_grid(node) is None:
                continue
            link = layer_of(node, tuple(weight.codes.shape))
            if link is not None and weight.scale_along(1 if link.transposed else 0) is not None:
                self.weights[node] = weight
                yield link

    def following(self, link: NodeLink) -> ir.Node | None:
        coded = sole_reader(link.node.outputs[0], "QuantizeLinear")
        numbers = None if coded is None else sole_reader(coded.outputs[0], "DequantizeLinear")
        return None if numbers is None else sole_reader(numbers.outputs[0])

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        """Whether codes of what the first makes are what the second reads, on one grid."""
        read, coded = read_grid(second.node), sole_reader(first.node.outputs[0], "QuantizeLinear")
        made = Grid.of(coded, "QuantizeLinear")
        return read is not None and made is not None and read == made


def read_grid(node: ir.Node) -> Grid | None:
    """The grid of what a layer reads."""
    return None if node.inputs[0] is None else Grid.of(node.inputs[0].producer(), "DequantizeLinear")


def int8_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph that read bytes."""
    reader = _Int8Reader(model)
    for chain in find_chains(reader):
        if chain.bias is None or constant(chain.bias.value) is not None:
            yield _Int8Chain(chain, [reader.weights[link.node] for link in chain.links]).part()


@dataclass(frozen=True)
class _Int8Chain:
    chain: NodeChain
    weights: list[Integers]

    def part(self) -> Part:
        chain, end = self.chain, sole_reader(result(self.chain), "QuantizeLinear")
        made = Grid.of(end, "QuantizeLinear")
        nodes = (*self._between(), *chain.nodes, *([] if end is None or made is None else [end]))
        rest = () if chain.residual is None else (chain.residual.value,)
        first = read_grid(chain.links[0].node)
        assert first is not None
        return Part(
            f"{replace(chain.spec, bias=True)} int8{' to bytes' * (made is not None)}",
            label(chain),
            Int8ChainOp.of(chain.spec, coded=made is not None),
            nodes,
            (first.codes, *rest),
            (nodes[-1].outputs[0],),
            self.inputs,
            conv_attributes_of(chain.spec),
        )

    def _between(self) -> Iterator[ir.Node]:
        """What makes codes of what a layer makes, and numbers of them for the next."""
        for link in self.chain.links[1:]:
            numbers = link.x.value.producer()
            coded = None if numbers is None or numbers.inputs[0] is None else numbers.inputs[0].producer()
            yield from (node for node in (coded, numbers) if node is not None)

    def inputs(self, constants: Constants) -> list[ir.Value]:
        chain = self.chain
        grids = [grid for link in chain.links if (grid := read_grid(link.node)) is not None]
        named = [grids[0].codes]
        for link, weight, grid in zip(chain.links, self.weights, grids, strict=True):
            named += [
                grid.scale,
                grid.zero,
                codes_of(link, weight, constants),
                scale_of(link, weight, constants),
            ]
        like = self.weights[-1].scale_source
        named.append(constants.zeros(like, outputs_of(chain)) if chain.bias is None else chain.bias.value)
        if chain.residual is not None:
            named.append(chain.residual.value)
        named += constants.bounds(like, chain.activation)
        made = Grid.of(sole_reader(result(chain), "QuantizeLinear"), "QuantizeLinear")
        return [*named, *(() if made is None else (made.scale, made.zero))]


def codes_of(link: NodeLink, weight: Integers, constants: Constants) -> ir.Value:
    """The codes as Conv or MatMul read them."""
    turned = weight.codes if link.axes or link.transposed else weight.codes.T
    return constants.like(weight.source, "matrix", turned)


def scale_of(
    link: NodeLink, weight: Integers, constants: Constants, behind: tuple[int, ...] = ()
) -> ir.Value:
    """The scale of every output channel, with these axes behind."""
    wanted = weight.scale_along(1 if link.transposed else 0)
    assert wanted is not None
    return constants.like(weight.scale_source, "scales", wanted.reshape(-1, *behind))
