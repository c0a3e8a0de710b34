"""tdpass map: which weight lies in which cell of which crossbar array."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict, dataclass

from torch import nn

import tdpass
from tdpass.cli.arguments import Verbs, add_data, add_model, add_torch, add_verb, data
from tdpass.cli.output import Output
from tdpass.cli.sources import read_sources
from tdpass.cli.values import CommandLineError, amount, count, file_ending, inputs, value
from tdpass.crossbars import CHIPS, Devices, Mapped, chip, map_model, simulate
from tdpass.errors import UsageError
from tdpass.targets.crossbar import CrossbarArray
from tdpass.views.tables import Part, grid
from tdpass.views.units import share


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass map net:build --weights small.safetensors --target crossbar.yaml -o map.json"
    parser = add_verb(
        verbs, "map", run, "lay the weights of a model into the cells of crossbar arrays", example
    )
    add_model(parser)
    parser.add_argument(
        "--target",
        metavar="NAME|FILE.yaml",
        type=array_name,
        default="admm_32x32",
        help="the array, as target crossbar has them (default %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="MAP.json",
        type=file_ending(".json"),
        required=True,
        help="where the map goes; the cells lie beside it, as .safetensors",
    )
    parser.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="map only sites whose names match; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave sites out whose names match; may be repeated",
    )
    add_data(parser)
    add_torch(parser)
    group = parser.add_argument_group("simulation, of a torch model on --data")
    group.add_argument(
        "--draws",
        metavar="N",
        type=count,
        help="compare the model with what its arrays answer, for so many draws of the devices",
    )
    group.add_argument(
        "--variation",
        metavar="S",
        type=amount,
        default=0.0,
        help="deviation of the logarithm of conductances (default %(default)s)",
    )
    group.add_argument(
        "--stuck",
        metavar="P",
        type=amount,
        default=0.0,
        help="share of cells that are stuck, half of them on (default %(default)s)",
    )
    group.add_argument(
        "--wires", action="store_true", help="with the resistance of wires, to the first order"
    )
    group.add_argument(
        "--chip",
        metavar="NAME",
        choices=CHIPS,
        help=f"devices as measured: {', '.join(CHIPS)} (needs aihwkit)",
    )


@value
def array_name(text: str) -> str:
    """The name of an array without the target's, or a file that describes one."""
    name = text.removeprefix("crossbar:")
    CrossbarArray.file(name)
    return name


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Map, write, show what each site takes, and simulate where it is asked for."""
    if arguments.draws is not None and arguments.data is None:
        raise CommandLineError("there is nothing to simulate the arrays on; give --data")
    (source,) = read_sources([arguments.model], arguments.weights, arguments.trust)
    array = CrossbarArray.load(arguments.target)
    model, example = source.load(), inputs(arguments.input)
    mapped = map_model(
        model, array, example_inputs=example, include=arguments.include or ("*",), exclude=arguments.exclude
    )
    files = mapped.save(arguments.output)
    answers = {} if arguments.draws is None else _answers(arguments, model, mapped)
    rows = _rows(mapped)

    def view(width: int | None) -> list[Part]:
        lines = [(row.site, f"{row.arrays:,}", f"{row.cells:,}", share(row.cells, row.room)) for row in rows]
        found = [f"{name}: {value}" for name, value in answers.items()]
        return [
            grid(("Site", "Arrays", "Cells", "Filled"), lines, width, numbers=(1, 2, 3)),
            "",
            *found,
            f"wrote {files[0]} and {files[1]}",
        ]

    document = {
        "model": source.text,
        "files": [str(path) for path in files],
        "sites": [asdict(row) for row in rows],
        **answers,
    }
    out.show(document, view)
    return 0


@dataclass(frozen=True)
class _Row:
    """Arrays of a site, cells of them that hold something, and all that they have."""

    site: str
    arrays: int
    cells: int
    room: int


def _rows(mapped: Mapped) -> list[_Row]:
    array, sets = mapped.map.array, defaultdict[str, set[int]](set)
    for matrix in mapped.map.matrices:
        sets[matrix.site] |= {place.array for place in matrix.places}
    filled = mapped.state.reshape(-1, array.copies, array.rows, array.columns).count_nonzero((1, 2, 3))
    size = array.copies * array.rows * array.columns
    return [
        _Row(name, len(found) * array.copies, sum(int(filled[k]) for k in found), len(found) * size)
        for name, found in sets.items()
    ]


def _answers(arguments: argparse.Namespace, model: object, mapped: Mapped) -> dict[str, str]:
    """How far the outputs are from the model's, over the draws."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"only torch models are simulated, not a {type(model).__name__}; leave --draws out to write the "
            "map alone"
        )
    stuck = arguments.stuck / 2
    devices = Devices(
        arguments.variation,
        stuck,
        stuck,
        arguments.wires,
        chip=None if arguments.chip is None else chip(arguments.chip),
    )
    values = data(arguments)
    reference = model.eval()

    def moved(made: nn.Module) -> float:
        return tdpass.verify(reference, made, values, samples=arguments.samples)["relative_difference"]

    return {"relative difference": str(simulate(model, mapped, moved, devices, draws=arguments.draws))}
