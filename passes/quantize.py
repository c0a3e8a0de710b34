"""quantize: store weights and factors in a number type."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdpass.form import DENSE, Form
from tdpass.numbers import numbers_named
from tdpass.passes.stored import Stored
from tdpass.pipeline import register_pass
from tdpass.planner.offers import beside_remainder, remainder_format
from tdpass.site import Site


@register_pass
@dataclass(frozen=True)
class Quantize(Stored):
    """Store weights, or the factors of replaced sites, in a number type such as `int8` or `levels16`.

    Others are `int4/64` and `float16`.

    With `beside` a dense weight becomes `U V + Q(W - U V)`: factors of that rank in float16, and what they
    leave of it in the number type.  Sites that have a number type already are left as they are.
    """

    name = "quantize"

    numbers: str = "int8"
    beside: int = 0

    def form(self, present: Form, site: Site) -> Form:
        text = str(numbers_named(self.numbers))
        fmt = remainder_format(site) if self.beside and present == DENSE else None
        if fmt is not None:
            return beside_remainder(fmt, site, self.beside, text)
        return present if present.numbers else replace(present, numbers=(text,))
