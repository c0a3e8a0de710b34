"""How a stage trains: optimizer, learning rate and what is around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args

import torch
from msgspec import Meta
from torch import nn
from torch.optim import Optimizer

from tdpass.documents import Amount, Positive, Share, misfit
from tdpass.errors import UsageError
from tdpass.training.schedules import Cosine, Schedule, ScheduleSpec, as_schedule

Name = Literal["sgd", "adam", "adamw"]
Decay = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True)
class Settings:
    """One stage of training.

    `lr` is the peak learning rate; `schedule` (a schedule that starts at 1, or None for half a cosine to
    zero) is run once per phase.  `distill` is the share of the loss that the dense model decides, at
    `temperature`; `clip` bounds the norm of the gradient; `average` is the decay of an average of the weights
    that each phase ends with; `bf16` computes in bfloat16 where autocast knows how; `compile` runs model and
    teacher through `torch.compile`; `rebuild` lets factored layers compute with the weights that their
    factors stand for.  Momentum is that of SGD.
    """

    optimizer: Name = "sgd"
    lr: float = 0.01
    schedule: ScheduleSpec | None = None
    momentum: Decay = 0.9
    weight_decay: Amount = 0.0
    label_smoothing: Share = 0.0
    distill: Share = 0.0
    temperature: Positive = 3.0
    clip: Positive | None = None
    average: Decay = 0.0
    bf16: bool = False
    compile: bool = False
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Name):
            raise UsageError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(get_args(Name))}")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"lr={self.lr!r} is not a positive learning rate")

    @classmethod
    def parse(cls, spec: Settings | Mapping[str, Any] | None, base: Settings | None = None) -> Settings:
        """Settings as they are, or those of a recipe on top of `base`.

        Raises `UsageError` for an unknown one.
        """
        if isinstance(spec, Settings):
            return spec
        base, given = base or cls(), dict(spec or {})
        known = {field.name for field in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise UsageError(f"unknown training setting {name!r}; known: {', '.join(sorted(known))}")
            wrong = misfit(cls, name, value)
            if wrong:
                raise UsageError(f"training setting {name}={value!r} must be of type {wrong}")
        made = replace(base, **given)
        made.make_schedule()
        return made

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer over all parameters that require gradients.

        Weights of one axis (biases, norms) do not decay.
        """
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [parameter for parameter in wanted if parameter.dim() > 1],
                "weight_decay": self.weight_decay,
            },
            {"params": [parameter for parameter in wanted if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise UsageError(
                "the model has no parameter that requires gradients; call requires_grad_() on it"
            )
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return (torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW)(groups, lr=self.lr)

    def make_schedule(self) -> Schedule:
        """The learning rate as a factor on `lr`."""
        return Cosine(1.0) if self.schedule is None else as_schedule(self.schedule, "schedule")
