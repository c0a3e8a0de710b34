"""What methods that end in few weights, on few levels, share.

The last projection, and the plan that says what is stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.constraints.base import Constraint
from tdpass.digest import digest
from tdpass.form import DENSE, Form
from tdpass.formats.layer import cost_of, dense_cost
from tdpass.methods.base import Method
from tdpass.numbers.levels import MOST_LEVELS
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.training.placement import placed_like, whole
from tdpass.verbs import compress


class SparseWeights(Method):
    """`finish` puts every weight where it shall end and stores those that are not zero.

    They are stored on their levels where they have some.
    """

    final = True
    grouped = True

    @abstractmethod
    def ends(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        """The set that each of these whole, trained weights ends in; what is not named stays as it is."""

    @abstractmethod
    def levels_in(self, name: str) -> int:
        """How many values, zero not among them, the weights of a site may have; 0 for any."""

    def reason(self, name: str, weight: Tensor) -> str:
        """Why a layer is as it is, for the plan."""
        return f"{int(weight.count_nonzero()):,} of {weight.numel():,} weights kept"

    def stays_dense(self, name: str) -> bool:
        """Whether a site was left alone."""
        return False

    @torch.no_grad()
    def close(self, model: nn.Module) -> Artifact:
        result = self.template.filled(model)
        weights = self.weights_of(result)
        project(weights, self.ends({name: weight.detach() for name, weight in weights.items()}))
        return compress(
            result,
            plan=self.plan(weights),
            pipeline="factorize",
            example_inputs=self.example,
            cache=False,
            progress=self.progress,
        )

    def plan(self, weights: Mapping[str, Tensor]) -> RankPlan:
        """The plan that stores each weight as it is."""
        choices = []
        for name, site in self.sites.items():
            weight = weights[name].detach()
            form = self._form(name, weight)
            costs = cost_of(site, form), dense_cost(site)
            choices.append(
                Choice(
                    name,
                    site.shape,
                    form,
                    *costs,
                    reason=self.reason(name, weight),
                    fingerprint=digest(weight.cpu()),
                )
            )
        return RankPlan(tuple(choices), self.original, metric="weights")

    def _form(self, name: str, weight: Tensor) -> Form:
        """What a layer is stored as: the weights that are not zero, on their levels where it has some.

        Dense where that takes fewer bytes.
        """
        kept, levels = int(weight.count_nonzero()), self.levels_in(name)
        if self.stays_dense(name) or not kept:
            return DENSE
        types = (
            (f"levels{levels}",) if 1 < levels <= MOST_LEVELS else (str(weight.dtype).removeprefix("torch."),)
        )
        form = replace(DENSE, numbers=types, support=f"unstructured/{kept}" if kept < weight.numel() else "")
        return form if cost_of(self.sites[name], form).bytes < dense_cost(self.sites[name]).bytes else DENSE


@torch.no_grad()
def project(weights: Mapping[str, nn.Parameter], constraints: Mapping[str, Constraint]) -> None:
    """Put weights where their constraints want them."""
    for name, bound in constraints.items():
        weight = weights[name]
        weight.copy_(placed_like(bound.project(whole(weight.detach())), weight))
