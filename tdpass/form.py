"""Form: what a site is stored as, as one value with a text that people read and write."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tdpass.documents import Size
from tdpass.errors import PlanError
from tdpass.flattening import Flattened

Rank = tuple[int, ...]
_RANK = re.compile(r"[1-9]\d*(x[1-9]\d*)*")
_NUMBERS = re.compile(r"[a-z]+\d+(/[a-z0-9]+)*")
_SUPPORT = re.compile(r"[1-9]\d*:[1-9]\d*|(rows|columns|unstructured|blocks[1-9]\d*x[1-9]\d*)/([1-9]\d*|\d+(\.\d+)?%)")
_GRAMMAR = "write a format, then its rank, number types and support where it has them, such as 'tucker2 16x24 int8' or 'dense 2:4'"


@dataclass(frozen=True)
class Form(Flattened):
    """The format that factors the weight, its rank, and how the factors are stored.

    `numbers` names the number type of each factor, in the format's order, or one for all of them; none is the type that the model's
    weights have, and single precision where a support is named.  `support` says of which entries of each factor the values are stored,
    one text for all factors or one for each, joined by commas: all of them (empty), `2:4`, `rows/8`, `columns/30%`, `blocks4x4/12`,
    `unstructured/500`.

    >>> Form.parse("tucker2 16x24 int8")
    Form(format='tucker2', rank=(16, 24), numbers=('int8',), support='')
    >>> str(Form("dense", (), support="2:4"))
    'dense 2:4'
    """

    format: str
    rank: tuple[Size, ...]
    numbers: tuple[str, ...] = ()
    support: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.format, "x".join(map(str, self.rank)), ",".join(self.numbers), self.support) if part)

    @property
    def encoded(self) -> bool:
        """Whether factors are stored otherwise than as plain tensors of the type that the model's weights have."""
        return bool(self.numbers or self.support)

    @property
    def family(self) -> str:
        """The text without the rank."""
        return str(replace(self, rank=()))

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read what `str` writes; raises `PlanError` for anything else."""
        name, *parts = text.split() or [""]
        rank = parts.pop(0) if parts and _RANK.fullmatch(parts[0]) else ""
        numbers = parts.pop(0).split(",") if parts and not _supports(parts[0]) else []
        support = parts.pop(0) if parts else ""
        if not name or parts or not all(map(_NUMBERS.fullmatch, numbers)) or (support and not _supports(support)):
            raise PlanError(f"form {text!r} is not understood; {_GRAMMAR}")
        return cls(name, tuple(int(size) for size in rank.split("x") if size), tuple(numbers), support)


def _supports(text: str) -> bool:
    return all(map(_SUPPORT.fullmatch, text.split(",")))


DENSE = Form("dense", ())
"""A site as it is."""


class Formed:
    """What has a form: the two parts of it that are asked for most."""

    form: Form

    @property
    def format(self) -> str:
        """Name of the format."""
        return self.form.format

    @property
    def rank(self) -> Rank:
        """Rank of the format."""
        return self.form.rank
