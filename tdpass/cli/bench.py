"""tdpass bench: whole models against each other on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.text import Text

from tdpass.cli.arguments import Verbs, add_data, add_model, add_torch, add_verb, data
from tdpass.cli.fused import library_notes
from tdpass.cli.output import Output
from tdpass.cli.runners import RUNTIMES, Runner, example_batch, runners
from tdpass.cli.sources import Source, read_sources
from tdpass.cli.timing import Quartiles
from tdpass.cli.values import count, inputs
from tdpass.clock import interleaved
from tdpass.data import calls_of
from tdpass.errors import UsageError
from tdpass.models import Batch, open_model
from tdpass.views.tables import Part, grid
from tdpass.views.units import dims, ratio, seconds


@dataclass(frozen=True)
class Timed:
    """A model in a runtime, timed.

    `faster` is the median over rounds of the first model's time in the same runtime over this one's,
    `faster_than_best` the same against the first model in its best runtime; None where there is nothing to
    compare with.
    """

    model: str
    runtime: str
    faster: Quartiles | None
    faster_than_best: Quartiles | None
    seconds: Quartiles


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = add_verb(
        verbs,
        "bench",
        run,
        "time whole models on this machine",
        "tdpass bench model.onnx small.onnx --batch 8 --threads 1",
    )
    add_model(parser, "models", nargs="+", help="the first is what the others are compared with")
    parser.add_argument(
        "--batch", metavar="N", type=count, help="samples per call (default: what the inputs have)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=count, default=1, help="threads of every runtime (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=count, default=15, help="rounds over all models (default %(default)s)"
    )
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        choices=RUNTIMES,
        action="append",
        default=[],
        help=f"only these: {', '.join(RUNTIMES)}",
    )
    parser.add_argument(
        "--inductor",
        action="store_true",
        help="also torch.compile with freezing, which takes a while to compile",
    )
    add_data(parser)
    add_torch(parser)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Load everything, time it round by round, and show ratios first."""
    sources = read_sources(arguments.models, arguments.weights, arguments.trust)
    wanted = tuple(arguments.runtime) or tuple(name for name in RUNTIMES if name != "inductor")
    wanted += ("inductor",) if arguments.inductor else ()
    batch = _batch(arguments, sources)
    with out.progress() as progress:
        candidates = [
            runner for source in sources for runner in runners(source, batch, arguments.threads, wanted)
        ]
        if not candidates:
            raise UsageError(
                f"no runtime left for {', '.join(source.name for source in sources)}; allow more with "
                "--runtime"
            )
        rounds = interleaved([runner.call for runner in candidates], arguments.rounds, progress)
    rows = compared(candidates, rounds)
    shapes = [dims(tensor.shape) for tensor in batch.tensors]
    notes = library_notes([Path(source.text) for source in sources])

    def view(width: int | None) -> list[Part]:
        lines = [
            (
                row.model,
                row.runtime,
                _times(row.faster),
                _times(row.faster_than_best),
                seconds(row.seconds.median),
                _range(row.seconds),
            )
            for row in rows
        ]
        titles = ("Model", "Runtime", "Faster", "Than best", "Time", "Quartiles")
        return [
            grid(titles, lines, width, numbers=(2, 3, 4, 5), wraps=(0,)),
            "",
            Text(
                f"inputs {', '.join(shapes)}; threads {arguments.threads}; {arguments.rounds} interleaved "
                "rounds, medians"
            ),
            *notes,
            Text(
                f"Faster: than {sources[0].name} in the same runtime; Than best: than {sources[0].name} in "
                "its fastest runtime"
            ),
        ]

    document = {
        "inputs": shapes,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": [asdict(row) for row in rows],
        "notes": notes,
    }
    out.show(document, view)
    return 0


def compared(candidates: Sequence[Runner], rounds: Sequence[Sequence[float]]) -> list[Timed]:
    """Ratios taken round by round, so that what slows a whole round cancels."""
    first = candidates[0].model
    medians = [Quartiles.of(times).median for times in rounds]
    own = {
        runner.runtime: index
        for index, runner in reversed(list(enumerate(candidates)))
        if runner.model == first
    }
    best = min(own.values(), key=lambda index: medians[index])

    def against(reference: int | None, index: int) -> Quartiles | None:
        if reference is None:
            return None
        return Quartiles.of(
            [before / after for before, after in zip(rounds[reference], rounds[index], strict=True)]
        )

    return [
        Timed(
            runner.model,
            runner.runtime,
            against(own.get(runner.runtime), index),
            against(best, index),
            Quartiles.of(rounds[index]),
        )
        for index, runner in enumerate(candidates)
    ]


def _batch(arguments: argparse.Namespace, sources: Sequence[Source]) -> Batch:
    """The inputs of every call: data, else shapes given, else what a model says of itself."""
    batch: Batch | None = None
    given = inputs(arguments.input)
    if arguments.data is not None:
        size = arguments.batch or 64
        batch = calls_of(
            open_model(sources[0].load()), data(arguments), arguments.batch or arguments.samples, size
        )[0][0]
    elif given is not None:
        batch = Batch(given)
    else:
        batch = next(
            (found for source in sources if (found := example_batch(source, arguments.batch)) is not None),
            None,
        )
    if batch is None:
        raise UsageError("a torch factory does not say what it reads; give --input 1x3x32x32 or --data")
    batch = batch if arguments.batch is None else batch.resized(arguments.batch)
    return batch.map(lambda tensor: torch.as_tensor(tensor).contiguous())


def _times(quartiles: Quartiles | None) -> str:
    return "" if quartiles is None else ratio(quartiles.median, 1)


def _range(quartiles: Quartiles) -> str:
    return f"{seconds(quartiles.low)} to {seconds(quartiles.high)}"
