"""What comes out: the model, the plan and the report, in memory and on disk."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from torch import nn
from typing_extensions import TypeVar

from tdpass.errors import DifferenceError, PlanError, TdpassError, UsageError
from tdpass.files import write_text
from tdpass.html_report import render_html
from tdpass.machine import installed_version
from tdpass.models import Batch, Model, check_digest, load_module
from tdpass.models.abilities import HoldsProgram
from tdpass.notebook import page
from tdpass.planner.rank_plan import RankPlan
from tdpass.planner.trials import ROUNDING, gap
from tdpass.report import Report

PLAN_KEY = "tdpass.plan"
SOURCE_KEY = "tdpass.model"
LARGEST_RELOADED = 1 << 29


@dataclass(frozen=True)
class Reload:
    """How a saved file is run once more: the call, and how the front end opens the file."""

    call: Batch
    opened: Callable[[Path], Model | None]


M = TypeVar("M", default=Any)


@dataclass(frozen=True, repr=False)
class Artifact(Generic[M]):
    """A compressed model of the type that went in, the plan that made it and the report of the run."""

    model: M
    plan: RankPlan
    report: Report
    opened: Model
    reload: Reload | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<Artifact: {type(self.model).__name__}, {self.plan!r}>"

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        return page(render_html(self.report, self.plan))

    def save(self, path: Path | str, *, program: bool = False) -> list[Path]:
        """Write the deployable file.

        It is `.safetensors` for a module, `.pt2` for an exported program, `.onnx` for a graph. Returns the
        files that hold weights beside it, as large `.onnx` models have.  The plan travels inside, as
        metadata.  In `.safetensors`, pruned and quantized tensors are packed without loss, and
        `report.stored` says how small they are.  Models of at most 512 MiB are loaded from the file again and
        run.  With `program` a `.safetensors` file also holds how the network is built, as an exported program
        without its weights, and `tdpass.load(path)` needs no dense class.

        Raises `UsageError` for a suffix that does not suit the model, `UnsupportedError` where torch cannot
        export it, `DifferenceError` when the file does not load or answers otherwise than the model,
        `WriteError` when the disk is full.
        """
        self.opened.save(
            Path(path),
            {
                PLAN_KEY: self.plan.to_json(),
                SOURCE_KEY: self.report.model,
                "tdpass.version": installed_version(),
                **(self._program() if program else {}),
            },
        )
        self.report.stored = self.opened.stored(Path(path))
        self._check_saved(Path(path))
        return (
            sorted(Path(path).parent.glob(f"{glob.escape(Path(path).name)}.*data"))
            if self.suffix == ".onnx"
            else []
        )

    def _program(self) -> dict[str, str]:
        call = self.opened.example() or (None if self.reload is None else self.reload.call)
        if not isinstance(self.opened, HoldsProgram) or self.suffix != ".safetensors":
            raise UsageError(f"program=True is for torch modules; a {self.suffix} file loads by itself")
        if call is None:
            raise UsageError("a program is exported from a call; compress with data= or example_inputs=")
        return self.opened.described(call)

    def _check_saved(self, path: Path) -> None:
        """Run what was saved once more, where that is cheap."""
        if self.reload is None:
            return
        if self.opened.bytes() > LARGEST_RELOADED:
            self.report.note(
                f"{path.name} was not loaded and run again: the model is larger than "
                f"{LARGEST_RELOADED >> 20} MiB"
            )
            return
        try:
            saved = self.reload.opened(path)
            moved = (
                0.0 if saved is None else gap(self.opened.run(self.reload.call), saved.run(self.reload.call))
            )
        except TdpassError as error:
            raise DifferenceError(
                f"what was saved does not load or run again, and is kept as {_set_aside(path)}: {error}"
            ) from error
        if moved > ROUNDING:
            kept = _set_aside(path)
            raise DifferenceError(
                f"what was saved answers otherwise than the model, off by {moved:.3g} of its outputs' size, "
                f"and is kept as {kept}"
            )

    def save_all(self, folder: Path | str) -> list[Path]:
        """Write model, plan.json, report.json and report.html into a folder; returns the paths."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = [
            target / f"model{self.suffix}",
            target / "plan.json",
            target / "report.json",
            target / "report.html",
        ]
        data = self.save(paths[0])
        self.plan.save(paths[1])
        self.report.save(paths[2])
        write_text(paths[3], render_html(self.report, self.plan))
        return [*paths, *data]

    @property
    def suffix(self) -> str:
        """The suffix of the deployable file."""
        return self.opened.suffix


def unverified(path: Path) -> Path:
    """Where a result goes that is not what it should be."""
    return path.with_name(f"{path.stem}.unverified{path.suffix}")


def _set_aside(path: Path) -> Path:
    return path.replace(unverified(path))


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """Put a saved `.safetensors` artifact on a dense model of the class it was made from, in place.

    Everything is checked before anything is allocated or changed: raises `InvalidModelError` for a damaged
    file, `PlanError` where names, shapes or ranks do not fit.  No pickle is ever read.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"load puts a .safetensors artifact on an nn.Module, not on a {type(model).__name__}; .onnx and "
            ".pt2 files load by themselves"
        )
    return load_module(_path(path), model)


def load_plan(path: Path | str) -> RankPlan:
    """The plan in a plan.json, or inside a `.safetensors` artifact."""
    path = _path(path)
    if path.suffix != ".safetensors":
        return RankPlan.load(path)
    try:
        return RankPlan.from_json(check_digest(path)[PLAN_KEY], str(path))
    except KeyError:
        raise PlanError(f"{path} carries no plan; it was not written by Artifact.save") from None


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"a file is named by a text or a Path, not by a {type(path).__name__}")
    return Path(path)
