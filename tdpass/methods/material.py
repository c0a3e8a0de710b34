"""What a recipe trains and what it trains on: the names of them, and what is made from these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tdpass.datasets import PARTS, Augment, Dataset, is_dataset, open_dataset
from tdpass.documents import Count, Size
from tdpass.errors import InvalidModelError, UsageError
from tdpass.methods.objects import made_by, named
from tdpass.methods.stages import Score
from tdpass.training.loop import Data
from tdpass.zoo import NETS

# a network without trained weights on hand is trained like this before a recipe begins that starts from such
_EPOCHS = 20
_FROM_SCRATCH = {
    "optimizer": "adam",
    "lr": 3e-3,
    "clip": 1.0,
    "distill": 0.0,
    "schedule": {"cosine": {"start": 1.0, "floor": 0.02, "warm_up": 0.1}},
}


@dataclass(frozen=True)
class Ingredients:
    """The names of a network and of its data, and how both are used before a method begins.

    `model` is a network of `tdpass.zoo` by name or `package.module:name`, which `model()` makes.  `data` is
    what `tdpass.datasets.open_dataset` opens, or `package.module:name`, where `data(seed)` returns the
    training batches.  `batch`, `augment`, `rounds_per_epoch` and `trained` are for data sets: the largest
    batch, how images are changed (the set's own way by default), how often an epoch goes through them, and
    whether to start from the trained weights that come with the set; where there are none the network is
    trained first.  `example` is the shape of one input, for networks that are not of the zoo.  No stage
    trains for more epochs than `at_most`, where that is not 0.
    """

    model: str
    data: str
    example: tuple[Size, ...] = ()
    batch: Size = 128
    augment: Augment | None = None
    trained: bool = False
    rounds_per_epoch: Size = 1
    pretrain: Count = 0
    pretraining: Mapping[str, Any] | None = None
    seed: Count = 0
    at_most: Count = 0

    def bounded(self, epochs: int) -> int:
        """So many epochs, or as many as a stage may have."""
        return min(epochs, self.at_most) if self.at_most else epochs


@dataclass(frozen=True)
class Material:
    """The network, the batches, the data set where they are of one, and its training before the method.

    `name` is what a network of that class is made by again, as `tdpass.load` does it.
    """

    name: str
    model: nn.Module
    batches: Data
    dataset: Dataset | None
    example: tuple[int, ...]
    pretrain: int
    pretraining: Mapping[str, Any] | None

    def score(self, text: str | None) -> Score | None:
        """What scores a model: accuracy on a part of the data set, or the named function.

        Raises `UsageError`.
        """
        if text is None or text not in PARTS:
            return None if text is None else named(text)
        return _accuracy(self._set_for(text), text)

    def inputs(self, text: str | None) -> object:
        """The inputs of a part of the data set, or what the named function returns; raises `UsageError`."""
        if text is None or text not in PARTS:
            return None if text is None else made_by(text)
        return self._set_for(text).inputs(text)

    def _set_for(self, part: str) -> Dataset:
        if self.dataset is None:
            raise UsageError(
                f"{part!r} is a part of a data set, and this data is a function's; name a function for it, "
                "as package.module:name"
            )
        return self.dataset


def gathered(wanted: Ingredients, note: Callable[[str], None] = lambda text: None) -> Material:
    """Make what is named.

    Raises `UsageError` for unknown names and missing data, `InvalidModelError` for what fails.
    """
    of_zoo = ":" not in wanted.model
    sample = NETS.get(wanted.model).sample if of_zoo else wanted.example[1:] or None
    dataset = open_dataset(wanted.data, sample) if is_dataset(wanted.data) else None
    if dataset is None and (wanted.trained or ":" not in wanted.data):
        open_dataset(wanted.data)  # says which there are
    example = wanted.example if dataset is None else (2, *dataset.sample)
    model = _of_zoo(wanted.model, dataset) if of_zoo else made_by(wanted.model)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{wanted.model!r} returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    name = _source(wanted.model, dataset) if of_zoo else wanted.model
    pretrain = wanted.bounded(wanted.pretrain)
    if dataset is None:
        batches = made_by(wanted.data, wanted.seed)
        return Material(name, model, batches, None, example, pretrain, wanted.pretraining)
    batches = dataset.batches(wanted.seed, wanted.batch, wanted.augment, wanted.rounds_per_epoch)
    made = Material(name, model, batches, dataset, example, pretrain, wanted.pretraining)
    return _started(made, wanted, note) if wanted.trained else made


def _accuracy(dataset: Dataset, part: str) -> Score:
    return lambda model: dataset.accuracy(model, part)


def _source(name: str, dataset: Dataset | None) -> str:
    """The name of a network of the zoo, with its classes where the data says how many there are."""
    classes = [] if dataset is None else [str(dataset.classes)]
    return ":".join(["zoo", name, *classes])


def _of_zoo(name: str, dataset: Dataset | None) -> nn.Module:
    build = NETS.get(name).build
    model = build() if dataset is None else build(classes=dataset.classes)
    # as images are; torch's stubs lack it for modules
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _started(made: Material, wanted: Ingredients, note: Callable[[str], None]) -> Material:
    """From the weights that come with the data set, or trained from the beginning where there are none."""
    assert made.dataset is not None
    path = made.dataset.weights.get(wanted.model)
    if path is not None:
        _load(made.model, path)
        return made
    epochs = made.pretrain or wanted.bounded(_EPOCHS)
    note(
        f"there are no trained weights of {wanted.model} for {made.dataset.name}: it is trained for {epochs} "
        "epochs first"
    )
    return replace(made, pretrain=epochs, pretraining=made.pretraining or _FROM_SCRATCH)


def _load(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InvalidModelError(
            f"the weights in {path} cannot be loaded: {str(error).splitlines()[0]}; fetch the file again"
        ) from None
