"""Terms with parameters of their own, and what optimizers hold as tensors with names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.training.placement import averaged
from tdpass.training.terms import State, Term

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What an optimizer holds of named parameters, as `NAME.entry`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = (
        (names[id(parameter)], optimizer.state[parameter])
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return {
        f"{name}.{key}": value
        for name, entries in held
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def make_room(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], layout: Layout) -> None:
    """Room for entries `NAME.entry` of those shapes and types.

    An optimizer makes its own only at the first step.
    """
    for key, (shape, dtype) in layout.items():
        name, _, entry = key.rpartition(".")
        if name in parameters:
            parameter = parameters[name]
            like = tuple(parameter.shape) == shape and entry != "step"
            optimizer.state[parameter][entry] = (
                torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(shape, dtype=dtype)
            )


class Learning(Term):
    """A term that trains parameters of its own, by an optimizer of its own; both are in its checkpoints.

    A subclass gives `loss` that depends on them (or lets the model read them), and the gradients that arise
    move them once after every step of the model; over several processes gradients are averaged.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self.parameters, self.optimizer = dict(parameters), optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                averaged(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> State:
        held = optimizer_tensors(self.optimizer, self.parameters)
        layout = {
            key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in held.items()
        }
        own = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return {"layout": layout, **own, **{f"optimizer.{key}": value for key, value in held.items()}}

    def resume_at(self, facts: Mapping[str, Any]) -> None:
        layout = {key: (tuple(shape), getattr(torch, kind)) for key, (shape, kind) in facts["layout"].items()}
        make_room(self.optimizer, self.parameters, layout)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        held = optimizer_tensors(self.optimizer, self.parameters)
        for key, value in held.items():
            value.copy_(state[f"optimizer.{key}"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"parameter.{name}"])
