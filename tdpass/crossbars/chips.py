"""Devices as they were measured on real chips, by the noise models of aihwkit."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpass.errors import UsageError
from tdpass.targets.crossbar import CrossbarArray

# Module and class in aihwkit.inference.noise, and the largest conductance that was measured, in microsiemens.
_MODELS = {
    "pcm": ("pcm", "PCMLikeNoiseModel", 25.0),
    "reram": ("reram", "ReRamWan2022NoiseModel", 40.0),
    "reram_cmo": ("reram", "ReRamCMONoiseModel", 88.2),
}
CHIPS = tuple(_MODELS)
_HINT = "pip install 'tdpass[crossbar]'"


@dataclass(frozen=True)
class MeasuredChip:
    """Phase-change memory (`pcm`), ReRAM (`reram`) or ReRAM of CMO / HfOx (`reram_cmo`).

    Sources of the first two: Nandakumar et al. 2020; Wan et al., Nature 2022. `seconds` pass between
    programming and reading, in which conductances drift.  Conductances are scaled so that the largest state
    is the largest that was measured.
    """

    name: str
    seconds: float = 0.0

    def programmed(self, siemens: Tensor, array: CrossbarArray, seed: int) -> Tensor:
        """Conductances as programmed, and after the drift; drawn by the seed alone."""
        model, largest = self.model()
        scale = largest / array.conductances[-1]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            # of logarithms of conductances that drifted below zero, taken by numpy of tensors
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            wanted = siemens.float() * scale
            made: Tensor = model.apply_programming_noise_to_conductance(wanted)
            if self.seconds:
                made = model.apply_drift_noise_to_conductance(
                    made, model.generate_drift_coefficients(wanted), self.seconds
                )
        return (made / scale).nan_to_num(0.0).clamp_min(0).to(siemens)

    def model(self) -> tuple[Any, float]:
        """The noise model, and its largest conductance in microsiemens.

        Raises `UsageError` where aihwkit is missing.
        """
        module, name, largest = _MODELS[self.name]
        try:
            return getattr(importlib.import_module(f"aihwkit.inference.noise.{module}"), name)(
                g_max=largest
            ), largest
        except ImportError as error:
            raise UsageError(
                f"chip {self.name!r} needs aihwkit, which cannot be imported ({error}); {_HINT}"
            ) from None


def chip(name: str, seconds: float = 0.0) -> MeasuredChip:
    """A chip by name; raises `UsageError` for an unknown one, or where aihwkit is missing."""
    if name not in _MODELS:
        raise UsageError(f"unknown chip {name!r}; known: {', '.join(_MODELS)}")
    if not seconds >= 0:
        raise UsageError(f"seconds={seconds} since programming is not a number of at least 0")
    found = MeasuredChip(name, seconds)
    found.model()  # so that what is missing is said at once
    return found
