"""Recipes: a whole training run as a YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from tdpass.artifact import Artifact
from tdpass.datasets import open_dataset, source_of
from tdpass.documents import Count, Document, read_yaml, register_document, yaml_value
from tdpass.errors import UsageError
from tdpass.following import Progress
from tdpass.loggers import Logger
from tdpass.methods.base import METHODS, Method, make_method
from tdpass.methods.material import Ingredients, gathered
from tdpass.methods.run import train
from tdpass.methods.same_run import check_same_run
from tdpass.registry import nearest
from tdpass.report import TrainingRow
from tdpass.training.settings import Settings
from tdpass.zoo import NETS

_RECIPES = Path(__file__).parent.parent / "recipes"
_SHIPPED = _RECIPES / "training"
# what a run that goes on was begun with; the rest is checked where training begins
_OF_ONE_RUN = (
    "model", "data", "evaluate", "test", "calibration", "example", "batch", "augment", "trained",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe(Ingredients):
    """What `tdpass.train` is called with, by names.

    `evaluate` (not on test data) and `test` score the model: a part of the data set (`tuning`, `test`), on
    which accuracy is measured, or `package.module:name`, where `test(model)` returns a score; `calibration`
    gives the data of a pipeline in the same way, `compression` its options of `tdpass.compress`.  The rest is
    as `tdpass.train` has it.
    """

    method: Mapping[str, Any] | str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    finetune: Count = 0
    finetuning: Mapping[str, Any] | None = None
    control: bool = True
    calibration: str | None = None
    compression: Mapping[str, Any] = field(default_factory=dict)
    evaluate: str | None = None
    test: str | None = None
    about: str = ""

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe file, or one that comes with tdpass by its name; raises `UsageError`."""
        path = Path(path)
        shipped = _SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
        known = f"give a YAML file, or one of: {', '.join(names())}"
        if not path.exists() and not shipped.exists():
            raise UsageError(f"there is no recipe {str(path)!r}{nearest(shipped.stem, names())}; {known}")
        found = read_yaml(path if path.exists() else shipped, "recipe", known)
        return cls.parse(found, str(path))

    @classmethod
    def parse(cls, found: object, source: str = "recipe") -> Recipe:
        """Check the keys of a recipe and the types of their values; raises `UsageError`."""
        if not isinstance(found, dict) or not {"model", "data"} <= set(found):
            raise UsageError(
                f"{source} is not a training recipe; it maps at least 'model' and 'data', to names or "
                "package.module:name"
            )
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in found if key not in known]
        if unknown:
            meant = nearest(str(unknown[0]), known)
            raise UsageError(f"{source} has an unknown key {unknown[0]!r}{meant}; known: {', '.join(known)}")
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
                    raise UsageError(
                        f"the recipe has no {place!r} to set; write key=value or method.NAME.key=value with "
                        "keys it has"
                    )
                inner[key] = dict(inner[key])
                inner = inner[key]
            if not sign:
                raise UsageError(f"{item!r} is not KEY=VALUE")
            inner[last] = yaml_value(value)
        return Recipe.parse(found)

    def with_data(self, data: str) -> Recipe:
        """The same on another data set: scored on its parts, images changed in its own way.

        Without compiling, which few images do not repay, and in no more epochs than the set is good for, where
        it says how many.  Raises `UsageError` where it is none.
        """
        source = source_of(data)
        calibration = None if self.calibration is None else "calibration"
        settings = {**self.settings, "compile": False}
        return replace(
            self,
            data=data,
            calibration=calibration,
            evaluate="tuning",
            test="test",
            augment=None,
            settings=settings,
            at_most=self.at_most if data == self.data else source.epochs,
        )

    def run(
        self,
        folder: Path | None = None,
        resume: bool = False,
        log: Callable[[TrainingRow], None] | None = None,
        checkpoint_every: int = 0,
        note: Callable[[str], None] = lambda text: None,
        loggers: Sequence[str | Logger] = (),
        progress: Progress | bool = True,
    ) -> Artifact:
        """Train as the recipe says."""
        torch.manual_seed(self.seed)
        material = gathered(self, note)
        method, finetune = self._method(), self.bounded(self.finetune)
        shorter = self.shorter()
        if shorter:
            note(shorter)
        if folder is not None:  # where data is missing no folder is made
            check_same_run(folder, "recipe.json", {name: getattr(self, name) for name in _OF_ONE_RUN}, resume)
        artifact = train(
            material.model,
            material.batches,
            method,
            settings=self.settings,
            pretrain=material.pretrain,
            pretraining=material.pretraining,
            finetune=finetune,
            finetuning=self.finetuning,
            control=self.control,
            rounds_per_epoch=self.rounds_per_epoch,
            evaluate=material.score(self.evaluate),
            test=material.score(self.test),
            example_inputs=torch.zeros(material.example) if material.example else None,
            calibration=material.inputs(self.calibration),
            compression=self.compression,
            folder=folder,
            resume=resume,
            seed=self.seed,
            log=log,
            checkpoint_every=checkpoint_every,
            note=note,
            loggers=loggers,
            progress=progress,
        )
        artifact.report.model = material.name
        if shorter:
            artifact.report.note(shorter)
        return artifact

    def _method(self) -> Method | str | None:
        """The method in no more epochs than a stage may have, or the pipeline."""
        if self.method is None or (isinstance(self.method, str) and self.method not in METHODS):
            return self.method
        method = make_method(self.method)
        return method.at_most(self.at_most, self.rounds_per_epoch) if self.at_most else method

    def shorter(self) -> str:
        """What is to be said where stages train for fewer epochs than the recipe has; empty where none does."""
        whole = replace(self, at_most=0)
        stages = (
            ("pretraining", whole.pretrain, self.bounded(self.pretrain)),
            ("the method", whole.epochs(), self.epochs()),
            ("fine-tuning", whole.finetune, self.bounded(self.finetune)),
        )
        fewer = [f"{now} of {full} in {name}" for name, full, now in stages if now < full]
        return (
            f"no stage trains for more than {self.at_most} epochs, enough to see a recipe at work and too few "
            f"to judge it by: {', '.join(fewer)}; give --set at_most=0 for all of them"
            if fewer
            else ""
        )

    def epochs(self) -> int:
        """How many epochs the method takes."""
        method = self._method()
        return method.epochs(self.rounds_per_epoch) if isinstance(method, Method) else 0

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed."""
        return replace(self, seed=seed)


_RECIPE = register_document(
    Document("training recipe", Recipe, UsageError, "the guide to training lists the keys")
)


def names() -> list[str]:
    """The training recipes that come with tdpass."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def starting_recipe(model: str, data: str) -> str:
    """A commented recipe for that network, as text.

    Raises `UsageError`, `InvalidModelError` where network or data cannot be made.
    """
    dataset = open_dataset(data, NETS.get(model).sample if ":" not in model else None)
    gathered(Ingredients(model=model, data=data, example=(2, *dataset.sample)))
    text = (_RECIPES / "start.yaml").read_text(encoding="utf-8")
    values = {"MODEL": model, "DATA": data, "EXAMPLE": ", ".join(map(str, (1, *dataset.sample)))}
    return re.sub("|".join(values), lambda found: values[found[0]], text)
