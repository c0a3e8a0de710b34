"""Random torch networks: small, and with what real ones do to a weight besides calling its layer."""

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


@dataclass(frozen=True, repr=False)
class Case:
    """A model, calibration data as tdpass gets it and as calls of the model, and calls on other data."""

    model: Any
    data: Any
    calls: list[Any]
    fresh: list[Any]
    text: str
    dtype: torch.dtype

    def __repr__(self) -> str:
        return self.text

    @property
    def example(self) -> Any:
        """The calibration data in torch."""
        return {name: torch.from_numpy(array) for name, array in self.data.items()} if isinstance(self.data, dict) else self.data


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
        kernel = self.rng.choice((1, 3, 3, 5)) if self.kind == "line" else self.rng.choice((1, 3, 3, (3, 1), (1, 5)))
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
        self.layer, self.norm, self.again = here.layer(self.there.channels), self.there.maybe_norm(), self.there.maybe_norm(0.15)
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
            self.two = type(self.one)(width, width, self.one.kernel_size, padding="same", bias=here.rng.random() < 0.5)
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
        self.parts = nn.ModuleList([here.layer(width), here.maybe_norm(), here.layer(width), here.maybe_norm()])
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
    "line": (lambda s: (lambda x: x.transpose(1, 2), "rows", (s[1], s[0])), lambda s: (lambda x: x.amax(2), "row", s[:1])),
    "image": (
        lambda s: (lambda x: x.mean((2, 3)), "row", s[:1]),
        lambda s: (lambda x: x.flatten(2), "line", (s[0], s[1] * s[2])),
        lambda s: (lambda x: x.permute(0, 2, 3, 1), "grid", (*s[1:], s[0])),
    ),
}
BLOCKS = (Plain, Plain, Residual, Residual, Reused, Twins, Decoded, Reader, Listed, NormFirst, Joined, Turned, Turned)
STARTS: dict[str, tuple[Sizes, ...]] = {
    "row": ((12,), (20,)), "rows": ((6, 12), (8, 8)), "grid": ((2, 3, 12),), "line": ((6, 10), (8, 8)), "image": ((3, 7, 8), (4, 8, 5)),
}  # fmt: skip
ENDS: dict[str, Callable[[list[Tensor]], object]] = {
    "one": lambda y: y[0],
    "softmax": lambda y: y[0].softmax(-1),
    "log-softmax": lambda y: y[0].log_softmax(-1),
    "sigmoid": lambda y: torch.sigmoid(4 * y[0]),
    "tuple": lambda y: (y[0], y[1].softmax(-1)),
    "dict": lambda y: {"scores": y[0], "boxes": 50 * y[1], "depth": y[1].mean(-1, keepdim=True)},
    "hidden": lambda y: (y[0], y[2]),
}


class Net(nn.Module):
    """Blocks in a row, and heads; `time_first` takes its samples along axis 1."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self.kind = rng.choice(tuple(STARTS))
        self.sizes = rng.choice(STARTS[self.kind])
        self.time_first = self.kind == "rows" and rng.random() < 0.3
        here = Here(self.kind, self.sizes, rng)
        self.blocks = nn.ModuleList()
        for _ in range(rng.choice((1, 2, 3, 4))):
            block = rng.choice(BLOCKS)(here)
            self.blocks.append(block)
            here = block.there
        while here.kind in CHANNELS_FIRST:
            self.blocks.append(Turned(here))
            here = self.blocks[-1].there
        self.end = rng.choice(tuple(ENDS))
        self.heads = nn.ModuleList([nn.Linear(here.channels, width) for width in (10, 4)])

    def forward(self, x: Tensor) -> object:
        x = x.transpose(0, 1) if self.time_first else x
        for block in self.blocks:
            x = block(x)
        return ENDS[self.end]([*(head(x) for head in self.heads), x])


def net(rng: Random) -> Case:
    """A trained-looking network with data: weights of decaying spectrum, real statistics."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = rng.choice((torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    with torch.random.fork_rng():
        torch.manual_seed(rng.randrange(2**31))
        model = Net(rng).eval()
    _trained(model, generator)
    model.to(dtype)

    def draw(samples: int) -> Tensor:
        x = torch.randn(samples, *model.sizes, generator=generator).to(dtype)
        return x.transpose(0, 1).contiguous() if model.time_first else x

    data, fresh = draw(rng.choice((5, 9, 16, 24))), [draw(7), draw(1)]
    parts = [f"{type(block).__name__}{'' if not isinstance(block, Turned) else ' to ' + block.there.kind}" for block in model.blocks]
    text = f"{str(dtype)[6:]} {model.kind}{list(data.shape)} {', '.join(parts)}, {model.end}"
    return Case(model, data, [data], fresh, text, dtype)


def _trained(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                u, s, v = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                decay = torch.exp(-torch.arange(len(s)) * 4 / len(s))
                parameter.copy_(((u * s.max() * decay) @ v).reshape(parameter.shape) * 1.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                statistics, width = (module.running_mean, module.running_var), module.num_features
                statistics[0].copy_(0.3 * torch.randn(width, generator=generator))
                statistics[1].copy_(0.5 + torch.rand(width, generator=generator))
                if module.weight is not None:
                    module.weight.copy_(0.5 + torch.rand(width, generator=generator))
                    module.bias.copy_(0.3 * torch.randn(width, generator=generator))
