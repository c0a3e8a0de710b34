"""Small networks for the kinds of output that tasks read, trained on handwritten digits, with scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.datasets.digits import stored

SCALE = 320.0
CANVAS = 24
CELL = 8
DIGITS = 10


@dataclass(frozen=True)
class Task:
    """A network with the images and targets it is trained on and judged by; `score` is in percent."""

    name: str
    network: Callable[[], nn.Module]
    make: Callable[[int, int, bool], tuple[Tensor, Tensor]]
    loss: Callable[[object, Tensor], Tensor]
    score: Callable[[object, Tensor], float]
    steps: int = 600

    def train(self, seed: int = 0) -> nn.Module:
        """The network after its steps of Adam, in eval mode."""
        torch.manual_seed(seed)
        network = self.network()
        images, targets = self.make(4096, seed, True)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            chosen = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            self.loss(network(images[chosen]), targets[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return network.eval()


def _digits(train: bool) -> tuple[Tensor, Tensor]:
    found = stored()
    held = torch.arange(len(found)) % 4 == 0
    chosen = ~held if train else held
    return found.inputs[chosen].float() / 16, found.targets[chosen]


def _drawn(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed + 7919 * train)
    images, labels = _digits(train)
    index = torch.randint(len(labels), (count,), generator=generator)
    return images[index], labels[index], generator


def _placed(images: Tensor, generator: torch.Generator, canvas: int) -> tuple[Tensor, Tensor]:
    """Each digit on an empty canvas, 5 to 8 pixels wide and high, and its box (x, y, width, height).

    Boxes are in pixels.
    """
    whole = torch.zeros(len(images), 1, canvas, canvas)
    boxes = torch.empty(len(images), 4)
    for row, image in enumerate(images):
        high, wide = (int(size) for size in torch.randint(5, CELL + 1, (2,), generator=generator))
        y, x = (int(torch.randint(canvas - size + 1, (1,), generator=generator)) for size in (high, wide))
        whole[row, :, y : y + high, x : x + wide] = F.interpolate(
            image[None], (high, wide), mode="bilinear", antialias=True
        )[0]
        boxes[row] = torch.tensor([x + wide / 2, y + high / 2, wide, high])
    return whole, boxes


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (x, y, width, height)."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    common = (high - low).clamp_min(0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common).clamp_min(1e-6)


def _trunk(*widths: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place, (i, o) in enumerate(itertools.pairwise((1, *widths))):
        layers += [nn.Conv2d(i, o, 3, stride if place else 1, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """Nine cells, each with a box in units of 0 to 320 and ten scores in [0, 1], side by side: [n, 9, 14]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk(32, 48, 64, 64, stride=2)
        self.head = nn.Conv2d(64, 4 + DIGITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(self.trunk(x)).flatten(2).transpose(1, 2)
        return torch.cat([found[..., :4].sigmoid() * SCALE, found[..., 4:].sigmoid()], -1)


def scenes(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """Canvases with a digit in half of nine cells.

    Targets [n, 9, 5] of box and class, -1 where there is none.
    """
    images, labels, generator = _drawn(9 * count, seed, train)
    cells, boxes = _placed(images, generator, CELL)
    empty = torch.rand(9 * count, generator=generator) < 0.5
    cells[empty] = 0
    corner = torch.stack([torch.arange(9) % 3, torch.arange(9) // 3], 1).repeat(count, 1) * CELL
    boxes[:, :2] += corner
    targets = torch.cat([boxes * SCALE / CANVAS, labels.where(~empty, -1)[:, None]], 1)
    canvas = cells.reshape(count, 3, 3, CELL, CELL).transpose(2, 3).reshape(count, 1, CANVAS, CANVAS)
    return canvas + 0.05 * torch.randn(canvas.shape, generator=generator), targets.reshape(count, 9, 5)


def _detection_loss(output: object, targets: Tensor) -> Tensor:
    assert isinstance(output, Tensor)
    there = targets[..., 4] >= 0
    classes = F.one_hot(targets[..., 4].long().clamp_min(0), DIGITS) * there[..., None]
    boxes = F.smooth_l1_loss(output[there][:, :4] / SCALE, targets[there][:, :4] / SCALE, beta=0.02)
    return 10 * boxes + 10 * F.binary_cross_entropy(output[..., 4:], classes.float())


def _detections_f1(output: object, targets: Tensor) -> float:
    """F1 of digits found: right class, score above one half, boxes that overlap by more than one half."""
    assert isinstance(output, Tensor)
    there = targets[..., 4] >= 0
    score, label = output[..., 4:].max(-1)
    claimed = score > 0.5
    right = claimed & there & (label == targets[..., 4]) & (_overlap(output[..., :4], targets[..., :4]) > 0.5)
    return 200 * float(right.sum()) / float(claimed.sum() + there.sum())


class TwoHeads(nn.Module):
    """Scores of ten classes, and the box of the one digit on the canvas in units of 0 to 320."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk(32, 48, 64, stride=2)
        self.classes = nn.Sequential(nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, DIGITS))
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.classes(features), self.box(features) * SCALE


def placed(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """One digit on a canvas of 12 x 12; targets [n, 5] of box and class."""
    images, labels, generator = _drawn(count, seed, train)
    canvas, boxes = _placed(images, generator, 12)
    return canvas, torch.cat([boxes * SCALE / 12, labels[:, None]], 1)


def _two_losses(output: object, targets: Tensor) -> Tensor:
    assert isinstance(output, tuple)
    boxes = F.smooth_l1_loss(output[1] / SCALE, targets[:, :4] / SCALE, beta=0.02)
    return F.cross_entropy(output[0], targets[:, 4].long()) + 10 * boxes


def _both_right(output: object, targets: Tensor) -> float:
    """How often class and box (overlap above one half) are both right."""
    assert isinstance(output, tuple)
    right = (output[0].argmax(-1) == targets[:, 4]) & (_overlap(output[1], targets[:, :4]) > 0.5)
    return 100 * float(right.double().mean())


def _classifier() -> nn.Module:
    return nn.Sequential(
        _trunk(32, 64, 64, stride=2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, DIGITS),
        nn.Softmax(-1),
    )


def single(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """Digits and their classes."""
    images, labels, _ = _drawn(count, seed, train)
    return images, labels


def _negative_log(output: object, targets: Tensor) -> Tensor:
    assert isinstance(output, Tensor)
    return F.nll_loss((output + 1e-9).log(), targets)


def _accuracy(output: object, targets: Tensor) -> float:
    assert isinstance(output, Tensor)
    return 100 * float((output.argmax(-1) == targets).double().mean())


class Tagger(nn.Module):
    """Reads six digits, scores at each place the sum of its digit and the last, modulo ten: [n, 6, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(CELL * CELL, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU())
        self.mix = nn.Conv1d(96, 128, 3, padding=1)
        self.score = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIGITS))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.read(x).transpose(1, 2)).relu()
        return self.score(mixed.transpose(1, 2))


def rows(count: int, seed: int, train: bool) -> tuple[Tensor, Tensor]:
    """Rows of six digits as [n, 6, 64]; targets [n, 6]."""
    images, labels, _ = _drawn(6 * count, seed, train)
    labels = labels.reshape(count, 6)
    return images.reshape(count, 6, -1), (labels + F.pad(labels, (1, 0))[:, :-1]) % DIGITS


def _tag_loss(output: object, targets: Tensor) -> Tensor:
    assert isinstance(output, Tensor)
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


TASKS = (
    Task("detector", Detector, scenes, _detection_loss, _detections_f1, 1200),
    Task("softmax classifier", _classifier, single, _negative_log, _accuracy),
    Task("two outputs", TwoHeads, placed, _two_losses, _both_right, 1500),
    Task("tagger", Tagger, rows, _tag_loss, _accuracy),
)
