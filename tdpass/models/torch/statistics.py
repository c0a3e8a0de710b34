"""The running statistics of a torch module's batch-norms, estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def estimate_anew(module: nn.Module, run: Callable[[], None]) -> Callable[[], None] | None:
    """Estimate the statistics of all batch-norms from what `run` calls the module with.

    Returns how to undo that, None without a batch-norm.
    """
    norms = [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return None
    before = [
        copy.deepcopy((m.running_mean, m.running_var, m.num_batches_tracked, m.momentum)) for m in norms
    ]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    hooks = [norm.register_forward_pre_hook(_learn_where_it_can) for norm in norms]
    run()
    for norm, hook, mode, (*statistics, momentum) in zip(norms, hooks, modes, before, strict=True):
        hook.remove()
        norm.training, norm.momentum = mode, momentum
        if not norm.num_batches_tracked:  # nothing that the data holds reaches it, or single values only
            _set_statistics(norm, statistics)

    def undo() -> None:
        for norm, (*statistics, _) in zip(norms, before, strict=True):
            _set_statistics(norm, statistics)

    return undo


def _learn_where_it_can(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Estimate statistics from this call, unless a single value per channel leaves no variance."""
    norm.training = not args or args[0].numel() > args[0].shape[1]


def _set_statistics(norm: Any, values: Sequence[Tensor | None]) -> None:
    for buffer, value in zip(
        (norm.running_mean, norm.running_var, norm.num_batches_tracked), values, strict=True
    ):
        if buffer is not None and value is not None:
            buffer.copy_(value)
