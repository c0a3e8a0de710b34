"""Measures of how far one output of a network is from the original's, each fitted to the original's answers.

A measure gives one number per row, where a row is what is judged at once: a distribution over classes, one
position with all its channels, an embedding.  Sums over rows do not depend on how samples were put into
calls, or in which order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpass.planner.answers import Answers
from tdpass.registry import Registry

_LEAST_PROBABILITY = 1e-12
_LEAST_SPREAD = 1e-2
_ROWS_FOR_SPREAD = 8


class Measure(ABC):
    """How far an output is from its reference; `reference` and `output` are float64 and of one shape."""

    name: ClassVar[str]

    @property
    def classes(self) -> int | None:
        """The axis over which classes compete; None where there is none."""
        return None

    @property
    @abstractmethod
    def gain(self) -> float:
        """What a probe counts: rows change by about E[gain (probe . d)^2] where the output does by d."""

    @abstractmethod
    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        """Divergence of every row, in one axis."""

    def count(self, reference: Tensor) -> int:
        """How many rows there are."""
        return reference.numel() // (1 if self.classes is None else max(reference.shape[self.classes], 1))

    @abstractmethod
    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """A random direction in output space, as long as the divergence is curved there."""

    def by_channel(self, reference: Tensor, output: Tensor) -> Tensor | None:
        """The mean over rows of each channel's part; None where channels have no scales of their own."""
        return None


MEASURES: Registry[Callable[[Answers], Measure]] = Registry("divergence")


def _normal(reference: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(reference.shape, generator=generator, dtype=reference.dtype)


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms p (log p - log q), 0 where p is 0 even if its logarithm is not finite."""
    return torch.where(p == 0, 0.0, p * (log_p - log_q))


def _curvature(p: Tensor, axis: int) -> float:
    """Half the trace of KL's Hessian in the logits, sum of p (1 - p), per direction in which they may move."""
    spread = 1 - p.square().sum(axis)
    return max(float(spread.mean()) / (2 * max(p.shape[axis] - 1, 1)), _LEAST_PROBABILITY)


@dataclass(frozen=True)
class ClassScores(Measure):
    """KL(p || q) of the softmax over `axis`; log-probabilities are scores as well."""

    name: ClassVar[str] = "kl"
    axis: int = -1
    curvature: float = 1.0

    @property
    def classes(self) -> int:
        return self.axis

    @property
    def gain(self) -> float:
        return self.curvature

    @classmethod
    def fit(cls, answers: Answers) -> ClassScores:
        """Over the axis of log-probabilities where there is one, else over the last."""
        axis = answers.log_probability_axis()
        axis = -1 if axis is None else axis
        return cls(axis, answers.mean_of(lambda value: _curvature(value.softmax(axis), axis)))

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(reference, self.axis), F.log_softmax(output, self.axis)
        return _divergence(log_p.exp(), log_p, log_q).sum(self.axis).reshape(-1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        direction = _normal(reference, generator)
        return direction - direction.mean(self.axis, keepdim=True)


@dataclass(frozen=True)
class Probabilities(Measure):
    """KL(p || q) over `axis` as the sum of p log(p / q) - p + q, which no rounding makes negative."""

    name: ClassVar[str] = "kl_probabilities"
    axis: int = -1
    curvature: float = 1.0

    @property
    def classes(self) -> int:
        return self.axis

    @property
    def gain(self) -> float:
        return self.curvature

    @classmethod
    def fit(cls, answers: Answers) -> Probabilities:
        """Over the axis along which values sum to one, else over the last."""
        axis = answers.probability_axis()
        axis = -1 if axis is None else axis
        return cls(axis, answers.mean_of(lambda value: _curvature(value, axis)))

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        p, q = reference.clamp_min(_LEAST_PROBABILITY), output.clamp_min(_LEAST_PROBABILITY)
        return (p * (p / q).log() - p + q).sum(self.axis).reshape(-1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        direction = _normal(reference, generator)
        return (direction - direction.mean(self.axis, keepdim=True)) / reference.clamp_min(_LEAST_PROBABILITY)


@dataclass(frozen=True)
class Bernoulli(Measure):
    """KL of the yes-or-no distribution that each element is the probability of; an element is a row."""

    name: ClassVar[str] = "kl_bernoulli"

    @property
    def gain(self) -> float:
        return 0.5

    @classmethod
    def fit(cls, answers: Answers) -> Bernoulli:
        """Nothing depends on the answers."""
        return cls()

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        pairs = [(reference, output), (1 - reference, 1 - output)]
        both = ((p.clamp_min(_LEAST_PROBABILITY), q.clamp_min(_LEAST_PROBABILITY)) for p, q in pairs)
        return torch.stack([p * (p / q).log() - p + q for p, q in both]).sum(0).reshape(-1)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        return _normal(reference, generator) / (reference * (1 - reference)).clamp_min(1e-4).sqrt()


@dataclass(frozen=True, eq=False)
class ScaledError(Measure):
    """Squared error over the squared spread of the channel, mean over channels; `scale` lies along `axis`.

    The spread is the standard deviation over all answers (the root mean square below eight values a
    channel).  Its square is raised by (1e-2 g)^2, g the geometric mean over the channels that vary, so that
    an error in a constant channel counts, but not without bounds.
    """

    name: ClassVar[str] = "mse"
    axis: int | None = None
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    whole: float = 1.0

    @classmethod
    def fit(cls, answers: Answers) -> ScaledError:
        """The channel axis from the answers, and the spread of each of its indices."""
        axis = answers.channel_axis()
        spread = answers.variance(axis, _ROWS_FOR_SPREAD)
        whole = (
            float(answers.variance(None, _ROWS_FOR_SPREAD))
            or answers.mean_of(lambda value: float(value.square().mean()))
            or 1.0
        )
        varies = spread > _LEAST_SPREAD**4 * spread.max()
        typical = float(spread[varies].log().mean().exp()) if bool(varies.any()) else whole
        return cls(axis, (spread + _LEAST_SPREAD**2 * typical).sqrt(), whole**0.5)

    @property
    def gain(self) -> float:
        return 1 / self.scale.numel()

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return self._squares(reference, output).mean(1)

    def count(self, reference: Tensor) -> int:
        return reference.numel() // (1 if self.axis is None else max(reference.shape[self.axis], 1))

    def by_channel(self, reference: Tensor, output: Tensor) -> Tensor | None:
        return None if self.axis is None else self._squares(reference, output).mean(0)

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        return _normal(reference, generator) / self._along(reference).to(reference.dtype)

    def _squares(self, reference: Tensor, output: Tensor) -> Tensor:
        """Relative squared errors as [rows, channels]."""
        squares = ((reference - output) / self._along(reference)).square()
        return squares.reshape(-1, 1) if self.axis is None else squares.movedim(self.axis, -1).flatten(0, -2)

    def _along(self, reference: Tensor) -> Tensor:
        """The scale, shaped to broadcast; the whole output's for another number of channels than was seen."""
        if self.axis is None or reference.shape[self.axis] != self.scale.numel():
            return torch.tensor(self.whole, dtype=torch.float64)
        shape = [1] * reference.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape)


@dataclass(frozen=True)
class Cosine(Measure):
    """One minus the cosine of the angle between outputs, all axes but the first flattened."""

    name: ClassVar[str] = "cosine"

    @property
    def gain(self) -> float:
        return 0.5

    @classmethod
    def fit(cls, answers: Answers) -> Cosine:
        """Nothing depends on the answers."""
        return cls()

    def rows(self, reference: Tensor, output: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self._flat(reference), self._flat(output), dim=1)

    def count(self, reference: Tensor) -> int:
        return reference.shape[0] if reference.dim() > 1 else 1

    def probe(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        flat = self._flat(reference)
        length = flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = flat / length
        direction = _normal(flat, generator) / length
        across: Tensor = direction - (direction * unit).sum(1, keepdim=True) * unit
        return across.reshape(reference.shape)

    def _flat(self, value: Tensor) -> Tensor:
        return (value[None] if value.dim() < 2 else value).flatten(1)


for _measure in (ClassScores, Probabilities, Bernoulli, ScaledError, Cosine):
    MEASURES.add(_measure.name, _measure.fit)
