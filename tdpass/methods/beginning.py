"""Where a search among forms begins: how likely each form of each layer is before anything is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tdpass.constraints.allocation import Options, allocate
from tdpass.following import Progress
from tdpass.form import DENSE
from tdpass.formats.layer import Layer
from tdpass.methods.calibrated import Tried, losses_of
from tdpass.models.base import Model
from tdpass.models.batch import Batch
from tdpass.training.choices import Choices
from tdpass.training.parametrized import Parametrized
from tdpass.training.rank_search import TENTH, Prices

# of the mean of the largest losses, so that layers which lose nothing leave forms comparable
_LEAST = 1e-3


@dataclass(frozen=True)
class Beginning:
    """The logits that a search begins at, and the price of cost that they hold."""

    prices: Prices
    price: float
    logits: Mapping[str, Tensor]

    @classmethod
    def uniform(cls, losses: Mapping[str, Tensor], prices: Prices) -> Beginning:
        """Every form as likely as any other, whatever it loses."""
        return cls(prices, 0.0, {name: torch.zeros_like(found) for name, found in losses.items()})

    @classmethod
    def by(cls, losses: Mapping[str, Tensor], prices: Prices, penalty: float) -> Beginning:
        """Likely as forms lose little and cost little, at the price that meets the goal or the penalty."""
        price = prices.meeting(losses) if prices.goal else penalty
        return cls(prices, price, prices.logits(losses, price))

    def worth(self, logits: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What logits that were learned from here say of forms, for a choice that is held to the goal by itself."""
        return self.prices.worth(logits, self.price) if self.prices.goal else logits


def unit_of(losses: Mapping[str, Tensor], prices: Prices, penalty: float) -> float:
    """What a layer loses on average in the choice that loses least: by so much, losses are far apart."""
    names = list(losses)
    if prices.goal:
        options = {
            name: Options(prices.costs[name].double().numpy(), losses[name].double().cpu().numpy())
            for name in names
        }
        chosen = allocate(options, prices.goal, str)
    else:
        chosen = {name: int((losses[name].cpu() + penalty * prices.costs[name]).argmin()) for name in names}
    lost = sum(float(losses[name][chosen[name]]) for name in names) / len(names)
    most = sum(float(losses[name].max()) for name in names) / len(names)
    return max(lost, _LEAST * most) or TENTH


def measured(
    model: Model,
    layers: Mapping[str, Parametrized],
    distances: Mapping[str, Tensor],
    batches: Sequence[Batch],
    progress: Progress,
) -> dict[str, Tensor]:
    """KL(dense || network) with one layer alone in each of its forms, the first of which is dense.

    `distances` are the relative squared errors of the forms.
    """
    sites = {site.name: site for site in model.sites()}

    def layer(name: str, k: int) -> Layer:
        choices, parts = layers[name].made_by, layers[name].originals
        assert isinstance(choices, Choices)
        with torch.no_grad():
            weight = choices.one(k, *(part.detach() for part in parts))
        return Layer(sites[name], DENSE, {"kernel": weight}, model.bias(name))

    tried = {
        name: Tried(
            [partial(layer, name, k) for k in range(1, len(found))],
            [math.sqrt(max(0.0, float(distance))) for distance in found[1:]],
        )
        for name, found in distances.items()
    }
    losses = losses_of(model, tried, batches, progress)
    return {
        name: torch.tensor([0.0, *losses[name]]).to(found).clamp(max=torch.finfo(found.dtype).max)
        for name, found in distances.items()
    }
