"""MNIST, CIFAR-10 and CIFAR-100: from a folder of one's own, torchvision or Hugging Face, whichever there is.

The environment variable `TDPASS_DATA` may name a folder with `data/load.py`, whose `load(name, split)`
returns pixels, labels and class names as arrays, and `models/NETWORK_NAME.safetensors`, the weights of
trained networks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tdpass.datasets import hugging_face, torchvision
from tdpass.datasets.augment import UNCHANGED, Augment
from tdpass.datasets.base import Dataset, Examples, Source, register_source
from tdpass.errors import InvalidModelError, UsageError
from tdpass.images import COLOUR_MEAN, COLOUR_STD

_VARIABLE = "TDPASS_DATA"
_COLOUR = (COLOUR_MEAN, COLOUR_STD)
_MOVED_AND_MIRRORED = Augment(shift=4, flip=True)


@dataclass(frozen=True)
class _Published:
    """How a set is cut and normalised, and what others call it.

    Without calibration images of their own the tuning images serve.
    """

    torchvision: str
    hugging_face: str
    calibration: int
    tuning: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = UNCHANGED


_SETS = {
    "mnist": _Published("MNIST", "mnist", 0, 5000, (0.1307,), (0.3081,)),
    "cifar10": _Published("CIFAR10", "cifar10", 512, 2000, *_COLOUR, _MOVED_AND_MIRRORED),
    "cifar100": _Published("CIFAR100", "cifar100", 512, 2000, *_COLOUR, _MOVED_AND_MIRRORED),
}


@register_source
class PublishedSets(Source):
    """The sets of the literature.

    The training split is cut with a fixed seed, accuracy is on the whole test split.
    """

    name = "published"
    example = ", ".join(_SETS)

    def claims(self, text: str) -> bool:
        return text in _SETS

    def open(self, text: str) -> Dataset:
        return _opened(text, os.environ.get(_VARIABLE, ""))


@functools.lru_cache(maxsize=2)
def _opened(name: str, folder: str) -> Dataset:
    read, known = _reader(name, folder), _SETS[name]
    calibration, tuning, training = read("train").divided(known.calibration, known.tuning)
    files = Path(folder, "models").glob(f"*_{name}.safetensors") if folder else ()
    return Dataset(
        name,
        training,
        calibration=calibration if known.calibration else tuning,
        tuning=tuning,
        test=read("test"),
        scale=255.0,
        mean=known.mean,
        std=known.std,
        augment=known.augment,
        weights={file.name.removesuffix(f"_{name}.safetensors"): file for file in files},
    )


def _reader(name: str, folder: str) -> Callable[[str], Examples]:
    """What reads a split of the set; raises `UsageError` where nothing does."""
    known = _SETS[name]
    if folder:
        return functools.partial(_from_folder, Path(folder), name)
    if torchvision.installed():
        return functools.partial(torchvision.split_of, known.torchvision)
    if hugging_face.installed():
        return functools.partial(hugging_face.split_of, known.hugging_face)
    raise UsageError(
        f"the data set {name!r} is not here; install torchvision or datasets (pip install datasets pillow), "
        "which fetch it, or name the folder "
        f"that holds it in {_VARIABLE}; data=digits (--data digits) needs neither"
    )


def _from_folder(folder: Path, name: str, split: str) -> Examples:
    path = folder / "data" / "load.py"
    spec = importlib.util.spec_from_file_location("tdpass_data_load", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(
            f"{_VARIABLE} names {str(folder)!r}, which holds no data/load.py; name the folder that does, or "
            "unset it"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        pixels, labels, _ = module.load(name, split)
    except (OSError, ImportError, KeyError) as error:
        raise InvalidModelError(
            f"{path} cannot load the {split} split of {name!r}: {type(error).__name__}: {error}"
        ) from error
    images = torch.from_numpy(pixels)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Examples(images, torch.from_numpy(labels).long())
