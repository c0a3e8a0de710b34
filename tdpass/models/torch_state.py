"""Saving a compressed torch model as safetensors with its structure, and putting that structure on a dense model again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tdpass.errors import InvalidModelError, PlanError, UsageError
from tdpass.files import replacing
from tdpass.formats.base import FORMATS
from tdpass.models.called_layers import call_layers
from tdpass.models.factorized import Factorized, empty_layer
from tdpass.models.in_place import become
from tdpass.models.torch_norms import Folded
from tdpass.models.torch_sites import Matched, find_sites
from tdpass.packing import SUFFIX, blocks_in, packed_state, read_header, unpack

VERSION = 2
_UNPACKED = 1  # where nothing is packed, any tdpass can read the file
_KEY = "tdpass.structure"


@dataclass(frozen=True)
class _Replacement:
    paths: tuple[str, ...]
    format: str
    rank: tuple[int, ...]
    bias: bool


def save_module(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write all parameters and buffers, shared ones once, and the structure; raises `UsageError` unless the suffix is .safetensors.

    A tensor that `tdpass.packing.pack` makes smaller is written as its block, in uint8 under its name and `SUFFIX`.
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
    named = list(module.named_modules(remove_duplicate=False))
    layers = [
        {"paths": [name for name, part in named if part is layer], "format": layer.format.name, "rank": list(layer.rank), "bias": layer.bias is not None}
        for layer in module.modules()
        if isinstance(layer, Factorized)
    ]
    folded = [path for path, candidate in named if isinstance(candidate, Folded)]
    biases = [path for path, candidate in named if isinstance(candidate, _DENSE) and candidate._parameters["bias"] is not None]
    written = packed_state(tensors)
    version = VERSION if written.keys() != tensors.keys() else _UNPACKED
    structure = {"version": version, "layers": layers, "folded": folded, "biases": biases, "aliases": aliases}
    with replacing(path) as temporary:
        save_file(written, temporary, metadata={**metadata, _KEY: json.dumps(structure)})


_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises `InvalidModelError` when it is missing, damaged or not one."""
    if not path.is_file():
        raise InvalidModelError(f"there is no file {path}; give the .safetensors file that `Artifact.save` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InvalidModelError(f"{path} is not an intact safetensors file ({error}); write it again with Artifact.save") from None


def load_module(path: Path, module: nn.Module) -> nn.Module:
    """Put the structure and tensors of a saved model on a dense model of the same class, in place.

    Names, shapes and ranks are checked before anything is allocated or changed.  Raises `InvalidModelError` when the file
    is damaged or was not written by tdpass, `PlanError` when it does not fit the model.
    """
    structure = _structure(path)
    found, _ = find_sites(module)
    by_path = {reached: matched for matched in found for reached in matched.paths}
    modules = dict(module.named_modules(remove_duplicate=False))
    swaps: list[tuple[_Replacement, Matched, Factorized]] = []
    factors: dict[int, Factorized] = {}
    for item in structure["layers"]:
        replacement = _read_layer(item, path)
        matched = by_path.get(replacement.paths[0])
        if matched is None or not all(reached in matched.paths for reached in replacement.paths):
            raise PlanError(f"{path} replaces {replacement.paths[0]!r}, which is no site of this model; load it on the class it was made from")
        layer = empty_layer(matched.site, replacement.format, replacement.rank, matched.weight.dtype)
        outputs = FORMATS.get(replacement.format).outputs(matched.site, replacement.rank)
        bias = nn.Parameter(torch.empty(outputs, dtype=matched.weight.dtype, device="meta")) if replacement.bias else None
        dense = modules[replacement.paths[0]]
        mode = str(getattr(dense, "padding_mode", "zeros"))
        pads: Any = tuple(dense._reversed_padding_repeated_twice) if mode != "zeros" else ()
        new = Factorized(layer, bias, mode, pads)
        shared = factors.setdefault(id(matched.weight), new)
        if shared is not new:
            for name, value in shared.factors().items():
                setattr(new, name, value)
        swaps.append((replacement, matched, new))
    unknown = [name for name in (*structure["folded"], *structure["biases"]) if name not in modules]
    if unknown:
        raise PlanError(f"{path} names {unknown[0]!r}, which this model does not have; load it on the class it was made from")
    expected = _expected_shapes(module, swaps, structure)
    with safe_open(path, framework="pt") as file:
        blocks = {} if structure["version"] == _UNPACKED else blocks_in(file)
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name.removesuffix(SUFFIX) not in blocks}  # noqa: SIM118 - it is no dict
        held.update({name: read_header(block, name)[0].shape for name, block in blocks.items()})
        held.update({alias: held.get(name, ()) for alias, name in structure["aliases"].items()})
        if held != expected:
            wrong = sorted(name for name in {*held, *expected} if held.get(name) != expected.get(name))
            raise PlanError(
                f"{path} does not fit this model: {wrong[0]!r} is {held.get(wrong[0], 'missing')} in the file and "
                f"{expected.get(wrong[0], 'missing')} in the model ({len(wrong)} such); load it on the class it was made from"
            )
        unpacked = {name: unpack(block, name) for name, block in blocks.items()}
        _carry_out(module, swaps, structure)
        state = _state(module)
        filled: dict[int, nn.Parameter | torch.Tensor] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if id(tensor) not in filled:
                stored = structure["aliases"].get(name, name)
                value = unpacked[stored] if stored in unpacked else file.get_tensor(stored)
                fresh = value if tensor.is_meta else tensor.detach().copy_(value)
                filled[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if tensor.is_meta else tensor
            if tensor.is_meta:
                setattr(holder, leaf, filled[id(tensor)])
    return module


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {
        name: value
        for name, value in module.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2] not in module.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters(remove_duplicate=False)), **buffers}


def _structure(path: Path) -> dict[str, Any]:
    text = read_metadata(path).get(_KEY)
    try:
        structure: dict[str, Any] = json.loads(text or "")
        if structure["version"] not in {_UNPACKED, VERSION} or not isinstance(structure["layers"], list) or not isinstance(structure["aliases"], dict):
            raise ValueError
        for name in ("folded", "biases"):
            if not all(isinstance(entry, str) for entry in structure[name]):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InvalidModelError(f"{path} carries no tdpass structure of version {_UNPACKED} or {VERSION}; it was not written by Artifact.save") from None
    return structure


def _read_layer(item: Any, path: Path) -> _Replacement:
    try:
        rank = tuple(item["rank"])
        if not all(isinstance(r, int) and not isinstance(r, bool) for r in rank) or not item["paths"]:
            raise ValueError
        return _Replacement(tuple(map(str, item["paths"])), str(item["format"]), rank, bool(item["bias"]))
    except (KeyError, TypeError, ValueError):
        raise InvalidModelError(f"the structure in {path} is damaged: {item!r}; write the file again with Artifact.save") from None


def _expected_shapes(module: nn.Module, swaps: Sequence[tuple[_Replacement, Matched, Factorized]], structure: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    gone = {path for replacement, _, _ in swaps for path in replacement.paths} | set(structure["folded"])
    expected = {name: tuple(value.shape) for name, value in _state(module).items() if name.rpartition(".")[0] not in gone}
    modules = dict(module.named_modules(remove_duplicate=False))
    for path in structure["biases"]:
        if path not in gone:
            expected[_under(path, "bias")] = (modules[path].weight.shape[0],)
    for replacement, _, new in swaps:
        for path in replacement.paths:
            expected.update({_under(path, name): tuple(value.shape) for name, value in new.named_parameters()})
    return expected


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _carry_out(module: nn.Module, swaps: Sequence[tuple[_Replacement, Matched, Factorized]], structure: Mapping[str, Any]) -> None:
    for path in structure["folded"]:
        become(module.get_submodule(path), Folded())
    for replacement, _, new in swaps:
        become(module.get_submodule(replacement.paths[0]), new)
    call_layers(module)
    for path in structure["biases"]:
        dense: Any = module.get_submodule(path)
        if getattr(dense, "bias", None) is None:
            dense.bias = nn.Parameter(torch.empty(dense.weight.shape[0], dtype=dense.weight.dtype, device="meta"))

