"""Targets that are modelled.

Closed formulas over a layer's products, from a table of constants, without running anything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from tdpass.cost import Cost
from tdpass.errors import PlanError, UsageError
from tdpass.form import DENSE, Form, Rank
from tdpass.formats.base import FORMATS, Format
from tdpass.formats.layer import shrinks
from tdpass.kinds import kind_of
from tdpass.measures import MEASURES
from tdpass.models.base import Batch, Model
from tdpass.site import Site
from tdpass.targets.base import ONE_CALL, Setting, Target
from tdpass.targets.workload import Product, products_of


class ModelledTarget(Target):
    """A machine whose every cost is computed: there is no noise, and the whole is the sum of its parts.

    A layer costs what the products that it is made of cost, in any format; what lies between them (adding,
    reshaping, normalizing, activations) and layers that are no sites cost nothing here, which `notes` says.
    """

    @abstractmethod
    def cost_product(self, product: Product) -> Cost:
        """What one product costs, an amount of each of `measures`."""

    def cost(self, site: Site, forms: Sequence[Form], setting: Setting = ONE_CALL) -> list[Cost]:
        if not site.seen:
            raise UsageError(
                f"site {site.name!r} cannot be priced: the model was not seen running; pass data= or "
                "example_inputs="
            )
        return [self._cost(site, form, setting.batch) for form in forms]

    def filling(self, site: Site, format_name: str, ranks: Sequence[Rank]) -> list[Rank]:
        """Each rank raised, place after place, as far as that is free here and the layer smaller than dense.

        These are the edges of the machine's staircase.
        """
        known = site if site.seen else replace(site, extents=(kind_of(site).typical(site),))
        return list(dict.fromkeys(self._raised(known, format_name, rank) for rank in ranks))

    def _raised(self, site: Site, format_name: str, rank: Rank) -> Rank:
        fmt, price = FORMATS.get(format_name), self._at_one(site, format_name, rank)
        largest = fmt.ranks(site)[-1]
        if len(largest) != len(rank):  # a format of chains of several lengths
            return rank
        for place, top in enumerate(largest):
            below, above = rank[place], top + 1
            while above - below > 1:
                middle = (below + above) // 2
                tried = (*rank[:place], middle, *rank[place + 1 :])
                free = _allowed(fmt, site, tried) and self._at_one(site, format_name, tried) <= price
                below, above = (middle, above) if free else (below, middle)
            rank = (*rank[:place], below, *rank[place + 1 :])
        return rank

    def _at_one(self, site: Site, format_name: str, rank: Rank) -> float:
        return self._cost(site, Form(format_name, rank), 1).get(self.measures[0])

    def cost_models(
        self,
        models: Sequence[Model],
        call: Callable[[], Batch],
        setting: Setting,
        yardstick: Site | None = None,
    ) -> list[Cost]:
        for model in models:
            missing = ", ".join(sorted(name or "the model" for name in model.declined()))
            said = f"what target {self.name} says is that of the sites alone" + (
                f"; these layers are none: {missing}" if missing else ""
            )
            self.notes = list(dict.fromkeys([*self.notes, said]))
        return [
            sum((self._layer(model, site, setting) for site in model.sites()), self._nothing())
            for model in models
        ]

    def _layer(self, model: Model, site: Site, setting: Setting) -> Cost:
        layer = model.layer(site.name)
        (cost,) = self.cost(site, [DENSE if layer is None else layer.form], setting)
        return cost

    def _cost(
        self, site: Site, form: Form, batch: int, price: Callable[[Product], Cost] | None = None
    ) -> Cost:
        """The sum over the site's calls, per call of the model.

        Counts are rounded up where calls are shared by several samples. What stands there whether it is
        called or not is that of the largest call.  `price` is used in place of `cost_product`.
        """
        calls = [(replace(site, extents=(extent,)), times) for extent, times in Counter(site.extents).items()]
        products = [(products_of(call, form, batch), times) for call, times in calls]
        ones = [
            (sum(map(price or self.cost_product, found), self._nothing()), times) for found, times in products
        ]
        return Cost.of(
            {
                measure: _over_calls(
                    measure, [(one.get(measure), times) for one, times in ones], site.samples
                )
                for measure in self.measures
            }
        )

    def _nothing(self) -> Cost:
        return Cost.of(dict.fromkeys(self.measures, 0))


def _over_calls(measure: str, amounts: Sequence[tuple[float, int]], samples: int) -> float:
    """What calls cost together, each so often, for one of the samples that share them."""
    if MEASURES.get(measure).standing:
        return max(amount for amount, _ in amounts)
    total = sum(amount * times for amount, times in amounts)
    return -(-total // samples) if MEASURES.get(measure).whole else total / samples


def _allowed(fmt: Format, site: Site, rank: Rank) -> bool:
    try:
        fmt.check_rank(site, rank)
    except PlanError:
        return False
    return shrinks(site, fmt.name, rank)
