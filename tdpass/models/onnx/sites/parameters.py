"""Which tensors of a graph are parameters."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from tdpass.models.onnx.files.storage import release_pages
from tdpass.models.onnx.graph.folding import REARRANGING
from tdpass.models.onnx.graph.tensors import FLOAT_TYPES, PARAMETER_TYPES, constant, finite, to_torch
from tdpass.models.onnx.sites.products import PRODUCTS

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_RUNNING_STATISTICS = {"BatchNormalization": (3, 4)}
_WEIGHING = frozenset({"Einsum", "BatchNormalization"})
_MASK_FROM = {
    "Attention": 3,
    "MultiHeadAttention": 4,
    "GroupQueryAttention": 3,
    "QAttention": 5,
}  # -inf hides a position


# how many numbers a tensor holds where those are not its elements, 0 for what scales or places others
HOLDS = "tdpass.holds"


def parameter_count(model: ir.Model) -> int:
    """How many numbers the parameters hold, what scales or places the numbers of others not counted."""
    return sum(int(value.metadata_props.get(HOLDS, tensor.size)) for value, tensor in _held(model))


def parameter_bytes(model: ir.Model) -> int:
    """Bytes of all parameters."""
    return sum(tensor.nbytes for _, tensor in _held(model))


def check_finite(model: ir.Model) -> None:
    """Raise `InvalidModelError` where a weight that a layer multiplies with, or its bias, is not finite.

    Each is read once.
    """
    for value, tensor in _constants(model):
        if tensor.dtype in FLOAT_TYPES and any(_weighs(usage.node, usage.idx) for usage in value.uses()):
            finite(to_torch(tensor), value.name or "a constant")
            release_pages()


def _weighs(node: ir.Node, index: int) -> bool:
    """Whether what a node reads there weighs its input, and hides nothing of it."""
    kind = node.op_type
    return (kind in PRODUCTS or kind in _WEIGHING) and index < _MASK_FROM.get(kind, index + 1)


def _held(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Floating-point and quantized constants with at least one axis, each once.

    Left out are running statistics, what the torch exporter marks as a buffer, and scalars, which are numbers
    of the graph's formulas.
    """
    return ((value, tensor) for value, tensor in _constants(model) if _counts(value, tensor))


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """All initializers, what Constant nodes hold, and what constants of a shape make for a product."""
    for graph in model.graphs():
        yield from (
            (value, value.const_value)
            for value in graph.initializers.values()
            if value.const_value is not None
        )
        for node in graph:
            tensor = constant(node.outputs[0], default=True) if node.outputs else None
            if tensor is not None and (not node.inputs or _feeds_layers(node.outputs[0])):
                yield node.outputs[0], tensor


def _feeds_layers(value: ir.Value) -> bool:
    """Whether a layer weighs with the value, as it is or laid out anew."""
    return any(_weighs(usage.node, usage.idx) or usage.node.op_type in REARRANGING for usage in value.uses())


def _counts(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    if (
        (tensor.dtype not in PARAMETER_TYPES and HOLDS not in value.metadata_props)
        or len(tensor.shape) == 0
        or value.metadata_props.get(_KIND) == "BUFFER"
    ):
        return False
    uses = value.uses()
    return not uses or any(usage.idx not in _RUNNING_STATISTICS.get(usage.node.op_type, ()) for usage in uses)
