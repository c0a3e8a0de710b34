"""tdpass compress: a smaller model and its report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import tdpass
from tdpass.artifact import unverified
from tdpass.cli.arguments import Verbs, add_data, add_model, add_planning, add_torch, add_verb, data
from tdpass.cli.fused import library_notes
from tdpass.cli.output import Output
from tdpass.cli.plan import planning
from tdpass.cli.sources import Source, read_source
from tdpass.cli.values import CommandLineError, budget
from tdpass.errors import TdpassError, UsageError, WriteError
from tdpass.files import check_writable, new_folder, write_text
from tdpass.html_report import render_html
from tdpass.report import Report
from tdpass.terminal import report_view
from tdpass.views.tables import Part


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass compress model.onnx --budget macs=0.4 --data calib.npz -o small.onnx"
    parser = add_verb(verbs, "compress", run, "compress a model and report what was done", example)
    add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help=".onnx, .pt2, or .safetensors for a factory's model",
    )
    add_data(parser, samples=None)
    add_planning(parser)
    add_torch(parser)
    parser.add_argument(
        "--plan", metavar="PLAN.json", type=Path, help="carry out this plan instead of making one"
    )
    parser.add_argument(
        "--no-strict",
        action="store_true",
        help="a result further from the original than planned is noted in the report, no error",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite the output, plan and report of another model"
    )
    parser.add_argument(
        "--program",
        action="store_true",
        help="let a .safetensors file hold how the network is built, so that it loads without its class",
    )
    parser.add_argument(
        "--report-dir", metavar="DIR", type=Path, help="where plan and report go (default: beside the output)"
    )


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Compress, save the model with its plan and report, and show the report."""
    limits = budget(arguments.budget)
    if not limits and arguments.plan is None and arguments.pipeline is None:
        raise CommandLineError("nothing to aim for; give --budget macs=0.4, or a --plan, or a --pipeline")
    source = read_source(arguments.model, arguments.weights, arguments.trust)
    output: Path = arguments.output
    source.check_output(output)
    folder: Path = arguments.report_dir or output.parent
    with new_folder(folder, "--report-dir"):
        return _compressed(source, limits, folder, arguments, out)


def _compressed(
    source: Source, limits: Mapping[str, str], folder: Path, arguments: argparse.Namespace, out: Output
) -> int:
    output: Path = arguments.output
    files = _files(output, folder)
    for path in files.values():
        check_writable(path)
    if not arguments.force:
        check_own(files, source.text)
    plan = None if arguments.plan is None else tdpass.load_plan(arguments.plan)
    options = planning(arguments)
    strict = not arguments.no_strict
    try:
        with out.progress() as progress:
            artifact = tdpass.compress(
                source.load(),
                limits or None,
                data(arguments),
                plan=plan,
                progress=progress,
                strict=strict,
                **options,
            )
    except TdpassError as error:
        if isinstance(error.artifact, tdpass.Artifact):
            kept = _write(error.artifact, source.text, unverified(output), folder, out)
            out.say(
                "what was made is kept, to look at and not to be used as it is: "
                f"{', '.join(map(str, kept.values()))}"
            )
        raise
    written = _write(artifact, source.text, output, folder, out, program=arguments.program)
    notes = library_notes([output])

    def view(width: int | None) -> list[Part]:
        return [
            *report_view(artifact.report, artifact.plan, width),
            "",
            *(f"wrote {path}" for path in written.values()),
            *notes,
        ]

    document = {
        "files": {kind: str(path) for kind, path in written.items()},
        "notes": notes,
        "report": json.loads(artifact.report.to_json()),
    }
    out.show({**document, "plan": json.loads(artifact.plan.to_json())}, view)
    return 0


def check_own(files: Mapping[str, Path], model: str) -> None:
    """Raise `UsageError` where a file is there already that is not of an earlier run with the same model."""
    there = [path for path in files.values() if path.exists()]
    if not there:
        return
    try:
        other = Report.load(files["report.json"]).model
    except TdpassError:
        other = "something else"
    if other != model:
        names = ", ".join(path.name for path in there)
        raise UsageError(
            f"{names} in {there[0].parent} are there already, of {other}; name another file with -o, or "
            "give --force to overwrite them"
        )


def _files(output: Path, folder: Path) -> dict[str, Path]:
    return {
        "model": output,
        **{kind: folder / f"{output.stem}.{kind}" for kind in ("plan.json", "report.json", "report.html")},
    }


def _write(
    artifact: tdpass.Artifact,
    name: str,
    output: Path,
    folder: Path,
    out: Output,
    *,
    program: bool = False,
) -> dict[str, Path]:
    """Save the model with its plan and report, these even where that fails; returns the files by kind.

    On a full disk the plan alone, where there is room for it.
    """
    artifact.report.model = name
    written = _files(output, folder)
    try:
        data = artifact.save(output, program=program)
    except WriteError:
        plan = written["plan.json"]
        with suppress(WriteError):  # the first error is the one to know of
            artifact.plan.save(plan)
            out.say(f"the plan is kept in {plan}; go on from it with --plan {plan}")
        raise
    except Exception:
        _say_what_was_done(artifact, written)
        raise
    _say_what_was_done(artifact, written)
    return {
        **written,
        **{("weights" if index == 0 else f"weights {index + 1}"): path for index, path in enumerate(data)},
    }


def _say_what_was_done(artifact: tdpass.Artifact, files: Mapping[str, Path]) -> None:
    artifact.plan.save(files["plan.json"])
    artifact.report.save(files["report.json"])
    write_text(files["report.html"], render_html(artifact.report, artifact.plan))
