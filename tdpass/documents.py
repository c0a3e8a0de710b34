"""Documents: JSON and YAML files, each read through one typed schema or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta

from tdpass.errors import TdpassError, UsageError
from tdpass.flattening import flat, flat_without_defaults, hints_of, nested, place_in_file
from tdpass.registry import Registry, nearest

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Amount = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

LARGEST_FILE = 1 << 28
_DEEPEST = 64
_MOST_NODES = 1 << 22
_MOST_WRITTEN = (
    1 << 16
)  # in YAML, which people write, and whose aliases can stand for far more than the file holds
_LARGEST_WHOLE = 1 << 63
# what PyYAML raises for tags and scalars that it cannot construct
_YAML_FAULTS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    RecursionError,
)


class Plain(ABC):
    """A value that is no dataclass, and says itself how it stands in a document."""

    __slots__ = ()

    @abstractmethod
    def plain(self) -> object:
        """The value as a tree of mappings, lists, texts and numbers."""

    @classmethod
    @abstractmethod
    def of_plain(cls, found: object) -> Plain:
        """The value that such a tree stands for; raises `ValueError` for one that stands for none."""


@dataclass(frozen=True)
class Document(Generic[T]):
    """One kind of file: the schema of its content, and what to say of a file that does not follow it.

    The schema is a dataclass or a collection of these. Strict: no value is converted but a whole number to a
    float; keys that the schema lacks or that are given twice are refused, and so are numbers that are not
    finite, unless `finite` says otherwise.  `version` is that of the files, where they say one; `sound`
    raises `ValueError` for content that contradicts itself.
    """

    noun: str
    schema: type[T]
    error: type[TdpassError]
    hint: str
    version: int | None = None
    finite: bool = True
    sound: Callable[[T], None] = lambda value: None

    def load(self, path: Path) -> T:
        """Read a JSON file; raises `error` on anything that is not such a document."""
        return self.parse(read_text(path, self.error), str(path))

    def parse(self, text: str, source: str) -> T:
        """Read JSON text; raises `error`, naming the `source` and the place in it."""
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self._refused(source, f"it is not JSON: {error}") from None
        if self.version is not None and (
            not isinstance(found, dict) or found.pop("version", None) != self.version
        ):
            raise self._refused(source, f"it is not of version {self.version}")
        return self.check(found, source)

    def check(self, found: object, source: str) -> T:
        """A value that was read already, by the schema; raises `error`."""
        try:
            _check_plain(found, finite=self.finite)
            made = msgspec.convert(nested(found, self.schema), self.schema, dec_hook=_of_plain)
            _check_known(found, flat(msgspec.to_builtins(made, enc_hook=_plain), self.schema))
            self.sound(made)
        except (ValueError, RecursionError) as error:
            raise self._refused(source, _with_value(place_in_file(str(error), self.schema), found)) from None
        return made

    def text(self, value: T) -> str:
        """The document as text that `parse` reads."""
        head = {} if self.version is None else {"version": self.version}
        found = flat_without_defaults(msgspec.to_builtins(value, enc_hook=_plain), self.schema)
        return json.dumps({**head, **found} if isinstance(found, dict) else found, indent=1)

    def sealed(self, value: T, key: str) -> str:
        """The document with a digest over it and the `key` that it is kept under."""
        content = self.text(value)
        return json.dumps({"digest": _seal(key, content), "content": content})

    def unsealed(self, text: str, key: str) -> T | None:
        """What `sealed` wrote under that key; None where anything else is there."""
        try:
            found = _SEALED.parse(text, key)
            return self.parse(found.content, key) if found.digest == _seal(key, found.content) else None
        except TdpassError:
            return None

    def _refused(self, source: str, reason: str) -> TdpassError:
        return self.error(f"{source} is not a {self.noun}: {reason}; {self.hint}")


@dataclass(frozen=True)
class _Sealed:
    digest: str
    content: str


DOCUMENTS: Registry[Document[Any]] = Registry("document")


def register_document(document: Document[T]) -> Document[T]:
    """Make a kind of file known by its noun."""
    DOCUMENTS.add(document.noun, document)
    return document


_SEALED = Document("sealed document", _Sealed, UsageError, "it is made again")


def _plain(value: object) -> object:
    if isinstance(value, Plain):
        return value.plain()
    raise NotImplementedError


def _of_plain(cls: type, found: object) -> object:
    if issubclass(cls, Plain):
        return cls.of_plain(found)
    raise NotImplementedError


def misfit(cls: type, option: str, value: object) -> str:
    """The type that an option of that dataclass has, where the value is not of it; empty where it is."""
    hint = hints_of(cls)[option]
    arms = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    return "" if any(_fits(value, arm) for arm in arms) else _named(hint)


def _fits(value: object, arm: Any) -> bool:
    try:
        msgspec.convert(value, arm)
    except msgspec.ValidationError:
        return isinstance(arm, type) and isinstance(value, arm) and not isinstance(value, bool)
    except TypeError:  # a type that no file can hold, such as a protocol
        return (
            isinstance(value, str | Path)
            if arm is Path
            else not isinstance(value, str | int | float | list | Mapping)
        )
    return True


def _named(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and get_origin(hint) is None
        else re.sub(r"[\w.]+\.(?=\w)", "", str(hint))
    )


def read_text(path: Path, error: type[TdpassError]) -> str:
    """The text of a file of at most `LARGEST_FILE` bytes.

    Raises `error` when it is missing, unreadable, larger or not text.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise error(f"{path} has {size:,} bytes; a document has at most {LARGEST_FILE:,}; check the path")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not a text file"
        raise error(f"cannot read {path}: {reason}; check the path") from None


def read_yaml(path: Path, noun: str, hint: str) -> Any:
    """What a YAML file holds.

    Raises `UsageError` naming the `noun`, with the `hint`, where it cannot be read.
    """
    try:
        return yaml_value(read_text(path, UsageError))
    except UsageError as error:
        raise UsageError(f"cannot read the {noun} {path}: {error}; {hint}") from None


def yaml_value(text: str) -> Any:
    """A value written in YAML.

    Raises `UsageError` for what is not YAML, and for keys given twice, runaway aliases and infinite numbers.
    """
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
        _check_plain(found, _MOST_WRITTEN)
    except _YAML_FAULTS as error:
        raise UsageError(
            f"it is not plain YAML: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from None
    return found


_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing a key that is given twice.

    `2:4` is text, as in YAML 1.2, and no number to base 60.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if kind is yaml.ScalarNode and tag in _NUMBERS and ":" in value else tag

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        if twice:
            raise ValueError(f"key {twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _seal(key: str, content: str) -> str:
    return hashlib.blake2b(f"{len(key)}:{key}{content}".encode(), digest_size=20).hexdigest()


def _with_value(reason: str, found: object) -> str:
    """What the schema says, with the value that it says it of."""
    said, _, place = reason.partition(" - at `$.")
    value: Any = found
    try:
        for step in re.findall(r"[^.\[\]`]+", place):
            value = value[int(step) if isinstance(value, list | tuple) else step]
    except (LookupError, TypeError, ValueError):
        return reason
    return f"{place[:-1]} is {reprlib.repr(value)}: {said}" if place else reason


def _check_plain(found: object, most: int = _MOST_NODES, finite: bool = True) -> None:
    """Raises `ValueError` unless everything in the tree can be shown and counted with."""
    for number, (value, depth) in enumerate(_nodes(found, 0)):
        if depth > _DEEPEST or number > most:
            raise ValueError(f"it nests more than {_DEEPEST} deep, or has more than {most:,} values")
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        if isinstance(value, int) and not -_LARGEST_WHOLE <= value < _LARGEST_WHOLE:
            raise ValueError(f"a number of {value.bit_length()} bits is too large")
        if (
            isinstance(value, str)
            and not value.isascii()
            and any("\ud800" <= character <= "\udfff" for character in value)
        ):
            raise ValueError(f"{value!r} is not text")


def _nodes(value: object, depth: int) -> Iterator[tuple[object, int]]:
    yield value, depth
    parts: Sequence[object] = ()
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        yield from _nodes(part, depth + 1)


def _check_known(found: object, understood: object, place: str = "$") -> None:
    """Raises `ValueError` for a key that was read over."""
    if isinstance(found, Mapping) and isinstance(understood, Mapping):
        unknown = [key for key in found if key not in understood]
        if unknown:
            names = [str(key) for key in understood]
            meant = nearest(str(unknown[0]), names)
            raise ValueError(
                f"unknown key {unknown[0]!r} at {place}{meant}; known: {', '.join(names) or 'none'}"
            )
        for key, value in found.items():
            _check_known(value, understood[key], f"{place}.{key}")
    elif isinstance(found, list | tuple) and isinstance(understood, list | tuple):
        # shorter where a name of an older version stands for less, as the rank of a pruned form does
        for index, (value, known) in enumerate(zip(found, understood, strict=False)):
            _check_known(value, known, f"{place}[{index}]")
