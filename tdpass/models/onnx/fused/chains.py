"""Chains of layers whose weights are float32, as parts that one operator computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import onnx_ir as ir
from torch import Tensor

from tdpass.fusing.choose import LANES
from tdpass.fusing.find import find_chains
from tdpass.fusing.spec import ChainSpec
from tdpass.models.onnx.fused.links import NodeChain, NodeLink, NodeReader, label, layer_of, result
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.graph.folding import folded, folded_weight, number_sources
from tdpass.models.onnx.graph.tensors import constant, held, sizes, to_torch
from tdpass.models.onnx.operators.fused import FusedOp
from tdpass.models.onnx.sites.parameters import HOLDS


class _HalfReader(NodeReader):
    """Reads layers whose weights a form stores as bfloat16, and nodes make numbers of."""

    def links(self) -> Iterator[NodeLink]:
        for node in self.model.graph:
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            if weight is not None and _is_half(weight):
                link = layer_of(node, sizes(folded_weight(weight)))
                if link is not None:
                    yield link


def _is_half(weight: ir.Value) -> bool:
    """Whether numbers of float32 are made of constants that a form stores as bfloat16.

    Only such a form says that what is multiplied with it may be rounded so too; a cast alone does not.
    """
    tensor = folded(weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    stored = {source: held(source).dtype for source in number_sources(weight)}
    return set(stored.values()) == {ir.DataType.BFLOAT16} and all(
        HOLDS in each.metadata_props for each in stored
    )


def float_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph."""
    return _parts(NodeReader(model), half=False)


def half_chains(model: ir.Model) -> Iterator[Part]:
    """The chains of the main graph whose weights a form stores as bfloat16."""
    return _parts(_HalfReader(model), half=True)


def _parts(reader: NodeReader, *, half: bool) -> Iterator[Part]:
    for chain in find_chains(reader):
        yield Part(
            f"{chain.spec}{' bfloat16' * half}",
            label(chain),
            FusedOp.of(chain.spec, half=half),
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
    ends = constants.bounds(chain.links[-1].weight.value, chain.activation)
    return [chain.x.value, *(_weight(link, constants) for link in chain.links), *added, *ends]


def _weight(link: NodeLink, constants: Constants) -> ir.Value:
    """The weight as the operator takes it; a matrix `[o, i]` is stored anew."""
    weight = link.weight.value
    if constant(weight) is None:
        return constants(
            weight, "halves", lambda: _laid_out(link, to_torch(folded_weight(weight)).bfloat16())
        )
    if link.axes or link.transposed:
        return weight
    return constants(weight, "matrix", lambda: _laid_out(link, to_torch(held(weight))))


def _laid_out(link: NodeLink, weight: Tensor) -> Tensor:
    """A matrix as `[i, o]`, a kernel as it is."""
    return weight if link.axes or link.transposed else weight.T
