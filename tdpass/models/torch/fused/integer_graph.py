"""Integer chains in an fx graph: what follows one moves in, and what only they read stays in bytes.

A graph as Dynamo or torch.export records it calls `integer_chain` once per layer of int8 factors that read
integers.  Each takes in a sum and an activation behind it.  Then a result that other integer chains alone
read, as their input or as what they add, at once or through a max-pool and what only moves numbers, is
rounded by the chain that makes it to the range that its first reader has stored for its input, and read as it
is: no floating-point number is written between them.  All readers read it in that range.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tdpass.kernels.int8_chain import CONV_CHAIN_INT8, LINEAR_CHAIN_INT8
from tdpass.layers.integer_chain import INTEGER_CHAIN, PackIntegers
from tdpass.models.torch.graphs.graph_calls import (
    FAKES,
    activation_of,
    argument,
    movable,
    same_sizes,
    sum_of,
    tensor_of,
)

_aten = torch.ops.aten
_POOLS = {F.max_pool2d, torch.max_pool2d, _aten.max_pool2d.default}
_MOVES = {
    "flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "clone",
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.clone,
    _aten.flatten.using_ints, _aten.reshape.default, _aten.view.default, _aten.permute.default,
    _aten.transpose.int, _aten.contiguous.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.unsqueeze.default, _aten.clone.default,
}  # fmt: skip
_PASSED = _POOLS | _MOVES | {torch.ops.quantized.max_pool2d.default}
ARGUMENTS = {
    name: place
    for place, name in enumerate(("x", "codes", "scales", "ranges", "bias", "stages", "linear", "activation"))
}
"""Where the arguments of `integer_chain` stand."""
_X, _CODES, _SCALES, _RANGES, _BIAS, _STAGES, _LINEAR, _ACTIVATION = ARGUMENTS.values()


@dataclass(frozen=True)
class HandOver:
    """Bytes that an integer chain makes: those that read them as their input, and those that add them."""

    maker: Node
    read: tuple[Node, ...]
    added: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of these chains."""
        return (self.maker, *self.read, *self.added)


def join_integers(graph: Graph) -> list[Node]:
    """Let the integer chains of a graph take in what follows them and hand bytes to each other; returns them.

    Sizes and types are read off the graph's fake tensors; what is not known stays as it is.
    """
    whole = [_extended(graph, node) for node in graph.nodes if is_integer_chain(node)]
    for chain in whole:
        _hand_over(chain)
    return whole


def hand_overs(graph: Graph) -> Iterator[HandOver]:
    """The bytes that chains of a joined graph hand each other."""
    for chain in filter(is_integer_chain, graph.nodes):
        if chain.kwargs.get("output_range") is None:
            continue
        uses = [(use, value) for use, value in _uses(chain) if is_integer_chain(use)]
        read = tuple(use for use, value in uses if use.args[_X] is value)
        added = tuple(use for use, value in uses if use.kwargs.get("residual") is value)
        yield HandOver(chain, read, added)


def lay_channels_innermost(graph: Graph) -> None:
    """Lay floating-point images with their channels innermost for the chains that make bytes of them."""
    for chain in filter(is_integer_chain, list(graph.nodes)):
        for image in dict.fromkeys((chain.args[_X], chain.kwargs.get("residual"))):
            value = tensor_of(image)
            if value is None or value.dim() != 4 or not value.is_floating_point():
                continue
            with graph.inserting_before(chain):
                laid = graph.call_function(
                    _aten.contiguous.default, (image,), {"memory_format": torch.channels_last}
                )
            laid.meta = dict(image.meta)
            chain.replace_input_with(image, laid)


def pack_integers(module: GraphModule) -> int:
    """Call the kernels on what is packed of the chains that the module stores; returns how many.

    It stores their codes, scales and ranges. Works in place; what the module stores is taken for constant.
    """
    chains = [node for node in module.graph.nodes if is_integer_chain(node) and _is_stored(node)]
    for number, chain in enumerate(chains):
        _pack(module, chain, number)
    if chains:
        module.graph.eliminate_dead_code()
        module.recompile()
    return len(chains)


def is_integer_chain(node: Node) -> bool:
    """Whether a node calls `integer_chain`."""
    return node.target is INTEGER_CHAIN


def reads_codes(user: Node, node: Node) -> bool:
    """Whether a call is of an integer chain, and reads a value as codes, scales or ranges alone."""
    return is_integer_chain(user) and node is not user.args[_X] and node is not user.kwargs.get("residual")


def _extended(graph: Graph, chain: Node) -> Node:
    """The chain with a sum and an activation that alone read it."""
    nodes, residual = [chain], None
    total, other = sum_of(chain)
    if total is not None and _alike(chain, other) and movable([*nodes, total]):
        nodes, residual = [*nodes, total], other
    user, activation = activation_of(nodes[-1])
    if user is not None and movable([*nodes, user]):
        nodes = [*nodes, user]
    if len(nodes) == 1 or chain.args[_ACTIVATION] != "identity":
        return chain
    last = nodes[-1]
    with graph.inserting_before(last):
        arguments = (*chain.args[:_ACTIVATION], activation)
        made = graph.call_function(INTEGER_CHAIN, arguments, {**chain.kwargs, "residual": residual})
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    for node in reversed(nodes):
        graph.erase_node(node)
    return made


def _alike(chain: Node, other: Node | None) -> bool:
    value, rest = tensor_of(chain), tensor_of(other)
    return value is not None and rest is not None and same_sizes(value.shape, rest.shape)


def _hand_over(chain: Node) -> None:
    """Let a chain make bytes where integer chains alone read them."""
    uses = list(_uses(chain))
    reads: Iterator[Any] = (
        use.args[_RANGES] for use, value in uses if is_integer_chain(use) and use.args[_X] is value
    )
    given = next((ranges[0] for ranges in reads if ranges), None)
    if given is None or not all(_takes_bytes(use, value) for use, value in uses):
        return
    if given.op == "get_attr":
        chain.prepend(given)
    chain.kwargs = {**chain.kwargs, "output_range": given}
    for use, value in uses:
        if not is_integer_chain(use):
            _read_bytes(use)
            continue
        if use.args[_X] is value:
            read: Any = use.args[_RANGES]
            use.args = (*use.args[:_RANGES], [given, *read[1:]], *use.args[_BIAS:])
        if use.kwargs.get("residual") is value:
            use.kwargs = {**use.kwargs, "residual_range": given}
    for node in (chain, *(use for use, _ in uses if not is_integer_chain(use))):
        node.meta.update({key: node.meta[key].to(torch.uint8) for key in FAKES if key in node.meta})


def _uses(value: Node) -> Iterator[tuple[Node, Node]]:
    """What reads a value, at once or through what bytes pass through, each with the value that it reads."""
    for use in value.users:
        yield use, value
        if use.target in _PASSED:
            yield from _uses(use)


def _takes_bytes(use: Node, value: Node) -> bool:
    """Whether a call may read bytes, its result being of single precision or bytes as well."""
    found = tensor_of(use)
    if found is None or found.dtype != torch.float32:
        return False
    if use.target in _POOLS:
        return not argument(use, 6, "return_indices", default=False)
    if use.target in _MOVES:
        return True
    if not is_integer_chain(use):
        return False
    as_x, ranges = use.args[_X] is value, use.args[_RANGES]
    return bool(ranges) or not as_x


def _read_bytes(use: Node) -> None:
    """Let a max-pool read bytes, which another operator serves; what moves numbers moves bytes as well."""
    if use.target not in _POOLS:
        return
    x, kernel = argument(use, 0, "input"), _pair(argument(use, 1, "kernel_size"))
    stride, padding, dilation = (
        _pair(argument(use, position, name)) or rest
        for position, name, rest in ((2, "stride", kernel), (3, "padding", [0, 0]), (4, "dilation", [1, 1]))
    )
    ceil = bool(argument(use, 5, "ceil_mode", default=False))
    use.target = torch.ops.quantized.max_pool2d.default
    use.args, use.kwargs = (x, kernel, stride, padding, dilation, ceil), {}


def _pair(given: Any) -> list[int]:
    if given is None:
        return []
    values = [given] if isinstance(given, int) else list(given)
    return values * 2 if len(values) == 1 else values


def _held(chain: Node) -> list[Node]:
    """What a chain reads codes, scales and ranges from, in the order of `PackIntegers`."""
    lists: Sequence[Any] = chain.args[_CODES:_BIAS]
    ends = (chain.kwargs.get(name) for name in ("output_range", "residual_range"))
    return [*(node for each in lists for node in each), *(node for node in ends if node is not None)]


def _is_stored(chain: Node) -> bool:
    return all(node.op == "get_attr" for node in _held(chain))


def _pack(module: GraphModule, chain: Node, number: int) -> None:
    stages, linear, activation = (chain.args[index] for index in (_STAGES, _LINEAR, _ACTIVATION))
    ends: dict[str, Any] = {name: chain.kwargs.get(f"{name}_range") for name in ("output", "residual")}
    ranged = [node is not None for node in ends.values()]
    recipe = PackIntegers(tuple(stages), *ranged)  # type: ignore[arg-type]
    values: list[Tensor] = [operator.attrgetter(str(node.target))(module) for node in _held(chain)]
    packed = recipe.make([value.detach() for value in values])
    graph, residual = module.graph, chain.kwargs.get("residual")
    x, bias = chain.args[_X], chain.args[_BIAS]
    value = tensor_of(x)
    flat = not linear and value is not None and value.dim() == 3
    with graph.inserting_before(chain):
        lists = []
        for name, tensors in (
            ("codes", packed.weights),
            ("scales", packed.scales),
            ("totals", packed.totals),
        ):
            lists.append(
                [_attribute(module, f"packed_{name}_{number}_{k}", each) for k, each in enumerate(tensors)]
            )
        if flat:
            x = graph.call_function(torch.unsqueeze, (x, 2))
            residual = None if residual is None else graph.call_function(torch.unsqueeze, (residual, 2))
        sizes = packed.widths if linear else packed.stages
        call = graph.call_function(
            LINEAR_CHAIN_INT8.call if linear else CONV_CHAIN_INT8.call,
            (x, *lists, bias, residual, packed.grids, sizes, activation),
        )
        made = graph.call_function(torch.squeeze, (call, 2)) if flat else call
    made.meta = dict(chain.meta)
    chain.replace_all_uses_with(made)
    graph.erase_node(chain)


def _attribute(module: GraphModule, name: str, value: Tensor) -> Node:
    module.register_buffer(name, value)
    return module.graph.get_attr(name)
