"""tdpass deploy: a model as files that run without tdpass."""

from __future__ import annotations

import argparse

import tdpass
from tdpass.cli.arguments import MODEL_HELP, Verbs, add_model, add_torch, add_verb
from tdpass.cli.fused import library_notes
from tdpass.cli.output import Output
from tdpass.cli.sources import read_sources
from tdpass.cli.values import CommandLineError, file_ending, inputs
from tdpass.errors import UsageError
from tdpass.files import check_writable
from tdpass.views.tables import Part


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass deploy net:make small.safetensors --input 1x3x32x32 --dynamic-batch -o small.pt2"
    parser = add_verb(
        verbs, "deploy", run, "write a model for a program that runs it without tdpass", example
    )
    add_model(
        parser,
        nargs="+",
        help=f"{MODEL_HELP}; a .safetensors file that compress wrote comes after its factory",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=file_ending(".pt2", ".onnx"),
        required=True,
        help=".pt2: compiled by AOTInductor, with its operators; .onnx: the graph",
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="let the first axis of every input be of any size"
    )
    add_torch(parser)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Write the files and name them."""
    sources = read_sources(arguments.model, arguments.weights, arguments.trust)
    source, output = sources[-1], arguments.output
    if len(sources) > 2 or (len(sources) == 2 and source.kind != "factors"):
        raise CommandLineError(
            f"{len(sources)} models are given; name one, or a factory and the .safetensors file that "
            "compress wrote for it"
        )
    if output.exists() and source.kind != "factory" and output.samefile(source.text):
        raise UsageError(f"the output {output} is the input; name another file with -o")
    check_writable(output)
    done = tdpass.deploy(
        source.load(), inputs(arguments.input), output, dynamic_batch=arguments.dynamic_batch
    )
    notes = library_notes([*done.files])

    def view(_width: int | None) -> list[Part]:
        return [
            *(f"wrote {path}" for path in done.files),
            *([] if notes else [f"{done.fused} layers run as fused operators"]),
            *(f"{name}: {reason}" for name, reason in done.declined.items()),
            *notes,
        ]

    out.show(
        {
            "model": source.text,
            "files": [str(path) for path in done.files],
            "fused": done.fused,
            "declined": dict(done.declined),
            "notes": notes,
        },
        view,
    )
    return 0
