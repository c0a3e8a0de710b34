"""Blocks that do what networks seldom do and are allowed to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from blocks import CHANNELS_FIRST, ROWS, Block, Here
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class OwnLinear(nn.Linear):
    """Casts and calls, as some libraries' layers do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input.to(self.weight.dtype))


class ScaledLinear(nn.Linear):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input)


class Hooked(Block):
    """Hooks that change what a layer reads or answers."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.norm = here.layer(width), here.maybe_norm()
        if here.rng.random() < 0.5:
            self.layer.register_forward_hook(_half)
        else:
            self.layer.register_forward_pre_hook(_twice, with_kwargs=True)
        if here.rng.random() < 0.3:
            self.norm.register_forward_hook(_half)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.layer(x)))


def _half(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 0.5 * output


def _twice(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (2 * args[0], *args[1:]), kwargs


class Subclassed(Block):
    """Layers of classes of one's own, or reparametrized."""

    def build(self, here: Here, width: int) -> None:
        last = here.kind in ROWS
        own = nn.Linear if not last else here.rng.choice((OwnLinear, ScaledLinear))
        self.first = own(width, width) if last else here.layer(width)
        self.second = parametrizations.weight_norm(here.layer(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class Functional(Block):
    """A layer whose weight a function reads instead of its call, or besides."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.norm, self.also = here.layer(width), here.maybe_norm(), here.rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if weight.dim() == 2:
            y = torch.einsum("...i,oi->...o", x, weight) if bias is None else F.linear(x, weight, bias)
        else:
            y = (F.conv1d, F.conv2d)[weight.dim() - 3](x, weight, bias, padding="same")
        return self.act(self.norm(y + self.layer(x) if self.also else y))


class ThroughNumpy(Block):
    """Leaves torch between two layers."""

    def build(self, here: Here, width: int) -> None:
        self.first, self.second, self.norm = here.layer(width), here.layer(width), here.maybe_norm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.second(torch.from_numpy(np.tanh(h.detach().float().numpy())).to(h))


class Experts(Block):
    """Two layers, each for some of the samples."""

    def build(self, here: Here, width: int) -> None:
        self.low, self.high = here.layer(width), here.layer(width)

    def forward(self, x: Tensor) -> Tensor:
        high = x.flatten(1)[:, 0] > 0
        y = torch.zeros_like(x)
        for layer, chosen in ((self.low, ~high), (self.high, high)):
            if bool(chosen.any()):
                y[chosen] = layer(x[chosen]).to(y.dtype)
        return self.act(y)


class Wider(Block):
    """Layers of another type than the rest."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.inner = here.layer(width), here.layer(width)

    def settle(self) -> None:
        self.inner.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.inner(x.double()).to(x.dtype)))


class SharedNorm(Block):
    """One batch-norm after two layers."""

    def build(self, here: Here, width: int) -> None:
        self.first, self.second, self.norm = here.layer(width), here.layer(width), here.norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.act(self.norm(self.first(x)))))


class Degenerate(Block):
    """A layer that says nothing: zeros, one number everywhere, or channels that never vary."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.last = here.layer(width), here.layer(width)
        self.number = here.rng.choice((0.0, 0.01))

    def settle(self) -> None:
        with torch.no_grad():
            self.layer.weight.fill_(self.number)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.layer(x))


class OverPositions(Block):
    """Recurrence or attention over positions, between layers."""

    def build(self, here: Here, width: int) -> None:
        self.layer = here.layer(width)
        self.way = (
            here.rng.choice(("gru", "attention", "encoder"))
            if here.kind == "rows" and width % 4 == 0
            else "none"
        )
        makers = {
            "gru": lambda: nn.GRU(width, width, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(width, 2, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True),
            "none": nn.Identity,
        }
        self.inner = makers[self.way]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.way == "gru":
            return self.inner(h)[0]
        return self.inner(h, h, h, need_weights=False)[0] if self.way == "attention" else self.inner(h)


class InPlace(Block):
    """Sums and activations written into what is read again."""

    def build(self, here: Here, width: int) -> None:
        self.layer, self.norm, self.second = here.layer(width), here.maybe_norm(), here.layer(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x))
        y = self.relu(h)
        h.add_(self.second(y)).mul_(0.5)
        return y + x


class Strided(Block):
    """Strides, dilations and paddings that are no zeros; for rows, half of the positions twice."""

    def build(self, here: Here, width: int) -> None:
        self.first = here.kind in CHANNELS_FIRST
        if not self.first:
            self.layer, self.norm = here.layer(width), nn.Identity()
            return
        axes = CHANNELS_FIRST[here.kind]
        stride, dilation = here.rng.choice((1, 2)), here.rng.choice((1, 2))
        mode = (
            "zeros"
            if min(here.sizes[1:]) <= dilation
            else here.rng.choice(("circular", "reflect", "replicate", "zeros"))
        )
        cls, reach = (nn.Conv1d, nn.Conv2d)[axes - 1], dilation
        self.layer = cls(
            width,
            width,
            3,
            stride=stride,
            dilation=dilation,
            padding=reach,
            padding_mode=mode,
            bias=here.rng.random() < 0.5,
        )
        sizes = tuple((size - 1) // stride + 1 for size in here.sizes[1:])
        self.there = Here(here.kind, (width, *sizes), here.rng)
        self.norm = self.there.maybe_norm()

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.act(self.norm(self.layer(x)))
        both = self.layer(torch.cat([x, x.flip(1)]))  # along the samples
        return both[: len(x)] + self.act(both[len(x) :])


UNUSUAL = (
    Hooked,
    Subclassed,
    Functional,
    ThroughNumpy,
    Experts,
    Wider,
    SharedNorm,
    Degenerate,
    OverPositions,
    InPlace,
    Strided,
)
