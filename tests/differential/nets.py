"""Random torch networks: small, of blocks in a row, with one or several heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from blocks import BLOCKS, CHANNELS_FIRST, Block, Here, Sizes, Turned
from torch import Tensor, nn
from unusual import UNUSUAL


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
        """The first call, in torch."""
        first = self.calls[0]
        return (
            {name: torch.from_numpy(array) for name, array in first.items()}
            if isinstance(first, dict)
            else first
        )


STARTS: dict[str, tuple[Sizes, ...]] = {
    "row": ((12,), (20,)),
    "rows": ((6, 12), (8, 8)),
    "grid": ((2, 3, 12),),
    "line": ((6, 10), (8, 8)),
    "image": ((3, 7, 8), (4, 8, 5)),
}
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
            block = rng.choice(UNUSUAL if rng.random() < 0.3 else BLOCKS)(here)
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
    dtype = rng.choice(
        (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    )
    with torch.random.fork_rng():
        torch.manual_seed(rng.randrange(2**31))
        model = Net(rng).eval()
    _trained(model, generator)
    model.to(dtype)
    for block in model.blocks:
        if isinstance(block, Block):
            block.settle()

    def draw(samples: int) -> Tensor:
        x = torch.randn(samples, *model.sizes, generator=generator).to(dtype)
        return x.transpose(0, 1).contiguous() if model.time_first else x

    calls, fresh = (
        [draw(count) for count in rng.choice(((5,), (9,), (16,), (24,), (8, 3)))],
        [draw(7), draw(1)],
    )
    parts = [
        f"{type(block).__name__}{'' if not isinstance(block, Turned) else ' to ' + block.there.kind}"
        for block in model.blocks
    ]
    text = (
        f"{str(dtype)[6:]} {model.kind}{[list(call.shape) for call in calls]} {', '.join(parts)}, {model.end}"
    )
    data = calls if len(calls) > 1 else {"x": calls[0]} if rng.random() < 0.2 else calls[0]
    return Case(model, data, calls, fresh, text, dtype)


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
