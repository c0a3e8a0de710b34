"""What a kind of raw data is, and who makes of it what a model reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tdpass.errors import UsageError
from tdpass.optional import optional
from tdpass.registry import Registry


@dataclass(frozen=True)
class Raw:
    """Raw data for a model: a folder or file, or `hf:` and a data set of the hub; and its processor.

    The processor makes inputs of it. `processor` is a folder or a name that transformers knows; None is the
    model's own.
    """

    data: str | Path
    processor: str | None = None


@dataclass(frozen=True)
class Reader:
    """Who reads: the torch module, the shape of a sample, and the processor asked for.

    The module is there where the model is one, the shape where it is known.
    """

    module: nn.Module | None
    sample: tuple[int, ...] | None
    processor: str | None = None

    @property
    def config(self) -> Any:
        """The configuration of a model of transformers; None for others."""
        config = getattr(self.module, "config", None)
        return config if hasattr(config, "model_type") else None

    def hugging_face(self, loader: str, what: str) -> Any:
        """What transformers has under that name for the model, such as its `AutoTokenizer`.

        Raises `UsageError` where the model does not say which, or that cannot be had.
        """
        name = self.processor or getattr(self.config, "name_or_path", "")
        if not name:
            raise UsageError(
                f"the model does not say which {what} it was trained with; name a folder or a model that has "
                "it: Raw(data, processor='bert-base-uncased') (--processor)"
            )
        library = optional("transformers", "transformers", f"the {what} of {name}")
        try:
            return getattr(library, loader).from_pretrained(name)
        except ImportError as error:
            needed = next(iter(str(error).strip().splitlines()), "")
            raise UsageError(f"the {what} of {name!r} needs another library: {needed}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(
                f"the {what} of {name!r} cannot be had: {said}; name a folder that save_pretrained wrote "
                "with --processor"
            ) from None


class RawKind(ABC):
    """One kind of raw data; `what` names it in messages, `suffixes` are those of its files."""

    name: str
    what: str
    suffixes: frozenset[str]
    feature: str  # the type of a column of it in a data set of the hub

    def claims(self, path: Path) -> bool:
        """Whether the file, or what a folder holds most of, is of this kind."""
        return path.suffix.lower() in self.suffixes

    def files(self, path: Path) -> list[Path]:
        """The file, or those of this kind in a folder and below, in order of their paths."""
        if not path.is_dir():
            return [path]
        return sorted(place for place in path.rglob("*") if place.suffix.lower() in self.suffixes)

    @abstractmethod
    def read(self, path: Path, reader: Reader, most: int) -> object:
        """Calibration data of at most so many samples; raises `UsageError`, `InvalidModelError`."""

    @abstractmethod
    def made(self, column: Sequence[Any], reader: Reader) -> object:
        """Calibration data of a column of a data set."""


RAW_KINDS: Registry[RawKind] = Registry("kind of raw data")


def register_raw_kind(kind: type[RawKind]) -> type[RawKind]:
    """Class decorator: make a kind known by its `name`."""
    RAW_KINDS.add(kind.name, kind())
    return kind


def raw_kind_of(path: Path) -> RawKind | None:
    """The kind of a file, or of the files in a folder, most of them deciding; None where it is none."""
    if not path.is_dir():
        return next((kind for kind in RAW_KINDS if kind.claims(path)), None)
    counts = {kind.name: len(kind.files(path)) for kind in RAW_KINDS}
    most = max(counts, key=lambda name: counts[name])
    return RAW_KINDS.get(most) if counts[most] else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, spread over all."""
    return list(items[:: max(1, len(items) // most)][:most])
