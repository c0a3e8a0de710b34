"""Whether a class that overrides `forward` still computes what its base class does, found by running both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_SCALES = (0.0, 1e-3, 1.0, 1e3)
_POSITIONS = 5


def computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the module's forward answers in inference as that of its base class: bit for bit, on small, ordinary and large inputs.

    A copy with random weights is run, so that neither the module nor the random state changes.  A forward that takes more than
    its input is never equal.
    """
    if type(module).forward is base.forward:
        return True
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and the input
        return False
    try:
        twin = copy.deepcopy(module).to_empty(device="cpu")
        twin.training = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in twin.parameters():
                parameter.normal_()
            return all(_equal(twin(x), base.forward(twin, x)) for x in _inputs(twin))
    except Exception:  # noqa: BLE001 - code of the user, run on what it may not be made for
        return False


def _inputs(module: nn.Module) -> Iterator[Tensor]:
    """Random inputs of a linear layer or convolution, in its own type."""
    dtype = next(module.parameters()).dtype
    sizes: tuple[tuple[int, ...], ...]
    if isinstance(module, nn.Linear):
        sizes = ((2, module.in_features), (2, 3, module.in_features))
    else:
        kernel = [dilation * (size - 1) + _POSITIONS for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]  # type: ignore[arg-type]
        sizes = ((2, int(module.in_channels), *kernel),)  # type: ignore[arg-type]
    for size in sizes:
        yield from (torch.randn(size).to(dtype) * scale for scale in _SCALES)


def _equal(one: object, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
