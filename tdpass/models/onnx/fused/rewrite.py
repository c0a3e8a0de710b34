"""Writing fused operators into a graph in place of the nodes that they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from tdpass.fusing.choose import LANES
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.fused.chains import float_chains, half_chains
from tdpass.models.onnx.fused.dynamic import dynamic_chains
from tdpass.models.onnx.fused.integers import int8_chains
from tdpass.models.onnx.fused.parts import Constants, Part
from tdpass.models.onnx.fused.recurrent import low_rank_cells
from tdpass.models.onnx.fused.sparse import sparse_layers
from tdpass.models.onnx.fused.weight_only import weight_only_layers
from tdpass.models.onnx.graph.graphs import opset_of
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.operators.fused import DOMAIN, FUNCTIONS_SINCE_IR, VERSION, Operator, function_of
from tdpass.models.onnx.rewriting.rewrite import prune_initializers, remove_nodes, take_place

FINDERS: tuple[Callable[[ir.Model], Iterator[Part]], ...] = (
    float_chains,
    half_chains,
    int8_chains,
    dynamic_chains,
    weight_only_layers,
    low_rank_cells,
    sparse_layers,
)


@dataclass(frozen=True)
class Fusion:
    """That a part is to be one operator with these lanes, as long as it computes what it did.

    `grain` is that of the operator.
    """

    spec: str
    lanes: Lanes
    grain: float = 0.0


Fusions = Mapping[str, Fusion]


def find_parts(model: ir.Model) -> list[Part]:
    """What can be one operator each, of all kinds."""
    return [part for find in FINDERS for part in find(model)]


def fused(model: ir.Model, fusions: Fusions) -> ir.Model:
    """The model, changed in place.

    The parts that make these values are nodes of com.tdpass, and functions say what those compute.
    """
    if not fusions:
        return model
    plain_initializers(model)
    names, constants = FreshNames(model), Constants()
    for part in find_parts(model):
        fusion = fusions.get(part.key)
        if fusion is not None and fusion.spec == part.spec:
            _put(model, part, fusion.lanes, names, constants)
    prune_initializers(model)
    constants.register(model)
    return model


def _put(model: ir.Model, part: Part, lanes: Lanes, names: FreshNames, constants: Constants) -> None:
    """One operator in the place of a part."""
    operator, named = part.operator, f"{part.label}/fused"
    laned = {"lanes": LANES.index(lanes)} if "lanes" in operator.attributes else {}
    node = ir.node(
        operator.name,
        part.inputs(constants),
        attributes={**part.attributes, **laned},
        domain=DOMAIN,
        num_outputs=len(part.makes),
        name=names.node(named),
    )
    node.metadata_props.update(part.nodes[0].metadata_props)
    model.graph.insert_before(part.last, node)
    for old, new in zip(part.makes, node.outputs, strict=True):
        new.name = names.value(named)
        take_place(old, new)
    remove_nodes(model.graph, part.nodes)
    _add_function(model, operator)


def _add_function(model: ir.Model, operator: Operator) -> None:
    """Say in the model what an operator computes."""
    model.ir_version = max(model.ir_version or 0, FUNCTIONS_SINCE_IR)
    model.graph.opset_imports[DOMAIN] = VERSION
    function = function_of(operator, opset_of(model))
    model.functions.setdefault(function.identifier(), function)


def plain_initializers(model: ir.Model) -> None:
    """Take the initializers out of the graph's inputs where the IR version wants them there.

    A version with functions does not.
    """
    if (model.ir_version or 0) < 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
