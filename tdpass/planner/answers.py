"""What the original answered at one output over all calibration calls, and what that says about its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_CLOSE = 2e-3
_CLOSE_HALF = 2e-2
_UNEVEN = 30.0
_SAYS = 0.75
_COMPETES = 0.7
_MANY_CLASSES = 256
_YES_OR_NO = 0.25
_DISTINCT = 0.5
_CLEARLY = 4.0


@dataclass(frozen=True)
class Answers:
    """The values of one output, a tensor per call; calls may differ in any size.

    Statistics are over all values of all calls, so that neither batching nor order matters.
    """

    name: str
    values: tuple[Tensor, ...]

    @cached_property
    def dim(self) -> int:
        """Number of axes where all calls agree, else 0."""
        dims = {value.dim() for value in self.values}
        return dims.pop() if len(dims) == 1 else 0

    def size(self, axis: int) -> int:
        """Length of an axis where all calls agree, else 0."""
        sizes = {value.shape[axis] for value in self.values} if -self.dim <= axis < self.dim else set()
        return sizes.pop() if len(sizes) == 1 else 0

    def mean_of(self, statistic: Callable[[Tensor], float]) -> float:
        """A statistic of each call's values in float64, averaged over the calls by their number of values."""
        total = sum(value.numel() for value in self.values)
        return sum(statistic(value) * value.numel() for value in self._doubles()) / max(total, 1)

    def mean(self, axis: int | None) -> Tensor:
        """Mean over everything, or of each index of an axis."""
        rows = (_rows(value, axis) for value in self._doubles())
        sums = [(row.sum(0), row.shape[0]) for row in rows]
        return torch.stack([total for total, _ in sums]).sum(0) / max(sum(count for _, count in sums), 1)

    def variance(self, axis: int | None, least: int = 1) -> Tensor:
        """Variance over everything, or of each index of an axis.

        Of fewer than `least` values the mean square.
        """
        mean = self.mean(axis)
        count = sum(value.numel() for value in self.values) // max(mean.numel(), 1)
        centre = mean if count >= least else torch.zeros_like(mean)
        squares = [(_rows(value, axis) - centre).square().sum(0) for value in self._doubles()]
        return torch.stack(squares).sum(0) / max(count, 1)

    def probability_axis(self) -> int | None:
        """The axis along which values from 0 to 1 sum to one everywhere; None where there is none."""
        if self.low < -_CLOSE or self.high > 1 + _CLOSE:
            return None
        return self._axis_of_ones(lambda value, axis: value.sum(axis))

    def log_probability_axis(self) -> int | None:
        """The axis along which exponentials of values sum to one everywhere; None where there is none."""
        if self.high > _CLOSE:
            return None
        return self._axis_of_ones(lambda value, axis: value.exp().sum(axis))

    def has_unit_rows(self) -> bool:
        """Whether all vectors along the last axis have length one."""
        return (
            self.dim in (2, 3)
            and self.size(-1) > 1
            and self._are_one(lambda value, axis: value.norm(dim=axis), -1)
        )

    def is_yes_or_no(self) -> bool:
        """Whether values lie in [0, 1], mostly at its ends.

        Probabilities of events, not fractions or coordinates. The variance of such values is at least a
        quarter of what it would be if all were 0 or 1.
        """
        if self.low < -_CLOSE or self.high > 1 + _CLOSE:
            return False
        mean = float(self.mean(None))
        return float(self.variance(None)) > _YES_OR_NO * mean * (1 - mean) and 0 < mean < 1

    def may_be_classes(self) -> bool:
        """Whether nothing speaks against class scores along the last axis.

        Alike spreads, some negative values.
        """
        spread = self.variance(-1).sqrt()
        varies = spread[spread > 1e-6 * spread.max()]
        alike = varies.numel() == 0 or float(varies.max() / varies.min()) < _UNEVEN
        return alike and not (self.low >= 0 and self.high > 1)

    def must_be_classes(self) -> bool:
        """Whether the softmax of the last axis says something, not alike everywhere, and classes compete.

        Its mean entropy is below 0.75 log(classes), several classes win, and the variance of the mean over
        classes is below 0.7 of what independent classes would give (not asked of 256 classes and more, whose
        scores drift together).
        """
        classes = self.size(-1)
        entropy = self.mean_of(lambda value: float(_entropy(value).mean())) / math.log(classes)
        if entropy > _SAYS or not self.may_be_classes() or not self._several_win():
            return False
        return classes >= _MANY_CLASSES or self.competition < _COMPETES

    @cached_property
    def competition(self) -> float:
        """Variance of the mean over the last axis, as a multiple of what independent elements would give."""
        middle = Answers(self.name, tuple(value.double().mean(-1, keepdim=True) for value in self.values))
        return self.size(-1) * float(middle.variance(None)) / max(float(self.variance(-1).mean()), 1e-300)

    def channel_axis(self) -> int | None:
        """The axis whose indices are channels, each of its own kind; None for one axis or none.

        The last axis of two or three, axis 1 of four and more, or the other of those two where its
        neighbouring indices differ clearly more, in mean or spread: neighbouring positions of a sequence or
        an image are alike.
        """
        if self.dim < 2:
            return None
        usual, other = (self.dim - 1, 1) if self.dim < 4 else (1, self.dim - 1)
        if self.dim >= 4 and 1 in (self.size(usual), self.size(other)):
            return usual if self.size(usual) == 1 else other
        if not self.size(usual):
            return other if self.size(other) else None
        if other == usual or not self.size(other):
            return usual
        here, there = self._distinction(usual), self._distinction(other)
        return other if there > max(_DISTINCT, _CLEARLY * here) else usual

    @cached_property
    def low(self) -> float:
        """The least value."""
        return min((float(value.min()) for value in self.values if value.numel()), default=0.0)

    @cached_property
    def high(self) -> float:
        """The largest value."""
        return max((float(value.max()) for value in self.values if value.numel()), default=0.0)

    def _doubles(self) -> Iterator[Tensor]:
        return (value.double() for value in self.values)

    def _class_axes(self) -> list[int]:
        """Axes that may hold classes, the last one first; the first only where it is the only one."""
        axes = [self.dim - 1, *range(1, self.dim - 1)] if self.dim else []
        return [axis for axis in axes if self.size(axis) > 1]

    def _axis_of_ones(self, total: Callable[[Tensor, int], Tensor]) -> int | None:
        return next((axis for axis in self._class_axes() if self._are_one(total, axis)), None)

    def _are_one(self, total: Callable[[Tensor, int], Tensor], axis: int) -> bool:
        close = (
            _CLOSE
            if all(value.dtype in (torch.float32, torch.float64) for value in self.values)
            else _CLOSE_HALF
        )
        return all(bool(((total(value, axis) - 1).abs() < close).all()) for value in self._doubles())

    def _several_win(self) -> bool:
        """Whether the largest value along the last axis is not at one place everywhere."""
        winners = torch.cat([value.argmax(-1).reshape(-1) for value in self.values])
        return bool((winners != winners[:1]).any())

    def _distinction(self, axis: int) -> float:
        """How much neighbouring indices of an axis differ, in means over spreads and in log variances."""
        count = sum(value.numel() for value in self.values) // self.size(axis)
        mean, variance = self.mean(axis), self.variance(axis)
        variance = variance + 1e-4 * float(self.variance(None)) + 1e-300
        means = (mean[1:] - mean[:-1]).square() / (variance[1:] + variance[:-1])
        spreads = (variance[1:].log() - variance[:-1].log()).square() - 4 / max(count, 1)
        return float((means + spreads).mean()) if mean.numel() > 1 else 0.0


def _rows(value: Tensor, axis: int | None) -> Tensor:
    """All values as rows of the indices of an axis, or in one column."""
    return value.reshape(-1, 1) if axis is None else value.movedim(axis, -1).reshape(-1, value.shape[axis])


def _entropy(value: Tensor) -> Tensor:
    logarithms = value.log_softmax(-1)
    return -torch.where(logarithms.isfinite(), logarithms.exp() * logarithms, 0.0).sum(-1)
