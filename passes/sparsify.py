"""sparsify: store a part of weights and factors, the rest being zero."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdpass.form import Form
from tdpass.passes.stored import Stored
from tdpass.pipeline import register_pass
from tdpass.site import Site
from tdpass.supports import support_named


@register_pass
@dataclass(frozen=True)
class Sparsify(Stored):
    """Keep a part of the entries of weights, or of the factors of sites that are replaced: `2:4`, `unstructured/30%`, `blocks4x4/50%`, `rows/50%`.

    `rounding` says which are kept: those that cost most to do without when the others make up for them
    (`moments`), those of largest magnitude times that of what they are multiplied by (`activations`), or
    those of largest magnitude (`nearest`).  Sites that have a support already are left as they are.
    """

    name = "sparsify"

    support: str = "2:4"

    def form(self, present: Form, site: Site) -> Form:
        text = str(support_named(self.support))
        return present if present.support else replace(present, support=text)
