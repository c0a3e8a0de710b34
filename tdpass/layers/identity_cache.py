"""What is derived from weights, found by the weights' identity.

Made anew when they change, gone when they die.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Tag = tuple[list[int | None], list[int]]
_FROZEN: Tag = ([], [])


@dataclass(frozen=True)
class _Entry(Generic[T]):
    tag: Tag
    value: T
    alive: tuple[weakref.ReferenceType[Tensor], ...]


class IdentityCache(Generic[T]):
    """Values by the identity of tensors and a recipe.

    An edit in place, `load_state_dict` and an assignment to `.data` are seen, since a tensor's version or its
    address changes; `weight.data.copy_(...)` changes neither, and `clear` is for that.  A `frozen` cache
    looks at the identity alone.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        self._frozen = frozen
        self._entries: dict[Hashable, _Entry[T]] = {}
        self._lock = RLock()

    def get(self, tensors: Sequence[Tensor], recipe: Hashable, make: Callable[[Sequence[Tensor]], T]) -> T:
        """The value that `make` derives from these tensors, made again only when one of them was changed.

        `make` runs without gradients unless the cache is frozen, and must not return the tensors themselves.
        """
        key = (recipe, *map(id, tensors))
        tag = _FROZEN if self._frozen else tag_of(tensors)
        entry = self._entries.get(key)
        if entry is not None and entry.tag == tag:
            return entry.value
        with self._lock, nullcontext() if self._frozen else _without_gradients():
            value = make(tensors)
            self._entries[key] = _Entry(
                tag, value, tuple(weakref.ref(tensor, partial(self._drop, key)) for tensor in tensors)
            )
        return value

    def clear(self, tensors: Sequence[Tensor] | None = None) -> int:
        """Forget everything, or what was derived from these tensors; returns how many values."""
        gone = None if tensors is None else set(map(id, tensors))
        keys = [
            key
            for key, entry in list(self._entries.items())
            if gone is None or any(id(alive()) in gone for alive in entry.alive)
        ]
        for key in keys:
            self._entries.pop(key, None)
        return len(keys)

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: Hashable, dead: weakref.ReferenceType[Tensor]) -> None:
        entry = self._entries.get(key)
        if entry is not None and any(alive is dead for alive in entry.alive):
            self._entries.pop(key, None)


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def tag_of(tensors: Sequence[Tensor]) -> Tag:
    """Version and address of each; what was made in inference mode counts no versions."""
    try:
        versions: list[int | None] = [tensor._version for tensor in tensors]
    except RuntimeError:
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    return versions, list(map(Tensor.data_ptr, tensors))
