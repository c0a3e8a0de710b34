"""Chains: layers in a row that one fused operator can compute, with what follows the last of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

from tdpass.kernels.stage import Lanes, Stage, Stages

N = TypeVar("N")
V = TypeVar("V")
Layout = Literal["channels_last", "contiguous"]


@dataclass(frozen=True)
class ChainSpec(Stages):
    """What a chain computes: `activation(layers(x) + bias + residual)`."""

    bias: bool = False
    residual: bool = False
    activation: str = "identity"

    def __str__(self) -> str:
        stages = " ".join(",".join(map(str, stage.integers())) for stage in self.stages)
        return (
            f"{stages} | {self.axes} axes{'+bias' * self.bias}{'+residual' * self.residual} {self.activation}"
        )


class Called(Protocol):
    """What is called, as text, with the size of its input and the type that it computes in."""

    @property
    def size(self) -> tuple[int, ...]:
        """Size of its first input."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""


@dataclass(frozen=True)
class ChainCall:
    """A chain as it is called: `size` is that of its input, `[n, c, *space]` or `[..., c]`.

    With `frozen` its weights are constants, which the plain layers too have laid out beforehand.
    """

    spec: ChainSpec
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    frozen: bool = False

    @property
    def output_size(self) -> tuple[int, ...]:
        """Size of what it answers with."""
        outputs, axes = self.spec.stages[-1].outputs, self.spec.axes
        if self.spec.linear:
            return (*self.size[:-1], outputs)
        space: tuple[int | torch.SymInt, ...] = (1, *self.size[2:])[-2:]
        for stage in self.spec.stages:
            space = stage.output_size(space)
        return (self.size[0], outputs, *(int(length) for length in space[-axes:]))

    def __str__(self) -> str:
        return f"{self.spec} on {'x'.join(map(str, self.size))} {self.layout}{' frozen' * self.frozen}"


@dataclass(frozen=True)
class Link(Generic[N, V]):
    """One layer in the graph of a front end.

    `nodes` are its call and, before it, zero padding that only it reads.  `axes` counts its spatial axes,
    none in a matrix product; `stage` is its geometry as a kernel takes it, None for what no kernel computes;
    `transposed` says that the weight is stored as `[i, o]`.
    """

    nodes: tuple[N, ...]
    x: V
    weight: V
    bias: V | None
    axes: int
    stage: Stage | None
    transposed: bool = False

    @property
    def node(self) -> N:
        """The call."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Chain(Generic[N, V]):
    """Layers in a row, then optionally: inference batch-norm, a bias, `+ residual`, an activation.

    `nodes` are all the calls it stands for, the last is the result.  `bias` belongs to the last layer.
    `lanes` is set where they were chosen before.
    """

    links: tuple[Link[N, V], ...]
    nodes: tuple[N, ...]
    bias: V | None
    norm: N | None = None
    residual: V | None = None
    activation: str = "identity"
    lanes: Lanes | None = None

    @property
    def x(self) -> V:
        """What it reads."""
        return self.links[0].x

    @property
    def result(self) -> N:
        """The call that makes what it answers with."""
        return self.nodes[-1]

    @property
    def spec(self) -> ChainSpec:
        """What it computes, a batch-norm folded into its last layer."""
        stages = tuple(link.stage for link in self.links if link.stage is not None)
        shift = self.bias is not None or self.norm is not None
        return ChainSpec(stages, self.links[0].axes, shift, self.residual is not None, self.activation)
