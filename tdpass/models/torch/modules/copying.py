"""Copies of modules that hold what `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.errors import InvalidModelError


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, with `memo` as `copy.deepcopy` fills it.

    Tensors that were computed and kept (a cached activation, a pruned or normalised weight) lose their
    history, those made in inference mode become ordinary ones, and compiled functions are shared.  Raises
    `InvalidModelError` for what cannot be copied.
    """
    for held in _held(module):
        if isinstance(held, torch.jit.ScriptFunction):
            memo[id(held)] = held
        elif isinstance(held, Tensor) and (held.is_inference() or not held.is_leaf):
            plain = held.detach().clone()
            memo[id(held)] = (
                nn.Parameter(plain, held.requires_grad) if isinstance(held, nn.Parameter) else plain
            )
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, NotImplementedError, pickle.PickleError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise InvalidModelError(
            f"the model cannot be copied: {why}; take what cannot be copied out of its attributes"
        ) from error


def _held(module: nn.Module) -> Iterator[object]:
    """Everything that the modules hold as attributes, in containers too."""
    seen: set[int] = set()
    waiting: list[object] = [vars(each) for each in module.modules()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        else:
            yield value
