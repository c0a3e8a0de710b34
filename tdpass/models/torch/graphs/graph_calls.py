"""Reading fx graphs, of Dynamo or torch.export: arguments, sizes, sums and activations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

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
_CLAMPS: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((F.hardtanh, _aten.hardtanh.default, _aten.hardtanh_.default), ("min_val", "max_val")),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip"), ("min", "max")),
    **dict.fromkeys((_aten.clamp.default, _aten.clamp_.default), ("min", "max")),
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
    names = _CLAMPS.get(node.target)
    if names is None:
        return None
    bounds = tuple(argument(node, place, name) for place, name in enumerate(names, 1))
    return "relu6" if bounds == (0, 6) else None


def movable(nodes: Sequence[Node]) -> bool:
    """Whether no call of others in between may change what the first ones of these read."""
    own, node = set(nodes), nodes[0]
    while node is not nodes[-1]:
        if node.op == "root" or (node not in own and mutates(node)):
            return False
        node = node.next
    return True
