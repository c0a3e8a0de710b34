"""A graph of one factor chain with that chain as one operator, for timing it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tdpass.fusing.find import find_chains
from tdpass.kernels.stage import Lanes
from tdpass.models.onnx.chains import NodeReader, result
from tdpass.models.onnx.fused_rewrite import Fusion, fused, plain_initializers


def fuse_layer_graph(graph: bytes, lanes: Lanes) -> bytes | None:
    """The serialized model with its only chain fused.

    None where it has none, or one that these lanes do not serve.
    """
    model = ir.from_proto(onnx.load_from_string(graph))
    plain_initializers(model)
    chains = find_chains(NodeReader(model))
    if len(chains) != 1 or (lanes == "pixels" and not chains[0].spec.axes):
        return None
    content: bytes = ir.to_proto(
        fused(model, {str(result(chains[0]).name): Fusion(chains[0].spec, lanes)})
    ).SerializeToString()
    return content
