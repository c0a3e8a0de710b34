"""Walks over a graph and the branches and bodies within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir


def opset_of(model: ir.Model) -> int:
    """Version of the standard operator set."""
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))


def nodes_of(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph and of all branches and bodies in it, in order."""
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph and of the local functions, those in branches and loop bodies included."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def bodies(node: ir.Node) -> Mapping[str, ir.Graph]:
    """Its branches, or its body, by the attribute that holds each."""
    return {
        name: attribute.as_graph()
        for name, attribute in node.attributes.items()
        if attribute.type == ir.AttributeType.GRAPH
    }


def within(node: ir.Node) -> list[ir.Node]:
    """The nodes in a node's branches and bodies."""
    return [inner for graph in _graphs(node) for inner in ir.traversal.RecursiveGraphIterator(graph)]


def captured_values(node: ir.Node) -> list[ir.Value]:
    """The outer values that a node's subgraphs read, each once."""
    inner: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}
    for graph in _graphs(node):
        inner.update((*graph.inputs, *graph.initializers.values()))
        for nested in ir.traversal.RecursiveGraphIterator(graph):
            inner.update(nested.outputs)
            read.update((value, None) for value in nested.inputs if value is not None)
            for subgraph in bodies(nested).values():
                inner.update((*subgraph.inputs, *subgraph.initializers.values()))
                read.update((value, None) for value in subgraph.outputs)
        read.update((value, None) for value in graph.outputs)
    direct = set(node.inputs)
    return [value for value in read if value not in inner and value not in direct]


def _graphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs
