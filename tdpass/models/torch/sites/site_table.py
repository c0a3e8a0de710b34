"""The sites of a module: which are dense, which are factored, and why other layers are none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats.layer import Layer, settles
from tdpass.models.extents import UNREACHED, with_extents
from tdpass.models.torch.graphs.quantized_graph import why_graph_quantized
from tdpass.models.torch.sites.factored import find_factored, put_product, settled
from tdpass.models.torch.sites.placement import place_layer, placed_layer
from tdpass.models.torch.sites.readers import graph_readers
from tdpass.models.torch.sites.sites import Matched, find_sites
from tdpass.tape import Tape, site_order

T = TypeVar("T")


@dataclass
class SiteTable:
    """What is known of the sites by name, in the order of first use where known.

    `replaced` names those with a factored layer in place, `came_factored` those of them that the module came
    with. `declined` has the reasons for other layers.
    """

    by_name: dict[str, Matched] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    came_factored: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """The sites of a module as it is."""
        found, declined = find_sites(module)
        table = cls({matched.site.name: matched for matched in found}, declined)
        table._adopt_factored(module)
        if isinstance(module, GraphModule):
            table.leave(graph_readers(module, table.by_name))
            table.declined.update(why_graph_quantized(module))
        return table

    def matched(self, name: str) -> Matched:
        """The modules of a site; raises `PlanError` for an unknown one."""
        if name not in self.by_name:
            raise PlanError(f"the model has no site {name!r}; `tdpass inspect` lists them")
        return self.by_name[name]

    @property
    def dense(self) -> dict[str, Matched]:
        """The sites that are not replaced."""
        return {name: matched for name, matched in self.by_name.items() if name not in self.replaced}

    @property
    def weights(self) -> dict[int, str]:
        """The dense sites by the id of their weight."""
        return {id(matched.weight): name for name, matched in self.dense.items()}

    @property
    def apart(self) -> frozenset[int]:
        """The ids of biases that are no part of their site."""
        matched = [one for one in self.by_name.values() if one.apart]
        return frozenset(id(bias) for one in matched for bias in one.biases if bias is not None)

    @property
    def modules(self) -> set[nn.Module]:
        """All modules of all sites."""
        return {module for matched in self.by_name.values() for module in matched.modules}

    def by_module(self, given: Mapping[str, T]) -> dict[int, T]:
        """What is given by site, by the id of every module of the site."""
        return {id(module): one for name, one in given.items() for module in self.matched(name).modules}

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Sites that stay dense, each with the reason."""
        self.declined.update(reasons)
        self.by_name = {name: matched for name, matched in self.by_name.items() if name not in reasons}

    def see(self, tapes: Sequence[Tape]) -> dict[str, Matched]:
        """Take order and extents from recorded runs, and leave dense sites that no run calls.

        Returns the dense ones before.
        """
        called = site_order(tapes)
        known = [name for name in called if name in self.by_name]
        rest = [name for name in self.by_name if name not in called]
        self.by_name = {
            name: replace(self.by_name[name], site=with_extents(self.by_name[name].site, tapes))
            for name in (*known, *rest)
        }
        dense = self.dense
        self.leave({name: UNREACHED for name in dense if name not in called})
        return dense

    def take(self, seen: SiteTable) -> None:
        """What was seen of a copy of the module."""
        self.by_name = {
            name: replace(self.by_name[name], site=matched.site) for name, matched in seen.by_name.items()
        }
        self.declined = dict(seen.declined)

    def put(self, name: str, layer: Layer) -> None:
        """Put a layer at every use of a site."""
        place_layer(self.matched(name), layer)
        self.replaced.add(name)
        self.came_factored.discard(name)

    def settle(self) -> dict[str, Form]:
        """Take dense layers with fewer channels that stand for sites for their own; returns their forms."""
        layers = {name: placed_layer(self.matched(name)) for name in self.replaced}
        narrow = {name: layer.form for name, layer in layers.items() if settles(layer)}
        self.by_name = {
            name: settled(matched) if name in narrow else matched for name, matched in self.by_name.items()
        }
        self.replaced -= set(narrow)
        return narrow

    def multiply_out(self) -> None:
        """Let every layer that came factored compute with the weight of its factors, as a dense site."""
        for name in self.came_factored:
            put_product(self.by_name[name])
        self.replaced -= self.came_factored
        self.came_factored = set()

    def scale_columns(self, name: str, scale: Tensor) -> None:
        """Multiply the columns of a dense site's weight, in a new parameter."""
        matched = self.by_name[name]
        scaled = matched.stored(matched.dense().double() * scale.double()).to(matched.weight)
        placed = nn.Parameter(scaled, requires_grad=matched.weight.requires_grad)
        matched.modules[0]._parameters["weight"] = placed
        self.by_name[name] = replace(matched, weight=placed)

    def rejoin(self, path: str, whole: Matched | None) -> None:
        """Put the site of a module that was divided, where it had one, in the place of its slices."""
        prefix = f"{path}.".removeprefix(".")
        found: dict[str, Matched] = {}
        for name, matched in self.by_name.items():
            if not name.startswith(prefix):
                found[name] = matched
            elif whole is not None:
                found[whole.site.name] = whole
        self.by_name = found
        if whole is None:
            self.declined[path] = "none of its projections is worth a layer of its own"

    def copy(self, memo: dict[int, Any]) -> SiteTable:
        """The same of a copy of the module that was made with `memo`."""
        copies = {name: matched.copy(memo) for name, matched in self.by_name.items()}
        return SiteTable(copies, dict(self.declined), set(self.replaced), set(self.came_factored))

    def _adopt_factored(self, module: nn.Module) -> None:
        found, declined = find_factored(module)
        self.came_factored = {matched.site.name for matched in found}
        if not (found or declined):
            return
        order = {path: place for place, (path, _) in enumerate(module.named_modules())}
        every = [*self.by_name.values(), *found]
        self.by_name = {one.site.name: one for one in sorted(every, key=lambda one: order[one.site.name])}
        self.replaced |= self.came_factored
        self._take_back({*declined, *(path for matched in found for path in matched.paths)})
        self.declined |= declined

    def _take_back(self, held: Collection[str]) -> None:
        """Forget why these modules, and those right within them, are none."""
        for name in [name for name in self.declined if name in held or name.rpartition(".")[0] in held]:
            del self.declined[name]
