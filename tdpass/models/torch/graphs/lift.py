"""Make functional layers of an fx graph into modules, so that module surgery reaches them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from tdpass.kinds import (
    STORED_FIRST,
    LayerKind,
    TransposedLinear,
    dense_modules,
    is_lookup,
    kind_of_function,
)
from tdpass.models.torch.graphs.fold_weights import fold_weights
from tdpass.models.torch.graphs.lift_opened import lift_opened
from tdpass.models.torch.graphs.lift_recurrent import lift_recurrent
from tdpass.models.torch.graphs.spell_out import spell_out

_aten = torch.ops.aten
_ADDMM = {torch.addmm, _aten.addmm.default}
_PRODUCT = {torch.matmul, torch.mm, operator.matmul, _aten.matmul.default, _aten.mm.default}
_READ_SECOND = _ADDMM | STORED_FIRST
_BATCH_NORM = {F.batch_norm, _aten.batch_norm.default}


def lift(graph_module: GraphModule) -> GraphModule:
    """Replace calls of functions of any layer kind on stored weights by modules holding those weights.

    Calls of inference batch-norm are replaced too. A module takes the place of the (empty) one that held its
    weight, so `layer1.0.conv1.weight` becomes the site `layer1.0.conv1`. Works in place; the outputs do not
    change.
    """
    fold_weights(graph_module, _is_layer, moved_only=True)
    changed = lift_recurrent(graph_module) | lift_opened(graph_module) | spell_out(graph_module)
    lifted: set[str] = set()
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    for node in sorted(calls, key=_looks_up):  # a layer has the place of a weight that tables read too
        build = _builder(node)
        if build is None:
            continue
        module, owner = build(graph_module, node)
        if module is None:
            continue
        lifted.update(str(read.target) for read in node.all_input_nodes if read.op == "get_attr")
        path = _place(graph_module, owner, module)
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(path, (node.args[1 if node.target in _READ_SECOND else 0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
        changed = True
    if changed:
        graph_module.graph.eliminate_dead_code()
        _drop_unread(graph_module, lifted)
        graph_module.delete_all_unused_submodules()
        graph_module.recompile()
    return graph_module


def lift_computed(module: nn.Module) -> list[str]:
    """Store the weights of layers that a graph computes, and lift these layers; returns their paths."""
    if not isinstance(module, GraphModule):
        return []
    paths = fold_weights(module, _is_layer)
    if paths:
        lift(module)
    return [path.removesuffix(".weight") for path in paths]


def _is_layer(node: Node) -> bool:
    return node.op == "call_function" and _builder(node) is not None


Built = tuple[nn.Module | None, str]


def _builder(node: Node) -> Callable[[GraphModule, Node], Built] | None:
    kind = kind_of_function(node.target)
    if kind is not None:
        return partial(_layer, kind)
    if node.target in _ADDMM and len(node.args) == 3 and not node.kwargs:
        return _added_product
    if node.target in _PRODUCT and len(node.args) == 2 and not node.kwargs:
        return _product
    if _looks_up(node):
        return _lookup
    return _batch_norm if node.target in _BATCH_NORM else None


def _looks_up(node: Node) -> bool:
    return is_lookup(node.target) or node.target in STORED_FIRST


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _stored(graph_module: GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph_module)
    return value if isinstance(value, torch.Tensor) else None


def _layer(kind: LayerKind, graph_module: GraphModule, node: Node) -> Built:
    weight = _argument(node, 1, "weight")
    options = {
        name: _argument(node, position, name, default)
        for position, (name, default) in enumerate(kind.arguments.items(), start=2)
    }
    bias = options.pop("bias")
    stored, stored_bias = _stored(graph_module, weight), _stored(graph_module, bias)
    if not isinstance(stored, nn.Parameter) or (bias is not None and stored_bias is None):
        return None, ""
    module = kind.build(kind.functions[node.target], tuple(stored.shape), options)
    return _with(module, stored, stored_bias), str(weight.target)


def _lookup(graph_module: GraphModule, node: Node) -> Built:
    first = node.target in STORED_FIRST
    read: Any = node.args[0 if first else 1]
    table = _stored(graph_module, read)
    rescaled = not first and _argument(node, 3, "max_norm") is not None
    if not isinstance(table, nn.Parameter) or rescaled:
        return None, ""
    count, width = table.shape
    return _with(nn.Embedding(count, width, device="meta"), table, None), str(read.target)


def _added_product(graph_module: GraphModule, node: Node) -> Built:
    read: Any = node.args[2]
    bias, weight = _stored(graph_module, node.args[0]), _stored(graph_module, read)
    if not isinstance(weight, nn.Parameter) or bias is None or bias.shape != weight.shape[1:]:
        return None, ""
    held = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return TransposedLinear(weight, held), str(read.target)


def _product(graph_module: GraphModule, node: Node) -> Built:
    """`x @ W` as a linear layer that holds W the other way round; only where nothing else reads W."""
    read: Any = node.args[1]
    weight = _stored(graph_module, read)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return None, ""
    readers = [
        user
        for other in graph_module.graph.nodes
        if other.op == "get_attr" and other.target == read.target
        for user in other.users
    ]
    if readers != [node]:
        return None, ""
    turned = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    return _with(layer, turned, None), str(read.target)


def _batch_norm(graph_module: GraphModule, node: Node) -> Built:
    mean = _argument(node, 1 if node.target is F.batch_norm else 3, "running_mean")
    variance = _argument(node, 2 if node.target is F.batch_norm else 4, "running_var")
    weight = _argument(node, 3 if node.target is F.batch_norm else 1, "weight")
    bias = _argument(node, 4 if node.target is F.batch_norm else 2, "bias")
    stored = [_stored(graph_module, argument) for argument in (mean, variance, weight, bias)]
    if _argument(node, 5, "training") or any(value is None for value in stored):
        return None, ""
    eps = float(_argument(node, 7, "eps", 1e-5))
    module = _FrozenBatchNorm(stored[0].shape[0], eps=eps, device="meta")  # type: ignore[union-attr]
    module._buffers.update(
        {
            "running_mean": stored[0],
            "running_var": stored[1],
            "num_batches_tracked": torch.zeros((), dtype=torch.long),
        }
    )
    module.weight, module.bias = stored[2], stored[3]  # type: ignore[assignment]
    module.training = False
    return module, str(weight.target)


class _FrozenBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch-norm in inference form for inputs of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - torch names it so
        """Any rank will do."""

    def train(self, mode: bool = True) -> _FrozenBatchNorm:
        """Stay in inference form: that is what the graph recorded."""
        return self


def _with(module: Any, weight: nn.Parameter, bias: torch.Tensor | None) -> nn.Module:
    module.weight = weight
    if bias is not None:
        module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return module  # type: ignore[no-any-return]


def _place(graph_module: GraphModule, owner: str, module: nn.Module) -> str:
    """Put the module where its weight was, unless something else lives there; returns the path."""
    path, _, leaf = owner.rpartition(".")
    current = _submodule(graph_module, path) if path else None
    if current is not None and _alike(current, module):
        return path
    others = current is not None and not {*map(id, _tensors(current))} <= {*map(id, _tensors(module))}
    called = any(node.op == "call_module" and node.target == path for node in graph_module.graph.nodes)
    taken = current is not None and (current._modules or others or called)
    if not path or taken or isinstance(current, (*dense_modules(), nn.Embedding)):
        beside = not path or isinstance(current, dense_modules())
        path = f"{owner.replace('.', '_')}_layer" if beside else f"{path}.{leaf}_layer"
        while _submodule(graph_module, path) is not None:
            path += "_"
    graph_module.add_submodule(path, module)
    return path


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules compute the same from the same tensors."""
    return (
        type(one) is type(other)
        and one.extra_repr() == other.extra_repr()
        and list(map(id, _tensors(one))) == list(map(id, _tensors(other)))
    )


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """What a module computes with."""
    held = {**module._parameters, **module._buffers}
    return [value for name, value in held.items() if value is not None and name != "num_batches_tracked"]


def _drop_unread(graph_module: GraphModule, lifted: set[str]) -> None:
    """Remove lifted tensors from where they were, so that each has one home.

    A module that took that place keeps its own.
    """
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for target in lifted - read:
        owner, _, leaf = target.rpartition(".")
        holder = _submodule(graph_module, owner) if owner else graph_module
        if holder is None or type(holder) in (*dense_modules(), nn.Embedding, _FrozenBatchNorm):
            continue
        if leaf in holder._parameters or leaf in holder._buffers:
            delattr(holder, leaf)


def _submodule(graph_module: GraphModule, path: str) -> nn.Module | None:
    try:
        return graph_module.get_submodule(path)
    except AttributeError:
        return None
