"""An `.npz` file of inputs and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tdpass.arrays import Array, read_arrays
from tdpass.datasets.base import Dataset, Examples, Source, measured, register_source
from tdpass.errors import UsageError

_PAIRS = (("x", "y"), ("images", "labels"), ("inputs", "targets"), ("data", "target"))


@register_source
class Npz(Source):
    """Arrays `x` and `y` (or images/labels, inputs/targets), alone or in two parts.

    The parts are `x_train`, `y_train` and `x_test`, `y_test`. Images `[n, h, w]` are grey, those of three
    channels may lie as `[n, h, w, 3]` or `[n, 3, h, w]`.
    """

    name = "npz"
    example = "an .npz file"

    def claims(self, text: str) -> bool:
        return text.endswith(".npz")

    def open(self, text: str) -> Dataset:
        if not Path(text).is_file():
            raise UsageError(f"there is no file {text}; check the path")
        arrays = read_arrays(Path(text))
        assert isinstance(arrays, dict)
        training = _pair(arrays, "_train") or _pair(arrays, "")
        if training is None:
            wanted = ", ".join("/".join(pair) for pair in _PAIRS)
            raise UsageError(
                f"{text} holds {', '.join(arrays)}; a data set needs two arrays named {wanted}, or these "
                "with _train and _test"
            )
        return measured(text, training, _pair(arrays, "_test"))


def _pair(arrays: dict[str, Array], suffix: str) -> Examples | None:
    for names in _PAIRS:
        inputs, labels = (arrays.get(name + suffix) for name in names)
        if inputs is not None and labels is not None:
            return _examples(names, inputs, labels)
    return None


def _examples(names: tuple[str, str], inputs: Array, labels: Array) -> Examples:
    if (
        len(inputs) != len(labels)
        or labels.ndim != 1
        or labels.dtype.kind not in "iu"
        or labels.min(initial=0) < 0
    ):
        shapes = (
            f"{names[0]} of shape {inputs.shape} and {names[1]} of shape {labels.shape} and type "
            f"{labels.dtype}"
        )
        raise UsageError(f"{shapes} are no examples; give as many classes, counted from 0, as inputs")
    images = torch.from_numpy(inputs)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    if images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    kept = images if images.dtype == torch.uint8 else images.float()
    return Examples(kept, torch.from_numpy(labels.astype(np.int64)))
