"""What integer layers save by handing each other bytes, where the model runs as a graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tdpass.fusing.choose import kept_seconds
from tdpass.fusing.together import Shared
from tdpass.kernels import native
from tdpass.layers.integer_chain import INTEGER_CHAIN, IntegerChain
from tdpass.machine import processor
from tdpass.models.base import Batch
from tdpass.models.torch.fused.deployable import joined_program
from tdpass.models.torch.fused.integer_graph import ARGUMENTS, HandOver, hand_overs
from tdpass.models.torch.graphs.graph_calls import hint, tensor_of
from tdpass.models.torch.modules.in_place import become
from tdpass.timings import Key

_FLOATS, _READS, _ADDS, _MAKES = "floats", "reads bytes", "adds bytes", "makes bytes"
_IMAGE = 4  # axes


def handed_bytes(module: nn.Module, layers: Mapping[str, IntegerChain], example: Batch) -> list[Shared[str]]:
    """What is saved where all layers of some paths are these chains in a graph of the module, as measured.

    Raises `InvalidModelError` where it cannot be exported.
    """
    twin = copy.deepcopy(module).eval()
    for path, chain in layers.items():
        become(twin.get_submodule(path), chain)
    chosen = {twin.get_submodule(path): path for path in layers}
    named = {
        path: chosen[part] for path, part in twin.named_modules(remove_duplicate=False) if part in chosen
    }
    graph = joined_program(twin, example)
    return [
        Shared(
            frozenset(named[path] for path in map(_owner, handed.nodes) if path in named),
            _saved(graph, handed),
        )
        for handed in hand_overs(graph.graph)
    ]


def _owner(chain: Node) -> str:
    """The path of the layer whose codes a chain reads; chains that the module holds already are not chosen."""
    codes: Any = chain.args[ARGUMENTS["codes"]]
    return str(codes[0].target).rpartition(".")[0]


def _saved(graph: GraphModule, handed: HandOver) -> float:
    """Seconds by which all chains are faster that make or read the bytes."""
    uses = [(handed.maker, _MAKES)]
    uses += [(node, _READS) for node in handed.read] + [(node, _ADDS) for node in handed.added]
    return sum(_Call(graph, node).gain(way) for node, way in uses)


@dataclass(frozen=True)
class _Call:
    """A chain as a graph calls it, on numbers of the sizes that the graph was recorded with."""

    graph: GraphModule
    node: Node

    def gain(self, way: str) -> float:
        """Seconds that it takes less where it reads, adds or makes bytes than where all is floating point."""
        seconds = kept_seconds(
            {name: self._key(name) for name in (_FLOATS, way)},
            lambda: {name: self._prepared(name) for name in (_FLOATS, way)},
            torch.get_num_threads(),
        )
        return seconds[_FLOATS] - seconds[way]

    def _key(self, way: str) -> Key:
        sizes = [None if value is None else tuple(map(hint, value.shape)) for value in self._reads()]
        fixed = [self.node.args[ARGUMENTS[name]] for name in ("stages", "linear", "activation")]
        assert sizes[0] is not None
        return Key(
            f"{processor()} {native.isa()}",
            f"torch {torch.__version__}, kernels {native.version()}",
            torch.get_num_threads(),
            sizes[0][0],
            "float32",
            f"{fixed} on {sizes}",
            f"{INTEGER_CHAIN} {way}",
            (),
        )

    def _reads(self) -> tuple[Tensor | None, Tensor | None]:
        """What stands for the input and for what is added."""
        return tensor_of(self.node.args[ARGUMENTS["x"]]), tensor_of(self.node.kwargs.get("residual"))

    def _prepared(self, way: str) -> Callable[[], Tensor]:
        held = partial(torch.fx.map_arg, fn=lambda node: operator.attrgetter(str(node.target))(self.graph))
        x, residual = (
            None if value is None else _numbers(value, coded=way == coded)
            for value, coded in zip(self._reads(), (_READS, _ADDS), strict=True)
        )
        _, *rest = held((None, *self.node.args[1:]))
        grid = {name: held(self.node.kwargs.get(f"{name}_range")) for name in ("output", "residual")}
        return partial(
            INTEGER_CHAIN,
            x,
            *rest,
            residual=residual,
            output_range=grid["output"] if way == _MAKES else None,
            residual_range=grid["residual"] if way == _ADDS else None,
        )


def _numbers(like: Tensor, *, coded: bool) -> Tensor:
    """Random numbers or bytes of that size; images with their channels innermost, as chains hand them on."""
    size = tuple(map(hint, like.shape))
    made = torch.randint(256, size, dtype=torch.uint8) if coded else torch.randn(size)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == _IMAGE else made
