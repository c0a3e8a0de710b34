"""CIFAR-10 and the trained ResNets of the accuracy benchmark.

The data folder is named by the environment variable `TDPASS_DATA`, as `tdpass.datasets.published` reads it.
The training split is cut once, with a fixed seed, into 512 calibration images, 2,000 images to tune on, and
the rest to train on; accuracy is always on the 10,000 test images.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.results import skip
from tdpass.datasets import Dataset, open_dataset
from tdpass.training.batches import Batches
from tdpass.zoo import NETS

DENSE_ACCURACY = {"resnet20": 91.73, "resnet32": 92.63, "resnet56": 93.39}


def data() -> Dataset:
    """The images; skips the benchmark where `TDPASS_DATA` names no folder of them."""
    if not os.environ.get("TDPASS_DATA"):
        skip("set TDPASS_DATA to the folder that holds data/load.py, data/cifar10/ and models/*.safetensors")
    return open_dataset("cifar10")


def load_resnet(name: str) -> nn.Module:
    """A trained network in evaluation mode."""
    if name not in DENSE_ACCURACY:
        raise SystemExit(f"unknown network {name!r}; known: {', '.join(DENSE_ACCURACY)}")
    model = NETS.get(name).build()
    model.load_state_dict(load_file(data().weights[name]))
    return model.eval()


def resnet20() -> nn.Module:
    """The trained ResNet-20, its images channels last."""
    return load_resnet("resnet20").to(memory_format=torch.channels_last)


def resnet32() -> nn.Module:
    """The trained ResNet-32, its images channels last."""
    return load_resnet("resnet32").to(memory_format=torch.channels_last)


def training(seed: int = 0) -> Batches:
    """Shuffled batches of 128 training images, cropped and flipped at random."""
    return data().batches(seed)


def calibration() -> Tensor:
    """The calibration images, ready for the network; no labels."""
    return data().inputs("calibration")


def augmented_calibration(copies: int = 8, batch: int = 128) -> Iterator[Tensor]:
    """Batches of `copies` random crops and flips of each calibration image, for batch-norm statistics."""
    found = data()
    generator = torch.Generator().manual_seed(1)
    for _ in range(copies):
        yield from found.prepared(found.augment(found.calibration.inputs, generator)).split(batch)


def evaluate(model: nn.Module, part: str = "test") -> float:
    """Percentage of images classified correctly, on the test images or another part."""
    return data().accuracy(copy.deepcopy(model).eval().to(memory_format=torch.channels_last), part)


def macs(model: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32)) -> int:
    """Multiply-adds of all convolutions and linear layers on one input, in whichever module or function."""
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
        print(
            f"{net}: {macs(dense):,} multiply-adds, accuracy {evaluate(dense):.2f} % (expected {expected})",
            end="",
        )
        print(f", with recalibrated batch-norm {evaluate(recalibrate_batchnorm(dense)):.2f} %")
