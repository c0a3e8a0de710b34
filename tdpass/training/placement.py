"""Tensors as they lie on one process or on many: whole or sharded, alike for training code."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on this process; a collective call where it is sharded."""
    if not _distributed():
        return tensor
    # takes half a second, and only a process group has such tensors
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, laid out as `other` is."""
    if not _distributed():
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 - as above

    if isinstance(other, DTensor):
        return distribute_tensor(tensor, other.device_mesh, other.placements)
    return tensor


def from_first(value: T) -> T:
    """What the first process has, on every one."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_owner(tensor: Tensor, owner: int) -> Tensor:
    """A whole tensor as process `owner` has it, written into `tensor` on every other one."""
    if world()[1] > 1:
        dist.broadcast(tensor, src=owner)
    return tensor


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrapper that averages its gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def averaged(tensor: Tensor) -> Tensor:
    """The mean of a whole tensor over the processes, written into it."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
        tensor.div_(world()[1])
    return tensor


class Template:
    """A model's structure without its numbers, taken before it is wrapped or sharded."""

    def __init__(self, model: nn.Module) -> None:
        memo: dict[int, object] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            hollow = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = (
                nn.Parameter(hollow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else hollow
            )
        self._hollow = copy.deepcopy(model, memo)

    def filled(self, model: nn.Module) -> nn.Module:
        """A copy with the whole weights that `model`, of this structure, has now.

        A collective call where it is sharded.
        """
        plain = bare(model)
        current = {
            name: whole(tensor.detach()).clone()
            for name, tensor in (*plain.named_parameters(), *plain.named_buffers())
        }
        return self.holding(current, plain.training)

    @property
    def names(self) -> list[str]:
        """The names of all parameters and buffers, each tensor once."""
        return [name for name, _ in (*self._hollow.named_parameters(), *self._hollow.named_buffers())]

    def holding(self, values: Mapping[str, Tensor], training: bool) -> nn.Module:
        """A copy with these whole tensors, by name."""
        memo: dict[int, object] = {}
        for name, hollow in (*self._hollow.named_parameters(), *self._hollow.named_buffers()):
            memo[id(hollow)] = (
                nn.Parameter(values[name], hollow.requires_grad)
                if isinstance(hollow, nn.Parameter)
                else values[name]
            )
        return copy.deepcopy(self._hollow, memo).train(training)
