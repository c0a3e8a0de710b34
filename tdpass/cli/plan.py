"""tdpass plan: a dry run that says what every site would become."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tdpass
from tdpass.cli.arguments import Verbs, add_data, add_model, add_planning, add_torch, add_verb, data
from tdpass.cli.output import Output
from tdpass.cli.sources import read_source
from tdpass.cli.values import CommandLineError, budget, file_ending, inputs
from tdpass.files import check_writable
from tdpass.terminal import report_view


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass plan model.onnx --budget macs=0.4 --data calib.npz -o plan.json"
    parser = add_verb(
        verbs, "plan", run, "plan formats and ranks under a budget, without touching the model", example
    )
    add_model(parser)
    add_data(parser, samples=None)
    add_planning(parser)
    add_torch(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="PLAN.json",
        type=file_ending(".json"),
        help="write the plan, to be changed by hand or given to compress --plan",
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Plan, show the plan, and write it where asked."""
    limits = budget(arguments.budget)
    if not limits and arguments.pipeline is None:
        raise CommandLineError("no budget; give at least one, such as --budget macs=0.4")
    source = read_source(arguments.model, arguments.weights, arguments.trust)
    path: Path | None = arguments.output
    if path is not None:
        check_writable(path)
    options = planning(arguments)
    with out.progress() as progress:
        dry_run = tdpass.make_plan(
            source.load(), limits or None, data(arguments), progress=progress, **options
        )
    dry_run.report.model = source.text
    if path is not None:
        dry_run.plan.save(path)
    document = {
        "plan": json.loads(dry_run.plan.to_json()),
        "report": json.loads(dry_run.report.to_json()),
        "files": [str(path)] if path else [],
    }
    out.show(
        document,
        lambda width: [
            *report_view(dry_run.report, dry_run.plan, width),
            *([f"wrote {path}"] if path else []),
        ],
    )
    return 0


def planning(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `plan` and `compress` hand to the library alike."""
    return {
        "pipeline": arguments.pipeline,
        "example_inputs": inputs(arguments.input),
        "include": tuple(arguments.include) or ("*",),
        "exclude": tuple(arguments.exclude),
        "overridable": tuple(arguments.overridable),
        "formats": tuple(arguments.format),
        "samples": arguments.samples,
        "effort": arguments.effort,
        "divergence": arguments.divergence,
        "target": arguments.target,
        "batch": arguments.batch,
        "threads": arguments.threads,
    }
