"""quantize: store weights and factors in a number type."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdpass.form import Form
from tdpass.numbers import numbers_named
from tdpass.passes.stored import Stored
from tdpass.pipeline import register_pass


@register_pass
@dataclass(frozen=True)
class Quantize(Stored):
    """Store weights, or the factors of sites that are replaced, in a number type such as `int8`, `int4/64`, `levels16` or `float16`.

    Sites that have a number type already are left as they are.
    """

    name = "quantize"

    numbers: str = "int8"

    def form(self, present: Form) -> Form:
        text = str(numbers_named(self.numbers))
        return present if present.numbers else replace(present, numbers=(text,))
