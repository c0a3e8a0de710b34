"""Learning from the dense model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.errors import UsageError
from tdpass.training.calls import call, class_scores
from tdpass.training.compiled import forward_of
from tdpass.training.terms import Term


@dataclass(eq=False)
class Distillation(Term):
    """share * T^2 * KL(teacher || student) of class probabilities softened by T.

    It takes the place of that share of the task's loss. Hinton, Vinyals, Dean 2015.  `teacher` is used in
    evaluation mode, without gradients; both must return class scores `[n, classes]`, or such as `logits`.
    """

    teacher: nn.Module
    share: float = 0.7
    temperature: float = 3.0
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(
                f"distillation share {self.share} is outside (0, 1]; it is the part of the loss that the "
                "teacher decides"
            )
        self.replaces = self.share
        self.teacher = self.teacher.eval().requires_grad_(requires_grad=False)
        self._forward = forward_of(self.teacher, self.compiled)

    def loss(self, inputs: object, outputs: object) -> Tensor | None:
        with torch.no_grad():
            target = call(self._forward, inputs)
        student, teacher = (
            F.log_softmax(class_scores(value).float().flatten(0, -2) / self.temperature, -1)
            for value in (outputs, target)
        )
        return (
            self.share
            * self.temperature**2
            * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        )
