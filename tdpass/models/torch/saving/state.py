"""Saving a compressed torch model as safetensors with its structure, and loading it onto a dense model."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tdpass.errors import InvalidModelError, PlanError, UsageError
from tdpass.models.torch.modules.in_place import Backup
from tdpass.models.torch.modules.plain import computed, make_plain
from tdpass.models.torch.saving.coded import Held, coded_factors, earlier_parts, under, with_coded_factors
from tdpass.models.torch.saving.program_text import PROGRAM_KEY, program_of
from tdpass.models.torch.saving.structure import (
    STRUCTURE,
    UNPACKED,
    Structure,
    Swap,
    carry_out,
    outputs_of,
    read_structure,
    shape_layers,
    structure_of,
    swaps_of,
)
from tdpass.models.torch.saving.tensor_file import check_digest, write_tensors
from tdpass.models.torch.sites.adapting import adapt
from tdpass.packing import SUFFIX, blocks_in, packed_state, read_header, unpack

_KEY = "tdpass.structure"


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
    structure = structure_of(module, aliases, packed=packed)
    write_tensors(path, written, {**metadata, _KEY: STRUCTURE.text(structure)})


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
        shape_layers(module, structure, str(path))
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
        blocks = {} if structure.version == UNPACKED else blocks_in(file)
        # what safetensors opens is no dict
        names = [name for name in file.keys() if name.removesuffix(SUFFIX) not in blocks]  # noqa: SIM118
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


def _loaded(path: Path, module: nn.Module, structure: Structure) -> nn.Module:
    _check_buffers(module, path)
    swaps = swaps_of(module, structure, str(path))
    expected = _expected(module, swaps, structure)
    with safe_open(path, framework="pt") as file:
        blocks = {} if structure.version == UNPACKED else blocks_in(file)
        names = file.keys()
        held = {name: _held(file, name) for name in names if name.removesuffix(SUFFIX) not in blocks}
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
        layers = [(replacement.paths, new.storage) for replacement, _, new in swaps]
        coded, earlier = coded_factors(layers, held), earlier_parts(layers, held)
        held.update({name: part for each in coded.values() for name, part in each.parts.items()})
        held.update({name: expected[name] for name in earlier.keys() & expected.keys()})
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
        carry_out(module, swaps, structure)
        state = _state(module)
        filled: dict[int | str, nn.Parameter | torch.Tensor] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            stored = aliases.get(name, name)
            key = stored if tensor.is_meta else id(tensor)
            if key not in filled:
                value = unpacked[stored] if stored in unpacked else file.get_tensor(stored)
                value = earlier[stored].renewed(value) if stored in earlier else value
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


def _structure(path: Path) -> Structure:
    text = check_digest(path).get(_KEY)
    if text is None:
        raise InvalidModelError(f"{path} carries no tdpass structure; it was not written by Artifact.save")
    return read_structure(text, f"what {path} carries")


def _older_names(structure: Structure, stored: Container[str]) -> dict[str, str]:
    """The weights of narrow layers that the file holds under the name they have in version 1, `kept`."""
    paths = [
        path for replacement in structure.layers if replacement.form.narrow for path in replacement.paths
    ]
    found = {
        under(path, "kernel"): structure.aliases.get(under(path, "kept"), under(path, "kept"))
        for path in paths
    }
    return {name: older for name, older in found.items() if older in stored}


def _expected(module: nn.Module, swaps: Sequence[Swap], structure: Structure) -> dict[str, Held]:
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
            expected.setdefault(under(path, "bias"), ((outputs_of(modules[path]),), weight.dtype))
    for replacement, _, new in swaps:
        for path in replacement.paths:
            expected.update(
                {under(path, name): (tuple(value.shape), value.dtype) for name, value in _state(new).items()}
            )
    return expected
