"""Saving a compressed torch model as safetensors with its structure, and putting that structure on a dense model again."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from msgspec import Meta
from safetensors import safe_open
from torch import nn

from tdpass.documents import Document, register_document
from tdpass.errors import InvalidModelError, PlanError, UnsupportedError, UsageError
from tdpass.form import Form, Formed
from tdpass.kinds import kind_of_module
from tdpass.layers.dial import Adaptation
from tdpass.layers.factorized import Factorized, empty_layer
from tdpass.machine import installed_version
from tdpass.models.torch.adapting import adapt, adaptation_of
from tdpass.models.torch.called_layers import call_layers
from tdpass.models.torch.coded import Held, coded_factors, under, with_coded_factors
from tdpass.models.torch.divide import divide_as, divisions_of
from tdpass.models.torch.factored import find_factored, pads_of
from tdpass.models.torch.in_place import Backup, become
from tdpass.models.torch.norms import Folded
from tdpass.models.torch.plain import computed, make_plain
from tdpass.models.torch.program_text import PROGRAM_KEY, program_of
from tdpass.models.torch.sites import Matched, find_sites
from tdpass.models.torch.streams import Slicing, shape_as, slicing_of
from tdpass.models.torch.tensor_file import check_digest, write_tensors
from tdpass.packing import SUFFIX, blocks_in, packed_state, read_header, unpack

_VERSIONS = (1, 2)
_VERSION = re.compile(r'"version": *(\d+)')
_UNPACKED: Final = 1  # where nothing is packed, any tdpass can read the file; 2 where something is
_KEY = "tdpass.structure"


@dataclass(frozen=True)
class _Replacement(Formed):
    paths: Annotated[tuple[str, ...], Meta(min_length=1)]
    form: Form
    bias: bool


@dataclass(frozen=True)
class _Structure:
    version: Literal[1, 2]
    layers: tuple[_Replacement, ...]
    folded: tuple[str, ...]
    biases: tuple[str, ...]
    aliases: Mapping[str, str]
    adaptive: Adaptation | None = None
    slicing: Slicing | None = None
    divided: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_STRUCTURE = register_document(
    Document("tdpass structure", _Structure, InvalidModelError, "write the file again with Artifact.save")
)


def save_module(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write all parameters and buffers, shared ones once, and the structure.

    Raises `UsageError` unless the suffix is .safetensors. A tensor that `tdpass.packing.pack` makes smaller
    is written as its block, in uint8 under its name and `SUFFIX`.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"cannot save a torch module as {path.name!r}; name a .safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _state(module).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    # a program reads the parts of factors, not the numbers that they stand for
    plain = tensors if PROGRAM_KEY in metadata else with_coded_factors(tensors, module)
    written = packed_state(plain)
    packed = written.keys() != tensors.keys()
    structure = _structure_of(module, aliases, version=2 if packed else 1)
    write_tensors(path, written, {**metadata, _KEY: _STRUCTURE.text(structure)})


def structure_text(module: nn.Module) -> str:
    """Which layers of a module are factored, as text that `restructure` reads; empty where none are."""
    structure = _structure_of(module, {}, version=_UNPACKED)
    return _STRUCTURE.text(structure) if structure.layers or structure.folded or structure.slicing else ""


def restructure(module: nn.Module, text: str, source: str) -> None:
    """Give a dense module the structure in the text, in place, its new tensors without storage.

    Raises as `load_module` does.
    """
    structure = _STRUCTURE.parse(text, source)
    if structure.adaptive is not None:
        raise UnsupportedError(
            f"{source} is of an adaptive network; load it with tdpass.load from the file that Artifact.save "
            "wrote"
        )
    if structure.slicing is not None:
        shape_as(module, structure.slicing, source)
    divide_as(module, structure.divided, source)
    _carry_out(module, _swaps(module, structure, source), structure)


def _structure_of(module: nn.Module, aliases: Mapping[str, str], version: Literal[1, 2]) -> _Structure:
    named = list(module.named_modules(remove_duplicate=False))
    layers = tuple(
        _Replacement(tuple(name for name, part in named if part is layer), layer.form, layer.bias is not None)
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
    return _Structure(version, layers, folded, biases, aliases, *how)


def load_module(path: Path, module: nn.Module) -> nn.Module:
    """Put the structure and tensors of a saved model on a dense model of the same class, in place.

    The digest of the file, names, shapes, types and ranks are checked before anything is allocated or
    changed.  Raises `InvalidModelError` when the file is damaged or was not written by tdpass, `PlanError`
    when it does not fit the model.
    """
    structure = _structure(path)
    changed = structure.adaptive or structure.slicing or structure.divided or computed(module)
    if not changed:
        return _loaded(path, module, structure)
    backup = Backup.of(list(module.modules()))
    try:
        with safe_open(path, framework="pt") as file:
            make_plain(module, frozenset(name.removesuffix(SUFFIX) for name in file.keys()))  # noqa: SIM118
        if structure.adaptive is not None:
            adapt(module, structure.adaptive, filled=False)
        if structure.slicing is not None:
            shape_as(module, structure.slicing, str(path))
        divide_as(module, structure.divided, str(path))
        return _loaded(path, module, structure)
    except BaseException:
        for entry in backup:
            entry.restore()
        raise


def load_program_of(path: Path) -> nn.Module | None:
    """The module that a saved model's own program makes of its tensors; None where it carries no program.

    Raises `InvalidModelError` when the file is damaged, or its program would run code.
    """
    metadata, structure = check_digest(path), _structure(path)
    if PROGRAM_KEY not in metadata:
        return None
    with safe_open(path, framework="pt") as file:
        blocks = {} if structure.version == _UNPACKED else blocks_in(file)
        names = [name for name in file.keys() if name.removesuffix(SUFFIX) not in blocks]  # noqa: SIM118 - it is no dict
        state = {name: file.get_tensor(name) for name in names}
    state |= {name: unpack(block, name) for name, block in blocks.items()}
    state |= {alias: state[name] for alias, name in structure.aliases.items() if name in state}
    return program_of(metadata[PROGRAM_KEY], state, path)


def _check_buffers(module: nn.Module, path: Path) -> None:
    """Raise `InvalidModelError` where a buffer is to be filled that no file holds."""
    held = _state(module)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.is_meta and name not in held:
            raise InvalidModelError(
                f"buffer {name!r} is on the meta device and no part of the model's state (persistent=False), "
                f"so {path} does not hold it; fill it first, or build the model outside torch.device('meta')"
            )


def _loaded(path: Path, module: nn.Module, structure: _Structure) -> nn.Module:
    _check_buffers(module, path)
    swaps = _swaps(module, structure, str(path))
    expected = _expected(module, swaps, structure)
    with safe_open(path, framework="pt") as file:
        blocks = {} if structure.version == _UNPACKED else blocks_in(file)
        held = {name: _held(file, name) for name in file.keys() if name.removesuffix(SUFFIX) not in blocks}  # noqa: SIM118 - it is no dict
        held.update(
            {
                name: (header.shape, header.dtype)
                for name, header in ((name, read_header(block, name)[0]) for name, block in blocks.items())
            }
        )
        older = _older_names(structure, held)
        aliases = {
            alias: name for alias, name in structure.aliases.items() if name not in older.values()
        } | older
        coded = coded_factors([(replacement.paths, new.storage) for replacement, _, new in swaps], held)
        held.update({name: part for each in coded.values() for name, part in each.parts.items()})
        held.update({alias: held[name] for alias, name in aliases.items() if name in held})
        held = {name: value for name, value in held.items() if name not in older.values()}
        if held != expected:
            wrong = sorted(name for name in {*held, *expected} if held.get(name) != expected.get(name))
            raise PlanError(
                f"{path} does not fit this model: {wrong[0]!r} is {_said(held.get(wrong[0]))} in the file "
                "and "
                f"{_said(expected.get(wrong[0]))} in the model ({len(wrong)} such); load it on the class it "
                "was made from, of the same types"
            )
        unpacked = {name: unpack(block, name) for name, block in blocks.items()}
        unpacked.update(
            {part: value for name, each in coded.items() for part, value in each.made(unpacked[name]).items()}
        )
        _carry_out(module, swaps, structure)
        state = _state(module)
        filled: dict[int | str, nn.Parameter | torch.Tensor] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            stored = aliases.get(name, name)
            key = stored if tensor.is_meta else id(tensor)
            if key not in filled:
                value = unpacked[stored] if stored in unpacked else file.get_tensor(stored)
                fresh = value if tensor.is_meta else tensor.detach().copy_(value)
                read = (
                    nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else fresh
                )
                filled[key] = read if tensor.is_meta else tensor
            if tensor.is_meta:
                setattr(holder, leaf, filled[key])
    return module


def _swaps(
    module: nn.Module, structure: _Structure, source: str
) -> list[tuple[_Replacement, Matched, Factorized]]:
    """What stands for which dense layer of the module.

    Raises `PlanError` where the structure names what it has not.
    """
    found = [*find_sites(module)[0], *find_factored(module)[0]]
    by_path = {reached: matched for matched in found for reached in matched.paths}
    modules = dict(module.named_modules(remove_duplicate=False))
    swaps: list[tuple[_Replacement, Matched, Factorized]] = []
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


def _empty_module(replacement: _Replacement, matched: Matched, dense: nn.Module) -> Factorized:
    """The layer that stands for a dense one, without storage."""
    layer = empty_layer(matched.site, replacement.form, matched.weight.dtype)
    bias = (
        nn.Parameter(torch.empty(layer.site.o, dtype=matched.weight.dtype, device="meta"))
        if replacement.bias
        else None
    )
    return Factorized(layer, bias, str(getattr(dense, "padding_mode", "zeros")), pads_of(dense))


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {
        name: value
        for name, value in module.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2]
        not in module.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters(remove_duplicate=False)), **buffers}


def _held(file: Any, name: str) -> Held:
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    return shape, (stored[:0] if shape else file.get_tensor(name)).dtype


def _said(held: Held | None) -> str:
    return "missing" if held is None else f"{held[0]} {str(held[1]).removeprefix('torch.')}"


def _structure(path: Path) -> _Structure:
    text = check_digest(path).get(_KEY)
    if text is None:
        raise InvalidModelError(f"{path} carries no tdpass structure; it was not written by Artifact.save")
    version = _VERSION.search(text)
    if version is not None and int(version[1]) not in _VERSIONS:
        raise InvalidModelError(
            f"{path} is of version {version[1]}, and this tdpass ({installed_version()}) reads "
            f"{_VERSIONS[0]} to {_VERSIONS[-1]}; load it with the tdpass that wrote it, or a later one"
        )
    return _STRUCTURE.parse(text, f"what {path} carries")


def _older_names(structure: _Structure, stored: Container[str]) -> dict[str, str]:
    """The weights of narrow layers that the file holds under the name they have in version 1, `kept`."""
    paths = [
        path for replacement in structure.layers if replacement.form.narrow for path in replacement.paths
    ]
    found = {
        under(path, "kernel"): structure.aliases.get(under(path, "kept"), under(path, "kept"))
        for path in paths
    }
    return {name: older for name, older in found.items() if older in stored}


def _expected(
    module: nn.Module, swaps: Sequence[tuple[_Replacement, Matched, Factorized]], structure: _Structure
) -> dict[str, Held]:
    gone = {path for replacement, _, _ in swaps for path in replacement.paths} | set(structure.folded)
    expected = {
        name: (tuple(value.shape), value.dtype)
        for name, value in _state(module).items()
        if name.rpartition(".")[0] not in gone
    }
    modules = dict(module.named_modules(remove_duplicate=False))
    for path in structure.biases:
        weight = getattr(modules[path], "weight", None)
        if path not in gone and isinstance(weight, torch.Tensor):
            expected.setdefault(under(path, "bias"), ((_outputs(modules[path]),), weight.dtype))
    for replacement, _, new in swaps:
        for path in replacement.paths:
            expected.update(
                {under(path, name): (tuple(value.shape), value.dtype) for name, value in _state(new).items()}
            )
    return expected


def _outputs(module: nn.Module) -> int:
    """Output channels of a layer; what is no layer has its bias along the first axis of its weight."""
    kind, weight = kind_of_module(module), module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if kind is None else kind.site(module, "").o


def _carry_out(
    module: nn.Module, swaps: Sequence[tuple[_Replacement, Matched, Factorized]], structure: _Structure
) -> None:
    for path in structure.folded:
        become(module.get_submodule(path), Folded())
    for replacement, _, new in swaps:
        become(module.get_submodule(replacement.paths[0]), new)
    call_layers(module)
    for path in structure.biases:
        dense: Any = module.get_submodule(path)
        if getattr(dense, "bias", None) is None:
            dense.bias = nn.Parameter(torch.empty(_outputs(dense), dtype=dense.weight.dtype, device="meta"))
