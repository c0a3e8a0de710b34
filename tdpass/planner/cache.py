"""Candidate tables on disk, keyed by the content they were computed from, so that a second budget costs seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tdpass.cost import Cost
from tdpass.errors import TdpassError
from tdpass.files import write_text
from tdpass.planner.candidates import Candidate
from tdpass.planner.joint import JointOption

T = TypeVar("T")


def digest(*parts: Tensor | str | None) -> str:
    """A hash of tensors and texts by content."""
    state = hashlib.blake2b(digest_size=20)
    for part in parts:
        if part is None:
            state.update(b"-")
        elif isinstance(part, str):
            state.update(part.encode())
        else:
            tensor = part.detach().cpu().contiguous()
            state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            state.update(np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy()).data if tensor.numel() else b"")
        state.update(b"|")
    return state.hexdigest()


class CandidateCache:
    """One small JSON file per site and key; None as the folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> list[Candidate] | None:
        """The stored candidates, or None when there are none or they cannot be read."""
        return self._read(key, lambda records: [_candidate(record) for record in records])

    def put(self, key: str, candidates: Sequence[Candidate]) -> None:
        """Store candidates; a cache that cannot be written is no error."""
        self._write(key, [asdict(candidate) for candidate in candidates])

    def get_joint(self, key: str) -> list[JointOption] | None:
        """The stored joint options, or None."""
        return self._read(
            key,
            lambda records: [
                JointOption({name: _candidate(part) for name, part in record["parts"].items()}, float(record["loss"]), tuple(record["channels"]))
                for record in records
            ],
        )

    def put_joint(self, key: str, options: Sequence[JointOption]) -> None:
        """Store joint options."""
        self._write(key, [asdict(option) for option in options])

    def _read(self, key: str, build: Callable[[Any], T]) -> T | None:
        if self.folder is None:
            return None
        try:
            return build(json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _write(self, key: str, records: object) -> None:
        if self.folder is None:
            return
        try:
            self._path(key).parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path(key), json.dumps(records))
        except (OSError, TdpassError):
            self.folder = None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"


def _candidate(record: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**record, "rank": tuple(record["rank"]), "cost": Cost(**record["cost"])})
