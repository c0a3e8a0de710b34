"""Learning from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UsageError
from tdpass.training.compiled import forward_of
from tdpass.training.terms import Term


def call(model: Callable[..., Any], inputs: object) -> object:
    """The model's outputs on a batch: positional inputs from a tuple or list, named ones from a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@dataclass(eq=False)
class Distillation(Term):
    """share * T^2 * KL(teacher || student) of class probabilities softened by T, in place of that share of the task's loss.

    Hinton, Vinyals, Dean 2015.  `teacher` is used in evaluation mode, without gradients; both must return class scores `[n, classes]`.
    """

    teacher: nn.Module
    share: float = 0.7
    temperature: float = 3.0
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"distillation share {self.share} is outside (0, 1]; it is the part of the loss that the teacher decides")
        self.replaces = self.share
        self.teacher = self.teacher.eval().requires_grad_(requires_grad=False)
        self._forward = forward_of(self.teacher, self.compiled)

    def loss(self, inputs: object, outputs: object) -> Tensor | None:
        with torch.no_grad():
            target = call(self._forward, inputs)
        if not isinstance(outputs, Tensor) or not isinstance(target, Tensor):
            raise UsageError(f"distillation needs class scores as a tensor, the model returned a {type(outputs).__name__}; leave distillation out")
        student, teacher = (F.log_softmax(value.float().flatten(0, -2) / self.temperature, -1) for value in (outputs, target))
        return self.share * self.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
