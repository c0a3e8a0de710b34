"""Constants of modelled machines.

Frozen dataclasses that are read from YAML files, with where each figure comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from tdpass.documents import Document, read_yaml
from tdpass.errors import UsageError

_HERE = Path(__file__).parent
_LINE = re.compile(r"^ *`(\w+)` \[([^\]]*)\]: (.+?)(?=^ *`\w+` \[|^ *$|\Z)", re.MULTILINE | re.DOTALL)


class Constants:
    """What a machine's costs are computed from; frozen dataclasses extend it.

    Class attributes: `noun`, `folder` beside this file with the presets, and `usual`, the one that is taken
    without a name.  The docstring has a line `` `name` [unit]: meaning `` for every field.  `source` says
    where the figures of one machine come from, `sources` where single ones do, by field.
    """

    noun: ClassVar[str]
    folder: ClassVar[str]
    usual: ClassVar[str]
    source: str
    sources: Mapping[str, str]

    @classmethod
    def load(cls, way: str) -> Self:
        """A shipped machine by name, or one from a YAML file; raises `UsageError` for neither."""
        path, hint = cls.file(way), cls._hint()
        document = Document(cls.noun, cls, UsageError, hint, sound=cls._check)
        return document.check(read_yaml(path, cls.noun, hint), str(path))

    @classmethod
    def file(cls, way: str) -> Path:
        """The YAML file that describes the machine; raises `UsageError` for what names none."""
        path = cls.presets().get(way or cls.usual, Path(way))
        if path.suffix not in {".yaml", ".yml"}:
            raise UsageError(f"{cls.noun} {way!r} is not known; {cls._hint()}")
        return path

    @classmethod
    def presets(cls) -> dict[str, Path]:
        """The files of the machines that come with tdpass, by name."""
        return {path.stem: path for path in sorted((_HERE / cls.folder).glob("*.yaml"))}

    @classmethod
    def described(cls) -> dict[str, tuple[str, str]]:
        """The unit and the meaning of every field that the docstring has a line for."""
        lines = _LINE.findall(cls.__doc__ or "")
        return {name: (unit, " ".join(meaning.split()).rstrip(".")) for name, unit, meaning in lines}

    def figures(self) -> dict[str, Any]:
        """Every constant by name, those of where they come from left out."""
        return {name: getattr(self, name) for name in self.described()}

    def sound(self) -> None:
        """Raises `ValueError` for constants that contradict each other."""

    @classmethod
    def _hint(cls) -> str:
        return f"give a YAML file, or one of: {', '.join(cls.presets())}"

    def _check(self) -> None:
        # every subclass is a dataclass
        known = [entry.name for entry in fields(self)]  # type: ignore[arg-type]
        unknown = [name for name in self.sources if name not in known]
        if unknown:
            raise ValueError(f"sources names {unknown[0]!r}, which is no constant; known: {', '.join(known)}")
        self.sound()
