"""The structure of a compressed module as text, and that structure put on a dense module again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import torch
from msgspec import Meta
from torch import nn

from tdpass.documents import Document, register_document
from tdpass.errors import InvalidModelError, PlanError, UnsupportedError
from tdpass.form import Form, Formed
from tdpass.kinds import kind_of_module
from tdpass.layers.dial import Adaptation
from tdpass.layers.factorized import Factorized, empty_layer
from tdpass.machine import installed_version
from tdpass.models.torch.modules.called_layers import call_layers
from tdpass.models.torch.modules.in_place import become
from tdpass.models.torch.sites.adapting import adaptation_of
from tdpass.models.torch.sites.divide import divide_as, divisions_of
from tdpass.models.torch.sites.factored import find_factored, pads_of
from tdpass.models.torch.sites.norms import Folded
from tdpass.models.torch.sites.sites import Matched, find_sites
from tdpass.models.torch.sites.streams import Slicing, shape_as, slicing_of

UNPACKED: Final = 1  # where nothing is packed, any tdpass can read the file
_PACKED: Final = 2
_LATEST: Final = 3  # 3 where a part is stored otherwise than versions before read it
_VERSION = re.compile(r'"version": *(\d+)')


@dataclass(frozen=True)
class Replacement(Formed):
    """A factored layer, where it is reached, and whether it has a bias."""

    paths: Annotated[tuple[str, ...], Meta(min_length=1)]
    form: Form
    bias: bool


@dataclass(frozen=True)
class Structure:
    """How a module differs from the dense one of its class.

    `aliases` are names of tensors that are held under another.
    """

    version: Literal[1, 2, 3]
    layers: tuple[Replacement, ...]
    folded: tuple[str, ...]
    biases: tuple[str, ...]
    aliases: Mapping[str, str]
    adaptive: Adaptation | None = None
    slicing: Slicing | None = None
    divided: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Swap = tuple[Replacement, Matched, Factorized]
STRUCTURE = register_document(
    Document("tdpass structure", Structure, InvalidModelError, "write the file again with Artifact.save")
)


def structure_text(module: nn.Module) -> str:
    """Which layers of a module are factored, as text that `restructure` reads; empty where none are."""
    structure = structure_of(module, {}, packed=False)
    return STRUCTURE.text(structure) if structure.layers or structure.folded or structure.slicing else ""


def restructure(module: nn.Module, text: str, source: str) -> None:
    """Give a dense module the structure in the text, in place, its new tensors without storage.

    Raises as `load_module` does.
    """
    structure = read_structure(text, source)
    if structure.adaptive is not None:
        raise UnsupportedError(
            f"{source} is of an adaptive network; load it with tdpass.load from the file that Artifact.save "
            "wrote"
        )
    shape_layers(module, structure, source)
    carry_out(module, swaps_of(module, structure, source), structure)


def read_structure(text: str, source: str) -> Structure:
    """The structure that the text says.

    Raises `InvalidModelError` for text that is none, and for one of a later version.
    """
    version = _VERSION.search(text)
    if version is not None and int(version[1]) > _LATEST:
        raise InvalidModelError(
            f"{source} was written by a newer tdpass: it is of version {version[1]}, and this one "
            f"({installed_version()}) reads {UNPACKED} to {_LATEST}; load it with the tdpass that wrote it, "
            "or a later one"
        )
    return STRUCTURE.parse(text, source)


def structure_of(module: nn.Module, aliases: Mapping[str, str], *, packed: bool) -> Structure:
    """The structure of a module whose tensors have these aliases, of the first version that reads them."""
    named = list(module.named_modules(remove_duplicate=False))
    layers = tuple(
        Replacement(tuple(name for name, part in named if part is layer), layer.form, layer.bias is not None)
        for layer in module.modules()
        if isinstance(layer, Factorized)
    )
    folded = tuple(path for path, candidate in named if isinstance(candidate, Folded))
    biases = tuple(
        path
        for path, candidate in named
        if kind_of_module(candidate) is not None and candidate._parameters["bias"] is not None
    )
    how = adaptation_of(module), slicing_of(module), divisions_of(module)
    version = _version(module, how[1], packed=packed)
    return Structure(version, layers, folded, biases, aliases, *how)


def _version(module: nn.Module, slicing: Slicing | None, *, packed: bool) -> Literal[1, 2, 3]:
    """The first version that reads what the module holds."""
    if slicing is not None and slicing.sums:
        return _LATEST
    if any(layer.storage.earlier for layer in module.modules() if isinstance(layer, Factorized)):
        return _LATEST
    return _PACKED if packed else UNPACKED


def shape_layers(module: nn.Module, structure: Structure, source: str) -> None:
    """Give a dense module the layers that are factored.

    They are narrower ones where streams are, and slices where a layer is divided.
    """
    if structure.slicing is not None:
        shape_as(module, structure.slicing, source)
    divide_as(module, structure.divided, source)


def swaps_of(module: nn.Module, structure: Structure, source: str) -> list[Swap]:
    """What stands for which dense layer of the module.

    Raises `PlanError` where the structure names what it has not.
    """
    found = [*find_sites(module)[0], *find_factored(module)[0]]
    by_path = {reached: matched for matched in found for reached in matched.paths}
    modules = dict(module.named_modules(remove_duplicate=False))
    swaps: list[Swap] = []
    factors: dict[int, Factorized] = {}
    for replacement in structure.layers:
        matched = by_path.get(replacement.paths[0])
        if matched is None or not all(reached in matched.paths for reached in replacement.paths):
            raise PlanError(
                f"{source} replaces {replacement.paths[0]!r}, which is no site of this model; load it on "
                "the class it was made from"
            )
        new = _empty_module(replacement, matched, modules[replacement.paths[0]])
        shared = factors.setdefault(id(matched.weight), new)
        if shared is not new:
            for name, value in shared.factors().items():
                setattr(new, name, value)
        swaps.append((replacement, matched, new))
    unknown = [name for name in (*structure.folded, *structure.biases) if name not in modules]
    if unknown:
        raise PlanError(
            f"{source} names {unknown[0]!r}, which this model does not have; load it on the class it was "
            "made from"
        )
    return swaps


def _empty_module(replacement: Replacement, matched: Matched, dense: nn.Module) -> Factorized:
    """The layer that stands for a dense one, without storage."""
    layer = empty_layer(matched.site, replacement.form, matched.weight.dtype)
    bias = (
        nn.Parameter(torch.empty(layer.site.o, dtype=matched.weight.dtype, device="meta"))
        if replacement.bias
        else None
    )
    return Factorized(layer, bias, str(getattr(dense, "padding_mode", "zeros")), pads_of(dense))


def outputs_of(module: nn.Module) -> int:
    """Output channels of a layer; what is no layer has its bias along the first axis of its weight."""
    kind, weight = kind_of_module(module), module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if kind is None else kind.site(module, "").o


def carry_out(module: nn.Module, swaps: Sequence[Swap], structure: Structure) -> None:
    """Put the layers in place, without storage."""
    for path in structure.folded:
        become(module.get_submodule(path), Folded())
    for replacement, _, new in swaps:
        become(module.get_submodule(replacement.paths[0]), new)
    call_layers(module)
    for path in structure.biases:
        dense: Any = module.get_submodule(path)
        if getattr(dense, "bias", None) is None:
            dense.bias = nn.Parameter(torch.empty(outputs_of(dense), dtype=dense.weight.dtype, device="meta"))
