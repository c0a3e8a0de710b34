"""Attributes of attention modules that speak of the width or number of heads, from which views get shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from tdpass.errors import PlanError
from tdpass.models.streams import HeadChange

# as Hugging Face, timm and others name them; a number of heads is none
_SIZE = re.compile(
    r"^(?!n_|num_).*(head.*(dim|size|width)|(dim|size|width).*head)"
    r"|^d_(head|k|v|kv)$|^key_value_proj_dim$|^inner_dim$"
)
_TURNED = re.compile(r"(^|_)(rot|rotary|rope)_?(n?dims?|width|size|embedding_dim|emb_dim)$|^dims?_rot(ary)?$")
_VALUES = re.compile(r"(^|_)(v|values?)(_|$)")
_COUNT = re.compile(r"^(n_?|num_)?([a-z]+_)*heads?$")
_HELD = "_head_sizes"


def resize_heads(module: nn.Module, owners: Mapping[int, HeadChange]) -> None:
    """Set the attributes of modules that hold layers whose heads change, the layers by id."""
    for part in module.modules():
        done = set[str]()
        for child in part.children():
            change = owners.get(id(child))
            if change is not None:
                _resize(part, change, done)


def heads_of(module: nn.Module) -> dict[str, dict[str, int]]:
    """The attributes that were set, by path of the module."""
    named = module.named_modules()
    return {path: dict(part.__dict__[_HELD]) for path, part in named if _HELD in part.__dict__}


def restore_heads(
    modules: Mapping[str, nn.Module], heads: Mapping[str, Mapping[str, int]], source: str
) -> None:
    """Set them again; raises `PlanError` where a module has no such attribute."""
    for path, sizes in heads.items():
        part = modules.get(path)
        if part is None or any(name not in part.__dict__ for name in sizes):
            raise PlanError(
                f"{source} has heads of another width in {path!r}, which has no "
                f"{', '.join(sizes) or 'heads'} here; load it on the class it was made from"
            )
        part.__dict__.update(sizes)
        part.__dict__[_HELD] = dict(sizes)


def _resize(part: nn.Module, change: HeadChange, done: set[str]) -> None:
    if all(before == after for before, after in change.sizes.items()):
        return
    held: dict[str, int] = part.__dict__.setdefault(_HELD, {})
    for name, size in list(part.__dict__.items()):
        if type(size) is not int or name in done:
            continue
        new = _sizes_of(name, change).get(size, size)
        if new != size:
            done.add(name)
            setattr(part, name, new)
            held[name] = new


def _sizes_of(name: str, change: HeadChange) -> Mapping[int, int]:
    """What an attribute of that name becomes, by what it is.

    Where queries and keys stay, so do the attributes that they share with values.
    """
    if _SIZE.search(name):
        return change.sizes if _VALUES.search(name) or not change.values else {}
    if _TURNED.search(name):
        return change.turned
    return change.counts if _COUNT.search(name) else {}
