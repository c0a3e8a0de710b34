"""SVD training: singular values and vectors trained, few of the values kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.constraints.base import Constraint
from tdpass.constraints.in_format import InFormat
from tdpass.cost import BudgetValue
from tdpass.errors import UsageError
from tdpass.formats.layer import shrinks
from tdpass.methods.base import register_method
from tdpass.methods.factored import Factored
from tdpass.site import Site
from tdpass.training.fixed_weights import FixedWeights
from tdpass.training.parametrized import dense_values
from tdpass.training.phases import Phase
from tdpass.training.placement import Template, whole
from tdpass.training.singular import (
    SPARSITY,
    FewValues,
    Orthogonal,
    Triplet,
    triplets,
    with_singular_values,
)
from tdpass.training.terms import Term

OneMatrix = Literal["channel_svd", "spatial_svd"]
Sparsity = Literal["hoyer", "hoyer-square", "l1"]


@register_method
@dataclass
class SvdTraining(Factored):
    """min f(U diag(s) V^T) + lambda_o sum_l D(U_l, V_l) + lambda_s sum_l R(s_l) over all U, s and V.

    Yang, Tang, Wen, Yan, Hu, Li, Li, Chen: Learning Low-rank Deep Neural Networks via Singular Vector
    Orthogonality Regularization and Singular Value Sparsification, CVPR Workshops 2020.  The matrix of a
    convolution is W[o, (i h w)] in `channel_svd` and W[(i h), (o w)] in `spatial_svd`; a linear layer's
    is W.  Those of LSTMs and GRUs are linear layers once `tdpass.open_recurrent` has opened them.  D =
    (||U^T U - I||^2 + ||V^T V - I||^2) / r^2 keeps U and V near orthonormal, so that a step needs no
    decomposition; R is ||s||_1 / ||s||_2 (`hoyer`), its square (`hoyer-square`) or ||s||_1 (`l1`).

    In turn: *factored*, with D alone, for a network that is not trained yet;  *sparsify*, with both;
    then in each layer the smallest singular values go whose squares are no more than `energy` of all, or
    over all layers those that a `budget` on params or macs leaves no room for (`RankBudget`), and layers
    that are no smaller in factors go back to dense;  *tune*, with D alone and what went held at zero.
    Phases without rounds are left out.

    The network that `prepare` returns stands in the model's place: at full rank it has more parameters
    than the model, as the report says with the memory that training held, and computes each weight from
    its factors before it is used.
    """

    name = "svd-training"

    format: OneMatrix = "channel_svd"
    energy: float = 1e-2
    budget: Mapping[str, BudgetValue] | None = None
    sparsity: Sparsity = "hoyer"
    sparse: float = 0.03
    orthogonal: float = 1.0
    factored: int = 0
    sparsify: int = 20
    tune: int = 10
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    ranks: dict[str, int | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("format", self.format, get_args(OneMatrix)),
            ("sparsity", self.sparsity, tuple(SPARSITY)),
        ):
            if value not in known:
                raise UsageError(f"{option}={value!r} is unknown to {self.name}; known: {', '.join(known)}")
        if not 0 <= self.energy < 1:
            raise UsageError(
                f"energy={self.energy} is not within 0 to 1; "
                "it is the share of the squared singular values that goes, such as 0.01"
            )
        if self.sparse < 0 or self.orthogonal < 0:
            raise UsageError(
                f"sparse={self.sparse}, orthogonal={self.orthogonal}: weights in the loss are 0 or more"
            )

    @torch.no_grad()
    def choose(self, model: nn.Module) -> None:
        if self.budget is not None:  # an impossible budget is refused before training
            self.rank_budget(self.budget).divide(self.weights_of(model))

    def restructured(self, model: nn.Module) -> nn.Module:
        self.dense = Template(model)
        network = with_singular_values(
            model, {name: (site, self.format_of(site)) for name, site in self.sites.items()}
        )
        self.trains, self.replaces = (
            sum(parameter.numel() for parameter in net.parameters()) for net in (network, model)
        )
        return network

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        try:
            self.layers = triplets(model, self.sites)
        except AttributeError:
            raise UsageError(
                "the model does not hold singular values; "
                f"attach {self.name} to the module that prepare() returned"
            ) from None
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.layers.items()
            for part in ("u", "s", "v")
        }

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("factored", self.factored, self._begin_factored),
            Phase("sparsify", self.sparsify, self._begin_sparse),
            Phase("tune", self.tune, self._begin_tuning),
        ]

    def _begin_factored(self) -> list[Term]:
        return [Orthogonal(self.layers, self.orthogonal)]

    def _begin_sparse(self) -> list[Term]:
        return [*self._begin_factored(), FewValues(self.layers, self.sparsity, self.sparse)]

    def _begin_tuning(self) -> list[Term]:
        if not self.ranks:
            self.ranks = self._found(
                {name: whole(layer.weight().detach()) for name, layer in self.layers.items()}
            )
        low: dict[str, Triplet] = {}
        for name, rank in self.ranks.items():
            if rank is not None:
                low[name] = self.layers[name]
                low[name].keep(rank)
        return [
            Orthogonal(low, self.orthogonal),
            FixedWeights({name: layer.s for name, layer in low.items()}),
        ]

    def _found(self, weights: Mapping[str, Tensor]) -> dict[str, int | None]:
        """The rank of each layer, None for one that stays dense."""
        if self.budget is None:
            return {
                name: self._paying(self.sites[name], layer.rank(self.energy))
                for name, layer in self.layers.items()
            }
        divided = self.rank_budget(self.budget).divide(weights)
        return {
            name: bound.rank[0] if isinstance(bound, InFormat) else None for name, bound in divided.items()
        }

    def _paying(self, site: Site, rank: int) -> int | None:
        return rank if shrinks(site, self.format_of(site), (rank,)) else None

    def constraints(self, weights: Mapping[str, Tensor]) -> Mapping[str, Constraint]:
        kept = {name: rank for name, rank in (self.ranks or self._found(weights)).items() if rank is not None}
        return {
            name: InFormat(self.sites[name], self.format_of(self.sites[name]), (rank,))
            for name, rank in kept.items()
        }

    def facts(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def recall(self, facts: Mapping[str, Any]) -> None:
        self.ranks = dict(facts["ranks"])

    def merged(self, model: nn.Module) -> nn.Module:
        trained = super().merged(model)
        return self.dense.holding(dense_values(trained, self.dense.names), trained.training)

    def close(self, model: nn.Module) -> Artifact:
        artifact = super().close(model)
        times = f"{self.trains / self.replaces:.2f} times those of the dense model"
        made = sum(site.weights for site in self.sites.values())
        artifact.report.note(
            f"{self.name} trained {self.trains:,} parameters, {times}; "
            f"every step computes the {made:,} weights of its sites from them"
        )
        return artifact
