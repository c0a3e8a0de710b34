"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tdpass.cli import values
from tdpass.cli.isolation import MEMORY, SECONDS
from tdpass.cli.sources import model_name
from tdpass.cli.values import CommandLineError
from tdpass.formats import FORMATS
from tdpass.measures import measures
from tdpass.planner.divergence import divergences
from tdpass.raw import Raw
from tdpass.raw.hub import PREFIX
from tdpass.registry import nearest

Run = Callable[..., int]
_BOTH = re.compile(r"(pass|with) (?:\w+=(?:'[^']*'|\[[^]]*\]|[^\s,;()]*)(?: or )?)+ \((--[^)]+)\)")
_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<allowed>.*)\)")
MODEL_HELP = (
    "model.onnx, program.pt2, package.module:factory for a torch model (imported with the current folder on "
    "the path), or timm:NAME, torchvision:NAME, hf:NAME, zoo:NAME"
)


class Verbs(Protocol):
    """Where a verb adds its parser: what argparse makes for sub-commands.

    `choices` are those added so far, by name.
    """

    choices: Any

    def add_parser(self, name: str, **options: Any) -> Parser:
        """A parser for one sub-command."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `CommandLineError`s, so that they look like every other error."""

    _words: Sequence[str] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{**options, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, but a word that means nothing is the verb's own error, which knows its options."""
        self._words = list(args or ())
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest))
        return found, rest

    def _unknown(self, words: Sequence[str]) -> str:
        meant = (nearest(word.partition("=")[0], self._option_string_actions) for word in words)
        return f"unrecognized arguments: {' '.join(words)}{next(filter(None, meant), '')}"

    def error(self, message: str) -> NoReturn:
        options = [word for word in self._words if word.startswith("--")]
        unknown = [word for word in options if word.partition("=")[0] not in self._option_string_actions]
        if "required" in message and unknown:  # what is lacking may be what was misspelt
            message = self._unknown(unknown)
        refused = _CHOICE.search(message)
        meant = nearest(refused["given"], re.findall(r"[\w-]+", refused["allowed"])) if refused else ""
        raise CommandLineError(f"{message}{meant}; see `{self.prog} --help`")


def add_verb(verbs: Verbs, name: str, run: Run, summary: str, example: str) -> Parser:
    """A verb with the options that all verbs have."""
    parser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"example: {example}"
    )
    common = parser.add_argument_group("output")
    common.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, and nothing else there"
    )
    common.add_argument("--quiet", action="store_true", help="print nothing but errors")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    alone = parser.add_argument_group("files that nobody vouches for")
    alone.add_argument(
        "--isolate",
        action="store_true",
        help="run in a process of its own that can take no more time and memory than it is given",
    )
    alone.add_argument(
        "--isolate-seconds",
        metavar="N",
        type=values.count,
        default=SECONDS,
        help="how long it may run (default %(default)s)",
    )
    alone.add_argument(
        "--isolate-memory",
        metavar="SIZE",
        type=values.memory,
        default=MEMORY,
        help="how much memory it may take (default %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: Parser, dest: str = "model", metavar: str = "MODEL", **options: Any) -> None:
    """A model by its name."""
    parser.add_argument(dest, metavar=metavar, type=model_name, **{"help": MODEL_HELP, **options})


def add_torch(parser: Parser) -> None:
    """Options that only a torch factory needs."""
    group = parser.add_argument_group("torch models")
    weights = "weights of the factory's model: .safetensors, or a state dict in .pth; once per factory"
    group.add_argument(
        "--weights", metavar="FILE", type=values.weights_file, action="append", default=[], help=weights
    )
    group.add_argument(
        "--trust", action="store_true", help="load a .pt2 file even where that could run code it holds"
    )
    shape = "shape of an input, such as 1x3x32x32 or 1x16:int64; once per input"
    group.add_argument(
        "--input", metavar="SHAPE[:DTYPE]", type=values.shape, action="append", default=[], help=shape
    )


def add_data(parser: Parser, samples: int | None = 512) -> None:
    """Where calibration data comes from, and how many samples are used; None for as many as the effort has."""
    default = "%(default)s" if samples else "512; with --effort fast up to 128, as there is time for"
    parser.add_argument(
        "--data",
        metavar="FILE",
        help=".npz with arrays named after the inputs (else taken in order), .npy, or images, text or "
        "sound in a folder or file, or hf:NAME, which the model's own processor reads",
    )
    parser.add_argument(
        "--processor",
        metavar="NAME",
        help="whose tokenizer, image processor or feature extractor reads --data: a folder, or a model of "
        "transformers (default: the model's own)",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=values.count,
        default=samples,
        help=f"how many samples to use at most (default: {default})",
    )


def data(arguments: argparse.Namespace) -> Raw | Path | None:
    """The calibration data."""
    if arguments.data is None:
        return None
    raw = arguments.processor is not None or arguments.data.startswith(PREFIX)
    return Raw(arguments.data, arguments.processor) if raw else Path(arguments.data)


def add_planning(parser: Parser) -> None:
    """Options that decide what the planner may do."""
    group = parser.add_argument_group("planning")
    amounts = ", ".join(f"{measure.name}={measure.example}" for measure in measures()).replace("%", "%%")
    budgets = f"a share or an amount, such as macs=0.4 or {amounts}; or max_error=0.1; may be repeated"
    group.add_argument(
        "--budget", metavar="KEY=VALUE", type=values.limit, action="append", default=[], help=budgets
    )
    group.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="plan only sites whose names match; may be repeated",
    )
    group.add_argument(
        "--exclude",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave sites alone whose names match; may be repeated",
    )
    group.add_argument(
        "--overridable",
        metavar="GLOB",
        action="append",
        default=[],
        help="initializers of ONNX that stay inputs; may be repeated",
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        choices=FORMATS.names(),
        action="append",
        default=[],
        help="use only these formats; may be repeated",
    )
    add_divergence(group)
    group.add_argument(
        "--effort",
        choices=("fast", "normal", "thorough"),
        default="normal",
        help="how long planning may take (default %(default)s)",
    )
    group.add_argument(
        "--target",
        metavar="NAME",
        type=values.target_name,
        help="plan on times measured here (cpu, cpu:openvino, cuda) or on a modelled one (crossbar:isaac)",
    )
    group.add_argument(
        "--batch",
        metavar="N",
        type=values.count,
        default=1,
        help="samples per call on the target (default %(default)s)",
    )
    group.add_argument(
        "--threads",
        metavar="N",
        type=values.count,
        help="threads on the target (default: as many as torch uses)",
    )
    group.add_argument(
        "--pipeline",
        metavar="TEXT|FILE",
        type=values.pipeline,
        help="passes as text, such as 'plan{macs=0.4},factorize', or a recipe.yaml",
    )


def add_divergence(parser: Parser | argparse._ArgumentGroup) -> None:
    """How outputs are compared."""
    known = divergences()
    parser.add_argument(
        "--divergence",
        metavar="NAME",
        choices=known,
        default=known[0],
        help=f"how outputs are compared: {', '.join(known)} (default %(default)s)",
    )


def as_options(message: str) -> str:
    """A message of the library in the words of the command line.

    Options stand in place of Python's arguments where it names both: `pass x= (--y)`.
    """
    return _BOTH.sub(
        lambda found: f"{'give' if found[1] == 'pass' else 'with'} {' or '.join(found[2].split(', '))}",
        message,
    )
