"""Reading fx graphs, of Dynamo or torch.export: arguments, sizes, sums and activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from tdpass.kernels.activation import clamp

_aten = torch.ops.aten
_SUMS = {operator.add, torch.add, operator.iadd, _aten.add.Tensor, _aten.add_.Tensor}
_SUMS_IN_PLACE = {operator.iadd, _aten.add_.Tensor}
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.gelu: "gelu", torch._C._nn.gelu: "gelu", torch._C._nn.silu: "silu",
    _aten.relu.default: "relu", _aten.relu_.default: "relu", _aten.silu.default: "silu",
    _aten.silu_.default: "silu", _aten.gelu.default: "gelu",
    F.relu6: "relu6", _aten.relu6.default: "relu6", _aten.relu6_.default: "relu6",
}  # fmt: skip
_Bound = tuple[int, str, float | None]  # where it stands among the arguments, its name, what it is else
_MIN, _MAX = (1, "min", None), (2, "max", None)
_CLAMPS: dict[Any, tuple[_Bound | None, _Bound | None]] = {
    **dict.fromkeys(
        (F.hardtanh, torch._C._nn.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default),
        ((1, "min_val", -1.0), (2, "max_val", 1.0)),
    ),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, torch.clip_), (_MIN, _MAX)),
    **dict.fromkeys(
        ("clamp", "clamp_", "clip", "clip_", _aten.clamp.default, _aten.clamp_.default), (_MIN, _MAX)
    ),
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"), (_MIN, None)),
    **dict.fromkeys((_aten.clamp_min.default, _aten.clamp_min_.default), (_MIN, None)),
    **dict.fromkeys((torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_"), (None, (1, "max", None))),
    **dict.fromkeys((_aten.clamp_max.default, _aten.clamp_max_.default), (None, (1, "max", None))),
}
_IN_PLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.ipow,
    operator.imatmul,
    operator.setitem,
}
FAKES = ("example_value", "val")


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def tensor_of(node: Any) -> Tensor | None:
    """The fake tensor that a node stands for."""
    found = (node.meta.get(name) for name in FAKES) if isinstance(node, Node) else ()
    return next((value for value in found if isinstance(value, Tensor)), None)


def hint(size: int | torch.SymInt) -> int:
    """A size, or what it was in the example, without a guard on it."""
    return size if isinstance(size, int) else int(size.node.hint)


def same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are known to be the same, without a guard."""

    def known(size: int | torch.SymInt) -> object:
        return size if isinstance(size, int) else size.node.expr

    return list(map(known, a)) == list(map(known, b))


def mutates(node: Node) -> bool:
    """Whether a call may change a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    asked = (
        node.kwargs.get("inplace") is True
        or "out" in node.kwargs
        or any(value is True for value in node.args)
    )
    return named or asked or node.target in _IN_PLACE


def only_user(node: Node) -> Node | None:
    """The one call that reads a value."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def sum_of(y: Node) -> tuple[Node, Node] | tuple[None, None]:
    """The sum that alone reads a value, and what it adds to it, in the same type; None for none."""
    total, value = only_user(y), tensor_of(y)
    if total is None or value is None or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return None, None
    first, second = total.args
    other = second if first is y else first
    rest = tensor_of(other)
    if (
        rest is None
        or other is y
        or not isinstance(other, Node)
        or (total.target in _SUMS_IN_PLACE and first is not y)
        or rest.dtype != value.dtype
    ):
        return None, None
    return total, other


def activation_of(y: Node) -> tuple[Node, str] | tuple[None, str]:
    """The activation that alone reads a value, and its name in the kernels; None and "identity" for none."""
    user = only_user(y)
    name = None if user is None else _ACTIVATIONS.get(user.target) or _clamp(user)
    if (
        user is None
        or name is None
        or argument(user, 0, "input") is not y
        or user.kwargs.get("approximate", "none") != "none"
    ):
        return None, "identity"
    return user, name


def _clamp(node: Node) -> str | None:
    """The name of an activation that a call is which cuts at two numbers; None for no such."""
    if node.target not in _CLAMPS:
        return None
    low, high = (None if bound is None else argument(node, *bound) for bound in _CLAMPS[node.target])
    numbers = all(
        end is None or (isinstance(end, int | float) and not math.isnan(end)) for end in (low, high)
    )
    return clamp(low, high) if numbers else None


def movable(nodes: Sequence[Node]) -> bool:
    """Whether no call of others in between may change what the first ones of these read."""
    own, node = set(nodes), nodes[0]
    while node is not nodes[-1]:
        if node.op == "root" or (node not in own and mutates(node)):
            return False
        node = node.next
    return True
