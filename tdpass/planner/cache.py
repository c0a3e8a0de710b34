"""Candidate tables on disk, keyed by what they were computed from, so that a second budget takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tdpass.documents import Document, register_document
from tdpass.errors import PlanError, TdpassError
from tdpass.files import write_text
from tdpass.planner.candidates import Candidate
from tdpass.planner.joint import JointOption

T = TypeVar("T")


_HINT = "it is computed again"
_CANDIDATES = register_document(Document("table of candidates", list[Candidate], PlanError, _HINT))
_JOINT = register_document(Document("table of joint options", list[JointOption], PlanError, _HINT))


class CandidateCache:
    """One small JSON file per site and key, under a digest of its content; None as the folder keeps nothing.

    A file that is not just what was written under its key is no entry, and is removed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> list[Candidate] | None:
        """The stored candidates, or None."""
        return self._read(key, _CANDIDATES)

    def put(self, key: str, candidates: Sequence[Candidate]) -> None:
        """Store candidates; a cache that cannot be written is no error."""
        self._write(key, _CANDIDATES.sealed(list(candidates), key))

    def get_joint(self, key: str) -> list[JointOption] | None:
        """The stored joint options, or None."""
        return self._read(key, _JOINT)

    def put_joint(self, key: str, options: Sequence[JointOption]) -> None:
        """Store joint options."""
        self._write(key, _JOINT.sealed(list(options), key))

    def _read(self, key: str, document: Document[T]) -> T | None:
        if self.folder is None or not self._path(key).is_file():
            return None
        found: T | None = None
        with suppress(OSError, ValueError):
            found = document.unsealed(self._path(key).read_text(encoding="utf-8"), key)
        if found is None:
            with suppress(OSError):
                self._path(key).unlink()
        return found

    def _write(self, key: str, text: str) -> None:
        if self.folder is None:
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path(key), text)
        except (OSError, TdpassError):
            self.folder = None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
