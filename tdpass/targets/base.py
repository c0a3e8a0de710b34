"""What a target is: a machine and a way to run models on it, asked what a layer costs there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tdpass.cost import Cost
from tdpass.errors import UsageError
from tdpass.form import DENSE, Form, Rank
from tdpass.formats.base import FORMATS
from tdpass.models.base import Batch, Model
from tdpass.registry import Registry
from tdpass.site import Site

LANES = 8
_FEW = 4


@dataclass(frozen=True)
class Setting:
    """How the model will be called: samples per call, threads, and the floating-point type of its weights."""

    batch: int = 1
    threads: int = 1
    dtype: torch.dtype = torch.float32


ONE_CALL = Setting()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of the model spent in a layer, and the runtime that was fastest.

    Infinite where none can run it.
    """

    seconds: float
    kernel: str = ""


class Target(ABC):
    """A machine that is asked what layers cost; a subclass per kind, registered with `register_target`.

    `measures` is what it tells of a layer, the one that says whether a layer pays first, and `here` whether
    it is this machine, so that what runs faster here may be chosen by time.  `margin` is how much less than
    the dense layer a form must cost to count as cheaper: what noise is left in what it tells.  `numbers` are
    the number types that a layer may be stored in to cost less here.  `filled_by` identifies what `filling`
    goes by.  `notes` is what the user should hear of.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    here: ClassVar[bool] = False
    margin: ClassVar[float] = 0.0
    numbers: ClassVar[tuple[str, ...]] = ()
    filled_by: str = ""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @classmethod
    @abstractmethod
    def open(cls, way: str, frontend: str, cache: Path | None) -> Target:
        """The target for models of that front end, run in the given way.

        `""` is as the front end's models usually are. `cache` is the folder where measurements are kept.
        Raises `UsageError` for a way it does not have, or a missing device.
        """

    @abstractmethod
    def cost(self, site: Site, forms: Sequence[Form], setting: Setting = ONE_CALL) -> list[Cost]:
        """What the site costs as each form, over all its calls.

        An amount of each of `measures`, infinite where it cannot run. Raises `UsageError` for a site that was
        not seen running.
        """

    @abstractmethod
    def cost_models(
        self,
        models: Sequence[Model],
        call: Callable[[], Batch],
        setting: Setting,
        yardstick: Site | None = None,
    ) -> list[Cost]:
        """What one call of each model costs, all of it as far as the target knows.

        `call` makes the call where it has to be run. With `yardstick`, a dense site that was priced before,
        the answer is on the scale of that price.
        """

    @abstractmethod
    def filling(self, site: Site, format_name: str, ranks: Sequence[Rank]) -> list[Rank]:
        """The ranks to consider in place of these, cheap to expensive.

        Those that leave nothing of the machine idle, as far as there are any.
        """

    def break_even(self, site: Site, format_name: str, setting: Setting = ONE_CALL) -> Rank | None:
        """The largest of the format's ranks, by multiply-adds, that is cheaper than dense; None for none.

        Cheaper is meant in the first of `measures`.
        """
        fmt, measure = FORMATS.get(format_name), self.measures[0]
        ranks = sorted(fmt.ranks(site), key=lambda rank: fmt.macs(site, rank))
        dense, *costs = self.cost(site, [DENSE, *(Form(format_name, rank) for rank in ranks)], setting)
        limit = dense.get(measure) * (1 - self.margin)
        return next(
            (
                rank
                for rank, cost in zip(reversed(ranks), reversed(costs), strict=True)
                if cost.get(measure) < limit
            ),
            None,
        )

    def break_even_sparsity(
        self, site: Site, group: str = "weight", setting: Setting = ONE_CALL
    ) -> float | None:
        """See `tdpass.targets.break_even.BreakEven`.

        Raises `UsageError` on a target without sparse operators.
        """
        raise UsageError(
            f"target {self.name} has no sparse operators; use target cpu, or a table of break-even "
            "sparsities, table:FILE.yaml"
        )


class TimedTarget(Target):
    """A machine that layers are timed on."""

    measures = ("seconds",)
    here = True
    filled_by = f"{LANES} lanes"

    def filling(self, site: Site, format_name: str, ranks: Sequence[Rank]) -> list[Rank]:
        """Multiples of the lanes of vector units where there are a few.

        The others take as long as the next multiple.
        """
        whole = [rank for rank in ranks if all(r % LANES == 0 for r in rank)]
        return whole if len(whole) >= _FEW else list(ranks)

    @abstractmethod
    def time(
        self, site: Site, forms: Sequence[Form], setting: Setting, careful: bool = False
    ) -> list[Timing]:
        """Seconds of the site as each form, summed over all its calls.

        All forms not known yet are measured against each other. With `careful`, what is known from a few
        rounds only is measured again in many.
        """

    @abstractmethod
    def time_models(
        self, models: Sequence[Model], batch: Batch, setting: Setting, yardstick: Site | None = None
    ) -> list[float]:
        """Seconds of one call of each model, measured against each other.

        With `yardstick`, a dense site that was timed before, the answer is on the scale of what it took then:
        a machine that is busier now than it was when the layers were timed changes nothing.
        """

    def seconds(
        self, site: Site, form: Form, batch: int = 1, threads: int = 1, dtype: torch.dtype = torch.float32
    ) -> float:
        """Time of one layer in that form."""
        return self.time(site, [form], Setting(batch, threads, dtype))[0].seconds

    def cost(self, site: Site, forms: Sequence[Form], setting: Setting = ONE_CALL) -> list[Cost]:
        return [Cost(seconds=timing.seconds) for timing in self.time(site, forms, setting)]

    def cost_models(
        self,
        models: Sequence[Model],
        call: Callable[[], Batch],
        setting: Setting,
        yardstick: Site | None = None,
    ) -> list[Cost]:
        return [Cost(seconds=seconds) for seconds in self.time_models(models, call(), setting, yardstick)]


TARGETS: Registry[type[Target]] = Registry("target")


def register_target(cls: type[Target]) -> type[Target]:
    """Class decorator: make a target known by its `name`."""
    return TARGETS.add(cls.name, cls)


def open_target(text: str | Target, frontend: str, cache: Path | None = None) -> Target:
    """Read `cpu`, `cpu:openvino` or `systolic:gemmini`.

    A registered target, and after the colon one of its ways to run a model. Raises `UsageError` for an
    unknown one.
    """
    if isinstance(text, Target):
        return text
    if not isinstance(text, str):
        raise UsageError(
            f"target={text!r} is not a text; write 'cpu', or another of: {', '.join(TARGETS.names())}"
        )
    check_target(text)
    name, _, way = text.strip().partition(":")
    return TARGETS.get(name).open(way, frontend, cache)


def check_target(text: str) -> None:
    """Raise `UsageError` for what names no target; what follows a colon may be known to the target alone."""
    name, colon, way = text.strip().partition(":")
    if colon and not way:
        raise UsageError(
            f"target {text!r} names no way to run a model after the colon; write {name!r}, or {name}:NAME"
        )
    TARGETS.get(name)
