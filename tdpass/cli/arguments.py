"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from tdpass.cli.isolation import MEMORY, SECONDS
from tdpass.errors import UsageError
from tdpass.measures import measures
from tdpass.planner.memory import size_of
from tdpass.raw import Raw
from tdpass.raw.hub import PREFIX
from tdpass.registry import nearest

Run = Callable[..., int]
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}
_BOTH = re.compile(r"(pass|with) (?:\w+=(?:'[^']*'|\[[^]]*\]|[^\s,;()]*)(?: or )?)+ \((--[^)]+)\)")
_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<allowed>.*)\)")
_INPUT = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")
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
    """argparse whose complaints are `UsageError`s, so that they look like every other error."""

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
        raise UsageError(f"{message}{meant}; see `{self.prog} --help`")


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
        type=count,
        default=SECONDS,
        help="how long it may run (default %(default)s)",
    )
    alone.add_argument(
        "--isolate-memory",
        metavar="SIZE",
        type=_memory,
        default=MEMORY,
        help="how much memory it may take (default %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def add_torch(parser: Parser) -> None:
    """Options that only a torch factory needs."""
    group = parser.add_argument_group("torch models")
    weights = "weights of the factory's model: .safetensors, or a state dict in .pth; once per factory"
    group.add_argument("--weights", metavar="FILE", action="append", default=[], help=weights)
    group.add_argument(
        "--trust", action="store_true", help="load a .pt2 file even where that could run code it holds"
    )
    shape = "shape of an input, such as 1x3x32x32 or 1x16:int64; once per input"
    group.add_argument("--input", metavar="SHAPE[:DTYPE]", action="append", default=[], help=shape)


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
        type=count,
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
    group.add_argument("--budget", metavar="KEY=VALUE", action="append", default=[], help=budgets)
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
        action="append",
        default=[],
        help="use only these formats; may be repeated",
    )
    group.add_argument(
        "--divergence",
        metavar="NAME",
        default="auto",
        help="how outputs are compared: auto, kl, mse or cosine (default %(default)s)",
    )
    group.add_argument(
        "--effort",
        choices=("fast", "normal", "thorough"),
        default="normal",
        help="how long planning may take (default %(default)s)",
    )
    group.add_argument(
        "--target",
        metavar="NAME",
        help="plan on times measured here (cpu, cpu:openvino, cuda) or on a modelled one (crossbar:isaac)",
    )
    group.add_argument(
        "--batch",
        metavar="N",
        type=count,
        default=1,
        help="samples per call on the target (default %(default)s)",
    )
    group.add_argument(
        "--threads", metavar="N", type=count, help="threads on the target (default: as many as torch uses)"
    )
    group.add_argument(
        "--pipeline",
        metavar="TEXT|FILE",
        help="passes as text, such as 'plan{macs=0.4},factorize', or a recipe.yaml",
    )


def as_options(message: str) -> str:
    """A message of the library in the words of the command line.

    Options stand in place of Python's arguments where it names both: `pass x= (--y)`.
    """
    return _BOTH.sub(
        lambda found: f"{'give' if found[1] == 'pass' else 'with'} {' or '.join(found[2].split(', '))}",
        message,
    )


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _memory(text: str) -> int:
    """A size in memory, for argparse."""
    size = size_of(text)
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size in memory; write a number of bytes with a unit, such as 512MiB or 4GiB"
        )
    return size


def budget(items: Sequence[str]) -> dict[str, str]:
    """`["macs=0.4", "bytes=2MiB"]` as a mapping.

    Raises `UsageError` for an item without `=` or a key given twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip() or not value.strip():
            raise UsageError(
                f"budget {item!r} is not KEY=VALUE; write --budget macs=0.4, and repeat the option for "
                "further limits"
            )
        if key.strip() in pairs:
            raise UsageError(f"budget {key.strip()!r} is given twice; give each limit once")
        pairs[key.strip()] = value.strip()
    return pairs


def inputs(items: Sequence[str]) -> tuple[Tensor, ...] | None:
    """`["1x3x32x32", "1x16:int64"]` as tensors: fixed noise for floats, zeros for whole numbers.

    None for none.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for item in items:
        match = _INPUT.fullmatch(item)
        dtype = _DTYPES.get((match[2] or "float32") if match else "")
        if match is None or dtype is None:
            raise UsageError(
                f"input {item!r} is not SHAPE or SHAPE:DTYPE; write 1x3x32x32 or 1x16:int64 (types: "
                f"{', '.join(_DTYPES)})"
            )
        shape = [int(size) for size in match[1].split("x")]
        if min(shape) < 1:
            raise UsageError(f"input {item!r} has an empty axis; every size must be at least 1")
        tensors.append(
            torch.randn(shape, generator=generator).to(dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, dtype=dtype)
        )
    return tuple(tensors) or None
