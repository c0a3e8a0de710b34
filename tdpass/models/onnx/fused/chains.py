"""Chains of layers whose weights are float32, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import onnx_ir as ir

from tdpass.fusing.choose import LANES
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import ChainSpec
from tdpass.models.onnx.fused.links import NodeChain, NodeLink, NodeReader, label, result
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.tensors import held, to_torch
from tdpass.models.onnx.operators.fused import FusedOp


def float_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph."""
    for chain in find_chains(NodeReader(model)):
        yield Part(
            str(chain.spec),
            label(chain),
            FusedOp.of(chain.spec),
            chain.nodes,
            (chain.x.value, *(() if chain.residual is None else (chain.residual.value,))),
            (result(chain),),
            partial(_inputs, chain),
            conv_attributes_of(chain.spec),
            LANES if chain.links[0].axes else LANES[:1],
        )


def conv_attributes_of(spec: ChainSpec) -> dict[str, int | Sequence[int]]:
    """The attributes of Conv for every stage of a chain; none for products with matrices."""
    axes, attributes = spec.axes, dict[str, int | Sequence[int]]()
    for k, stage in enumerate(spec.stages if axes else (), start=1):
        attributes |= {
            f"group_{k}": stage.groups,
            f"strides_{k}": list(stage.stride[-axes:]),
            f"pads_{k}": [*stage.before[-axes:], *stage.after[-axes:]],
            f"dilations_{k}": list(stage.dilation[-axes:]),
        }
    return attributes


def _inputs(chain: NodeChain, constants: Constants) -> list[ir.Value]:
    added = [slot.value for slot in (chain.bias, chain.residual) if slot is not None]
    return [chain.x.value, *(_weight(link, constants) for link in chain.links), *added]


def _weight(link: NodeLink, constants: Constants) -> ir.Value:
    """The weight as the operator takes it; a matrix `[o, i]` is stored anew."""
    weight = link.weight.value
    if link.axes or link.transposed:
        return weight
    return constants(weight, "matrix", lambda: to_torch(held(weight)).T)
