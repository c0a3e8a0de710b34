"""What a layer kind is: all that differs between layers that hold one weight, said once for all who ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tdpass.ops import Ops, V
from tdpass.registry import Registry
from tdpass.site import Extent, Pads, Site

TYPICAL = 8
Sizes = tuple[int, ...]
Functions = Mapping[Any, type[nn.Module]]


class Attributes(Protocol):
    """The attributes of an ONNX node, by name."""

    def get_int(self, key: str, default: int, /) -> int:
        """A number."""

    def get_ints(self, key: str, default: Sequence[int], /) -> Sequence[int]:
        """A list of numbers."""

    def get_string(self, key: str, default: str, /) -> str:
        """A word."""


@dataclass(frozen=True)
class Window:
    """How a layer moves over what it reads.

    Per spatial axis its stride, (before, after) padding and dilation; and its groups.
    """

    stride: Sizes = ()
    padding: Pads = ()
    dilation: Sizes = ()
    groups: int = 1


class LayerKind(ABC):
    """One kind of layer; a subclass per file, registered with `register_kind`.

    Class attributes: `name`, as sites and files say it; `axes`, the numbers of spatial axes that its layers
    may have; `modules`, the torch classes of it; `functions`, what torch graphs call it by, each with the
    class of module that computes the same, and `arguments`, what those functions take after input and weight,
    with defaults; `calls`, the functions by which a running model reaches it, input and weight first;
    `operator`, the ONNX operator that reads input, weight and bias, "" where there is none; `as_stored`,
    whether models store the weight as `[o, i / groups, *kernel]`.
    """

    name: ClassVar[str]
    axes: ClassVar[range]
    modules: ClassVar[tuple[type[nn.Module], ...]]
    functions: ClassVar[Functions]
    arguments: ClassVar[Mapping[str, Any]]
    calls: ClassVar[frozenset[Callable[..., Any]]]
    operator: ClassVar[str] = ""
    as_stored: ClassVar[bool] = True

    @abstractmethod
    def examples(self) -> Sequence[Site]:
        """Small sites of this kind, seen running, that differ in all that its layers may differ in."""

    @abstractmethod
    def site(self, module: nn.Module, name: str) -> Site:
        """The site of a module of this kind."""

    def base_of(self, module: nn.Module) -> type[nn.Module] | None:
        """The one of `modules` that a module is, or whose tensors it holds so that it may compute the same.

        None for any other.
        """
        return next((cls for cls in self.modules if isinstance(module, cls)), None)

    def why_not(self, module: nn.Module) -> str | None:
        """Why a module of this kind is no site; None for one that is."""
        return None

    @abstractmethod
    def build(self, cls: type[nn.Module], shape: Sizes, options: Mapping[str, Any]) -> nn.Module:
        """A module on the meta device, without bias, for a weight of that shape and the `arguments` given."""

    def turned(self, weight: Tensor, groups: int) -> Tensor:
        """The weight `[o, i / groups, *kernel]` of one as models store it, and the other way round."""
        return weight

    def window(self, attributes: Attributes, shape: Sizes, size: Sequence[int | None]) -> Window:
        """The window of a node with a stored weight of that shape that reads that spatial size.

        Raises `UnsupportedError` with the reason.
        """
        return Window()

    @abstractmethod
    def input_sizes(self, module: nn.Module, positions: int) -> Sequence[Sizes]:
        """Sizes that a module may be called with, one of each number of axes.

        From each it makes so many positions along each axis.
        """

    @abstractmethod
    def call(self, site: Site, read: Sizes, made: Sizes) -> tuple[Extent, int]:
        """What a call that read and made tensors of these sizes tells.

        An extent, and how often it was met.
        """

    def extents(self, extent: Extent, times: int) -> tuple[Extent, ...]:
        """An extent that was met so often."""
        return (extent,) * times

    @abstractmethod
    def typical(self, site: Site) -> Extent:
        """An extent to count by where none was seen.

        `TYPICAL` outputs along every axis, or inputs where those are fewer.
        """

    @abstractmethod
    def sample(self, site: Site, batch: int) -> Sizes:
        """Sizes of what the site's first call reads, for `batch` samples."""

    @abstractmethod
    def positions(self, site: Site, axes: range | None = None) -> int:
        """How often the part of the weight along these spatial axes (by default all) is applied.

        It is counted over the calls that the extents tell of. The axes before them are taken to be at output
        size, those after them at input size.
        """

    @abstractmethod
    def apply(self, ops: Ops[V], x: V, weight: V, bias: V | None, site: Site) -> V:
        """The dense layer, from a weight `[o, i / groups, *kernel]`."""

    @abstractmethod
    def reaches(self, site: Site) -> Sequence[tuple[int, int]] | None:
        """(reach, stride) per spatial axis, as `Ops.fill` takes them.

        None where output sizes do not follow from such.
        """

    @abstractmethod
    def rows(
        self, x: Tensor, site: Site, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """What the layer reads as rows `[positions, i * prod(kernel)]` of each group.

        Their order is that of `weight.flatten(1)`. Rows run over samples, then output positions.  `limit`
        asks for a random subset of at most that many rows, gathered without unfolding the rest.
        """

    @abstractmethod
    def output_rows(self, y: Tensor, site: Site) -> Tensor:
        """What the layer makes as rows `[positions, o]`, matching `rows`."""


KINDS: Registry[LayerKind] = Registry("layer kind")


def register_kind(cls: type[LayerKind]) -> type[LayerKind]:
    """Class decorator: make a layer kind known by its `name`."""
    KINDS.add(cls.name, cls())
    return cls


def kind_of(site: Site) -> LayerKind:
    """The kind of a site."""
    return KINDS.get(site.kind)


def kind_of_module(module: nn.Module) -> LayerKind | None:
    """The kind of which a torch module is a layer, or may be by what it holds, if any.

    The nearest class of the module decides.
    """
    named = {cls: kind for kind in KINDS for cls in kind.modules}
    nearest = [named[cls] for cls in type(module).__mro__ if cls in named]
    return next((kind for kind in (*nearest, *KINDS) if kind.base_of(module) is not None), None)


def kind_of_function(function: object) -> LayerKind | None:
    """The kind of layer that a function called in a torch graph computes, if there is one."""
    return next((kind for kind in KINDS if function in kind.functions), None)


def is_layer_call(function: object) -> bool:
    """Whether a running model reaches a layer of some kind by that function."""
    return any(function in kind.calls for kind in KINDS)


def dense_modules() -> tuple[type[nn.Module], ...]:
    """The torch classes of all kinds."""
    return tuple(cls for kind in KINDS for cls in kind.modules)


def some_rows(rows: int, limit: int | None, generator: torch.Generator | None) -> Tensor | None:
    """Indices of a random subset where there are more rows than the limit; None for all."""
    return None if limit is None or rows <= limit else torch.randperm(rows, generator=generator)[:limit]
