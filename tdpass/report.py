"""The report: what was done to each site, what was declined and why, what every pass cost and changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tdpass.cost import Cost
from tdpass.errors import InvalidModelError
from tdpass.files import read_json, write_text
from tdpass.packing import StoredSize

VERSION = 1


@dataclass(frozen=True)
class SiteRow:
    """One site before and after.

    `error` is the relative error of the weight in the plan's metric, `loss` the expected increase of the divergence,
    `note` the reason for the choice; `format` is "dense" for a site that was left alone.  On a target `before` and `after` hold
    measured seconds, `kernel` says in which runtime, and `predicted` what was expected before `after` was measured.
    """

    site: str
    shape: tuple[int, ...]
    format: str
    rank: tuple[int, ...]
    before: Cost
    after: Cost
    error: float
    loss: float
    guarantee: str = ""
    note: str = ""
    kernel: str = ""
    predicted: float = 0.0


@dataclass(frozen=True)
class PassRow:
    """One pass: its text form, whether it changed the model, its time, the model's cost after it, what it says."""

    text: str
    changed: bool
    seconds: float
    after: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CurvePoint:
    """A point of the budget curve: multiply-adds and parameters as fractions of the original, and the summed expected loss."""

    budget: float
    macs: float
    params: float
    loss: float
    chosen: bool = False


@dataclass(frozen=True)
class TrainingRow:
    """One epoch: mean loss, learning rate at its end, seconds, what `evaluate` said of it, and ||W - Z|| / ||W|| of each constrained weight."""

    stage: str
    epoch: int
    loss: float
    rate: float
    seconds: float
    score: float | None = None
    residuals: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """Everything a run has to say; filled by the passes, printed, saved as JSON, rendered as HTML.

    After a dry run `final` is the planned cost, and the model is as it was.  `stored` is what saving found for pruned and
    quantized tensors, None where there are none.
    """

    model: str = ""
    frontend: str = ""
    budget: str = ""
    metric: str = ""
    divergence: str = ""
    machine: str = ""
    created: str = ""
    original: Cost = field(default_factory=Cost)
    final: Cost = field(default_factory=Cost)
    sites: list[SiteRow] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    passes: list[PassRow] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    training: list[TrainingRow] = field(default_factory=list)
    checks: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    target: str = ""
    stored: StoredSize | None = None

    def decline(self, name: str, reason: str) -> None:
        """Say that a layer is left alone, and why."""
        self.declined[name] = reason

    def note(self, text: str) -> None:
        """Say something about the run as a whole; each text once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    def save(self, path: Path | str) -> None:
        """Write the report as JSON, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a report; raises `InvalidModelError` on anything that is not one."""
        text = read_json(Path(path), InvalidModelError)
        try:
            record = json.loads(text)
            if record.pop("version") != VERSION:
                raise ValueError(f"not version {VERSION}")
            return cls(
                **{
                    **record,
                    "original": Cost(**record["original"]),
                    "final": Cost(**record["final"]),
                    "sites": [_site_row(row) for row in record["sites"]],
                    "passes": [_pass_row(row) for row in record["passes"]],
                    "curve": [CurvePoint(**point) for point in record["curve"]],
                    "training": [TrainingRow(**row) for row in record.get("training", [])],
                    "stored": _stored(record.get("stored")),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidModelError(f"{path} is not a tdpass report ({error}); it is the report.json that `tdpass compress` writes") from None


def _site_row(row: Mapping[str, Any]) -> SiteRow:
    costs = {name: Cost(**row[name]) for name in ("before", "after")}
    return SiteRow(**{**row, **costs, "shape": tuple(row["shape"]), "rank": tuple(row["rank"])})


def _stored(record: Mapping[str, Any] | None) -> StoredSize | None:
    if record is None:
        return None
    if any(type(value) is not int for value in record.values()):
        raise ValueError("the sizes of packed tensors are whole numbers")
    return StoredSize(**record)


def _pass_row(row: Mapping[str, Any]) -> PassRow:
    return PassRow(**{**row, "after": Cost(**row["after"]), "notes": tuple(row["notes"])})
