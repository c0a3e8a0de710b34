"""Crossbar: weights that memristor arrays can hold, in few arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.constraints.base import Constraint
from tdpass.constraints.composed import Composed
from tdpass.constraints.device_levels import DeviceLevels
from tdpass.constraints.group_budget import GroupBudget
from tdpass.constraints.in_block import Side
from tdpass.constraints.one_sign import OneSign
from tdpass.constraints.sparse import Group, Sparse
from tdpass.constraints.unconstrained import Unconstrained
from tdpass.crossbars.states import device_levels
from tdpass.crossbars.use import dense_costs, uses_of
from tdpass.errors import UsageError
from tdpass.methods.base import register_method
from tdpass.methods.sparse_weights import SparseWeights, project
from tdpass.targets.crossbar import CrossbarArray
from tdpass.training.admm import Admm
from tdpass.training.curvature import Curvature, Metric
from tdpass.training.fixed_signs import FixedSigns
from tdpass.training.fixed_weights import ProgressiveFixing
from tdpass.training.noise import NoisyWeights
from tdpass.training.phases import Phase
from tdpass.training.schedules import GROWING, ScheduleSpec, as_schedule
from tdpass.training.terms import Term

PHASES = ("admm", "retrain", "fix")
WHOLE: tuple[Group, ...] = ("filter", "channel", "column")


@register_method
@dataclass
class Crossbar(SparseWeights):
    """Few groups of weights, on the levels of memristors, by ADMM (Yuan, Ma, Ding et al., ISLPED 2019).

    In turn: *admm*, towards all of these sets at once, each projection after the one before:  the filters,
    channels and columns that `groups` says, which is `{glob of sites: {group: share kept}}`;  rows or columns
    (`side`) within blocks of the size of an array, whose weights are `keep` in all (`GroupBudget`), falling
    from all by equal factors over the first `reach` of the phase;  fragments of one sign where the array
    needs them (FORMS, ISCA 2021);  and from `reach` on the levels of its devices, of which none is zero.
    *retrain*, with zeros and signs fixed, so that the weights stay in the arrays they were mapped to;  *fix*,
    where more and more weights stay on their levels.  Phases without rounds are left out.

    `array` is a name or a file as target `crossbar` has them, `weight_bits` a number of bits in place of the
    array's own.  `noise` is the log-normal deviation of conductances that the last two phases train for.
    With `metric: fisher` groups are worth what they are to the loss (`Curvature`).  Every layer keeps at
    least the share `least` of its groups.

    The report has the cost of each layer on its arrays against that of the dense matrix at the array's own
    bits, and which cells are used.
    """

    name = "crossbar"

    array: str = "admm_32x32"
    weight_bits: int | None = None
    keep: int | None = None
    side: Side = "column"
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    least: float = 0.0
    metric: Metric = "frobenius"
    admm: int = 20
    retrain: int = 10
    fix: int = 6
    reach: float = 0.7
    noise: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    rho: ScheduleSpec = GROWING
    decoupled: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    levels: dict[str, DeviceLevels] = field(default_factory=dict, init=False, repr=False)
    curvature: Curvature | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.own = CrossbarArray.load(self.array)
        self.machine = (
            self.own if self.weight_bits is None else replace(self.own, weight_bits=self.weight_bits)
        )
        try:
            self.machine.sound()
        except ValueError as error:
            raise UsageError(f"weight_bits={self.weight_bits} on array {self.array!r}: {error}") from None
        self.states = device_levels(self.machine)
        if self.metric not in get_args(Metric) or self.side not in get_args(Side):
            raise UsageError(
                f"metric={self.metric!r}, side={self.side!r}: known are "
                f"{', '.join((*get_args(Metric), *get_args(Side)))}"
            )
        if self.keep is None and not self.groups:
            raise UsageError(
                "nothing says what is kept; give keep, the number of weights, or groups such as {'fc*': "
                "{'filter': 0.5}}"
            )
        wrong = [
            f"{group}: {share}"
            for found in self.groups.values()
            for group, share in found.items()
            if group not in WHOLE or not 0 < share <= 1
        ]
        if wrong:
            raise UsageError(f"groups have {wrong[0]}; give {', '.join(WHOLE)} with a share kept in (0, 1]")
        if not 0 < self.reach < 1 or not 0 <= self.least <= 1 or self.noise < 0:
            raise UsageError(
                f"reach={self.reach}, least={self.least}, noise={self.noise}: shares within 0 and 1 (reach "
                "strictly), a deviation of 0 or more"
            )
        unknown = set(self.rates) - set(PHASES)
        if unknown or not all(rate > 0 for rate in self.rates.values()):
            raise UsageError(
                f"rates={dict(self.rates)!r} are not positive factors on the learning rate of phases; the "
                f"phases are {', '.join(PHASES)}"
            )

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        weights = self.weights_of(model)
        unmatched = [glob for glob in self.groups if not any(fnmatchcase(name, glob) for name in self.sites)]
        if unmatched:
            raise UsageError(
                f"groups name {unmatched[0]!r}, which matches no site; the sites are: {', '.join(self.sites)}"
            )
        total = sum(weight.numel() for weight in weights.values())
        if self.keep is not None and self.keep > total:
            raise UsageError(
                f"keep={self.keep:,} is more than the {total:,} weights of the sites; keep fewer"
            )
        self._structure(
            1.0, {name: weight.detach() for name, weight in weights.items()}
        )  # an impossible budget is refused before training

    def phases(self) -> Sequence[Phase]:
        steps = (
            ("admm", self.admm, self._begin),
            ("retrain", self.retrain, self._begin_retraining),
            ("fix", self.fix, self._begin_fixing),
        )
        return [Phase(name, rounds, begin, self.rates.get(name, 1.0)) for name, rounds, begin in steps]

    def _begin(self) -> list[Term]:
        self.curvature = None if self.metric == "frobenius" else Curvature(self.weights)
        measured = [] if self.curvature is None else [self.curvature]
        return [*measured, Admm(self.weights, [self._rule], as_schedule(self.rho, "rho"), self.decoupled)]

    def _begin_retraining(self) -> list[Term]:
        project(self.weights, self._structure(1.0, self.whole_weights()))
        return self._noisy([FixedSigns(self.weights)])

    def _begin_fixing(self) -> list[Term]:
        if not self.levels:
            project(self.weights, self._structure(1.0, self.whole_weights()))
            found = {name: self.states.frozen(weight) for name, weight in self.whole_weights().items()}
            self.levels = {name: levels for name, levels in found.items() if levels.scale is not None}
        return self._noisy(
            [
                ProgressiveFixing({name: self.weights[name] for name in self.levels}, self.levels),
                FixedSigns(self.weights),
            ]
        )

    def _noisy(self, terms: list[Term]) -> list[Term]:
        return [NoisyWeights(self.weights, self.noise, terms)] if self.noise else terms

    def _rule(self, progress: float, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        structure = self._structure(min(1.0, progress / self.reach), weights)
        if progress < self.reach:
            return structure
        return {name: Composed((bound, self.states)) for name, bound in structure.items()}

    def _structure(self, reached: float, weights: Mapping[str, Tensor]) -> dict[str, Constraint]:
        """Groups and signs, with the share `reached` of the way to `keep` gone."""
        parts: dict[str, list[Constraint]] = {name: self._whole_groups(name) for name in weights}
        if self.keep is not None:
            left = {
                name: Composed(tuple(found)).project(weights[name]) if found else weights[name]
                for name, found in parts.items()
            }
            total = sum(weight.numel() for weight in weights.values())
            kept = round(self.keep * (total / self.keep) ** (1 - reached))
            metric = {} if self.curvature is None else self.curvature.known()
            block = (self.machine.width, self.machine.rows)
            for name, bound in GroupBudget(kept, self.side, block, self.least, metric).divide(left).items():
                parts[name].append(bound)
        if self.machine.signs == "fragments":
            for found in parts.values():
                found.append(OneSign(self.machine.rows_at_once))
        return {name: Composed(tuple(found) or (Unconstrained(),)) for name, found in parts.items()}

    def _whole_groups(self, name: str) -> list[Constraint]:
        site, found = self.sites[name], dict[str, float]()
        for glob, shares in self.groups.items():
            if fnmatchcase(name, glob):
                found = {**shares, **found}
        sizes = {"filter": site.o, "channel": site.shape[1], "column": site.weights // site.o}
        return [
            Sparse(max(1, round(found[group] * sizes[group])), group) for group in WHOLE if group in found
        ]

    def ends(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        structure = self._structure(1.0, weights)
        for name, bound in structure.items():
            if name not in self.levels:
                self.levels[name] = self.states.frozen(bound.project(weights[name]))
        return {name: Composed((bound, self.levels[name])) for name, bound in structure.items()}

    def levels_in(self, name: str) -> int:
        return 2 * len(self.states.magnitudes)

    def reason(self, name: str, weight: Tensor) -> str:
        return f"{super().reason(name, weight)}, {self.levels[name]}"

    def close(self, model: nn.Module) -> Artifact:
        artifact = super().close(model)
        uses = uses_of(self.sites, {name: artifact.opened.weight(name) for name in self.sites}, self.machine)
        before, after = dense_costs(self.sites, self.own), {name: use.cost for name, use in uses.items()}
        report = artifact.report
        report.target = (
            f"crossbar:{self.array}, {self.machine.weight_bits}-bit weights, against "
            f"{self.own.weight_bits}-bit dense"
        )
        report.arrays = [row for use in uses.values() for row in use.rows]
        report.sites = [
            replace(row, before=row.before + before[row.site], after=row.after + after[row.site])
            for row in report.sites
        ]
        report.original, report.final = (
            sum(before.values(), report.original),
            sum(after.values(), report.final),
        )
        report.note(
            f"{sum(use.arrays for use in uses.values()):,} arrays of {self.machine.rows} x "
            f"{self.machine.columns} cells hold the weights"
        )
        choices = [
            replace(choice, cost=choice.cost + after[choice.site], dense=choice.dense + before[choice.site])
            for choice in artifact.plan
        ]
        return replace(artifact, plan=replace(artifact.plan, choices=tuple(choices)))

    def facts(self) -> dict[str, Any]:
        return {"scales": {name: (levels.scale or 0.0).hex() for name, levels in self.levels.items()}}

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.levels = {
            name: replace(self.states, scale=float.fromhex(scale)) for name, scale in facts["scales"].items()
        }
