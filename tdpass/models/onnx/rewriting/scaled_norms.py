"""Layer norms of an ONNX graph whose channels can be scaled.

Columns of the layers that alone read them are scaled the other way.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from tdpass.models.abilities import Decline
from tdpass.models.onnx.graph.tensors import constant, sizes, to_torch
from tdpass.models.onnx.rewriting.edits import replace_constant
from tdpass.models.onnx.sites.sites import FoundSite
from tdpass.models.onnx.sites.weight_use import Slot

_NORMS = {"LayerNormalization": (1, 2), "SimplifiedLayerNormalization": (1,), "RMSNormalization": (1,)}


@dataclass(frozen=True)
class ScaledNorm:
    """The inputs of a norm over the last axis that hold its scale and shift, and the sites that read it."""

    slots: tuple[Slot, ...]
    sites: tuple[str, ...]

    def scale(self, model: ir.Model, scale: Tensor) -> None:
        """Divide what it makes."""
        for slot in self.slots:
            held = constant(slot.value)
            assert held is not None
            tensor = to_torch(held)
            divided = (tensor.double() / scale.to(torch.float64)).to(tensor.dtype)
            if not torch.equal(divided, tensor):  # zeros may stay shared
                replace_constant(model, slot, divided, slot.value.name or "norm")


def scale_columns(model: ir.Model, name: str, found: FoundSite, scale: Tensor) -> None:
    """Multiply the columns of a linear site's weight."""
    use = found.uses[0]
    scaled = found.weight().double() * scale.to(torch.float64)
    stored = use.turned(scaled)
    replace_constant(model, use.weight, (stored / use.scale).to(found.dtype), f"{name}.weight")


def scaled_norms(
    model: ir.Model, sites: Mapping[str, FoundSite], replaced: Container[str], decline: Decline
) -> dict[str, ScaledNorm]:
    """The norms that nothing but dense linear sites reads, by the name of what they make.

    A constant that others read too is theirs as it is; a scaled norm gets one of its own.
    """
    reading = {found.uses[0].input: name for name, found in sites.items() if _plain(found)}
    found = {}
    for node in model.graph:
        slots = _slots(node)
        if not slots:
            continue
        made = node.outputs[0]
        names = [reading.get(Slot(usage.node, usage.idx), "") for usage in made.uses()]
        if made.is_graph_output() or not names or any(not name or name in replaced for name in names):
            decline(str(made.name), "not smoothed: what it makes is read by more than dense layers")
        else:
            found[str(made.name)] = ScaledNorm(slots, tuple(dict.fromkeys(names)))
    return found


def _plain(found: FoundSite) -> bool:
    use = found.uses[0]
    alone = len(found.uses) == 1 and not found.site.axes and not found.site.table
    return alone and found.present is None and use.swap_in is None and use.contraction is None


def _slots(node: ir.Node) -> tuple[Slot, ...]:
    """The constants along the last axis of a norm; none where it is no such."""
    places = _NORMS.get(node.op_type, ())
    present = [place for place in places if place < len(node.inputs) and node.inputs[place] is not None]
    held = [constant(node.inputs[place]) for place in present]
    fits = all(tensor is not None and len(sizes(tensor)) == 1 for tensor in held)
    read = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
    return tuple(Slot(node, place) for place in present) if fits and 1 in present and not read else ()
