"""A graph of one factor chain with that chain as one operator, for timing it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.fused.rewrite import Fusion, find_parts, fused, plain_initializers


def fuse_layer_graph(graph: bytes, lanes: Lanes) -> bytes | None:
    """The serialized model with its only chain fused.

    None where it has none, or one that these lanes do not serve.
    """
    model = ir.from_proto(onnx.load_from_string(graph))
    plain_initializers(model)
    parts = find_parts(model)
    if len(parts) != 1 or lanes not in parts[0].families:
        return None
    fusions = {parts[0].key: Fusion(parts[0].spec, lanes)}
    content: bytes = ir.to_proto(fused(model, fusions)).SerializeToString()
    return content
