"""What a source of torch models is, and how a name becomes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from tdpass.errors import InvalidModelError, TdpassError, UsageError
from tdpass.methods.objects import made_by
from tdpass.registry import Registry, nearest


class ModuleSource(ABC):
    """Models of one library, written `name:` and what the library calls them."""

    name: str
    example: str  # what to write, for messages

    @abstractmethod
    def build(self, text: str, *, pretrained: bool) -> nn.Module:
        """The model of that name, with its published weights or untrained.

        Raises `UsageError`, `InvalidModelError`.
        """


MODULE_SOURCES: Registry[ModuleSource] = Registry("source of models")


def register_module_source(source: type[ModuleSource]) -> type[ModuleSource]:
    """Make a source known by its name, which is what names of its models begin with."""
    MODULE_SOURCES.add(source.name, source())
    return source


def is_module(text: str) -> bool:
    """Whether the text can name a torch model: `source:name`, or `package.module:factory`."""
    before, sign, name = text.partition(":")
    factory = name.isidentifier() and all(part.isidentifier() for part in before.split("."))
    return bool(sign) and bool(name) and (before in MODULE_SOURCES or factory)


def module_of(text: str, *, pretrained: bool = True) -> nn.Module:
    """The named model; raises `UsageError`, `InvalidModelError` where it cannot be made."""
    source, _, name = text.partition(":")
    try:
        known = source in MODULE_SOURCES
        model = _built(MODULE_SOURCES.get(source), name, pretrained) if known else made_by(text)
    except UsageError as error:
        meant = "" if known else nearest(source, MODULE_SOURCES.names())
        raise UsageError(f"{error}{meant}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{text!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _built(source: ModuleSource, name: str, pretrained: bool) -> nn.Module:
    try:
        return source.build(name, pretrained=pretrained)
    except TdpassError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        told = f"{source.name} cannot make {name!r} ({type(error).__name__}: {reason})"
        raise InvalidModelError(
            f"{told}; check its name, and the connection where weights are fetched, or give them with "
            "--weights"
        ) from error
