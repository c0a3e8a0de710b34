"""Which number types and supports a plan may choose among."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tdpass.form import DENSE, Form
from tdpass.numbers import numbers_named
from tdpass.supports import support_named


@dataclass(frozen=True)
class Offer:
    """Number types for weights and factors, and supports for weights.

    Each support goes with each number type, and with none.
    """

    numbers: tuple[str, ...] = ()
    supports: tuple[str, ...] = ()

    @classmethod
    def parse(cls, numbers: str, supports: str) -> Offer:
        """Read texts that are joined by +.

        Raises `PlanError` for one that is no number type, or no support.
        """
        names = tuple(str(numbers_named(text)) for text in filter(None, numbers.split("+")))
        return cls(names, tuple(str(support_named(text)) for text in filter(None, supports.split("+"))))

    def __bool__(self) -> bool:
        return bool(self.numbers or self.supports)

    def forms(self, plain: Form) -> Iterator[Form]:
        """Every form on offer of what has the type of the model's weights as yet."""
        types = [(), *((text,) for text in self.numbers)]
        for support in ("", *(self.supports if plain == DENSE else ())):
            yield from (replace(plain, numbers=each, support=support) for each in types if each or support)


NOTHING = Offer()
EVERYTHING = Offer(("int8", "int4", "levels8", "levels4"), ("unstructured/50%", "unstructured/25%"))
"""What is offered where a budget on bytes asks for more than factors in the type of the model's weights give."""
