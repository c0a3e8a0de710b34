"""Slicing a torch module's streams: other parameters in its layers, other norms in place of its norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdpass.errors import PlanError, UnsupportedError
from tdpass.kinds import kind_of_module
from tdpass.layers.factorized import Factorized
from tdpass.layers.shortcuts import lead_sums, leads_sums
from tdpass.layers.sliced_norm import NormShape, SlicedNorm
from tdpass.models.streams import NewNorm, StreamEdits
from tdpass.models.torch.modules.in_place import become, can_become, watched
from tdpass.models.torch.sites.head_sizes import heads_of, resize_heads, restore_heads
from tdpass.models.torch.sites.sums import summing_modules

_SIZES = {"out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1, "embedding_dim": 1}
_FEW = 2
_LONGER = ("dynamic", "longrope")
_SIZES |= {"nx": 0, "nf": 1}  # of a layer that holds `[in, out]`, as GPT-2's do


@dataclass(frozen=True)
class Slicing:
    """The shapes that a sliced module has.

    They are those of its norms, by path, and of all other parameters and buffers, by name.  `heads` are the
    attributes that speak of the width of heads, by the path of the module that has them, `sums` the paths of
    modules whose sums are led through shortcuts of norms, `layers` the channels (out, in) of layers whose
    weight is stored in another form.
    """

    norms: Mapping[str, NormShape]
    shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sums: tuple[str, ...] = ()
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def slice_module(module: nn.Module, edits: StreamEdits, run: Callable[[], object]) -> None:
    """Carry out the edits in place; `run` runs the module as it is.

    Raises `UnsupportedError`, before anything changes, where a tensor is none of the module's own, or a norm
    is more than a norm.
    """
    holders = _holders(module)
    norms = {key: _norm_module(holders, edits.held[key]) for key in edits.norms}
    for key in (*edits.layers, *edits.tables):
        if key not in holders:
            raise UnsupportedError(
                f"a tensor of shape {tuple(edits.held[key].shape)} that the stream is computed from is "
                "neither parameter nor buffer of the model; make it one"
            )
    for key in edits.tables:
        anew = next((type(owner).__name__ for owner, _ in holders[key] if _computes_anew(owner)), "")
        if anew:
            raise UnsupportedError(f"{anew} computes its table anew for longer inputs, at its full width")
    led = [norms[key] for key, norm in edits.norms.items() if norm.shortcut is not None]
    summing = summing_modules(module, led, run) if led else ()
    for key, layer in edits.layers.items():
        weight = _like(edits.held[key], layer.weight)
        bias = None if layer.bias is None else _like(edits.held[key], layer.bias)
        for owner, name in holders[key]:
            _put(owner, name, weight)
            if bias is not None and "bias" in owner._parameters:
                _put(owner, "bias", bias)
    for key, table in edits.tables.items():
        new = _like(edits.held[key], table)
        for owner, name in holders[key]:
            _put(owner, name, new)
            owner._non_persistent_buffers_set.discard(name)  # it is not what the class makes any more
    for key, norm in norms.items():
        become(norm, _sliced_norm(edits.norms[key], edits.held[key]))
    for part in summing:
        lead_sums(part)
    owners = {id(owner): width for key, width in edits.heads.items() for owner, _ in holders[key]}
    resize_heads(module, owners)


def slicing_of(module: nn.Module) -> Slicing | None:
    """The shapes of a sliced module; None for one that is not."""
    norms = {path: part.shape for path, part in module.named_modules() if isinstance(part, SlicedNorm)}
    heads = heads_of(module)
    if not norms and not heads:
        return None
    shapes = {
        f"{path}.{name}" if path else name: tuple(tensor.shape)
        for path, part in module.named_modules(remove_duplicate=False)
        if not isinstance(part, Factorized) and path.rpartition(".")[0] not in norms
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }
    sums = tuple(path for path, part in module.named_modules() if leads_sums(part))
    layers = {
        path: (part.site.o, part.site.i)
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, Factorized) and part.site.groups == 1 and path.rpartition(".")[0] not in norms
    }
    return Slicing(norms, shapes, heads, sums, layers)


def shape_as(module: nn.Module, slicing: Slicing, source: str) -> None:
    """Give a dense module the shapes of a sliced one, what changes without storage.

    Raises `PlanError` where it has no such parts, or smaller ones.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    for path, shape in slicing.norms.items():
        norm = modules.get(path)
        weight = None if norm is None else norm._parameters.get("weight")
        if norm is None or weight is None:
            raise PlanError(
                f"{source} has a norm {path!r}, which this model has not; load it on the class it was made "
                "from"
            )
        become(norm, SlicedNorm(shape, weight.dtype, "meta"))
    for path in slicing.sums:
        if path not in modules:
            raise PlanError(
                f"{source} has residual sums in {path!r}, which this model has not; load it on the class it "
                "was made from"
            )
        lead_sums(modules[path])
    restore_heads(modules, slicing.heads, source)
    made: dict[int, Tensor] = {}
    for name, wanted in {**slicing.shapes, **_of_layers(modules, slicing.layers)}.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        held = None if owner is None else {**owner._parameters, **owner._buffers}.get(leaf)
        if owner is None or held is None or tuple(held.shape) == wanted:
            continue
        if held.dim() != len(wanted) or any(new > old for new, old in zip(wanted, held.shape, strict=True)):
            raise PlanError(
                f"{source} has {name!r} of shape {wanted}, this model {tuple(held.shape)}; load it on the "
                "class it was made from"
            )
        new = made.setdefault(id(held), _like(held, torch.empty(wanted, dtype=held.dtype, device="meta")))
        _put(owner, leaf, new)
        owner._non_persistent_buffers_set.discard(leaf)


def _of_layers(
    modules: Mapping[str, nn.Module], layers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of dense weights of so many channels, as their modules hold them, by name."""
    found = dict[str, tuple[int, ...]]()
    for path, (outputs, inputs) in layers.items():
        weight = getattr(modules.get(path), "weight", None)
        if weight is None:
            continue
        channels = (inputs, outputs) if _inputs_first(modules[path]) else (outputs, inputs)
        found[f"{path}.weight"] = (*channels, *weight.shape[2:])
        if getattr(modules[path], "bias", None) is not None:
            found[f"{path}.bias"] = (outputs,)
    return found


def _inputs_first(module: nn.Module) -> bool:
    """Whether a layer holds its weight `[i, o, *kernel]`, by what it is with a weight that shows it."""
    kind, weight = kind_of_module(module), module._parameters.get("weight")
    if kind is None or weight is None:
        return False
    probe = copy.copy(module)
    shape = (_FEW, _FEW + 1, *weight.shape[2:])
    probe._parameters = {**module._parameters, "weight": nn.Parameter(torch.empty(shape, device="meta"))}
    return kind.site(probe, "").o != _FEW


def _holders(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Which modules hold each parameter and buffer, and under what names."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((part, name))
    return holders


def _computes_anew(owner: nn.Module) -> bool:
    """Whether a rotary embedding of Hugging Face puts other angles into its buffers while it runs."""
    return any(kind in str(getattr(owner, "rope_type", "")) for kind in _LONGER)


def _norm_module(holders: Mapping[int, list[tuple[nn.Module, str]]], weight: Tensor) -> nn.Module:
    found = [owner for owner, _ in holders.get(id(weight), ())]
    if len(found) != 1:
        raise UnsupportedError(
            "a norm on the stream is no module of its own; leave it in the module that it came as"
        )
    (norm,) = found
    name = type(norm).__name__
    if {*norm._parameters} - {"weight", "bias"} or norm._buffers or norm._modules:
        raise UnsupportedError(f"{name} on the stream holds more than the scale and shift of a norm")
    if watched(norm) or not can_become(norm, SlicedNorm):
        raise UnsupportedError(
            f"{name} on the stream cannot be changed: {watched(norm) or 'it has __slots__'}"
        )
    return norm


def _sliced_norm(new: NewNorm, like: Tensor) -> SlicedNorm:
    writes = 0 if new.adapter is None else len(new.adapter)
    leads = 0 if new.shortcut is None else len(new.shortcut)
    shape = NormShape(new.reads, new.eps, new.drops, writes, new.shift is not None, leads)
    norm = SlicedNorm(shape, like.dtype, like.device)
    if norm.shortcut is not None and new.shortcut is not None:
        _put(norm.shortcut, "weight", _like(like, new.shortcut))
    if norm.adapter is not None and new.adapter is not None:
        _put(norm.adapter, "weight", _like(like, new.adapter))
        if new.shift is not None:
            _put(norm.adapter, "bias", _like(like, new.shift))
    return norm


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A new tensor as the old one is held: a parameter or not, with gradients or not, on its device."""
    placed = new if new.is_meta else new.to(old.device)
    return nn.Parameter(placed, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else placed


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a module hold the tensor, and say so in the attributes that speak of its size."""
    held: dict[str, Any] = owner._buffers if name in owner._buffers else owner._parameters
    held[name] = tensor
    if name != "weight":
        return
    for attribute, axis in _SIZES.items():
        if attribute in owner.__dict__:
            setattr(owner, attribute, tensor.shape[axis])
