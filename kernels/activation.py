"""What operators end with: nothing, a clamp, silu or gelu, as the text that they are told it by."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import KernelError

_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}
NAMES = tuple(_NAMED)
_RELUS = {"relu": math.inf, "relu6": 6.0}
_HEAD, _TAIL = "clamp(", ")"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Activation:
    """`function` is "identity", "silu", "gelu" (by erf) or "clamp", `min(max(y, low), high)`.

    Its text is that name, or `clamp(low,high)`, of which relu and relu6 name two.
    """

    function: str
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def read(cls, text: str) -> Self:
        """What a text says; raises `KernelError` for one that is not known."""
        if text in _RELUS:
            return cls("clamp", 0.0, _RELUS[text])
        if text in _NAMED:
            return cls(text)
        ends = text[len(_HEAD) : -len(_TAIL)].split(",")
        try:
            low, high = map(_number, ends if text.startswith(_HEAD) and text.endswith(_TAIL) else ())
        except ValueError:
            low = high = math.nan
        if math.isnan(low) or math.isnan(high):
            raise KernelError(
                f"activation {text!r} is not known; it is one of {', '.join(NAMES)}, clamp(low,high)"
            )
        return cls("clamp", low, high)

    def __str__(self) -> str:
        if self.function != "clamp":
            return self.function
        named = (name for name, high in _RELUS.items() if (self.low, self.high) == (0.0, high))
        return next(named, f"{_HEAD}{self.low!r},{self.high!r}{_TAIL}")


def _number(text: str) -> float:
    """A bound as it is written; NaN for any other text, which `float` may take for one."""
    if text in ("inf", "-inf"):
        return float(text)
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else math.nan


def clamp(low: float | None, high: float | None) -> str:
    """The text of a clamp between two numbers, of which either may be missing."""
    ends = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    return "identity" if ends == (-math.inf, math.inf) else str(Activation("clamp", *ends))


def activate(y: Tensor, activation: str) -> Tensor:
    """What a text says of y; raises `KernelError` for one that is not known."""
    if activation in _NAMED:
        return _NAMED[activation](y)
    cut = Activation.read(activation)
    top = torch.finfo(y.dtype).max
    low, high = (end if abs(end) <= top else math.copysign(math.inf, end) for end in (cut.low, cut.high))
    return y.clamp(low, high)


def check_activation(activation: str) -> None:
    """Raise `KernelError` for a text that is not known."""
    Activation.read(activation)
