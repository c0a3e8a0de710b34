"""Walks over an ONNX protobuf: its graphs, nodes and tensors, wherever they are nested."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx


def graph_protos(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph, those in local functions included."""
    waiting = [proto.graph, *(graph for function in proto.functions for graph in _subgraphs(function.node))]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting.extend(_subgraphs(graph.node))


def node_protos(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of local functions included."""
    for graph in graph_protos(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those in their branches and loop bodies."""
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            yield node
            waiting.extend(graph.node for graph in _subgraphs([node]))


def tensor_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every initializer and every tensor that a node holds."""
    for graph in graph_protos(proto):
        yield from graph.initializer
    for node in node_protos(proto):
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def texts(proto: onnx.ModelProto) -> Iterator[object]:
    """All names and descriptions: `str`, or `bytes` where one is not UTF-8."""
    yield from (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
    yield from (text for entry in proto.metadata_props for text in (entry.key, entry.value))
    yield from (entry.domain for entry in proto.opset_import)
    for function in proto.functions:
        yield from (
            function.name,
            function.domain,
            function.overload,
            function.doc_string,
            *function.input,
            *function.output,
            *function.attribute,
        )
    for graph in graph_protos(proto):
        yield from (graph.name, graph.doc_string)
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield from (
                value.name,
                value.doc_string,
                *(size.dim_param for size in value.type.tensor_type.shape.dim),
            )
    for node in node_protos(proto):
        yield from (
            node.name,
            node.op_type,
            node.domain,
            node.overload,
            node.doc_string,
            *node.input,
            *node.output,
        )
        yield from (
            text
            for attribute in node.attribute
            for text in (attribute.name, attribute.ref_attr_name, attribute.doc_string)
        )
        yield from (text for entry in node.metadata_props for text in (entry.key, entry.value))
    for tensor in tensor_protos(proto):
        yield from (
            tensor.name,
            tensor.doc_string,
            *(text for entry in tensor.external_data for text in (entry.key, entry.value)),
        )


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove the initializers of a graph that nothing in it reads, in its subgraphs neither."""
    read = {name for node in nodes_within(graph.node) for name in node.input}
    read.update(value.name for inner in _within(graph) for value in inner.output)
    read.update(value.name for value in graph.input)
    graph.initializer.sort(key=lambda tensor: tensor.name not in read)  # in place: contents are not copied
    del graph.initializer[sum(tensor.name in read for tensor in graph.initializer) :]


def _within(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in nodes_within(graph.node):
        yield from _subgraphs([node])


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.graphs
            if attribute.HasField("g"):
                yield attribute.g
