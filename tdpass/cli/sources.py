"""Models as they are named on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import tdpass
from tdpass.cli.values import CommandLineError, value
from tdpass.deploy import Deployed, is_package
from tdpass.errors import InvalidModelError, UsageError
from tdpass.models.front_ends import front_end_of, front_end_of_file
from tdpass.sources import MODULE_SOURCES, is_module, load_weights, module_of
from tdpass.sources.saved import holds_program, published_model

Kind = Literal["file", "factory", "factors"]
_FACTORS = ".safetensors"
_DOCUMENTS = (".json", ".html")


@dataclass(frozen=True)
class Source:
    """A model named on the command line: a file, or a factory with the weights for its model.

    A `.safetensors` file that `compress` wrote holds `factors`; it needs the factory of the dense model, in
    `factory`, unless it holds its own program.
    """

    text: str
    kind: Kind
    weights: Path | None = None
    factory: str = ""
    trust: bool = False

    @property
    def name(self) -> str:
        """A short name for tables."""
        return self.text if self.kind == "factory" else Path(self.text).name

    @property
    def suffix(self) -> str:
        """What the file of the model ends in; empty for a factory."""
        return "" if self.kind == "factory" else Path(self.text).suffix.lower()

    def load(self) -> object:
        """A path for files that the library opens itself, a trusted program, else a model to evaluate.

        The last is a torch model in evaluation mode.
        """
        if self.suffix == ".pt2" and is_package(Path(self.text)):
            if not self.trust:
                raise UsageError(
                    f"{self.text} is compiled code, which loading runs; give --trust where you know who "
                    "made it"
                )
            return Deployed(Path(self.text))
        if self.kind == "file":
            front_end = front_end_of(Path(self.text))
            return (
                front_end.trusted(Path(self.text))
                if self.trust and front_end.trusted is not None
                else self.text
            )
        if self.kind == "factors" and not self.factory:
            return tdpass.load(Path(self.text))
        # what a factory draws is the same for every command, so that its results can be told from each other
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # published weights are not fetched where others take their place
            module = module_of(self.factory, pretrained=self.kind == "factory" and self.weights is None)
        if self.kind == "factors":
            return tdpass.load(Path(self.text), module).eval()
        if self.weights is not None:
            load_weights(module, self.weights)
        return module.eval()

    def check_output(self, path: Path) -> None:
        """Raise `UsageError` unless a result can be written there, `CommandLineError` for the wrong suffix."""
        suffix = self.suffix or _FACTORS
        if path.suffix != suffix:
            raise CommandLineError(
                f"the output {path.name!r} of {self.name} must end in {suffix}; write -o "
                f"{path.with_suffix(suffix).name}"
            )
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}; make it, or name another with -o")
        if self.kind != "factory" and path.exists() and path.samefile(self.text):
            raise UsageError(f"the output {path} is the input; name another file with -o")


def read_sources(texts: Sequence[str], weights: Sequence[str], trust: bool = False) -> list[Source]:
    """Sources for model arguments in order.

    Raises `InvalidModelError` for a file that is not there, `UsageError` for factors without a factory,
    `CommandLineError` for weights without one. Each `--weights` belongs to one
    factory, in order; a `.safetensors` argument is built on the first factory.
    """
    kinds = [_kind(text) for text in texts]
    if len(weights) > kinds.count("factory"):
        raise CommandLineError(
            f"{len(weights)} --weights for {kinds.count('factory')} torch factories; a .onnx or .pt2 file "
            "holds its own weights"
        )
    for text, kind in zip(texts, kinds, strict=True):
        if kind != "factory" and not Path(text).is_file():
            raise InvalidModelError(f"there is no file {text}; check the path")
    factory = next((text for text, kind in zip(texts, kinds, strict=True) if kind == "factory"), "")
    if "factors" in kinds and not factory:
        place = texts[kinds.index("factors")]
        factory = published_model(Path(place))
    if "factors" in kinds and not factory and not holds_program(Path(place)):
        raise UsageError(
            f"{place!r} holds factors only; name the torch model they belong to as well, as "
            "package.module:factory"
        )
    files: Iterator[str] = iter(weights)
    sources = []
    for text, kind in zip(texts, kinds, strict=True):
        given = next(files, None) if kind == "factory" else None
        sources.append(
            Source(text, kind, Path(given) if given else None, text if kind == "factory" else factory, trust)
        )
    return sources


def read_source(text: str, weights: Sequence[str], trust: bool = False) -> Source:
    """The one model of a verb that takes one."""
    return read_sources([text], weights, trust)[0]


@value
def model_name(text: str) -> str:
    """What names a model, whether or not there is one of that name."""
    _kind(text)
    return text


def _kind(text: str) -> Kind:
    path = Path(text)
    factors = path.suffix.lower() == _FACTORS
    if factors or front_end_of_file(path) is not None:
        return "factors" if factors else "file"
    if is_module(text):
        return "factory"
    if path.suffix.lower() in _DOCUMENTS:
        raise UsageError(
            f"{text} is no model but what is said of one; show a report with `tdpass report`, and carry out a "
            "plan with `tdpass compress MODEL --plan`"
        )
    known = ", ".join(source.example for source in MODULE_SOURCES)
    raise UsageError(
        f"{text!r} names no model; give a .onnx or .pt2 file, package.module:factory, or one such as {known}"
    )
