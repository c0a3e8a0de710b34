"""CIFAR-10 and the trained ResNets of the accuracy benchmark.

The data folder is named by the environment variable `TDPASS_DATA`; its `data/load.py` reads the images and its
`models/` holds the weights.  The training split is cut once, with a fixed seed, into 512 calibration images,
2,000 images to tune on, and the rest to train on; accuracy is always on the 10,000 test images.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.results import skip
from tdpass.training.batches import Batches

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}
DENSE_ACCURACY = {"resnet20": 91.73, "resnet32": 92.63, "resnet56": 93.39}
CALIBRATION, TUNING = 512, 2000
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shortcut(nn.Module):
    """Parameter-free shortcut: every second pixel, new channels zero, half of them before and half after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = channels // 4

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to `[n, 2 c, h / 2, w / 2]`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and a residual connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(after)

    def forward(self, x: Tensor) -> Tensor:
        """One residual block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR-10 ResNet of He et al. 2016, section 4.2, with `blocks` blocks per stage."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def data_folder() -> Path:
    """The folder that `TDPASS_DATA` names; skips the benchmark when there is none."""
    folder = Path(os.environ.get("TDPASS_DATA", ""))
    if not os.environ.get("TDPASS_DATA") or not (folder / "data" / "load.py").is_file():
        skip("set TDPASS_DATA to the folder that holds data/load.py, data/cifar10/ and models/*.safetensors")
    return folder


def load_resnet(name: str) -> ResNet:
    """A trained network in evaluation mode."""
    if name not in BLOCKS:
        raise SystemExit(f"unknown network {name!r}; known: {', '.join(BLOCKS)}")
    model = ResNet(BLOCKS[name])
    model.load_state_dict(load_file(data_folder() / "models" / f"{name}_cifar10.safetensors"))
    return model.eval()


@functools.cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 `[n, 3, 32, 32]`, and their classes."""
    pixels, labels = read_split("cifar10", split)
    return pixels.permute(0, 3, 1, 2).contiguous(), labels


def read_split(dataset: str, split: str) -> tuple[Tensor, Tensor]:
    """The images of `train` or `test` as they are stored, and their classes."""
    path = data_folder() / "data" / "load.py"
    spec = importlib.util.spec_from_file_location("tdpass_data_load", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels, labels, _ = module.load(dataset, split)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 images as the network's input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (pixels.float() / 255 - mean) / std


def cut(part: str) -> tuple[Tensor, Tensor]:
    """`calibration` (512), `tuning` (2,000) or `training` (47,488) images of the training split; disjoint, shuffled."""
    pixels, labels = images("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    bounds = {"calibration": (0, CALIBRATION), "tuning": (CALIBRATION, CALIBRATION + TUNING), "training": (CALIBRATION + TUNING, len(labels))}
    start, stop = bounds[part]
    return pixels[order[start:stop]], labels[order[start:stop]]


def calibration() -> Tensor:
    """The calibration images, ready for the network; no labels."""
    return normalise(cut("calibration")[0])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image padded by four zero pixels, flipped half of the time."""
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    flip = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), torch.arange(width).repeat(count, 1)
    columns = left + torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def resnet20() -> ResNet:
    """The trained ResNet-20."""
    return load_resnet("resnet20").to(memory_format=torch.channels_last)


def resnet32() -> ResNet:
    """The trained ResNet-32."""
    return load_resnet("resnet32").to(memory_format=torch.channels_last)


def training(seed: int = 0) -> Batches:
    """Shuffled batches of 128 training images, cropped and flipped at random."""
    pixels, labels = cut("training")
    return Batches(pixels, labels, 128, seed, lambda chosen, generator: normalise(augment(chosen, generator)).contiguous(memory_format=torch.channels_last))


def tuning_accuracy(model: nn.Module) -> float:
    """Percentage of the tuning images classified correctly."""
    return evaluate(model, "tuning")


def augmented_calibration(copies: int = 8, batch: int = 128) -> Iterator[Tensor]:
    """Batches of `copies` random crops and flips of each calibration image, as batch-norm statistics need them."""
    pixels, _ = cut("calibration")
    generator = torch.Generator().manual_seed(1)
    for _ in range(copies):
        yield from normalise(augment(pixels, generator)).split(batch)


def evaluate(model: nn.Module, part: str = "test", batch: int = 250) -> float:
    """Percentage of images classified correctly, on the test images or on a cut of the training split."""
    pixels, labels = images("test") if part == "test" else cut(part)
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        scores = torch.cat([model(normalise(x).to(memory_format=torch.channels_last)) for x in pixels.split(batch)])
    return 100 * float((scores.argmax(1) == labels).double().mean())


def macs(model: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32)) -> int:
    """Multiply-adds of all convolutions and linear layers on one input, whichever module or function they are in."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(torch.zeros(shape))
    return counter.get_total_flops() // 2


def recalibrate_batchnorm(model: nn.Module) -> nn.Module:
    """A copy whose batch-norm statistics are the averages over `augmented_calibration`."""
    model = copy.deepcopy(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for x in augmented_calibration():
            model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


if __name__ == "__main__":
    for net, expected in DENSE_ACCURACY.items():
        dense = load_resnet(net)
        print(f"{net}: {macs(dense):,} multiply-adds, accuracy {evaluate(dense):.2f} % (expected {expected})", end="")
        print(f", with recalibrated batch-norm {evaluate(recalibrate_batchnorm(dense)):.2f} %")
