"""What a front end is: the kinds of models that come in through it, and how one is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.base import Batch, Model
from tdpass.registry import Registry

Open = Callable[[object, Batch | None, Sequence[str]], Model]


@dataclass(frozen=True)
class FrontEnd:
    """Models of these classes, and files with these suffixes.

    A class is given as it is, or by its full name where its library need not be there; of several front ends
    whose classes a model is of, the one that has the nearest takes it.  `open(model, example, overridable)`
    gets the model or a `Path`.  `trusted` reads a file whose loading could run code, where such files exist;
    `dequantized` copies a model or what a `Path` holds, with floating-point weights in place of integers.
    """

    name: str
    open: Open
    types: tuple[type | str, ...] = ()
    suffixes: tuple[str, ...] = ()
    trusted: Callable[[Path], object] | None = None
    dequantized: Callable[[object], object] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the classes."""
        return tuple(kind if isinstance(kind, str) else _name(kind) for kind in self.types)


FRONT_ENDS: Registry[FrontEnd] = Registry("front end")


def register_front_end(front_end: FrontEnd) -> FrontEnd:
    """Make a front end known; raises `UsageError` where its name, a class or a suffix is taken."""
    for known in FRONT_ENDS:
        taken = {*known.names, *known.suffixes}.intersection((*front_end.names, *front_end.suffixes))
        if taken:
            raise UsageError(
                f"front end {front_end.name!r} takes {min(taken)!r}, which {known.name!r} takes already"
            )
    return FRONT_ENDS.add(front_end.name, front_end)


def front_end_of(source: object) -> FrontEnd:
    """The front end that takes a model or a path.

    Raises `InvalidModelError`, for a path `UsageError`, where there is none.
    """
    found = front_end_of_file(source) if isinstance(source, Path) else _of_type(type(source))
    if found is not None:
        return found
    if isinstance(source, Path):
        raise UsageError(
            f"cannot read {source.name!r} as a model; give a file that ends in {listed(_suffixes())}, or a "
            "model in memory"
        )
    raise InvalidModelError(
        f"cannot compress a {_name(type(source))}; give a model of type "
        f"{listed(sorted(name for known in FRONT_ENDS for name in known.names))}, or a path to "
        f"{listed(_suffixes())}"
    )


def front_end_of_file(path: Path) -> FrontEnd | None:
    """The front end that takes files with that suffix, in whatever case it is written."""
    return next((known for known in FRONT_ENDS if path.suffix.lower() in known.suffixes), None)


def listed(words: Sequence[str]) -> str:
    """Alternatives as a sentence has them."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _of_type(given: type) -> FrontEnd | None:
    takes = {name: known for known in FRONT_ENDS for name in known.names}
    return next((takes[name] for name in map(_name, given.__mro__) if name in takes), None)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _suffixes() -> list[str]:
    return sorted(suffix for known in FRONT_ENDS for suffix in known.suffixes)
