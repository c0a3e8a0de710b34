"""tdpass train: a training recipe, from the dense network to the artifact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from tdpass.artifact import Artifact
from tdpass.cli.arguments import Verbs, add_verb
from tdpass.cli.output import Output
from tdpass.cli.values import CommandLineError, count, setting
from tdpass.datasets import SOURCES
from tdpass.errors import UsageError
from tdpass.files import check_writable, new_folder, write_text
from tdpass.html_report import render_html
from tdpass.loggers import LOGGERS
from tdpass.methods.recipe import Recipe, names, starting_recipe
from tdpass.report import TrainingRow
from tdpass.terminal import report_view
from tdpass.views.tables import Part
from tdpass.views.training import destroyed

DESTROYED = 3  # the exit code where training went through and left a network that is no use


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass train lenet5_admm_nn --data digits --folder runs/lenet5"
    parser = add_verb(verbs, "train", run, "compress a model while training it, as a recipe says", example)
    known = f"a YAML file, or one that comes with tdpass: {', '.join(names())}"
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=known)
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="where checkpoints, the log, the model and its report go"
    )
    sources = ", ".join(source.example for source in SOURCES)
    parser.add_argument(
        "--data", metavar="DATA", help=f"train on this instead of the recipe's data: {sources}"
    )
    init = (
        "write a commented recipe for package.module:factory to RECIPE (default: recipe.yaml), "
        "and train nothing"
    )
    parser.add_argument("--init", metavar="MODEL", help=init)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in the folder"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="instead of the recipe's")
    change = "change the recipe: finetune=2, method.admm-nn.keep=3000; may be repeated"
    parser.add_argument("--set", metavar="KEY=VALUE", type=setting, action="append", default=[], help=change)
    parser.add_argument(
        "--log",
        metavar="LOGGER",
        action="append",
        default=[],
        choices=LOGGERS.names(),
        help=f"show the epochs in {' or '.join(LOGGERS.names())} too; may be repeated",
    )
    parser.add_argument(
        "--checkpoint-every",
        metavar="STEPS",
        type=count,
        default=0,
        help="a checkpoint this often, besides after every epoch",
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Train, save the model with its plan and report, and show the report; or write a recipe."""
    if arguments.init:
        return _init(arguments, out)
    if arguments.recipe is None:
        raise CommandLineError(
            f"name a recipe: a YAML file, or one of {', '.join(names())}; --init package.module:factory "
            "writes one to start from"
        )
    if arguments.folder is None:
        raise CommandLineError(
            "name a folder for checkpoints, the model and its report with --folder, such as --folder runs/one"
        )
    return _train(_recipe(arguments), arguments, out)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    recipe = Recipe.load(arguments.recipe)
    if arguments.data is not None:
        recipe = recipe.with_data(arguments.data)
    recipe = recipe.with_options(arguments.set)
    return recipe if arguments.seed is None else recipe.seeded(arguments.seed)


def _train(recipe: Recipe, arguments: argparse.Namespace, out: Output) -> int:
    folder: Path = arguments.folder
    checkpoints = any(folder.glob("*/step-*"))
    if arguments.resume and not checkpoints:
        out.say(f"{folder} holds no checkpoint to go on from; training starts from the beginning")
    if checkpoints and not arguments.resume:
        raise UsageError(
            f"{folder} holds checkpoints of an earlier run; give --resume to go on with it, or another "
            "--folder"
        )
    with new_folder(folder, "--folder"):
        check_writable(folder / "model.safetensors")
        artifact = _run(recipe, arguments, out)
    if not isinstance(artifact.model, nn.Module):
        raise UsageError(f"the recipe made a {type(artifact.model).__name__}, not a module")
    artifact.save(folder / "model.safetensors")
    artifact.plan.save(folder / "plan.json")
    artifact.report.save(folder / "report.json")
    write_text(folder / "report.html", render_html(artifact.report, artifact.plan))

    def view(width: int | None) -> list[Part]:
        written = f"wrote model.safetensors, plan.json, report.json, report.html and log.csv to {folder}"
        return [*report_view(artifact.report, artifact.plan, width), "", written]

    out.show({"folder": str(folder), "report": json.loads(artifact.report.to_json())}, view)
    return DESTROYED if destroyed(artifact.report) else 0


def _run(recipe: Recipe, arguments: argparse.Namespace, out: Output) -> Artifact:
    """Train; what is interrupted says how to go on."""
    with out.progress() as bars:

        def say(text: str) -> None:
            bars.clear()
            out.say(text)

        try:
            return recipe.run(
                arguments.folder,
                arguments.resume,
                lambda row: say(line(row)),
                arguments.checkpoint_every,
                say,
                arguments.log,
                bars,
            )
        except KeyboardInterrupt:
            if any(arguments.folder.glob("*/step-*")):
                say(f"{arguments.folder} holds checkpoints; the same command with --resume goes on from them")
            raise


def _init(arguments: argparse.Namespace, out: Output) -> int:
    path = Path(arguments.recipe or "recipe.yaml")
    if path.exists():
        raise UsageError(
            f"{path} is there already; name another file: tdpass train other.yaml --init {arguments.init}"
        )
    text = starting_recipe(arguments.init, arguments.data or "digits")
    write_text(path, text)
    written = f"wrote {path}; edit it, then: tdpass train {path} --folder runs/{path.stem}"
    out.show({"recipe": str(path)}, lambda width: [written])
    return 0


def line(row: TrainingRow) -> str:
    """One epoch as text."""
    score = "" if row.score is None else f", score {row.score:.2f}"
    residual = f", residual {max(row.residuals.values()):.3f}" if row.residuals else ""
    return f"{row.stage} epoch {row.epoch + 1}: loss {row.loss:.4f}{score}{residual}"
