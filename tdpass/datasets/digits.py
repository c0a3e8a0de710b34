"""Handwritten digits of 8 x 8 grey pixels, which come with tdpass.

1,797 images of Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI Machine Learning
Repository, CC BY 4.0), the test half of that set, which scikit-learn ships as well; pixels are 0 to 16.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tdpass.arrays import read_arrays
from tdpass.datasets.base import Dataset, Examples, Source, register_source

_TEST, _HELD = 360, 256


def stored() -> Examples:
    """All images `[1797, 1, 8, 8]`, 0 to 16, and their classes."""
    arrays = read_arrays(Path(__file__).with_name("digits.npz"))
    assert isinstance(arrays, dict)
    return Examples(
        torch.from_numpy(arrays["images"]).unsqueeze(1), torch.from_numpy(arrays["labels"]).long()
    )


@register_source
class Digits(Source):
    """1,181 digits to train on, 256 to calibrate and tune with, 360 to test on."""

    name = "digits"
    example = "digits"
    epochs = 12

    def claims(self, text: str) -> bool:
        return text == self.name

    def open(self, text: str) -> Dataset:
        test, held, training = stored().divided(_TEST, _HELD)
        return Dataset(text, training, calibration=held, tuning=held, test=test, scale=16.0)
