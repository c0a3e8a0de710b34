"""Which module adds to what a norm reads: the one in whose call both happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from tdpass.errors import UnsupportedError
from tdpass.layers.shortcuts import Additions
from tdpass.models.torch.modules.in_place import wrapping

Entered = tuple[nn.Module, ...]


def summing_modules(
    module: nn.Module, norms: Sequence[nn.Module], run: Callable[[], object]
) -> list[nn.Module]:
    """The modules in whose calls sums add to what these norms read, each once, found by a run.

    Raises `UnsupportedError` where a norm has none, or one that is a graph.
    """
    found = _Sums({id(norm): norm for norm in norms})
    with found.watched(module):
        run()
    for norm in norms:
        owner = found.owners.get(id(norm))
        if owner is None:
            raise UnsupportedError("what a norm on the stream reads is changed before it is added to")
        if isinstance(owner, GraphModule):
            raise UnsupportedError(
                f"the sums of {type(owner).__name__} are a graph, no code that leads them through shortcuts"
            )
    return list(dict.fromkeys(found.owners[id(norm)] for norm in norms))


@dataclass
class _Sums:
    """Who is running, what the norms have read of late, and whose sums read the same."""

    norms: Mapping[int, nn.Module]
    running: list[nn.Module] = field(default_factory=list)
    read: list[tuple[Tensor, int, Entered]] = field(default_factory=list)
    owners: dict[int, nn.Module] = field(default_factory=dict)

    @contextmanager
    def watched(self, module: nn.Module) -> Iterator[None]:
        with wrapping(dict.fromkeys(module.modules()), self._followed), _Watched(self._add):
            yield

    def _followed(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if id(module) in self.norms:
                x = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
                self.read.append((x, id(module), tuple(self.running)))
            self.running.append(module)
            try:
                return forward(*args, **kwargs)
            finally:
                self.running.pop()

        return run

    def _add(self, summands: Sequence[object]) -> None:
        for x, norm, then in self.read:
            if any(summand is x for summand in summands):
                both = [one for one, other in zip(then, self.running, strict=False) if one is other]
                self.owners.setdefault(norm, both[-1])


class _Watched(Additions):
    def __init__(self, see: Callable[[Sequence[object]], None]) -> None:
        super().__init__()
        self.see = see

    def led(self, summands: tuple[Any, ...]) -> tuple[Any, ...]:
        self.see(summands)
        return summands
