"""Which tensors of a graph are parameters."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from tdpass.models.onnx.tensors import PARAMETER_TYPES, constant

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_RUNNING_STATISTICS = {"BatchNormalization": (3, 4)}


HOLDS = "tdpass.holds"  # how many numbers a tensor holds where those are not its elements, 0 for what scales or places others


def parameter_count(model: ir.Model) -> int:
    """How many numbers the parameters hold, what scales or places the numbers of others not counted."""
    return sum(int(value.metadata_props.get(HOLDS, tensor.size)) for value, tensor in _held(model))


def parameter_bytes(model: ir.Model) -> int:
    """Bytes of all parameters."""
    return sum(tensor.nbytes for _, tensor in _held(model))


def _held(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Floating-point and quantized constants with at least one axis, each once.

    Left out are running statistics, what the torch exporter marks as a buffer, and scalars, which are numbers of the
    graph's formulas.
    """
    for graph in model.graphs():
        named = [(value, value.const_value) for value in graph.initializers.values() if value.const_value is not None]
        yield from ((value, tensor) for value, tensor in named if _counts(value, tensor))
        for node in graph:
            if node.op_type == "Constant" and not node.domain:
                tensor = constant(node.outputs[0])
                if tensor is not None and _counts(node.outputs[0], tensor):
                    yield node.outputs[0], tensor


def _counts(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype not in PARAMETER_TYPES or len(tensor.shape) == 0 or value.metadata_props.get(_KIND) == "BUFFER":
        return False
    uses = value.uses()
    return not uses or any(usage.idx not in _RUNNING_STATISTICS.get(usage.node.op_type, ()) for usage in uses)
