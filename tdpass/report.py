"""The report: what was done to each site, what was declined and why, what every pass cost and changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tdpass.cost import Cost
from tdpass.documents import Amount, Count, Document, Size, register_document
from tdpass.errors import InvalidModelError
from tdpass.files import write_text
from tdpass.form import Form, Formed
from tdpass.notebook import table
from tdpass.packing import StoredSize

VERSION = 1


@dataclass(frozen=True)
class SiteRow(Formed):
    """One site before and after.

    `error` is the relative error of the weight in the plan's metric, `loss` the expected increase of the
    divergence, `note` the reason for the choice; `form` is dense for a site that was left alone.  On a target
    `before` and `after` hold measured seconds, `kernel` says in which runtime, and `predicted` what was
    expected before `after` was measured.
    """

    site: str
    shape: tuple[Size, ...]
    form: Form
    before: Cost
    after: Cost
    error: float
    loss: float
    guarantee: str = ""
    note: str = ""
    kernel: str = ""
    predicted: Amount = 0.0


@dataclass(frozen=True)
class PassRow:
    """One pass: its text form, whether it changed the model, its time, the cost after it, what it says."""

    text: str
    changed: bool
    seconds: Amount
    after: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CurvePoint:
    """A point of the budget curve.

    Multiply-adds and parameters as fractions of the original, and the summed expected loss. `forms` is what
    each site that is not left dense would be stored as.
    """

    budget: float
    macs: float
    params: float
    loss: float
    chosen: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRow:
    """One epoch: mean loss, learning rate at its end, seconds, and what `evaluate` said of it.

    Beside these is ||W - Z|| / ||W|| of each constrained weight. `memory` is what training holds from step to
    step, in bytes: the parameters and buffers, their gradients, and what the optimizer and the method keep;
    neither activations nor the teacher are in it.  0 where it is not known.
    """

    stage: str
    epoch: Count
    loss: float
    rate: float
    seconds: Amount
    score: float | None = None
    residuals: Mapping[str, float] = field(default_factory=dict)
    memory: Count = 0


@dataclass(frozen=True)
class ArrayBlock:
    """A block of weights in an array.

    Where it begins and how large it is, in word lines and columns of weights, and how many are not zero.
    """

    row: Count
    column: Count
    rows: Size
    columns: Size
    weights: Count


@dataclass(frozen=True)
class ArrayRow:
    """A set of `copies` arrays that hold the same blocks of a site's weights; so large, in weights.

    Each is another digit or sign of them.
    """

    site: str
    array: Count
    rows: Size
    columns: Size
    copies: Size
    blocks: tuple[ArrayBlock, ...]


@dataclass(repr=False)
class Report:
    """Everything a run has to say; filled by the passes, printed, saved as JSON, rendered as HTML.

    After a dry run `final` is the planned cost, and the model is as it was.  `arrays` are those of a machine
    that holds the weights in arrays.  `stored` is what saving found for pruned and quantized tensors, None
    where there are none.
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
    arrays: list[ArrayRow] = field(default_factory=list)

    def decline(self, name: str, reason: str) -> None:
        """Say that a layer is left alone, and why."""
        self.declined[name] = reason

    def note(self, text: str) -> None:
        """Say something about the run as a whole; each text once."""
        if text not in self.notes:
            self.notes.append(text)

    def __repr__(self) -> str:
        measures = ", ".join(
            f"{name} {share:.0%}" for name, share in self.final.shares(self.original).items()
        )
        what = "plan of " if self.dry_run else ""
        return (
            f"<Report: {what}{self.model or 'no model'}, {measures or 'nothing counted'} of the "
            f"original, {len(self.sites)} sites, {len(self.notes)} notes>"
        )

    def _repr_html_(self) -> str:
        """The report's table for a notebook."""
        rows = [
            (row.site, "x".join(map(str, row.shape)), row.form, f"{row.error:.2g}", row.note)
            for row in self.sites
        ]
        return table(repr(self).strip("<>"), ("site", "shape", "form", "error", "note"), rows)

    def to_json(self) -> str:
        """The report as text."""
        return _REPORT.text(self)

    def save(self, path: Path | str) -> None:
        """Write the report as JSON, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a report; raises `InvalidModelError` on anything that is not one."""
        return _REPORT.load(Path(path))


_REPORT = register_document(
    Document(
        "tdpass report",
        Report,
        InvalidModelError,
        "it is the report.json that `tdpass compress` writes",
        VERSION,
        finite=False,
    )
)
