"""What a target is: a machine and a way to run models on it, asked how long a layer takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.models.base import Batch, Model
from tdpass.registry import Registry
from tdpass.site import Site


@dataclass(frozen=True)
class Setting:
    """How the model will be called: samples per call, threads, and the floating-point type of its weights."""

    batch: int = 1
    threads: int = 1
    dtype: torch.dtype = torch.float32


ONE_CALL = Setting()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of the model spent in a layer, and the runtime that was fastest; infinite where none can run it."""

    seconds: float
    kernel: str = ""


class Target(ABC):
    """A machine that layers are timed on; a subclass per kind, registered with `register_target`.

    `margin` is how much faster than the dense layer a form must have been measured to count as faster: what is left of the
    noise after careful rounds.  `measures` is what it tells of a layer, `notes` what the user should hear of.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]] = ("seconds",)
    margin: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.notes: list[str] = []

    @classmethod
    @abstractmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        """The target for models of that front end, run in the given way (`""`: as the front end's models usually are).

        `cache` is the folder where measurements are kept.  Raises `UsageError` for a way it does not have, or a missing device.
        """

    @abstractmethod
    def time(self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False) -> list[Timing]:
        """Seconds of the site as each form, summed over all its calls; all forms not known yet are measured against each other.

        With `careful`, what is known from a few rounds only is measured again in many.
        """

    @abstractmethod
    def time_models(self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None) -> list[float]:
        """Seconds of one call of each model, measured against each other.

        With `yardstick`, a dense site that was timed before, the answer is on the scale of what it took then: a machine that
        is busier now than it was when the layers were timed changes nothing.
        """

    def seconds(self, site: Site, form: Form, batch: int = 1, threads: int = 1, dtype: torch.dtype = torch.float32) -> float:
        """Time of one layer in that form."""
        return self.time(site, [form], Setting(batch, threads, dtype))[0].seconds

    def break_even_sparsity(self, site: Site, group: str = "weight", setting: Setting = ONE_CALL) -> float | None:
        """See `tdpass.targets.break_even.BreakEven`; raises `UsageError` on a target without sparse operators."""
        raise UsageError(f"target {self.name} has no sparse operators; use target cpu, or a table of break-even sparsities, table:FILE.yaml")


TARGETS: Registry[type[Target]] = Registry("target")


def register_target(cls: type[Target]) -> type[Target]:
    """Class decorator: make a target known by its `name`."""
    return TARGETS.add(cls.name, cls)


def open_target(text: str | Target, frontend: str, cache: Path | None = None) -> Target:
    """Read `cpu`, `cpu:openvino` or `cuda`: a registered target, and after the colon one of its ways to run a model.

    Raises `UsageError` for an unknown one.
    """
    if isinstance(text, Target):
        return text
    if not isinstance(text, str):
        raise UsageError(f"target={text!r} is not a text; write 'cpu', or another of: {', '.join(TARGETS.names())}")
    name, colon, way = text.strip().partition(":")
    if colon and not way:
        raise UsageError(f"target {text!r} names no way to run a model after the colon; write {name!r}, or {name}:NAME")
    return TARGETS.get(name).open(way, frontend, cache)
