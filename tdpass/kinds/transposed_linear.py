"""Linear layers that store their weight as [in, out] and call addmm, as GPT-2's Conv1D does."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.ops import transposed_linear

AnyCall = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class TransposedLinear(nn.Module):
    """`y = x W + b` with `W[i, o]`, by one `addmm`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.reshape(*x.shape[:-1], self.weight.shape[1])


def may_be_transposed(module: nn.Module) -> bool:
    """Whether a module holds what a `TransposedLinear` does, and nothing else.

    What it computes is another question.
    """
    held = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    weight, bias = held.get("weight"), held.get("bias")
    if weight is None or bias is None or len(held) != 2 or [*module.buffers(False), *module.children()]:
        return False
    return weight.dim() == 2 and bias.shape == weight.shape[1:]


def as_layer(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], weights: Container[int]
) -> AnyCall:
    """A call that reads one of these weights (by `id`) with its input and weight first.

    `addmm(bias, x, weight)` has them last.
    """
    if func is torch.addmm and len(args) == 3 and not kwargs and id(args[2]) in weights:
        bias, x, weight = args
        return transposed_linear, (x, weight, bias), {}
    return func, args, kwargs
