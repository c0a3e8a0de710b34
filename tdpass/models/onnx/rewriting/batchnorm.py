"""Batch-norms: folding them into the layers before them, and estimating their statistics anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.models.onnx.graph.functions import NotServedError, Operator
from tdpass.models.onnx.graph.graphs import nodes_of
from tdpass.models.onnx.graph.shapes import Shapes
from tdpass.models.onnx.graph.tensors import constant, held, to_torch
from tdpass.models.onnx.rewriting.edits import replace_constant, write_bias
from tdpass.models.onnx.rewriting.rewrite import remove_nodes, take_place
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import Slot

_MEAN, _VARIANCE = 3, 4


def batchnorms(model: ir.Model) -> list[ir.Node]:
    """The batch-norms in inference form, with constant statistics."""
    return [node for node in nodes_of(model) if _is_batchnorm(node)]


def _is_batchnorm(node: ir.Node) -> bool:
    if node.op_type != "BatchNormalization" or node.domain:
        return False
    trains, per_channel = node.attributes.get_int("training_mode", 0), node.attributes.get_int("spatial", 1)
    extra = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    return (
        not trains
        and bool(per_channel)
        and not extra
        and all(constant(value) is not None for value in node.inputs[1:])
    )


def foldable(model: ir.Model, site: FoundSite, shapes: Shapes) -> ir.Node | None:
    """The batch-norm that alone reads the output of the site's only use, if there is one."""
    if len(site.uses) != 1:
        return None
    use = site.uses[0]
    output = use.output
    readers = output.uses()
    unlike = use.node.domain or use.node.op_type == "Einsum" or use.swap_out is not None
    if len(readers) != 1 or output.is_graph_output() or use.addend is not None or unlike:
        return None
    ((node, index),) = readers
    if not _is_batchnorm(node) or index != 0 or node.graph is not use.node.graph:
        return None
    # A batch-norm's channels are on axis 1, a linear layer's on the last one.
    return node if site.site.axes or shapes.rank(output) == 2 or use.node.op_type == "Gemm" else None


def fold(model: ir.Model, name: str, site: FoundSite, node: ir.Node) -> None:
    """Scale the weight, shift the bias and take the batch-norm out of the dense model.

    Computed in float64.
    """
    gamma, beta, mean, variance = (to_torch(held(value)).double() for value in node.inputs[1:5])
    scale = gamma / torch.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    use = site.uses[0]
    weight = use.turned(to_torch(site.stored).double())
    scaled = use.turned(weight * scale.reshape(-1, *(1 for _ in weight.shape[1:])))
    bias = use.bias_tensor()
    shifted = beta - mean * scale if bias is None else (bias.double() - mean) * scale + beta
    replace_constant(model, use.weight, scaled.to(site.dtype), f"{name}.weight")
    write_bias(model, use, shifted.to(site.dtype), f"{name}.bias")
    take_place(node.outputs[0], Slot(node, 0).value)
    assert node.graph is not None
    remove_nodes(node.graph, [node])


@dataclass
class BatchStatistics:
    """Stands for a batch-norm in training: normalizes by the batch and averages over all batches."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)

    def __call__(self, op: Operator, x: Tensor, scale: Tensor, bias: Tensor, *_running: Tensor) -> Tensor:
        """The operator's output; raises `NotServedError` for a batch of one number per channel."""
        values = x.double().transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            raise NotServedError
        self.means.append(values.mean(1))
        self.variances.append(values.var(1))
        return F.batch_norm(x, None, None, scale, bias, True, 0.0, op.number("epsilon", 1e-5))

    def write(self, model: ir.Model, node: ir.Node) -> None:
        """Put the averages in the model, in the type of what was there."""
        if self.means:
            set_statistics(model, node, [torch.stack(seen).mean(0) for seen in (self.means, self.variances)])


def estimate_anew(
    model: ir.Model, run: Callable[[Mapping[ir.Node, BatchStatistics]], None], changed: Callable[[], None]
) -> Callable[[], None] | None:
    """Estimate the statistics of all batch-norms from a run with these there, and tell of every change.

    Returns how to undo that, None without a batch-norm.
    """
    norms = batchnorms(model)
    if not norms:
        return None
    before = [statistics(node) for node in norms]
    seen = {node: BatchStatistics() for node in norms}
    run(seen)
    for node, batch_statistics in seen.items():
        batch_statistics.write(model, node)
    changed()

    def undo() -> None:
        for node, values in zip(norms, before, strict=True):
            set_statistics(model, node, values)
        changed()

    return undo


def statistics(node: ir.Node) -> list[Tensor]:
    """Running mean and variance."""
    return [to_torch(held(node.inputs[index])) for index in (_MEAN, _VARIANCE)]


def set_statistics(model: ir.Model, node: ir.Node, values: Sequence[Tensor]) -> None:
    """Replace running mean and variance."""
    for index, value, present in zip((_MEAN, _VARIANCE), values, statistics(node), strict=True):
        replace_constant(
            model,
            Slot(node, index),
            value.to(present.dtype),
            f"{node.name or 'norm'}.{'mean' if index == _MEAN else 'variance'}",
        )
