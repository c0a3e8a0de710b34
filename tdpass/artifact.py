"""What comes out: the model, the plan and the report, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from tdpass.errors import PlanError, UsageError
from tdpass.files import write_text
from tdpass.html_report import render_html
from tdpass.models import Model, load_module, read_metadata
from tdpass.packing import stored_in
from tdpass.planner.rank_plan import RankPlan
from tdpass.report import Report

PLAN_KEY = "tdpass.plan"


@dataclass(frozen=True)
class Artifact:
    """A compressed model of the type that went in, the plan that made it and the report of the run."""

    model: object
    plan: RankPlan
    report: Report
    opened: Model

    def save(self, path: Path | str) -> None:
        """Write the deployable file: `.safetensors` for a module, `.pt2` for an exported program, `.onnx` for a graph.

        The plan travels inside, as metadata.  In `.safetensors`, pruned and quantized tensors are packed without loss, and
        `report.stored` says how small they are.  Raises `UsageError` for a suffix that does not suit the model.
        """
        self.opened.save(Path(path), {PLAN_KEY: self.plan.to_json(), "tdpass.version": _version()})
        if isinstance(self.model, nn.Module) and self.suffix == ".safetensors":
            self.report.stored = stored_in(Path(path))

    def save_all(self, folder: Path | str) -> list[Path]:
        """Write model, plan.json, report.json and report.html into a folder; returns the paths."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = [target / f"model{self.suffix}", target / "plan.json", target / "report.json", target / "report.html"]
        self.save(paths[0])
        self.plan.save(paths[1])
        self.report.save(paths[2])
        write_text(paths[3], render_html(self.report, self.plan))
        return paths

    @property
    def suffix(self) -> str:
        """The suffix of the deployable file."""
        return self.opened.suffix


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """Put a saved `.safetensors` artifact on a dense model of the class it was made from, in place.

    Everything is checked before anything is allocated or changed: raises `InvalidModelError` for a damaged file, `PlanError`
    where names, shapes or ranks do not fit.  No pickle is ever read.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"load puts a .safetensors artifact on an nn.Module, not on a {type(model).__name__}; .onnx and .pt2 files load by themselves")
    return load_module(Path(path), model)


def load_plan(path: Path | str) -> RankPlan:
    """The plan in a plan.json, or inside a `.safetensors` artifact."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return RankPlan.load(path)
    try:
        return RankPlan.from_json(read_metadata(path)[PLAN_KEY], str(path))
    except KeyError:
        raise PlanError(f"{path} carries no plan; it was not written by Artifact.save") from None


def _version() -> str:
    try:
        return version("tdpass")
    except PackageNotFoundError:
        return "uninstalled"


