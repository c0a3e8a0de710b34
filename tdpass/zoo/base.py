"""A network of the zoo: how it is built, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from tdpass.registry import Registry


class Build(Protocol):
    """Makes an untrained network that scores so many classes."""

    def __call__(self, classes: int = 10) -> nn.Module: ...


@dataclass(frozen=True)
class Net:
    """A network by name; `sample` is the shape of one input, with None for an axis of any size."""

    name: str
    build: Build
    sample: tuple[int | None, ...]


NETS: Registry[Net] = Registry("network")


def register_net(*sample: int | None) -> Callable[[Build], Build]:
    """Make a function known, by its name, as the network that it builds.

    `sample` is what the network reads.
    """

    def register(build: Build) -> Build:
        name = build.__name__  # type: ignore[attr-defined]
        NETS.add(name, Net(name, build, sample))
        return build

    return register
