"""tdpass train: a training recipe, from the dense network to the artifact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from tdpass.cli.arguments import Verbs, add_verb, count
from tdpass.cli.output import Output
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.html_report import render_html
from tdpass.methods.recipe import Recipe, names
from tdpass.report import TrainingRow
from tdpass.terminal import report_view
from tdpass.views.tables import Part


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass train lenet5_admm_nn --folder runs/lenet5 --seed 1"
    parser = add_verb(verbs, "train", run, "compress a model while training it, as a recipe says", example)
    parser.add_argument("recipe", metavar="RECIPE", help=f"a YAML file, or one that comes with tdpass: {', '.join(names())}")
    parser.add_argument("--folder", metavar="DIR", type=Path, required=True, help="where checkpoints, the log, the model and its report go")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in the folder")
    parser.add_argument("--seed", metavar="N", type=int, help="instead of the recipe's")
    change = "change the recipe: finetune=2, method.admm-nn.keep=3000; may be repeated"
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=change)
    parser.add_argument("--checkpoint-every", metavar="STEPS", type=count, default=0, help="a checkpoint this often, besides after every epoch")


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Train, save the model with its plan and report, and show the report."""
    recipe = Recipe.load(arguments.recipe).with_options(arguments.set)
    if arguments.seed is not None:
        recipe = recipe.seeded(arguments.seed)
    folder: Path = arguments.folder
    if folder.exists() and any(folder.glob("*/step-*")) and not arguments.resume:
        raise UsageError(f"{folder} holds checkpoints of an earlier run; give --resume to go on with it, or another --folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}; name another with --folder") from None
    artifact = recipe.run(folder, arguments.resume, lambda row: out.say(line(row)), arguments.checkpoint_every, out.say)
    if not isinstance(artifact.model, nn.Module):
        raise UsageError(f"the recipe made a {type(artifact.model).__name__}, not a module")
    artifact.report.model = recipe.model
    artifact.save(folder / "model.safetensors")
    artifact.plan.save(folder / "plan.json")
    artifact.report.save(folder / "report.json")
    write_text(folder / "report.html", render_html(artifact.report, artifact.plan))

    def view(width: int | None) -> list[Part]:
        written = f"wrote model.safetensors, plan.json, report.json, report.html and log.csv to {folder}"
        return [*report_view(artifact.report, artifact.plan, width), "", written]

    out.show({"folder": str(folder), "report": json.loads(artifact.report.to_json())}, view)
    return 0


def line(row: TrainingRow) -> str:
    """One epoch as text."""
    score = "" if row.score is None else f", score {row.score:.2f}"
    residual = f", residual {max(row.residuals.values()):.3f}" if row.residuals else ""
    return f"{row.stage} epoch {row.epoch + 1}: loss {row.loss:.4f}{score}{residual}"
