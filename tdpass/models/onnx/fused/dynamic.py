"""Chains of products that make bytes of what they read in every call, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import Link
from tdpass.kernels.int8_factor import MOST_PRODUCTS
from tdpass.kernels.stage import Stage
from tdpass.models.onnx.fused.integers import codes_of, scale_of
from tdpass.models.onnx.fused.links import NodeChain, NodeLink, NodeReader, label, outputs_of, result
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.stored_integers import Integers
from tdpass.models.onnx.graph.tensors import constant
from tdpass.models.onnx.operators.fused_integers import DynamicChainOp
from tdpass.models.onnx.sites.dynamic_products import DynamicProduct
from tdpass.models.onnx.sites.weight_use import Slot


class _DynamicReader(NodeReader):
    """Reads products with matrices of int8, each with the nodes that make bytes of what it reads."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self.weights: dict[ir.Node, Integers] = {}

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            product = DynamicProduct.of(node) if node.op_type == "MatMulInteger" else None
            weight = None if product is None or product.x.value.is_initializer() else product.integers
            if product is None or weight is None or weight.codes.dim() != 2 or 0 in weight.codes.shape:
                continue
            inputs, outputs = weight.codes.shape
            if inputs <= MOST_PRODUCTS:
                self.weights[product.last] = weight
                stage = Stage(inputs, outputs)
                yield Link(product.nodes, product.x, Slot(node, 1), None, 0, stage, transposed=True)

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        return second.x.value is first.node.outputs[0]


def dynamic_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph whose layers make bytes of what they read."""
    reader = _DynamicReader(model)
    for chain in find_chains(reader):
        if chain.bias is None or constant(chain.bias.value) is not None:
            rest = () if chain.residual is None else (chain.residual.value,)
            yield Part(
                f"{replace(chain.spec, bias=True)} int8 by row",
                label(chain),
                DynamicChainOp.of(chain.spec),
                chain.nodes,
                (chain.x.value, *rest),
                (result(chain),),
                partial(_inputs, chain, [reader.weights[link.node] for link in chain.links]),
            )


def _inputs(chain: NodeChain, weights: Sequence[Integers], constants: Constants) -> list[ir.Value]:
    named = [chain.x.value]
    for link, weight in zip(chain.links, weights, strict=True):
        named += [codes_of(link, weight, constants), scale_of(link, weight, constants)]
    like = weights[-1].scale_source
    named.append(constants.zeros(like, outputs_of(chain)) if chain.bias is None else chain.bias.value)
    named += [] if chain.residual is None else [chain.residual.value]
    return [*named, *constants.bounds(like, chain.activation)]
