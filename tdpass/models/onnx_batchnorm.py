"""Folding batch-norms into the layers before them."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.onnx_rewrite import opset_of, remove_nodes, replace_constant, take_place, write_bias
from tdpass.models.onnx_shapes import Shapes
from tdpass.models.onnx_sites import FoundSite
from tdpass.models.onnx_tensors import constant, held, to_torch
from tdpass.models.onnx_use import Slot

_CHANNEL_STATISTICS_FROM = 7


def foldable(model: ir.Model, site: FoundSite, shapes: Shapes) -> ir.Node | None:
    """The inference-form batch-norm that alone reads the output of the site's only use, if there is one."""
    if len(site.uses) != 1 or opset_of(model) < _CHANNEL_STATISTICS_FROM:
        return None
    use = site.uses[0]
    output = use.output
    readers = output.uses()
    if len(readers) != 1 or output.is_graph_output() or use.addend is not None or use.swap_out is not None:
        return None
    ((node, index),) = readers
    if node.op_type != "BatchNormalization" or node.domain or index != 0 or node.graph is not model.graph:
        return None
    if node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1):
        return None
    if any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]) or any(constant(value) is None for value in node.inputs[1:]):
        return None
    # A batch-norm's channels are on axis 1, a linear layer's on the last one.
    return node if site.site.kind == "conv" or shapes.rank(output) == 2 or use.node.op_type == "Gemm" else None


def fold(model: ir.Model, name: str, site: FoundSite, node: ir.Node) -> None:
    """Scale the weight, shift the bias and take the batch-norm out of the dense model; computed in float64."""
    gamma, beta, mean, variance = (_numbers(value) for value in node.inputs[1:5])
    scale = gamma / torch.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    use = site.uses[0]
    stored = to_torch(site.stored).double()
    shape = [1] * stored.dim()
    shape[use.output_axis] = -1
    bias = use.bias_tensor()
    shifted = beta - mean * scale if bias is None else (bias.double() - mean) * scale + beta
    replace_constant(model, use.weight, (stored * scale.reshape(shape)).to(site.dtype), name)
    write_bias(model, name, site, shifted.to(site.dtype))
    take_place(node.outputs[0], Slot(node, 0).value)
    remove_nodes(model.graph, [node])


def _numbers(value: ir.Value | None) -> Tensor:
    return to_torch(held(value)).double()
