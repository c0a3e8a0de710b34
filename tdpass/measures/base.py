"""What a measure is: a number that a layer or model costs, how it is written, and what knowing it takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from tdpass.errors import UsageError
from tdpass.registry import Registry

_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(\S*)", re.IGNORECASE)
COUNTS: Mapping[str, float] = {
    prefix + ending: factor
    for prefix, factor in {
        "": 1,
        "k": 1e3,
        "m": 1e6,
        "g": 1e9,
        "t": 1e12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
    }.items()
    for ending in ("", "b")
}


class Needs(IntEnum):
    """What has to be there before a measure is known."""

    NOTHING = 0
    RUN = 1
    TARGET = 2


@dataclass(frozen=True)
class Measure:
    """A number that adds up over layers, at least 0.

    `title` heads a column of it; `less` and `more` are what a model has, or is, that costs less or more of
    it. `units` is what an amount may be written in, each as a multiple of that in which it is kept, and
    `example` such an amount. A `whole` measure counts: its units do not mind case, and it is written out in
    full; `unit` is what is counted, where that is shown. `aliases` are other words for it. A `standing` one
    is that of what is there, however often it is called.
    """

    name: str
    title: str
    less: str
    more: str
    example: str
    units: Mapping[str, float]
    whole: bool = True
    needs: Needs = Needs.NOTHING
    unit: str = ""
    aliases: tuple[str, ...] = ()
    standing: bool = False

    def read(self, text: str) -> float | None:
        """The amount that a text with a unit stands for; None for a text that is no such amount.

        >>> macs = MEASURES.get("macs")
        >>> macs.read("120M"), MEASURES.get("seconds").read("3ms"), macs.read("120")
        (120000000.0, 0.003, None)
        """
        match = _NUMBER.fullmatch(text)
        if match is None:
            return None
        unit = match[2].lower() if self.whole else match[2]
        if not unit or unit not in self.units:
            return None
        value = float(match[1]) * self.units[unit]
        return value if value > 0 or self.whole else None

    def write(self, value: float) -> str:
        """The amount as text: a count in full, others in the largest unit reached, as `read` takes it.

        >>> MEASURES.get("macs").write(1200000), MEASURES.get("seconds").write(0.00325)
        ('1,200,000', '3.25ms')
        """
        if self.whole:
            return f"{int(value):,}"
        falling = sorted(self.units.items(), key=lambda item: -item[1])
        unit, size = next((item for item in falling if abs(value) >= item[1]), falling[-1])
        return f"{value / size:.4g}{unit}"

    def fault(self, value: object) -> str:
        """What the value is instead of an amount; empty for one."""
        kinds = int if self.whole else (int, float)
        fits = (
            isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        )
        return (
            ""
            if fits
            else f"{self.name} is {value!r}: expected {'a whole' if self.whole else 'a'} number of at least 0"
        )


MEASURES: Registry[Measure] = Registry("measure")


def register_measure(measure: Measure) -> Measure:
    """Make a measure known by its name; raises `UsageError` where that or an alias is taken."""
    taken = {word for known in MEASURES for word in (known.name, *known.aliases)}
    twice = taken.intersection((measure.name, *measure.aliases))
    if twice:
        raise UsageError(f"measure {min(twice)!r} is registered twice; give it another name")
    return MEASURES.add(measure.name, measure)


def measure_named(word: str) -> str:
    """The name of the measure that the word stands for, be it an alias; any other word as it is."""
    return next((measure.name for measure in MEASURES if word in measure.aliases), word)


def measures() -> list[Measure]:
    """All measures, those that are always known first."""
    return sorted(MEASURES, key=lambda measure: (measure.needs, measure.name))


def counted() -> list[str]:
    """The measures that need no target."""
    return [measure.name for measure in measures() if measure.needs < Needs.TARGET]
