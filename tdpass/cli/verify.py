"""tdpass verify: how far two models' outputs are apart."""

from __future__ import annotations

import argparse

import tdpass
from tdpass.cli.arguments import Verbs, add_data, add_divergence, add_model, add_torch, add_verb, data
from tdpass.cli.output import Output
from tdpass.cli.sources import read_sources
from tdpass.cli.values import amount, inputs
from tdpass.errors import InvalidModelError
from tdpass.views.summary import checks
from tdpass.views.tables import Part, grid
from tdpass.views.units import small

DIFFERENCE = "max_difference"


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass verify model.onnx small.onnx --data calib.npz --tolerance 0.05"
    parser = add_verb(verbs, "verify", run, "compare the outputs of two models on the same data", example)
    add_model(parser, "reference", "A")
    add_model(
        parser,
        "candidate",
        "B",
        help="the same, or a .safetensors file that compress wrote for the factory A",
    )
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=amount,
        default=1e-4,
        help="largest allowed relative difference (default %(default)s)",
    )
    add_divergence(parser)
    add_data(parser)
    add_torch(parser)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Run both, show the differences, and fail when they are above the tolerance."""
    reference, candidate = read_sources(
        [arguments.reference, arguments.candidate], arguments.weights, arguments.trust
    )
    values = tdpass.verify(
        reference.load(),
        candidate.load(),
        data(arguments),
        example_inputs=inputs(arguments.input),
        samples=arguments.samples,
        divergence=arguments.divergence,
    )
    if DIFFERENCE not in values:
        raise InvalidModelError(
            f"the models have no common floating-point output; compared: {', '.join(values) or 'nothing'}"
        )
    passed = values[DIFFERENCE] <= arguments.tolerance

    def view(width: int | None) -> list[Part]:
        verdict = "within" if passed else "above"
        conclusion = f"{small(values[DIFFERENCE])} is {verdict} the tolerance of {arguments.tolerance:g}"
        return [grid(("Compared", "Value"), checks(values), width, numbers=(1,)), "", conclusion]

    out.show(
        {
            "reference": reference.text,
            "candidate": candidate.text,
            **values,
            "tolerance": arguments.tolerance,
            "passed": passed,
        },
        view,
    )
    return 0 if passed else 1
