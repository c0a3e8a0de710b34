"""The form in which a model is kept.

It is sorted, its constants are not also inputs, and weights are not rearranged at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from tdpass.models.onnx.files.checks import invalid_if_failing
from tdpass.models.onnx.graph.names import FreshNames
from tdpass.models.onnx.graph.shapes import ordered
from tdpass.models.onnx.graph.tensors import FLOAT_TYPES, constant, from_torch, sizes, to_torch
from tdpass.models.onnx.operators.fused import DOMAIN
from tdpass.models.onnx.rewriting.rewrite import INPUTS_HOLD_INITIALIZERS_BELOW, prune_initializers
from tdpass.models.onnx.rewriting.shared_constants import share_constants
from tdpass.models.onnx.rewriting.split_constants import split_constants
from tdpass.models.onnx.sites.matchers import MATCHERS, matcher_for

_REARRANGING = frozenset({"Identity", "Transpose"})


def defaults(model: ir.Model) -> list[ir.Value]:
    """The inputs that an initializer gives a default."""
    initializers = set(model.graph.initializers.values())
    return [value for value in model.graph.inputs if value in initializers]


def normalized(model: ir.Model, overridable: Sequence[str] = ()) -> ir.Model:
    """An equivalent copy of the model in that form; the weights are shared.

    Inputs with a default are constants, but for those that match a name in `overridable`.  Raises
    `InvalidModelError` for a cyclic graph.
    """
    with invalid_if_failing(
        "the model's graph cannot be sorted", "it has a cycle or a missing value; export it again"
    ):
        copy = ordered(model)
    with invalid_if_failing("the model's local functions cannot be written out", "export it again"):
        _inline(copy)
    _name_apart(copy)
    for value in defaults(copy):
        if (copy.ir_version or 0) < INPUTS_HOLD_INITIALIZERS_BELOW or not any(
            fnmatchcase(value.name or "", name) for name in overridable
        ):
            copy.graph.inputs.remove(value)
    split_constants(copy)
    for graph in list(copy.graphs()):
        for node in list(graph):
            if not node.domain and node.op_type in _REARRANGING:
                _fold(graph, node)
    prune_initializers(copy)
    return copy


def _inline(model: ir.Model) -> None:
    """Write out the local functions that may hold a weight or be given one.

    Those that stand for fused operators stay: what they compute is a chain of layers already. What several
    calls of one hold is one constant.
    """
    count = len(model.functions)
    InlinePass(
        lambda function: (
            function.domain != DOMAIN and any(matcher_for(node) is not None for node in function.all_nodes())
        )
    )(model)
    if len(model.functions) < count:
        share_constants(model)


def _name_apart(model: ir.Model) -> None:
    """Give nodes of a graph that have one name each their own: ONNX Runtime, unlike others, asks for it."""
    names = FreshNames(model)
    for node in _namesakes(model):
        node.name = names.node(node.name or "")


def _namesakes(model: ir.Model) -> list[ir.Node]:
    """The nodes of a name that one before them in their graph has."""
    found = []
    for graph in model.graphs():
        seen: set[str] = set()
        for node in graph:
            if node.name in seen:
                found.append(node)
            elif node.name:
                seen.add(node.name)
    return found


def named_twice(model: ir.Model) -> int:
    """How many nodes have the name of one before them."""
    return len(_namesakes(model))


def made_constant(given: ir.Model, model: ir.Model) -> tuple[str, ...]:
    """The inputs of the given model that are constants in the normalized one.

    These are the ones that its version lets callers leave out.
    """
    if (model.ir_version or 0) < INPUTS_HOLD_INITIALIZERS_BELOW:
        return ()
    kept = {value.name for value in model.graph.inputs}
    return tuple(str(value.name) for value in defaults(given) if value.name not in kept)


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    """Store a weight as it is read, where the rearranging node is all that reads it and feeds only layers."""
    source, output = node.inputs[0], node.outputs[0]
    tensor = constant(source)
    readers = [usage.node for usage in output.uses()]
    sole = (
        source is not None
        and len(source.uses()) == 1
        and not source.is_graph_output()
        and not output.is_graph_output()
    )
    feeds_layers = bool(readers) and all(
        not reader.domain and reader.op_type in MATCHERS and reader.graph is graph for reader in readers
    )
    if (
        source is None
        or tensor is None
        or not source.is_initializer()
        or source.graph is not graph
        or not feeds_layers
        or tensor.dtype not in FLOAT_TYPES
    ):
        return
    if node.op_type == "Identity":
        output.replace_all_uses_with(source)
        graph.remove(node, safe=True)
    elif sole:
        axes = tuple(node.attributes.get_ints("perm", tuple(range(len(tensor.shape)))[::-1]))
        shape = ir.Shape([sizes(tensor)[axis] for axis in axes])
        value = ir.Value(name=source.name, shape=shape, type=ir.TensorType(tensor.dtype))
        value.const_value = ir.LazyTensor(
            partial(_permuted, tensor, axes), tensor.dtype, shape, name=source.name
        )
        value.metadata_props.update(source.metadata_props)
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        del graph.initializers[source.name or ""]
        graph.register_initializer(value)


def _permuted(tensor: ir.TensorProtocol, axes: tuple[int, ...]) -> ir.TensorProtocol:
    return from_torch(to_torch(tensor).permute(axes))
