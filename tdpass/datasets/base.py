"""A data set: images and classes in parts, as a network reads them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.datasets.augment import UNCHANGED, Augment
from tdpass.errors import UsageError
from tdpass.registry import Registry, nearest
from tdpass.training.batches import Batches
from tdpass.training.calls import class_scores

PARTS = ("training", "calibration", "tuning", "test")
_MEASURED = 4096  # images from which mean and deviation are taken
_STEPS = 16  # batches that an epoch has at least, where there are so many images


@dataclass(frozen=True)
class Examples:
    """Inputs `[n, ...]` as they are stored, and their classes `[n]`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def divided(self, *sizes: int) -> list[Examples]:
        """So many examples each, chosen at random once for all, and the rest; disjoint."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        parts = torch.split(order, [*sizes, len(self) - sum(sizes)])
        return [Examples(self.inputs[part], self.targets[part]) for part in parts]


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, to calibrate and tune with, and to test on.

    A network is given (inputs / `scale` - `mean`) / `std` by channel.  `weights` are files of trained
    networks, by the network's name.
    """

    name: str
    training: Examples
    calibration: Examples
    tuning: Examples
    test: Examples
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: Augment = UNCHANGED
    weights: Mapping[str, Path] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 1 + max(int(part.targets.max()) for part in (self.training, self.test))

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.training.inputs.shape[1:])

    def part(self, name: str) -> Examples:
        """One of `PARTS`; raises `UsageError` for another name."""
        if name not in PARTS:
            raise UsageError(f"data set {self.name!r} has no part {name!r}; its parts: {', '.join(PARTS)}")
        found: Examples = getattr(self, name)
        return found

    def prepared(self, inputs: Tensor) -> Tensor:
        """Stored inputs as a network reads them."""
        shape = (1, -1, *(1,) * (inputs.dim() - 2))
        mean, std = (torch.tensor(values).view(shape) for values in (self.mean, self.std))
        made = (inputs.float() / self.scale - mean) / std
        return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made

    def inputs(self, part: str = "calibration") -> Tensor:
        """The inputs of a part, prepared; no classes."""
        return self.prepared(self.part(part).inputs)

    def batches(
        self, seed: int = 0, size: int = 128, augment: Augment | None = None, steps: int = 1
    ) -> Batches:
        """Shuffled batches of the training part, of at most `size` samples.

        They are so small that an epoch has at least 16 and at least `steps` of them.
        """
        change = self.augment if augment is None else augment
        fitting = max(1, min(size, len(self.training) // max(_STEPS, steps)))
        made = Batches(self.training.inputs, self.training.targets, fitting, seed)
        made.change = lambda chosen, generator: self.prepared(change(chosen, generator))
        return made

    def accuracy(self, model: nn.Module, part: str = "test", size: int = 250) -> float:
        """Percentage of a part's images that the model classifies correctly.

        Raises `UsageError` where it returns no class scores, nor `logits` among what it returns.
        """
        examples = self.part(part)
        model = copy.deepcopy(model).eval() if model.training else model
        with torch.inference_mode():
            answers = [
                class_scores(model(self.prepared(chunk))).argmax(1)
                for chunk in torch.split(examples.inputs, size)
            ]
        return 100 * float((torch.cat(answers) == examples.targets).double().mean())

    def fitted(self, sample: Sequence[int | None]) -> Dataset:
        """The same images as a network reads them that wants `sample` channels, rows and columns.

        None keeps what is there. Grey images become colour by repetition, colour images grey by their mean;
        sizes change by interpolation.  Raises `UsageError` for data that are no images.
        """
        if len(sample) == len(self.sample) and all(
            wanted in (None, here) for wanted, here in zip(sample, self.sample, strict=True)
        ):
            return self
        if len(sample) != 3 or len(self.sample) != 3 or sample[0] not in (None, 1, 3):
            raise UsageError(
                f"the network reads inputs of shape {tuple(sample)}, and {self.name!r} has {self.sample}; "
                "only images are resized"
            )
        training, calibration, tuning, test = (
            Examples(_resized(part.inputs, sample), part.targets) for part in map(self.part, PARTS)
        )
        made = replace(self, training=training, calibration=calibration, tuning=tuning, test=test)
        turns_grey = sample[0] == 1 and self.sample[0] == 3
        return replace(made, mean=_middle(self.mean), std=_middle(self.std)) if turns_grey else made


def _middle(values: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(values) / len(values),)


def _resized(images: Tensor, sample: Sequence[int | None]) -> Tensor:
    channels, height, width = (
        here if wanted is None else wanted for wanted, here in zip(sample, images.shape[1:], strict=True)
    )
    if images.shape[1] == 3 and channels == 1:
        images = images.float().mean(1, keepdim=True)
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)


def measured(name: str, training: Examples, test: Examples | None = None, held: int = 512) -> Dataset:
    """A data set of someone's own.

    Bytes are scaled to mean 0 and deviation 1 by channel, other numbers taken as they are. Without `test` a
    fifth of the examples is held back as such; a tenth, at most `held`, calibrates and tunes.  Raises
    `UsageError` for too few examples.
    """
    if len(training) < 20:
        raise UsageError(f"data set {name!r} has {len(training)} examples to train on; give at least 20")
    if test is None:
        test, training = training.divided(len(training) // 5)
    calibration, rest = training.divided(min(held, len(training) // 10))
    made = Dataset(name, rest, calibration=calibration, tuning=calibration, test=test)
    if rest.inputs.dtype != torch.uint8:
        return made
    axes = [axis for axis in range(rest.inputs.dim()) if axis != 1]
    std, mean = torch.std_mean(rest.inputs[:_MEASURED].float() / 255, axes)
    return replace(made, scale=255.0, mean=tuple(mean.tolist()), std=tuple(std.clamp_min(1e-3).tolist()))


class Source(ABC):
    """Where data sets come from: what it is called by, and how it is opened.

    `epochs` is set where a set is there to try recipes on: no stage of a recipe for other data trains longer.
    """

    name: str
    example: str  # what to write, for messages
    epochs: int = 0

    @abstractmethod
    def claims(self, text: str) -> bool:
        """Whether the text names a data set of this source."""

    @abstractmethod
    def open(self, text: str) -> Dataset:
        """The data set; raises `UsageError` saying how to get it where it is missing."""


SOURCES: Registry[Source] = Registry("source of data")


def register_source(source: type[Source]) -> type[Source]:
    """Make a source known."""
    SOURCES.add(source.name, source())
    return source


def is_dataset(text: str) -> bool:
    """Whether some source claims the text."""
    return any(source.claims(text) for source in SOURCES)


def source_of(text: str) -> Source:
    """The source that claims the text; raises `UsageError`."""
    source = next((source for source in SOURCES if source.claims(text)), None)
    if source is None:
        known = ", ".join(source.example for source in SOURCES)
        raise UsageError(
            f"{text!r} names no data set{nearest(text, known.split(', '))}; give one of: {known}"
        )
    return source


def open_dataset(text: str, sample: Sequence[int | None] | None = None) -> Dataset:
    """The data set that the text names, its images as a network reads them that wants `sample`.

    Raises `UsageError`.
    """
    found = source_of(text).open(text)
    return found if sample is None else found.fitted(sample)
