"""Sums over products with one matrix, in Einstein's notation: a linear layer between changes of axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Self

from tdpass.errors import UnsupportedError

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """`y = x . w` over the axes `summed` of w, of which those in `made` are new in y.

    `inward` orders the axes of x so that those summed over come last, in the order of w's; `outward` orders
    those that are left, and then w's, as y has them.
    """

    made: Axes
    summed: Axes
    inward: Axes
    outward: Axes

    @classmethod
    def of(cls, equation: str, weight: int, rank: int | None) -> Self:
        """That of an equation of two operands, operand `weight` of which is w; `rank` is that of x.

        Raises `UnsupportedError` for another kind of sum.
        """
        text = equation.replace(" ", "")
        terms, arrow, made = text.partition("->")
        if not arrow:  # then it makes, in the alphabet's order, the letters that occur once
            letters = sorted(set(filter(str.isalpha, terms)))
            made = "..." * ("..." in terms) + "".join(x for x in letters if terms.count(x) == 1)
        of_weight, of_data = (terms.split(",")[place] for place in (weight, 1 - weight))
        if "..." in of_data:
            if rank is None:
                raise UnsupportedError(
                    "the rank of the data is unknown, and dots in the equation stand for some of it"
                )
            dots = "".join(chr(ord("0") + k) for k in range(rank - len(of_data) + len("...")))
            of_data, made = of_data.replace("...", dots), made.replace("...", dots)
        summed = [letter for letter in of_weight if letter in of_data and letter not in made]
        new = [letter for letter in of_weight if letter in made and letter not in of_data]
        rest = [letter for letter in of_data if letter not in summed]
        once = all(len(set(term)) == len(term) for term in (of_weight, of_data, made))
        whole = len(summed) + len(new) == len(of_weight) and bool(summed) and bool(new)
        if not once or not whole or set(made) != {*rest, *new}:
            raise UnsupportedError(
                f"'{text}' is no product with one matrix, along one axis or several; write it as a MatMul"
            )
        return cls(
            tuple(of_weight.index(letter) for letter in new),
            tuple(of_weight.index(letter) for letter in summed),
            tuple(of_data.index(letter) for letter in (*rest, *summed)),
            tuple([*rest, *new].index(letter) for letter in made),
        )

    @property
    def plain(self) -> bool:
        """Whether w is a matrix as it is."""
        return len(self.made) == len(self.summed) == 1

    def matrix(self, weight: Tensor) -> Tensor:
        """`[o, i]` of w."""
        outputs = math.prod(weight.shape[axis] for axis in self.made)
        return weight.permute(*self.made, *self.summed).reshape(outputs, -1)

    def stored(self, matrix: Tensor, shape: Axes) -> Tensor:
        """W, of that shape, of `[o, i]`."""
        axes = (*self.made, *self.summed)
        turned = matrix.reshape(tuple(shape[axis] for axis in axes))
        return turned.permute(tuple(axes.index(axis) for axis in range(len(axes))))


def moves(axes: Axes) -> Axes | None:
    """The order of axes; None where it leaves them as they are."""
    return None if list(axes) == sorted(axes) else axes
