"""A layer in some form: its factors, what it costs, and whether it may stand for a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdpass.cost import Cost, pays
from tdpass.errors import PlanError
from tdpass.form import DENSE, Form, Formed, Rank
from tdpass.formats.base import FORMATS
from tdpass.formats.integers import apply_integers, coded
from tdpass.formats.lines import apply_stored, lines_left
from tdpass.formats.storage import Storage
from tdpass.kinds import kind_of
from tdpass.ops import TorchOps
from tdpass.site import Site


def check_form(site: Site, form: Form) -> None:
    """Raise `PlanError` unless the form can be that of the site, `UsageError` for an unknown format."""
    FORMATS.get(form.format).check_rank(form.on(site), form.rank)
    storage_of(site, form)


def storage_of(site: Site, form: Form) -> Storage:
    """How the site's factors are stored in that form; raises `PlanError` where they cannot be."""
    fmt, own = FORMATS.get(form.format), form.on(site)
    return Storage.of(form, fmt.shapes(own, form.rank), fmt.orders(own, form.rank))


def cost_of(site: Site, form: Form) -> Cost:
    """What a site costs in that form, the bias not counted."""
    own = form.on(site)
    cost = FORMATS.get(form.format).cost(own, form.rank)
    if not form.encoded:
        return cost
    storage = storage_of(site, form)
    lines = lines_left(own, form, storage)
    if lines is not None:
        cost = FORMATS.get(form.format).cost(lines.site, form.rank)
    return cost.replace(params=storage.params, bytes=storage.bytes)


def dense_cost(site: Site) -> Cost:
    """What the dense layer costs, the bias not counted."""
    return FORMATS.get(DENSE.format).cost(site, DENSE.rank)


def shrinks(site: Site, format_name: str, rank: Rank, present: Form = DENSE) -> bool:
    """Whether the factored layer is smaller than the present one in a measure and larger in none.

    A site that was not seen running is taken to read as many positions for each of its outputs as its stride
    says.
    """
    known = site if site.seen else replace(site, extents=(kind_of(site).typical(site),))
    return pays(FORMATS.get(format_name).cost(known, rank), cost_of(known, present))


@dataclass(frozen=True)
class Layer(Formed):
    """A layer in some form: what may stand for the dense layer of a site.

    `factors` are held as the form's number types store them. `site` is its own geometry: `form.on` that of
    the site it stands at, which may have more channels. `floats` is the floating-point type of the weight it
    stands for, which only such factors do not tell.
    """

    site: Site
    form: Form
    factors: Mapping[str, Tensor]
    bias: Tensor | None = None
    floats: torch.dtype = torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """Run it in eager torch; whole numbers ask a table for these rows."""
        fmt = FORMATS.get(self.format)
        if self.site.table and not x.is_floating_point():
            return fmt.rows(TorchOps(), x, self.values(self.dtype), self.site, self.rank)
        if self.form.activations:
            values = coded(self.storage, self.factors, x.dtype)
            return apply_integers(fmt, x, values, self.bias, self.site, self.rank)
        return apply_stored(
            TorchOps(), x, self.factors, self.bias, self.site, self.form, self.storage, x.dtype
        )

    @property
    def storage(self) -> Storage:
        """How its factors are stored."""
        return storage_of(self.site, self.form)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of its bias and of those factors that have no number type of their own.

        `floats` where there are none.
        """
        tensors = [
            *(() if self.form.encoded else self.factors.values()),
            *(() if self.bias is None else (self.bias,)),
        ]
        return tensors[0].dtype if tensors else self.floats

    def values(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Its factors as floating-point numbers.

        Factors that have no number types of their own stay in the type they have.
        """
        return self.storage.restore(TorchOps(), self.factors, dtype) if self.form.encoded else self.factors

    def to(self, dtype: torch.dtype) -> Layer:
        """The same layer in another floating-point type.

        Factors that have number types of their own stay as they are stored.
        """
        kept = {
            name: factor.to(dtype).contiguous()
            for name, factor in self.factors.items()
            if factor.is_floating_point()
        }
        factors = self.factors if self.form.encoded else {**self.factors, **kept}
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, factors=factors, bias=bias, floats=dtype)

    def stored(self, form: Form) -> Layer:
        """The same layer with its factors in the number types of that form, and with its support."""
        stored = replace(self, form=form).storage.store(self.factors)
        return replace(self, form=form, factors=stored, floats=self.dtype)

    def converted(self, format_name: str) -> Layer:
        """The same layer in another format that stores the factors of the same chain, in their own type.

        Raises `NumericalError` where that format cannot without a loss, `PlanError` for the factors of
        another chain.
        """
        if format_name == self.format:
            return self
        ours, theirs = FORMATS.get(self.format), FORMATS.get(format_name)
        if ours.chain.name != theirs.chain.name:
            raise PlanError(
                f"'{self.form}' does not convert to {format_name}, which stores the factors of "
                f"{theirs.chain.name}; factorize the weight anew"
            )
        whole = {
            name: factor.double() if factor.is_floating_point() else factor
            for name, factor in self.factors.items()
        }
        factors = theirs.from_chain(ours.to_chain(whole, self.site), self.site)
        return replace(self, form=replace(self.form, format=format_name), factors=factors).to(self.dtype)

    def reconstruct(self) -> Tensor:
        """The dense weight it stands for."""
        return FORMATS.get(self.format).reconstruct(dict(self.values(self.dtype)), self.site)


def settles(layer: Layer) -> bool:
    """Whether a layer with fewer channels is a dense layer like any other of that many."""
    form = layer.form
    return form.narrow and not form.factored and not form.encoded and form.inputs != 0
