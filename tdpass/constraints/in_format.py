"""in_format: weights that a format holds exactly at a given rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from tdpass.constraints.base import Constraint, checked, register_constraint
from tdpass.constraints.spectral import SPECTRAL
from tdpass.errors import PlanError
from tdpass.formats import FORMATS, Factors, Rank
from tdpass.formats.base import offered_formats
from tdpass.site import Site


@register_constraint
@dataclass(frozen=True)
class InFormat(Constraint):
    """`reconstruct(factors)` for any factors of the site in `format` at `rank`.

    The projection is exact for formats of one matrix and within sqrt(2) or sqrt(cuts) of it for `tucker2` and
    `tensor_train`; other formats have a local optimum, searched from `start` where that is given: a search
    that begins anew may leave an allowed weight for another by a third of its norm.  Raises `PlanError` for a
    format or a rank that does not fit, or a weight of another shape.
    """

    site: Site
    format: str
    rank: Rank
    start: Factors | None = field(default=None, compare=False, repr=False)
    name = "in_format"

    @property
    def searched(self) -> bool:
        """Whether the projection ends in a local optimum."""
        return self.format not in SPECTRAL

    def near(self, weight: Tensor) -> InFormat:
        """The same set, where the search goes on from what it finds for this weight."""
        return replace(self, start=self.factors(weight)) if self.searched and self.start is None else self

    def __post_init__(self) -> None:
        form = FORMATS.get(self.format)
        if not form.fits(self.site):
            fitting = ", ".join(name for name in offered_formats() if FORMATS.get(name).fits(self.site))
            raise PlanError(
                f"format {self.format} does not fit site {self.site.name!r} of shape {self.site.shape}; "
                f"these do: {fitting}"
            )
        form.check_rank(self.site, self.rank)

    def project(self, weight: Tensor) -> Tensor:
        return self._nearest(self._checked(weight)).to(weight)

    def factors(self, weight: Tensor) -> Factors:
        """Factors of the projection, float64 on the CPU, by the format itself."""
        form, exact = FORMATS.get(self.format), self._checked(weight).double().cpu()
        if self.start is None or not self.searched:
            return form.factorize(exact, self.site, self.rank)
        return form.refine(exact, self.site, self.rank, self.start)

    def _nearest(self, weight: Tensor) -> Tensor:
        if self.format in SPECTRAL:
            return SPECTRAL[self.format].nearest(weight, self.site, self.rank).contiguous()
        return FORMATS.get(self.format).reconstruct(self.factors(weight), self.site).contiguous()

    def _checked(self, weight: Tensor) -> Tensor:
        if tuple(weight.shape) != self.site.shape:
            raise PlanError(
                f"site {self.site.name!r} has shape {self.site.shape}, the weight {tuple(weight.shape)}; "
                "make the constraint from this model"
            )
        return checked(weight)

    def __str__(self) -> str:
        return f"{self.format} {self.rank}"
