"""Recipes: a whole training run as a YAML file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdpass.artifact import Artifact
from tdpass.documents import Count, Document, Size, read_yaml, register_document, yaml_value
from tdpass.errors import InvalidModelError, TdpassError, UsageError
from tdpass.methods.base import make_method
from tdpass.methods.run import train
from tdpass.methods.same_run import check_same_run
from tdpass.methods.stages import Score
from tdpass.report import TrainingRow
from tdpass.training.settings import Settings

_SHIPPED = Path(__file__).parent.parent / "recipes" / "training"


@dataclass(frozen=True)
class Recipe:
    """What `tdpass.train` is called with; objects are named `package.module:name`.

    `model()` makes the dense network, `data(seed)` the training batches, `evaluate(model)` scores on data that is not the test data,
    `test(model)` on the test data; `calibration()` gives the data of a pipeline; `example` is the shape of one input.  The rest is as `tdpass.train` has it.
    """

    model: str
    data: str
    method: Mapping[str, Any] | str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Count = 0
    pretraining: Mapping[str, Any] | None = None
    finetune: Count = 0
    finetuning: Mapping[str, Any] | None = None
    control: bool = True
    rounds_per_epoch: Size = 1
    calibration: str | None = None
    evaluate: str | None = None
    test: str | None = None
    example: tuple[Size, ...] = ()
    seed: Count = 0
    about: str = ""

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe file, or one that comes with tdpass by its name; raises `UsageError`."""
        path = Path(path)
        shipped = _SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
        found = read_yaml(path if path.exists() or not shipped.exists() else shipped, "recipe", f"give a YAML file, or one of: {', '.join(names())}")
        return cls.parse(found, str(path))

    @classmethod
    def parse(cls, found: object, source: str = "recipe") -> Recipe:
        """Check the keys of a recipe and the types of their values; raises `UsageError`."""
        if not isinstance(found, dict) or not {"model", "data"} <= set(found):
            raise UsageError(f"{source} is not a training recipe; it maps at least 'model' and 'data' to package.module:name")
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in found if key not in known]
        if unknown:
            raise UsageError(f"{source} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
        made = _RECIPE.check(found, source)
        if made.method is not None and not isinstance(made.method, str):
            make_method(made.method)
        for settings in (made.settings, made.pretraining, made.finetuning):
            Settings.parse(settings)
        return made

    def with_options(self, items: list[str]) -> Recipe:
        """With `key=value` or `method.NAME.key=value` put in its place; raises `UsageError`."""
        found: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for item in items:
            place, sign, value = item.partition("=")
            *outer, last = place.split(".")
            inner = found
            for key in outer:
                if not isinstance(inner.get(key), Mapping):
                    raise UsageError(f"the recipe has no {place!r} to set; write key=value or method.NAME.key=value with keys it has")
                inner[key] = dict(inner[key])
                inner = inner[key]
            if not sign:
                raise UsageError(f"{item!r} is not KEY=VALUE")
            inner[last] = yaml_value(value)
        return Recipe.parse(found)

    def run(
        self,
        folder: Path | None = None,
        resume: bool = False,
        log: Callable[[TrainingRow], None] | None = None,
        checkpoint_every: int = 0,
        note: Callable[[str], None] = lambda text: None,
    ) -> Artifact:
        """Train as the recipe says."""
        if folder is not None:
            names = ("model", "data", "evaluate", "test", "calibration", "example")
            check_same_run(folder, "recipe.json", {name: getattr(self, name) for name in names}, resume)
        torch.manual_seed(self.seed)
        model = made_by(self.model)
        if not isinstance(model, nn.Module):
            raise UsageError(f"{self.model!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
        return train(
            model,
            made_by(self.data, self.seed),
            self.method,
            settings=self.settings,
            pretrain=self.pretrain,
            pretraining=self.pretraining,
            finetune=self.finetune,
            finetuning=self.finetuning,
            control=self.control,
            rounds_per_epoch=self.rounds_per_epoch,
            evaluate=_score(self.evaluate),
            test=_score(self.test),
            example_inputs=torch.zeros(self.example) if self.example else None,
            calibration=None if self.calibration is None else made_by(self.calibration),
            folder=folder,
            resume=resume,
            seed=self.seed,
            log=log,
            checkpoint_every=checkpoint_every,
            note=note,
        )

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed."""
        return replace(self, seed=seed)


_RECIPE = register_document(Document("training recipe", Recipe, UsageError, "the guide to training lists the keys"))


def names() -> list[str]:
    """The training recipes that come with tdpass."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def named(text: str) -> Any:
    """The object that `package.module:name` names, imported with the current folder on the path; raises `UsageError`."""
    module_name, _, name = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {module_name!r} of {text!r}: {error}; run from the folder it lies in, or install it") from error
    except (AttributeError, ValueError):
        raise UsageError(f"module {module_name!r} has no {name!r}; name a function, as package.module:name") from None


def made_by(text: str, *arguments: object) -> Any:
    """What the named function returns; raises `UsageError`, or `InvalidModelError` where it fails."""
    function = named(text)
    try:
        return function(*arguments)
    except TdpassError:
        raise
    except Exception as error:
        with_what = f"called with {arguments}" if arguments else "called without arguments"
        raise InvalidModelError(f"{text!r} failed when it was {with_what}: {type(error).__name__}: {error}") from error


def _score(text: str | None) -> Score | None:
    return None if text is None else named(text)
