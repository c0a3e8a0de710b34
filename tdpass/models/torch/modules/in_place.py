"""Changing a module in place, so that whoever holds it sees the change.

Parents, plain lists, dicts, closures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
# hooks of all kinds and the mode: what a module is called with, not what it computes
_CALLING = frozenset(nn.Module().__dict__) - frozenset(_CONTENTS)


def become(module: nn.Module, new: nn.Module) -> None:
    """Give a module the class, tensors and attributes of `new`.

    Its hooks, its mode and attributes of other names stay. Raises `TypeError` where `can_become` is False.
    """
    own = module.__dict__
    state = {**own, **new.__dict__, **{name: own[name] for name in _CALLING if name in own}}
    object.__setattr__(module, "__class__", type(new))
    own.clear()
    own.update(state)


def can_become(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether Python lets an instance of the module's class turn into one of `cls`.

    It does not where either has slots of its own.
    """
    probe = cls.__new__(cls)
    try:
        object.__setattr__(probe, "__class__", type(module))
    except TypeError:
        return False
    return True


def watched(module: nn.Module) -> str:
    """Why a module is more than its class: it has hooks or a forward of its own.

    Empty where it has neither.
    """
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "it carries hooks" if any(hooks) else ""


@contextmanager
def watching(
    modules: Iterable[nn.Module], see: Callable[[nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call `see` with all arguments whenever one of the modules is entered, however it is held.

    It is the forward that is entered. A bound forward that was captured earlier goes past it, as it would go
    past a change of the module's class.
    """

    def seen(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            see(module, (*args, *kwargs.values()))
            return forward(*args, **kwargs)

        return run

    with wrapping(modules, seen):
        yield


@contextmanager
def wrapping(
    modules: Iterable[nn.Module], wrapped: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let each of the modules compute by `wrapped` of its forward, as `watching` does."""
    before: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in modules:
            before.append((module.__dict__, module.__dict__.get("forward")))
            module.__dict__["forward"] = wrapped(module, module.forward)
        yield
    finally:
        for state, forward in before:
            del state["forward"]
            if forward is not None:
                state["forward"] = forward


@dataclass(frozen=True)
class Backup:
    """A module as it was; tensors are held, not copied."""

    module: nn.Module
    cls: type[nn.Module]
    state: dict[str, Any]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> list[Backup]:
        """The modules as they are now."""
        return [
            cls(
                module,
                type(module),
                {**module.__dict__, **{name: module.__dict__[name].copy() for name in _CONTENTS}},
            )
            for module in modules
        ]

    def restore(self) -> None:
        """Make the module what it was."""
        object.__setattr__(self.module, "__class__", self.cls)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.state)
