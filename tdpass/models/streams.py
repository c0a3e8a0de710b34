"""What becomes of a model whose streams, or heads, are stored in other coordinates.

It has other weights, and norms that know what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class NewNorm:
    """The norm `adapter t + shift` with `t = c / sqrt(|c|^2 / reads + eps)`, c the first `reads` channels.

    `drops`: one channel lies behind these, the coordinate along the direction of the mean, which such a norm
    leaves out.  Without an adapter `[writes, reads]` it answers with t.  What it reads is added to through a
    `shortcut` `[to, from]` where the sum has other coordinates.
    """

    reads: int
    eps: float
    drops: bool
    adapter: Tensor | None = None
    shift: Tensor | None = None
    shortcut: Tensor | None = None


@dataclass(frozen=True)
class NewLayer:
    """Weight, `[o, i, *kernel]` or as the layer holds it, and bias of a layer."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class HeadWidth:
    """How many channels each head of a layer had, and has: `rows` heads of its weight, and `columns`."""

    before: int
    after: int
    rows: int
    columns: int

    def renamed(self, size: int) -> int | None:
        """What a size becomes that is that of a head, or of all of them together; None for another."""
        counts = {self.before: self.after}
        for heads in (self.rows, self.columns):
            counts.setdefault(heads * self.before, heads * self.after)
        return counts.get(size)


@dataclass
class StreamEdits:
    """What changes, by the tensor of the model that is held there.

    These are layers by their weight, norms by theirs, tables and other constants.  `heads` are layers whose
    heads have another width, so that views of what they make and read must follow.  `held` are the tensors
    as a recorded run names them, by the keys of the others.
    """

    held: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[int, NewLayer] = field(default_factory=dict)
    norms: dict[int, NewNorm] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, HeadWidth] = field(default_factory=dict)
