"""What a tape is made of: recorded calls, and numbers in place of the tensors they read and make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tdpass.kinds import is_layer_call, is_lookup
from tdpass.ops import own_bias


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a call, by position or by name; None where it is left out."""
    return args[position] if len(args) > position else kwargs.get(name)


def in_parts(
    call: Callable[..., Any],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    apart: Container[int],
) -> Any:
    """Make a layer's call by `call(func, args, kwargs)`.

    A bias whose id is in `apart` is added by a call of its own.
    """
    bias = argument(args, kwargs, 2, "bias") if is_layer_call(func) else None
    if bias is None or id(bias) not in apart:
        return call(func, args, kwargs)
    axes = argument(args, kwargs, 1, "weight").dim() - 2
    y = call(
        func,
        (*args[:2], *((None, *args[3:]) if len(args) > 2 else ())),
        {name: value for name, value in kwargs.items() if name != "bias"},
    )
    return call(own_bias, (y, bias, axes), {})


@dataclass(frozen=True)
class Ref:
    """The value with that number on the tape."""

    number: int


@dataclass(frozen=True)
class Autocast:
    """The automatic mixed precision that a call was made under."""

    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, tree: Any) -> Autocast | None:
        """What holds now for the device of the first tensor in `tree`; None where there is none."""
        device = next((leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)), "cpu")
        return cls(device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


@dataclass(frozen=True)
class Call:
    """One recorded torch function call.

    `output` has the structure of what it returned, with `Ref` for tensors. Layer calls also carry the shapes
    of their input and output.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    mutates: bool
    site: str | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    autocast: Autocast | None = None

    @property
    def name(self) -> str:
        """The function's bare name."""
        return getattr(self.func, "__name__", str(self.func))

    @property
    def operator(self) -> str:
        """Its name without the overload, which torch.export writes after a dot."""
        return self.name.partition(".")[0]

    @property
    def looks_up(self) -> bool:
        """Whether it reads rows of a table."""
        return is_lookup(self.func)

    def reads(self) -> Iterator[int]:
        """Numbers of the values it uses."""
        return (leaf.number for leaf in leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Ref))

    def writes(self) -> Iterator[int]:
        """Numbers of the values it makes."""
        return (leaf.number for leaf in leaves(self.output) if isinstance(leaf, Ref))

    def context(self) -> AbstractContextManager[object]:
        """The mixed precision to repeat the call under."""
        return (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self.autocast.device, self.autocast.dtype)
        )


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers; the fields of a dataclass count as its branches."""
    found: list[Any] = []
    for leaf in tree_leaves(tree, is_leaf=_is_ref):
        found.extend(leaves([getattr(leaf, f.name) for f in fields(leaf)]) if _is_record(leaf) else (leaf,))
    return found


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with every leaf changed, in the same containers and dataclasses."""

    def at(leaf: Any) -> Any:
        if not _is_record(leaf):
            return change(leaf)
        twin = copy.copy(leaf)
        for f in fields(leaf):
            object.__setattr__(twin, f.name, mapped(change, getattr(leaf, f.name)))
        return twin

    return tree_map(at, tree, is_leaf=_is_ref)


def plain(result: Any) -> Any:
    """Outputs of dict-like results (Hugging Face) as plain dicts, without empty entries."""
    if isinstance(result, Mapping):
        return {key: plain(value) for key, value in result.items() if value is not None}
    if isinstance(result, list) or type(result) is tuple:
        return [plain(value) for value in result]
    return result


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


def _is_record(leaf: Any) -> bool:
    return is_dataclass(leaf) and not isinstance(leaf, type | Ref)
