"""Chains of products that make bytes of what they read in every call, as parts that one operator computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import Link
from tdpass.kernels.int8_factor import MOST_PRODUCTS
from tdpass.kernels.stage import Stage
from tdpass.models.onnx.fused.chains import conv_attributes_of
from tdpass.models.onnx.fused.integers import codes_of, scale_of
from tdpass.models.onnx.fused.links import (
    NodeChain,
    NodeLink,
    NodeReader,
    conv_stage,
    label,
    outputs_of,
    result,
)
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.folding import folded, folded_weight, number_sources
from tdpass.models.onnx.graph.stored_integers import Integers
from tdpass.models.onnx.graph.tensors import to_torch
from tdpass.models.onnx.operators.fused_integers import DynamicChainOp, DynamicConvChainOp
from tdpass.models.onnx.sites.dynamic_products import DynamicProduct, by_channel
from tdpass.models.onnx.sites.weight_use import Slot


class _DynamicReader(NodeReader):
    """Reads products with weights of int8, each with the nodes that make bytes of what it reads."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__(model)
        self.weights: dict[ir.Node, Integers] = {}

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            product = DynamicProduct.of(node)
            weight = None if product is None or product.x.value.is_initializer() else product.integers
            if product is None or weight is None or 0 in weight.codes.shape:
                continue
            link = (
                _convolution(product, weight) if node.op_type == "ConvInteger" else _matrix(product, weight)
            )
            if link is not None:
                self.weights[product.last] = weight
                yield link

    def fuses(self, first: NodeLink, second: NodeLink) -> bool:
        return second.x.value is first.node.outputs[0]

    def bias(self, chain: NodeChain) -> NodeChain:
        """The chain with its bias, one number by channel, whatever the axes around these."""
        axes = chain.links[0].axes
        if not axes:
            return super().bias(chain)
        found = by_channel(result(chain), outputs_of(chain), axes)
        if found is None or chain.bias is not None:
            return chain
        add, slot = found
        return replace(chain, nodes=(*chain.nodes, add), bias=slot)


def _matrix(product: DynamicProduct, weight: Integers) -> NodeLink | None:
    if weight.codes.dim() != 2 or weight.codes.shape[0] > MOST_PRODUCTS:
        return None
    stage = Stage(*weight.codes.shape)
    return Link(product.nodes, product.x, Slot(product.node, 1), None, 0, stage, transposed=True)


def _convolution(product: DynamicProduct, weight: Integers) -> NodeLink | None:
    shape = tuple(weight.codes.shape)
    stage = conv_stage(product.node, shape) if math.prod(shape[1:]) <= MOST_PRODUCTS else None
    if stage is None or weight.scale_along(0) is None:
        return None
    return Link(product.nodes, product.x, Slot(product.node, 1), None, len(shape) - 2, stage)


def dynamic_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph whose layers make bytes of what they read."""
    reader = _DynamicReader(model)
    for chain in find_chains(reader):
        if chain.bias is None or folded(chain.bias.value) is not None:
            rest = () if chain.residual is None else (chain.residual.value,)
            operator = DynamicConvChainOp if chain.links[0].axes else DynamicChainOp
            yield Part(
                f"{replace(chain.spec, bias=True)} int8 {'on one grid' if chain.links[0].axes else 'by row'}",
                label(chain),
                operator.of(chain.spec),
                chain.nodes,
                (chain.x.value, *rest),
                (result(chain),),
                partial(_inputs, chain, [reader.weights[link.node] for link in chain.links]),
                conv_attributes_of(chain.spec),
            )


def _inputs(chain: NodeChain, weights: Sequence[Integers], constants: Constants) -> list[ir.Value]:
    named, behind = [chain.x.value], (1,) * chain.links[0].axes
    for link, weight in zip(chain.links, weights, strict=True):
        named.append(codes_of(link, weight, constants))
        named.append(scale_of(link, weight, constants, behind))
    like = weights[-1].scale_source
    named.append(_bias(chain, behind, like, constants))
    named += [] if chain.residual is None else [chain.residual.value]
    return [*named, *constants.bounds(like, chain.activation)]


def _bias(chain: NodeChain, behind: tuple[int, ...], like: ir.Value, constants: Constants) -> ir.Value:
    """The bias with axes of one behind it."""
    if chain.bias is None:
        return constants.zeros(like, outputs_of(chain), *behind)
    source = number_sources(chain.bias.value)[0]
    return constants.like(source, "bias", to_torch(folded_weight(chain.bias.value)).reshape(-1, *behind))
