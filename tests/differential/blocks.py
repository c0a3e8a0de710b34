"""Blocks of random torch networks: what real ones do to a weight besides calling its layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sizes = tuple[int, ...]
CHANNELS_FIRST = {"line": 1, "image": 2}
ROWS = ("row", "rows", "grid")
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.relu, torch.tanh, F.gelu, F.silu, lambda x: x)


@dataclass
class Here:
    """What a block reads: the kind of tensor and its sizes without the batch."""

    kind: str
    sizes: Sizes
    rng: Random

    @property
    def channels(self) -> int:
        return self.sizes[0] if self.kind in CHANNELS_FIRST else self.sizes[-1]

    def with_channels(self, channels: int) -> Here:
        sizes = (channels, *self.sizes[1:]) if self.kind in CHANNELS_FIRST else (*self.sizes[:-1], channels)
        return Here(self.kind, sizes, self.rng)

    def layer(self, out: int, inputs: int | None = None, groups: int = 1) -> nn.Module:
        """A linear layer, or a convolution that keeps the positions."""
        bias, inputs = self.rng.random() < 0.6, inputs or self.channels
        if self.kind in ROWS:
            return nn.Linear(inputs, out, bias=bias)
        kernel = (
            self.rng.choice((1, 3, 3, 5))
            if self.kind == "line"
            else self.rng.choice((1, 3, 3, (3, 1), (1, 5)))
        )
        cls = (nn.Conv1d, nn.Conv2d)[CHANNELS_FIRST[self.kind] - 1]
        return cls(inputs, out, kernel, padding="same", groups=groups, bias=bias)

    def norm(self) -> nn.Module:
        """A batch-norm on axis 1, which for rows is not the one that layers write."""
        cls = nn.BatchNorm2d if len(self.sizes) == 3 else nn.BatchNorm1d
        return cls(self.sizes[0], affine=self.rng.random() < 0.8, eps=self.rng.choice((1e-5, 1e-3)))

    def maybe_norm(self, share: float = 0.5) -> nn.Module:
        return self.norm() if self.rng.random() < share else nn.Identity()

    def activation(self) -> Callable[[Tensor], Tensor]:
        return self.rng.choice(ACTIVATIONS)


class Plain(nn.Module):
    """A layer, perhaps batch-norms, an activation."""

    def __init__(self, here: Here) -> None:
        super().__init__()
        self.there = here.with_channels(here.rng.choice((8, 12, 16)))
        self.layer, self.norm, self.again = (
            here.layer(self.there.channels),
            self.there.maybe_norm(),
            self.there.maybe_norm(0.15),
        )
        self.act = here.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.again(self.norm(self.layer(x))))


class Block(nn.Module):
    """Blocks that leave the sizes as they are."""

    there: Here

    def __init__(self, here: Here) -> None:
        super().__init__()
        self.there = here
        self.act = here.activation()
        self.build(here, here.channels)

    def build(self, here: Here, width: int) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """What is done once weights and types are."""


class Residual(Block):
    """A branch of two layers and a sum, perhaps in place."""

    def build(self, here: Here, width: int) -> None:
        self.inner = here.rng.choice((8, 16, 24))
        self.first, self.norm = here.layer(self.inner), here.with_channels(self.inner).maybe_norm()
        self.second, self.last = here.layer(width, self.inner), here.maybe_norm()
        self.in_place = here.rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.second(self.act(self.norm(self.first(x)))))
        if self.in_place:
            y += x
            return y
        return x + y


class Reused(Block):
    """One layer called two or three times, a batch-norm after the last call only."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.norm, self.times = here.layer(width), here.maybe_norm(), here.rng.choice((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.act(self.layer(x))
        return self.norm(x)


class Twins(Block):
    """Two layers that share a weight, each with a bias of its own or none."""

    def build(self, here: Here, width: int) -> None:
        self.one, self.norm = here.layer(width), here.maybe_norm()
        if isinstance(self.one, nn.Linear):
            self.two: Any = nn.Linear(width, width, bias=here.rng.random() < 0.5)
        else:
            self.two = type(self.one)(
                width, width, self.one.kernel_size, padding="same", bias=here.rng.random() < 0.5
            )
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.norm(self.one(x))))


class Decoded(Block):
    """A layer whose weight, transposed, leads back."""

    def build(self, here: Here, width: int) -> None:
        self.inner = here.rng.choice((8, 12))
        self.layer, self.norm = here.layer(self.inner), here.with_channels(self.inner).maybe_norm()

    def forward(self, x: Tensor) -> Tensor:
        h, weight = self.act(self.norm(self.layer(x))), self.layer.weight
        if weight.dim() == 2:
            return F.linear(h, weight.t())
        back = (F.conv_transpose1d, F.conv_transpose2d)[weight.dim() - 3]
        return back(h, weight, padding=tuple(size // 2 for size in weight.shape[2:]))


class Reader(Block):
    """A layer whose weight or bias also scales what it answers."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.norm = here.layer(width), here.maybe_norm()
        readable = ("mean square", "row") if self.layer.bias is None else ("mean square", "row", "bias")
        self.what = here.rng.choice(readable)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x))
        weight, bias = self.layer.weight, self.layer.bias
        if self.what == "mean square":
            return self.act(y) / (1 + weight.square().mean())
        if self.what == "row":
            return self.act(y) + weight[0].mean()
        return self.act(y) * bias.sum()


class Listed(Block):
    """Layers that are called through a plain list, a dict, or bound methods."""

    def build(self, here: Here, width: int) -> None:
        self.way = here.rng.choice(("list", "dict", "call"))
        self.parts = nn.ModuleList(
            [here.layer(width), here.maybe_norm(), here.layer(width), here.maybe_norm()]
        )
        self.reached = {
            "list": lambda: list(self.parts),
            "dict": lambda: {str(place): part for place, part in enumerate(self.parts)},
            "call": lambda: [part.__call__ for part in self.parts],
        }[self.way]()

    def forward(self, x: Tensor) -> Tensor:
        for part in self.reached.values() if self.way == "dict" else self.reached:
            x = self.act(part(x))
        return x


class NormFirst(Block):
    """A batch-norm, then a layer, perhaps grouped."""

    def build(self, here: Here, width: int) -> None:
        groups = math.gcd(width, here.rng.choice((1, 2, 4))) if here.kind in CHANNELS_FIRST else 1
        self.norm, self.layer, self.last = here.norm(), here.layer(width, groups=groups), here.maybe_norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.layer(self.norm(x))))


class Joined(Block):
    """Two layers side by side, one of them read twice, and a layer over both."""

    def build(self, here: Here, width: int) -> None:
        self.left, self.right, self.norm = here.layer(8), here.layer(8), here.with_channels(8).maybe_norm()
        self.over = here.layer(width, 16)
        self.axis = 1 if here.kind in CHANNELS_FIRST else -1

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return self.over(torch.cat([self.act(self.norm(left)), self.right(x) + left], self.axis))


class Turned(nn.Module):
    """To another kind of tensor."""

    def __init__(self, here: Here) -> None:
        super().__init__()
        self.way, kind, sizes = here.rng.choice(TURNS[here.kind])(here.sizes)
        self.there = Here(kind, sizes, here.rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


TURNS: dict[str, tuple[Callable[[Sizes], tuple[Callable[[Tensor], Tensor], str, Sizes]], ...]] = {
    "row": (lambda s: (lambda x: x, "row", s),),
    "rows": (
        lambda s: (lambda x: x.transpose(1, 2), "line", (s[1], s[0])),
        lambda s: (lambda x: x.mean(1), "row", s[1:]),
        lambda s: (lambda x: x.flatten(1), "row", (s[0] * s[1],)),
        lambda s: (lambda x: x[:, None], "grid", (1, *s)),
    ),
    "grid": (
        lambda s: (lambda x: x.permute(0, 3, 1, 2), "image", (s[2], *s[:2])),
        lambda s: (lambda x: x.flatten(1, 2), "rows", (s[0] * s[1], s[2])),
    ),
    "line": (
        lambda s: (lambda x: x.transpose(1, 2), "rows", (s[1], s[0])),
        lambda s: (lambda x: x.amax(2), "row", s[:1]),
    ),
    "image": (
        lambda s: (lambda x: x.mean((2, 3)), "row", s[:1]),
        lambda s: (lambda x: x.flatten(2), "line", (s[0], s[1] * s[2])),
        lambda s: (lambda x: x.permute(0, 2, 3, 1), "grid", (*s[1:], s[0])),
    ),
}
BLOCKS = (
    Plain,
    Plain,
    Residual,
    Residual,
    Reused,
    Twins,
    Decoded,
    Reader,
    Listed,
    NormFirst,
    Joined,
    Turned,
    Turned,
)
