"""Hooks of a module that another takes the place of."""

from __future__ import annotations

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def carry_hooks(module: nn.Module, made: nn.Module) -> None:
    """Let `made` call the hooks of `module`, with what they were registered to be called with."""
    for name in _HOOKS:
        setattr(made, name, getattr(module, name))
