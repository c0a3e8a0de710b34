"""Factors as they are stored: as named tensors of known sizes and types.

Each is in its number type and with its support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.form import ALL, STATIC, Form
from tdpass.formats.bonds import ORDER_TYPE
from tdpass.numbers import SCALE, VALUES, Earlier, Numbers, Part, numbers_named
from tdpass.ops import StorageOps, V
from tdpass.supports import SUPPORT, Support, support_named

Shapes = Mapping[str, tuple[int, ...]]
RANGE = "range"
_WITH_SUPPORT = "float32"
T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """How factors of these shapes are stored.

    No `numbers` where they have the type of the model's weights and no support. `orders` are stored beside
    them as they are, whole numbers of which so many have that name. With `activations` what is multiplied
    with `integer_factors` are integers too, in ranges stored beside these where they are `static`.
    """

    shapes: Shapes
    numbers: Mapping[str, Numbers]
    supports: Mapping[str, Support] = field(default_factory=dict)
    orders: Mapping[str, int] = field(default_factory=dict)
    activations: str = ""

    @classmethod
    def of(cls, form: Form, shapes: Shapes, orders: Mapping[str, int] | None = None) -> Self:
        """The storage that a form says.

        Raises `PlanError` for another count of number types or supports than of factors, an unknown one, and
        one that does not divide a factor.
        """
        named = form.numbers or ((_WITH_SUPPORT,) if form.support else ())
        numbers = _each(form, "number types", named, shapes, numbers_named)
        supports = _each(form, "supports", tuple(filter(None, form.support.split(","))), shapes, _support)
        partial = {name: support for name, support in supports.items() if support is not None}
        made = cls(shapes, numbers, partial, orders or {}, form.activations)
        made.parts()
        if form.activations and not made.integer_factors:
            raise PlanError(
                f"form '{form}' has no factor of int8 with one scale for each of its rows, so what it "
                f"reads is no integer; store it as 'int8', or leave out '{form.activations}'"
            )
        return made

    def parts(self) -> dict[str, Part]:
        """What is stored, by name; empty where no number types are named."""
        return {part: held for name in self.numbers for part, held in self.parts_of(name).items()}

    def parts_of(self, name: str) -> dict[str, Part]:
        """What is stored of one factor, by name, where number types are named."""
        each, shape, support = self.numbers[name], self.shapes[name], self.supports.get(name)
        kept = None if support is None else support.kept(shape)
        found = {_name(name, part): held for part, held in each.parts(shape, kept).items()}
        if support is not None:
            found[_name(name, SUPPORT)] = Part((math.ceil(support.bits(shape) / 8),), torch.uint8)
        return found

    @property
    def integer_factors(self) -> tuple[str, ...]:
        """The factors that products with integers may be made of.

        All of them are stored as signed bytes with one scale a row.
        """
        whole = (name for name in self.numbers if name not in self.supports)
        return tuple(
            name for name in whole if self.activations and self.numbers[name].scales_rows(self.shapes[name])
        )

    @property
    def ranges(self) -> tuple[str, ...]:
        """Names of the ranges that are stored: scale and zero point of what a factor is multiplied with."""
        names = self.integer_factors if self.activations == STATIC else ()
        return tuple(map(self.range_of, names))

    def range_of(self, name: str) -> str:
        """The name of what a factor's static range is stored as."""
        return f"{name}_{RANGE}"

    def scale_of(self, name: str) -> str:
        """The name of what the scales of a factor of integers are stored as."""
        return self.part_of(name, SCALE)

    def part_of(self, name: str, part: str) -> str:
        """The name under which one part of a factor is stored."""
        return _name(name, part)

    @property
    def earlier(self) -> dict[str, Earlier]:
        """The parts that earlier versions stored otherwise, by the name of each."""
        return {
            _name(name, part): found
            for name, each in self.numbers.items()
            for part, found in each.earlier(self.shapes[name]).items()
        }

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of all that is stored, by name."""
        factors = (
            {name: part.shape for name, part in self.parts().items()} if self.numbers else dict(self.shapes)
        )
        ranges = dict.fromkeys(self.ranges, (2,))
        return {**factors, **{name: (count,) for name, count in self.orders.items()}, **ranges}

    def count(self, name: str) -> int:
        """How many numbers the part of that name holds, 0 for what scales or places them."""
        if name not in self.shapes:
            return 0
        support = self.supports.get(name)
        return math.prod(self.shapes[name]) if support is None else support.kept(self.shapes[name])

    @property
    def params(self) -> int:
        """How many numbers are stored, what scales or places them not counted."""
        return sum(map(self.count, self.shapes))

    @property
    def bytes(self) -> int:
        """Bytes of all parts and orders; of the orders alone where factors are stored as they are."""
        return sum(part.bytes for part in (*self.parts().values(), *self.order_parts().values()))

    def order_parts(self) -> dict[str, Part]:
        """The orders as they are stored, by name."""
        return {name: Part((count,), ORDER_TYPE) for name, count in self.orders.items()}

    def store(
        self, factors: Mapping[str, Tensor], beside: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The parts of factors of floating-point numbers.

        Of a factor with a support the entries of largest magnitude are kept. `beside` has, by factor, parts
        such as scales to use instead of those that suit.
        """
        if not self.numbers:
            return dict(factors)
        beside = beside or {}
        parts = {
            part: held
            for name in self.numbers
            for part, held in self.stored(name, factors[name], beside.get(name)).items()
        }
        return {**parts, **{name: factors[name] for name in self.orders}}

    def stored(
        self, name: str, factor: Tensor, beside: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parts of one factor, as `store` makes them."""
        each, support = self.numbers[name], self.supports.get(name)
        if support is None:
            return {_name(name, part): held for part, held in each.store(factor, None, beside).items()}
        kept = support.choose(factor.detach().double().square())
        parts = {**each.store(factor * kept, kept, beside), SUPPORT: support.packed(kept)}
        return {_name(name, part): held for part, held in parts.items()}

    def restore(self, ops: StorageOps[V], held: Mapping[str, V], dtype: torch.dtype) -> Mapping[str, V]:
        """The factors that the parts stand for, in a floating-point type.

        As they are where no number types are named.
        """
        if not self.numbers:
            return held
        orders = {name: held[name] for name in self.orders}
        return {**{name: self.restored(ops, name, held, dtype) for name in self.numbers}, **orders}

    def restored(self, ops: StorageOps[V], name: str, held: Mapping[str, V], dtype: torch.dtype) -> V:
        """One factor of those that are stored in number types of their own, as `restore` makes it."""
        each, shape, support = self.numbers[name], self.shapes[name], self.supports.get(name)
        if support is None:
            return each.restore(
                ops, {part: held[_name(name, part)] for part in each.parts(shape)}, shape, dtype
            )
        count = support.kept(shape)
        kept = support.mask(ops, held[_name(name, SUPPORT)], shape)
        return each.restore(
            ops,
            {part: held[_name(name, part)] for part in each.parts(shape, count)},
            shape,
            dtype,
            kept,
            count,
        )


def _each(
    form: Form, what: str, texts: tuple[str, ...], shapes: Shapes, read: Callable[[str], T]
) -> dict[str, T]:
    """What is read from the texts, one for all factors or one for each."""
    if len(texts) not in {0, 1, len(shapes)}:
        raise PlanError(
            f"form '{form}' has {len(texts)} {what} for the factors {', '.join(shapes)}; give one for all, "
            "or one for each"
        )
    made = [read(text) for text in texts]
    return dict(zip(shapes, made if len(made) == len(shapes) else made * len(shapes), strict=False))


def _support(text: str) -> Support | None:
    return None if text == ALL else support_named(text)


def _name(factor: str, part: str) -> str:
    return factor if part == VALUES else f"{factor}_{part}"
