"""Shortcuts: linear maps between the coordinates of a residual stream before a sum and behind it.

Where a module computes `x + f(norm(x))`, the norm says by `lead` through what x goes on; the sum finds it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tdpass.errors import InvalidModelError
from tdpass.tape import ADDITIONS

_NO_SUM = (
    "what a norm with a shortcut reads is added to nothing in the module that leads its sums; call the "
    "module that was sliced, or one around it, as it was called then"
)


class Additions(TorchFunctionMode, ABC):
    """While it is on, a sum reads what `led` makes of its summands."""

    @abstractmethod
    def led(self, summands: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is added in place of these."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in ADDITIONS:
            args = self.led(args)
        # the method's own code is none that torch.compile can trace from here
        called = torch.unflatten if func is Tensor.unflatten else func
        return called(*args, **(kwargs or {}))


class _Leading(Additions):
    """While it is on, a sum reads its summand through the shortcut that was named for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[Tensor, nn.Module]] = []

    def led(self, summands: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map(self._through, summands)) if self.waiting else summands

    def _through(self, summand: Any) -> Any:
        for place, (x, shortcut) in enumerate(self.waiting):
            if summand is x:
                del self.waiting[place]
                return shortcut(x)
        return summand


def lead(x: Tensor, shortcut: nn.Module) -> None:
    """Let the next sum with that very tensor read `shortcut(x)`.

    Raises `InvalidModelError` outside of a module that leads sums.
    """
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    leading = [mode for mode in modes if isinstance(mode, _Leading)]
    if not leading:
        raise InvalidModelError(_NO_SUM)
    leading[-1].waiting.append((x, shortcut))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _leading(cls: type[nn.Module]) -> type[nn.Module]:
    """The class like that one of which `forward` leads sums."""
    if cls not in _classes:
        _classes[cls] = _made(cls)
    return _classes[cls]


def _made(cls: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = _Leading()
        with mode:
            answer = cls.forward(self, *args, **kwargs)
        if mode.waiting:
            raise InvalidModelError(_NO_SUM)
        return answer

    def reduce(self: nn.Module) -> tuple[Any, ...]:
        return _revived, (cls,), self.__dict__

    body = {"forward": forward, "__reduce__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**body, "_leads": cls})


def _revived(cls: type[nn.Module]) -> nn.Module:
    made = _leading(cls)
    return made.__new__(made)


def leads_sums(module: nn.Module) -> bool:
    """Whether the sums of a module are led through the shortcuts of its norms."""
    return "_leads" in type(module).__dict__


def lead_sums(module: nn.Module) -> None:
    """Let the sums of a module be led, in place: its class becomes a subclass."""
    if not leads_sums(module):
        object.__setattr__(module, "__class__", _leading(type(module)))
