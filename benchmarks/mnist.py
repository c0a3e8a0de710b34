"""MNIST and the networks trained on it: LeNet-5, and an LSTM that reads an image row by row.

The data folder is named by the environment variable `TDPASS_DATA`.  The training split is cut once, with a fixed seed, into
5,000 images to tune on and 55,000 to train on; test accuracy is on the 10,000 test images.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdpass
from benchmarks.cifar import read_split
from tdpass.training.batches import Batches

TUNING = 5000


class LeNet5(nn.Module):
    """The Caffe variant of LeNet-5: 20 and 50 filters of 5x5, 500 hidden units, 430,500 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 28, 28]`."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class RowReader(nn.Module):
    """An LSTM over the 28 rows of an image, and a classifier on its last state."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of `[n, 1, 28, 28]`."""
        states, _ = self.lstm(x.squeeze(1))
        return self.classifier(states[:, -1])


def lenet5() -> nn.Module:
    """An untrained LeNet-5."""
    return LeNet5().to(memory_format=torch.channels_last)


def row_reader() -> nn.Module:
    """An untrained LSTM(256), its weights open to factoring."""
    return tdpass.open_recurrent(RowReader())


@functools.cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, normalised, `[n, 1, 28, 28]`, and their classes."""
    pixels, labels = read_split("mnist", split)
    return (pixels.float().reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081, labels.long()


def cut(part: str) -> tuple[Tensor, Tensor]:
    """`tuning` (5,000) or `training` (55,000) images of the training split; disjoint, shuffled."""
    pixels, labels = images("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:TUNING] if part == "tuning" else order[TUNING:]
    return pixels[chosen], labels[chosen]


def training(seed: int = 0) -> Batches:
    """Shuffled batches of 128 training images."""
    return Batches(*cut("training"), size=128, seed=seed)


def shifted(seed: int = 0) -> Batches:
    """The same, each image moved by up to one pixel each way."""
    return Batches(*cut("training"), size=128, seed=seed, change=_shift)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random step, background behind it."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    top, left = (torch.randint(0, 3, (len(images), 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(28), left + torch.arange(28)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def tuning_accuracy(model: nn.Module) -> float:
    """Percentage of the tuning images classified correctly."""
    return _accuracy(model, *cut("tuning"))


def test_accuracy(model: nn.Module) -> float:
    """Percentage of the test images classified correctly."""
    return _accuracy(model, *images("test"))


def _accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(pixels.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)
