"""Which number types and supports a plan may choose among."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS, Format
from tdpass.numbers import numbers_named
from tdpass.site import Site
from tdpass.supports import support_named

FEW_BITS = 4
BESIDE = "float16"


@dataclass(frozen=True)
class Offer:
    """Number types for weights and factors, and supports for weights.

    Each support goes with each number type, and with none. `beside` are ranks of factors in float16 beside
    which the rest of a weight is stored in each number type of at most four bits.
    """

    numbers: tuple[str, ...] = ()
    supports: tuple[str, ...] = ()
    beside: tuple[int, ...] = ()

    @classmethod
    def parse(cls, numbers: str, supports: str, beside: str = "") -> Offer:
        """Read texts that are joined by +.

        Raises `PlanError` for one that is no number type, no support, or no rank.
        """
        ranks = tuple(filter(None, beside.split("+")))
        if not all(map(str.isdecimal, ranks)) or "0" in ranks:
            raise PlanError(f"{beside!r} is no list of ranks; write them as '8' or '8+16'")
        return cls(
            tuple(str(numbers_named(text)) for text in filter(None, numbers.split("+"))),
            tuple(str(support_named(text)) for text in filter(None, supports.split("+"))),
            tuple(map(int, ranks)),
        )

    def __bool__(self) -> bool:
        return bool(self.numbers or self.supports)

    def forms(self, plain: Form) -> Iterator[Form]:
        """Every form on offer of what has the type of the model's weights as yet."""
        types = [(), *((text,) for text in self.numbers)]
        for support in ("", *(self.supports if plain == DENSE else ())):
            yield from (replace(plain, numbers=each, support=support) for each in types if each or support)

    def with_remainder(self, site: Site) -> Iterator[Form]:
        """Forms of a site as few factors and what they leave of the weight."""
        fmt = remainder_format(site)
        few = [text for text in self.numbers if numbers_named(text).bits <= FEW_BITS]
        if fmt is not None:
            yield from (beside_remainder(fmt, site, rank, text) for rank in self.beside for text in few)


def remainder_format(site: Site) -> Format | None:
    """The format of few factors and what they leave of that site's weight."""
    return next((fmt for fmt in FORMATS if fmt.remainder and fmt.fits(site)), None)


def beside_remainder(fmt: Format, site: Site, rank: int, numbers: str) -> Form:
    """The form of a format with a remainder stored in a number type, and with the factors in float16."""
    shapes = fmt.shapes(site, (rank,))
    return Form(fmt.name, (rank,), tuple(numbers if name == fmt.remainder else BESIDE for name in shapes))


NOTHING = Offer()
EVERYTHING = Offer(("int8", "int4", "levels8", "levels4"), ("unstructured/50%", "unstructured/25%"), (8,))
"""What is offered where a budget on bytes asks for more than factors in the type of the weights give."""
