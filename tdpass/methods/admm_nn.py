"""ADMM-NN: joint pruning and quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdpass.constraints.base import Constraint
from tdpass.constraints.level_budget import LevelBudget
from tdpass.constraints.levels import UniformLevels
from tdpass.constraints.sparse import Sparse
from tdpass.constraints.weight_budget import Score, WeightBudget
from tdpass.errors import UsageError
from tdpass.files import cache_folder
from tdpass.methods.base import register_method
from tdpass.methods.sparse_weights import SparseWeights, project
from tdpass.targets.break_even import BreakEven, open_break_even
from tdpass.training.admm import Admm
from tdpass.training.curvature import Curvature, Metric
from tdpass.training.fixed_weights import FixedWeights, ProgressiveFixing
from tdpass.training.phases import Phase
from tdpass.training.rules import fixed
from tdpass.training.schedules import GROWING, ScheduleSpec, as_schedule
from tdpass.training.surgery import Surgery
from tdpass.training.terms import Term

Pruning = Literal["admm", "surgery"]

PHASES = ("prune", "retrain", "quantize", "fix")


@register_method
@dataclass
class AdmmNN(SparseWeights):
    """Few weights on few levels, by ADMM (Ren, Zhang, Ye, Li, Xu, Qian, Lin, Wang, ASPLOS 2019).

    In turn: *prune*, ADMM towards the `keep` weights of largest score over the whole net, where the number
    kept falls from all to `keep` by equal factors over the first `reach` of the phase;  *retrain* with the
    others at zero;  *quantize*, ADMM towards levels {+-q .. +-n q}, whose interval is found in closed form
    and whose number in each layer is chosen so that all surviving weights together take `bits_per_weight`
    bits on average, one of `bits` in each (`LevelBudget`);  *fix*, where more and more weights stay on their
    levels. Phases without rounds are left out; without `bits_per_weight` the last two are.  `rates` has
    factors on the learning rate by phase.

    With `metric: fisher` what the loss makes of it counts: weights are pruned by the scores of `w sqrt(F)`,
    and bits divided by the errors times F, with F the diagonal of the Fisher information over the last
    thousand steps (`Curvature`).  `pruning: surgery` prunes at once and lets weights come back (`Surgery`)
    where ADMM draws them to zero.  `least` names sites that keep no fewer weights than that, whatever their
    scores; every other keeps at least `least_share` of what it would if all kept alike, so that none is cut
    off.

    `hardware` (a target such as `cpu:onnxruntime`, or `table:FILE.yaml` for another machine) makes it
    hardware-aware: a layer whose sparsity would stay below its break-even goes back to dense, and the rest is
    pruned harder.
    """

    name = "admm-nn"

    keep: int
    bits_per_weight: float | None = None
    bits: Sequence[int] = (1, 2, 3, 4, 5, 6)  # more levels than a small layer has weights would be no saving
    score: Score = "magnitude"
    metric: Metric = "frobenius"
    pruning: Pruning = "admm"
    least: Mapping[str, int] = field(default_factory=dict)
    least_share: float = 0.1
    prune: int = 20
    retrain: int = 10
    quantize: int = 10
    fix: int = 6
    reach: float = 0.7
    rates: Mapping[str, float] = field(default_factory=dict)
    rho: ScheduleSpec = GROWING
    decoupled: bool = True
    hardware: BreakEven | str | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    dense: tuple[str, ...] = field(default=(), init=False, repr=False)
    levels: dict[str, UniformLevels] = field(default_factory=dict, init=False, repr=False)
    curvature: Curvature | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("metric", self.metric, get_args(Metric)),
            ("pruning", self.pruning, get_args(Pruning)),
        ):
            if value not in known:
                raise UsageError(f"{option}={value!r} is unknown to {self.name}; known: {', '.join(known)}")
        if not 0 <= self.least_share <= 1:
            raise UsageError(
                f"least_share={self.least_share} is not within 0 to 1; it is a share of what a layer would "
                "keep if all kept alike"
            )
        if self.keep < 1 or not 0 < self.reach <= 1:
            raise UsageError(
                f"keep={self.keep}, reach={self.reach}: keep at least one weight, and reach that number "
                "within a share in (0, 1] of the phase"
            )
        unknown = set(self.rates) - set(PHASES)
        if unknown or not all(rate > 0 for rate in self.rates.values()):
            raise UsageError(
                f"rates={dict(self.rates)!r} are not positive factors on the learning rate of phases; the "
                f"phases are {', '.join(PHASES)}"
            )
        if self.bits_per_weight is not None and not 1 <= self.bits_per_weight <= 8:
            raise UsageError(
                f"bits_per_weight={self.bits_per_weight} is not within 1 to 8; leave it out to prune only"
            )
        if self.bits_per_weight is not None and not self.quantize + self.fix:
            raise UsageError(
                f"bits_per_weight={self.bits_per_weight} with quantize=0 and fix=0 would put no weight on a "
                "level; give either some rounds"
            )

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        weights = self.weights_of(model)
        total = sum(weight.numel() for weight in weights.values())
        if self.keep > total:
            raise UsageError(
                f"keep={self.keep:,} is more than the {total:,} weights of the sites; keep fewer"
            )
        unknown = set(self.least) - set(self.sites)
        if unknown:
            raise UsageError(
                f"least names {', '.join(sorted(unknown))}; the sites are: {', '.join(self.sites)}"
            )
        machine = None if self.hardware is None else open_break_even(self.hardware, cache=cache_folder())
        while machine is not None:
            slow = self._below_break_even(machine, self._budget(self.keep).divide(weights))
            if not slow:
                return
            self.dense += slow

    def _below_break_even(self, machine: BreakEven, constraints: Mapping[str, Constraint]) -> tuple[str, ...]:
        found = []
        for name, bound in constraints.items():
            if isinstance(bound, Sparse) and bound.keep < self.sites[name].weights:
                least = machine.break_even_sparsity(self.sites[name])
                if least is None or 1 - bound.keep / self.sites[name].weights < least:
                    found.append(name)
        return tuple(found)

    def _budget(self, keep: int) -> WeightBudget:
        metric = {} if self.curvature is None else self.curvature.known()
        stay = sum(self.sites[name].weights for name in self.dense)
        free = sum(site.weights for site in self.sites.values()) - stay
        share = self.least_share * max(0, keep - stay) / max(free, 1)
        least = {
            name: self.least.get(name, max(1, int(share * site.weights))) for name, site in self.sites.items()
        }
        return WeightBudget(keep, self.score, self.dense, least, metric=metric)

    def phases(self) -> Sequence[Phase]:
        steps = [
            ("prune", self.prune, self._begin_pruning),
            ("retrain", self.retrain, self._begin_retraining),
        ]
        if self.bits_per_weight is not None:
            steps += [("quantize", self.quantize, self._begin_levels), ("fix", self.fix, self._begin_fixing)]
        return [Phase(name, rounds, begin, self.rates.get(name, 1.0)) for name, rounds, begin in steps]

    def _begin_pruning(self) -> list[Term]:
        if self.pruning == "surgery":
            return [*self._measured(), Surgery(self.weights, self._falling)]
        return [
            *self._measured(),
            Admm(self.weights, [self._falling], as_schedule(self.rho, "rho"), self.decoupled),
        ]

    def _measured(self) -> list[Curvature]:
        self.curvature = None if self.metric == "frobenius" else Curvature(self.weights)
        return [] if self.curvature is None else [self.curvature]

    def _falling(self, progress: float, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        total = sum(weight.numel() for weight in weights.values())
        left = 1 - min(1.0, progress / self.reach)
        return self._budget(round(self.keep * (total / self.keep) ** left)).divide(weights)

    def _begin_retraining(self) -> list[Term]:
        project(self.weights, self._budget(self.keep).divide(self.whole_weights()))
        return [*self._measured(), FixedWeights(self.weights)]

    def _begin_levels(self) -> list[Term]:
        if not self.retrain:  # whose beginning prunes
            project(self.weights, self._budget(self.keep).divide(self.whole_weights()))
        return [
            FixedWeights(self.weights),
            Admm(self._levelled(), [fixed(self.levels)], as_schedule(self.rho, "rho"), self.decoupled),
        ]

    def _levelled(self) -> dict[str, nn.Parameter]:
        """The weights that get levels, which are chosen when they are first asked for."""
        if not self.levels:
            self.levels = self._choose_levels()
        return {name: self.weights[name] for name in self.levels}

    def _choose_levels(self) -> dict[str, UniformLevels]:
        """Numbers of levels under the budget, and their intervals."""
        weights = {name: weight for name, weight in self.whole_weights().items() if name not in self.dense}
        survivors = sum(int(weight.count_nonzero()) for weight in weights.values())
        worth = {} if self.curvature is None else self.curvature.sensitivity(weights)
        found = LevelBudget(int((self.bits_per_weight or 0) * survivors), worth, tuple(self.bits)).divide(
            weights
        )
        frozen = {name: bound.frozen(weights[name]) for name, bound in found.items()}
        return {name: bound for name, bound in frozen.items() if isinstance(bound, UniformLevels)}

    def _begin_fixing(self) -> list[Term]:
        return [ProgressiveFixing(self._levelled(), self.levels), FixedWeights(self.weights)]

    def ends(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        return self.levels or self._budget(self.keep).divide(weights)

    def levels_in(self, name: str) -> int:
        return 2 * self.levels[name].count if name in self.levels else 0

    def stays_dense(self, name: str) -> bool:
        return name in self.dense

    def reason(self, name: str, weight: Tensor) -> str:
        if name in self.levels:
            return f"{super().reason(name, weight)}, {self.levels[name]}"
        return "dense: below break-even" if name in self.dense else super().reason(name, weight)

    def facts(self) -> dict[str, Any]:
        return {
            "levels": {
                name: [bound.count, (bound.interval or 0.0).hex()] for name, bound in self.levels.items()
            }
        }

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.levels = {
            name: UniformLevels(count, float.fromhex(interval))
            for name, (count, interval) in facts["levels"].items()
        }
