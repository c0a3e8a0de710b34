"""Trials: small inputs on which the model is really run after every pass.

A pass that breaks it is named at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tdpass.errors import InvalidModelError, TdpassError
from tdpass.models.abilities import HoldsIntegerActivations, RoundsInOperators
from tdpass.models.base import Batch, Model
from tdpass.planner.divergence import Divergence, FittedDivergence
from tdpass.planner.resampled import resampled
from tdpass.tape import Tape

FACTOR = 10.0  # how many times the expected loss a result may show
# noise on the outputs, relative to their size, that is never held against a result that was to lose something
SLIGHT = 1e-2
NEGLIGIBLE = (
    1e-3  # a divergence that is never held against a plan: below it losses of single sites do not add up
)
ROUNDING = 2e-4  # relative difference between two ways to compute the same in float32
SAMPLES = 16
OTHER_SIZE = 3
LARGEST_WITHOUT_DATA = 1 << 28  # bytes of a model that is not run where there is no data to plan on either
_EPSILONS = 10  # of the output's type, where that is more than ROUNDING
_AMPLIFIED = 30  # times what a last digit in the input changes
_STEP = 1 / 127  # of the largest number, on a grid of eight bits


class Promise(Enum):
    """What a pass promises of the network's outputs."""

    SAME = "leaves the outputs as they are, up to rounding"
    REPAIR = "brings the outputs no further from the original's"
    PLAN = "loses what the plan expects"
    NONE = "promises nothing"


@dataclass
class Trial:
    """One call: what the model as it was given answered, and what it answered after the last pass.

    `tape` is the call recorded on the still dense model; a replay with the layers in place says what they
    should answer.
    """

    what: str
    call: Batch
    original: object
    now: object
    calibration: bool = False
    slight: float = 0.0
    distance: float = 0.0
    tape: Tape | None = None

    def allowed(self, expected: float) -> float:
        """The divergence from which on a result is not what was expected.

        `slight` is what a hundredth of noise on the outputs makes.
        """
        return FACTOR * max(expected, 0.0) + self.slight


@dataclass
class Trials:
    """The calls of one run.

    `steps` holds how far each pass brought the calibration data's outputs from the original's.
    """

    given: Model
    divergence: FittedDivergence | None
    trials: list[Trial] = field(default_factory=list)
    steps: list[tuple[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, given: Model, batches: Sequence[Batch], divergence: FittedDivergence | None) -> Trials:
        """Calls on the calibration data, on noise of its moments and with another number of samples.

        Those are left out that the model does not answer. `divergence` is that of the calibration data.
        Without data the model's example stands for it, unless the model is larger than 256 MiB.
        """
        trials = cls(given, divergence)
        without_data = given.example() if not batches and given.bytes() <= LARGEST_WITHOUT_DATA else None
        example = batches[0] if batches else without_data
        if example is None:
            return trials
        for what, call in _calls(example, given.signature().fixed_batch()):
            try:
                answer = given.run(call)
            except TdpassError:
                continue
            if _shapes(answer) and _finite(answer):
                trial = Trial(what, call, answer, answer, calibration=bool(batches) and not trials.trials)
                trial.slight = trials._distance(trial, _noisy(answer))
                trials.trials.append(trial)
        return trials

    def record(self, model: Model) -> None:
        """Record every call on the model, which is still dense."""
        for trial in self.trials:
            try:
                trial.tape = model.record(trial.call)
            except TdpassError:
                trial.tape = None

    def check(self, step: str, promise: Promise, model: Model, expected: float | None) -> str:
        """Run the model as the pass left it; returns how it broke its promise, or nothing.

        `expected` is the loss that the plan expects on the calibration data, where it was made on them.
        """
        broken = ""
        for trial in self.trials:
            try:
                answer = model.run(trial.call)
            except TdpassError as error:
                return (
                    f"{step} made a network that does not run on {trial.what}, as the original does: {error}"
                )
            distance = self._distance(trial, answer)
            broken = broken or self._broken(trial, answer, distance, promise, model, expected)
            if trial.calibration:
                self.steps.append((step, distance))
            trial.now, trial.distance = answer, distance
        return f"{step} {broken}" if broken else ""

    def culprit(self) -> str:
        """The pass that brought the outputs furthest from the original's."""
        before, worst = 0.0, ("", 0.0)
        for step, distance in self.steps:
            worst = max(worst, (step, distance - before), key=lambda item: item[1])
            before = distance
        return worst[0]

    def allowed(self, expected: float) -> float:
        """The divergence on the calibration data from which on a result is not what the plan expected."""
        return max(
            (max(trial.allowed(expected), NEGLIGIBLE) for trial in self.trials if trial.calibration),
            default=float("inf"),
        )

    def _broken(
        self,
        trial: Trial,
        answer: object,
        distance: float,
        promise: Promise,
        model: Model,
        expected: float | None,
    ) -> str:
        if not _finite(answer):
            return f"makes the network answer {trial.what} with NaN or infinite values"
        if promise is Promise.SAME:
            moved, allowed = gap(trial.now, answer), self._rounding(trial, answer, model)
            return (
                f"changed the outputs on {trial.what} by {moved:.3g} of their size, where rounding allows "
                f"{allowed:.2g}"
                if moved > allowed
                else ""
            )
        allowed = self._allowed(trial, promise, model, expected)
        if distance <= allowed:
            return ""
        return (
            f"brought the outputs on {trial.what} to a divergence of {distance:.3g} from the "
            f"original's, where at most {allowed:.3g} was to be expected"
        )

    def _allowed(self, trial: Trial, promise: Promise, model: Model, expected: float | None) -> float:
        bounds = [float("inf")]
        if promise is Promise.REPAIR and trial.calibration:
            bounds.append(
                max(trial.allowed(trial.distance), NEGLIGIBLE)
            )  # a repair is judged on all data, this on few samples
        if promise is Promise.PLAN and trial.calibration and expected is not None:
            bounds.append(max(trial.allowed(expected), NEGLIGIBLE))
        if promise is not Promise.NONE and trial.tape is not None:
            with torch.no_grad():
                replayed = trial.tape.play().fork(model.replaced()).finish()
            bounds.append(trial.allowed(self._distance(trial, replayed)))
        return min(bounds)

    def _distance(self, trial: Trial, answer: object) -> float:
        if self.divergence is None:
            return 0.0
        if _shapes(answer) != _shapes(trial.original):
            return float("inf")
        return self.divergence.mean(
            [(self.divergence.outputs(trial.original), self.divergence.outputs(answer))]
        )

    def _rounding(self, trial: Trial, answer: object, model: Model) -> float:
        """What rounding may change: some last digits, or what the original makes of one in its input.

        Where layers or operators read rounded numbers, a last digit may put one on the next of its grid: what
        the model makes of such a step in its input.
        """
        epsilon = max((torch.finfo(leaf.dtype).eps for leaf in _floats(answer)), default=0.0)
        least, moved = max(ROUNDING, _EPSILONS * epsilon), gap(trial.now, answer)
        grain = _grain(model)
        if moved > least and grain:
            least = max(SLIGHT, gap(answer, model.run(_nudged(trial.call, grain))))
        if moved <= least:
            return least
        again, near = self.given.run(trial.call), self.given.run(_nudged(trial.call, epsilon))
        return max(least, _AMPLIFIED * max(gap(trial.original, again), gap(trial.original, near)))


def _grain(model: Model) -> float:
    """The relative step in which layers, operators or the graph between them hold activations; 0 for none."""
    held = isinstance(model, HoldsIntegerActivations) and bool(model.held_integers())
    whole = held or any(layer.form.activations for layer in model.replaced().values())
    return max(_STEP if whole else 0.0, model.grain() if isinstance(model, RoundsInOperators) else 0.0)


def _nudged(call: Batch, epsilon: float) -> Batch:
    """The call with every floating-point number off by about that share of it."""
    generator = torch.Generator().manual_seed(0)

    def nudged(tensor: Tensor) -> Tensor:
        return (
            tensor * (1 + epsilon * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
        )

    return call.map(nudged)


def gap(reference: object, output: object) -> float:
    """The largest difference of any floating-point output's channel, relative to its root mean square.

    Channels lie along the second and along the last axis.  Infinite where the outputs have other shapes or
    other values that are not finite.
    """
    if _shapes(reference) != _shapes(output):
        return float("inf")
    return max(
        (
            _channel_gap(a.double(), b.double())
            for a, b in zip(_floats(reference), _floats(output), strict=True)
        ),
        default=0.0,
    )


def _channel_gap(reference: Tensor, output: Tensor) -> float:
    same = (reference == output) | (reference.isnan() & output.isnan())
    difference = torch.where(same, 0.0, reference - output)
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    level = torch.nan_to_num(reference, 0.0, 0.0, 0.0)
    least = 1e-2 * float(level.square().mean().sqrt()) + 1e-30
    gaps = [0.0]
    for axis in {1, reference.dim() - 1} if reference.dim() > 1 else {-1}:
        rest = [other for other in range(reference.dim()) if other != axis] if axis > 0 else [0]
        sizes = level.square().mean(rest).sqrt().clamp_min(least)
        gaps.append(float((difference.square().mean(rest).sqrt() / sizes).max()))
    return max(gaps)


def _calls(example: Batch, fixed: int | None) -> Iterator[tuple[str, Batch]]:
    free = fixed is None and example.divisible
    few = example.part(0, SAMPLES) if free else example
    yield "the calibration data", few
    yield "noise of its moments", resampled(few, torch.Generator().manual_seed(0))
    if free and few.size != OTHER_SIZE:
        yield f"{OTHER_SIZE} samples at a time", few.resized(OTHER_SIZE)


def _noisy(outputs: object) -> object:
    generator = torch.Generator().manual_seed(0)

    def noisy(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        level = SLIGHT * leaf.double().square().mean().sqrt()
        return (leaf + level * torch.randn(leaf.shape, generator=generator)).to(leaf.dtype)

    return tree_map(noisy, outputs)


def _floats(returned: object) -> list[Tensor]:
    try:
        return list(Divergence().outputs(returned).values())
    except InvalidModelError:  # it returns whole numbers only
        return []


def _shapes(outputs: object) -> list[torch.Size]:
    return [leaf.shape for leaf in _floats(outputs)]


def _finite(outputs: object) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in _floats(outputs))
