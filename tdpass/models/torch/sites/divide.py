"""Modules that hold several projections in one weight, and layers of each of these in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from torch import nn

from tdpass.errors import PlanError
from tdpass.layers.factorized import Factorized
from tdpass.layers.opening import Opener, is_opened, opener_of
from tdpass.layers.parallel import Parallel
from tdpass.models.torch.modules.in_place import Backup, become, can_become
from tdpass.models.torch.sites.readers import Run
from tdpass.models.torch.sites.sites import Matched, find_sites
from tdpass.tape import slices_read


@dataclass(frozen=True)
class Division:
    """A module and what makes layers of its slices; why it stays as it is ("" where it need not).

    `whole` is its site, None for attention and recurrence, which an `opener` opens. Torch's encoders around
    attention are written to as well: their choice of a path depends on it.
    """

    path: str
    module: nn.Module
    whole: Matched | None
    make: Callable[[], nn.Module]
    encoders: tuple[nn.Module, ...] = ()
    reason: str = ""
    opener: Opener | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that it writes to."""
        return (self.module, *self.encoders)

    def apply(self) -> Divided:
        """Put the layers in place; returns how to undo that."""
        backup = Backup.of(self.modules)
        become(self.module, self.make())
        for name in () if self.opener is None else self.opener.leftovers:
            self.module.__dict__.pop(name, None)
        for encoder in self.encoders:
            encoder.enable_nested_tensor = encoder.use_nested_tensor = False  # type: ignore[assignment]
        return Divided(self.path, self.module, self.whole, tuple(backup))


@dataclass(frozen=True)
class Divided:
    """A module that was divided, and what it was."""

    path: str
    module: nn.Module
    whole: Matched | None
    backup: tuple[Backup, ...]

    @property
    def changed(self) -> bool:
        """Whether any of its layers was replaced."""
        return any(isinstance(part, Factorized) for part in self.module.modules())

    def undo(self) -> None:
        """Make it what it was."""
        for entry in self.backup:
            entry.restore()

    def keep(self) -> None:
        """Let the layers that stayed dense hold numbers of their own, so that the whole weight can go."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.clone()


def find_divisions(
    model: nn.Module, sites: Mapping[str, Matched], run: Run, nested: Container[nn.Module]
) -> list[Division]:
    """Every linear layer of which a run reads slices apart, and every module that can be opened.

    `nested` holds the modules that torch runs on nested tensors.
    """
    found = []
    of_opened = {f"{path}." for path, module in model.named_modules() if is_opened(module)}
    for name, matched in sites.items():
        if f"{name.rpartition('.')[0]}." in of_opened:  # what is read apart of these are gates
            continue
        layer, sizes = matched.modules[0], () if matched.site.axes else slices_read(run.tape, name)
        if len(sizes) > 1 and len(matched.modules) == 1:
            reason = "" if can_become(layer, Parallel) else f"{type(layer).__name__} has __slots__"
            found.append(Division(name, layer, matched, _slices(matched, sizes), reason=reason))
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    holders = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    for path, module in model.named_modules():
        opener = opener_of(module)
        if opener is not None:
            around = tuple(encoder for encoder in encoders if module in encoder.modules())
            reason = _why_closed(opener, module, run, nested, holders)
            found.append(Division(path, module, None, _opened(opener, module), around, reason, opener))
    return found


def divisions_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The modules that were divided, by path, with their slices' sizes; opened ones have none to be told."""
    found = {path: _as_divided(part) for path, part in module.named_modules()}
    return {path: sizes for path, sizes in found.items() if sizes is not None}


def _as_divided(part: nn.Module) -> tuple[int, ...] | None:
    if isinstance(part, Parallel):
        return part.sizes
    return () if is_opened(part) else None


def divide_as(module: nn.Module, divisions: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Divide a dense module in place as `divisions_of` says; what is so already stays.

    Raises `PlanError` where it does not fit, in the name of its source.
    """
    modules = dict(module.named_modules())
    sites = {matched.site.name: matched for matched in find_sites(module)[0]} if divisions else {}
    for path, sizes in divisions.items():
        part, whole = modules.get(path), sites.get(path)
        if part is not None and _as_divided(part) == sizes:
            continue
        opener = None if part is None or sizes else opener_of(part)
        if part is not None and opener is not None and not opener.why_closed(part):
            Division(path, part, None, _opened(opener, part), opener=opener).apply()
        elif part is not None and whole is not None and sum(sizes) == whole.site.o and len(sizes) > 1:
            become(part, _slices(whole, sizes)())
        else:
            raise PlanError(
                f"{source} divides {path!r} into slices of {list(sizes)}, which does not fit this model; "
                "load it on the class it was made from"
            )


def _slices(matched: Matched, sizes: tuple[int, ...]) -> Callable[[], nn.Module]:
    trained = matched.weight.requires_grad
    return lambda: Parallel.of(matched.dense(), matched.biases[0], sizes, trained=trained)


def _opened(opener: Opener, module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: opener.open(module)


def _why_closed(
    opener: Opener, module: nn.Module, run: Run, nested: Container[nn.Module], holders: Mapping[int, int]
) -> str:
    reason = opener.why_closed(module)
    if reason:
        return reason
    if module in nested:
        return "torch runs its encoder on nested tensors, by a path that reads weights"
    held = list(module.parameters())
    if any(holders[id(tensor)] > 1 for tensor in held):
        return "its weights are shared with another module"
    calls = [place for tensor in held for place in run.readers(tensor)]
    if not calls:
        return "it is not called when the model runs on the data"
    last = len(run.tape.calls)
    foreign = next(
        (place for place in calls if place == last or run.tape.calls[place].name not in opener.calls), None
    )
    return "" if foreign is None else "its weights are read by more than its own call"
