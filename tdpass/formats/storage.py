"""Factors as they are stored: each in its number type, as named tensors of known sizes and types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.numbers import VALUES, Numbers, Part, numbers_named
from tdpass.ops import Ops, V

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Storage:
    """How factors of these shapes are stored; no `numbers` where they have the type of the model's weights."""

    shapes: Shapes
    numbers: Mapping[str, Numbers]

    @classmethod
    def of(cls, form: Form, shapes: Shapes) -> Self:
        """The storage that a form says.

        Raises `PlanError` for another count of number types than of factors, an unknown one, one that does not divide a factor, and
        for a support, which no front end can store.
        """
        if form.support:
            raise PlanError(f"form '{form}' asks for the support {form.support!r}, which neither torch nor ONNX layers store; leave it out")
        if len(form.numbers) not in {0, 1, len(shapes)}:
            raise PlanError(f"form '{form}' has {len(form.numbers)} number types for the factors {', '.join(shapes)}; give one for all, or one for each")
        named = [numbers_named(text) for text in form.numbers]
        made = cls(shapes, dict(zip(shapes, named if len(named) == len(shapes) else named * len(shapes), strict=False)))
        made.parts()
        return made

    def parts(self) -> dict[str, Part]:
        """What is stored, by name; empty where no number types are named."""
        return {_name(name, part): held for name, each in self.numbers.items() for part, held in each.parts(self.shapes[name]).items()}

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of all that is stored, by name."""
        return {name: part.shape for name, part in self.parts().items()} if self.numbers else dict(self.shapes)

    @property
    def params(self) -> int:
        """How many numbers are stored, what scales them not counted."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts().values())

    def store(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of factors of floating-point numbers."""
        if not self.numbers:
            return dict(factors)
        return {_name(name, part): held for name, each in self.numbers.items() for part, held in each.store(factors[name]).items()}

    def restore(self, ops: Ops[V], held: Mapping[str, V], dtype: torch.dtype) -> Mapping[str, V]:
        """The factors that the parts stand for, in a floating-point type; as they are where no number types are named."""
        if not self.numbers:
            return held
        found: dict[str, V] = {}
        for name, each in self.numbers.items():
            shape = self.shapes[name]
            found[name] = each.restore(ops, {part: held[_name(name, part)] for part in each.parts(shape)}, shape, dtype)
        return found


def _name(factor: str, part: str) -> str:
    return factor if part == VALUES else f"{factor}_{part}"
