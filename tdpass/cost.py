"""What a layer or a model costs, and the budgets put on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real

from tdpass.documents import Amount, Count
from tdpass.errors import BudgetError

BudgetValue = float | int | str
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_ABSOLUTE = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(s|ms|us|\u00b5s|\u03bcs|ns)")
_DURATIONS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ns": 1e-9}
_ALIASES = {"latency": "seconds"}


@dataclass(frozen=True)
class Cost:
    """Stored numbers, multiply-adds per sample, bytes of storage, seconds of a call on the target; they add up over layers.

    `seconds` is 0 where nothing was timed.  A difference may be negative, what a file says may not.
    """

    params: Count = 0
    macs: Count = 0
    bytes: Count = 0
    seconds: Amount = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.bytes - other.bytes, self.seconds - other.seconds)

    def get(self, measure: str) -> float:
        """The value of one measure by name; a whole number for all but seconds."""
        value: float = getattr(self, measure)
        return value


def pays(cost: Cost, dense: Cost) -> bool:
    """Whether a layer is no larger than the dense one in any measure that is known beforehand, and smaller in one."""
    pairs = [(cost.get(measure), dense.get(measure)) for measure in ("params", "macs")]
    return all(ours <= theirs for ours, theirs in pairs) and any(ours < theirs for ours, theirs in pairs)


MEASURES: tuple[str, ...] = tuple(field.name for field in fields(Cost))


def amount(measure: str, value: float) -> str:
    """A value of a measure as text, which a budget reads again.

    >>> amount("macs", 1200000), amount("seconds", 0.00325)
    ('1,200,000', '3.25ms')
    """
    if measure != "seconds":
        return f"{int(value):,}"
    unit = next((unit for unit in ("s", "ms", "us") if value >= _DURATIONS[unit]), "us")
    return f"{value / _DURATIONS[unit]:.4g}{unit}"


@dataclass(frozen=True)
class Bound:
    """An upper limit on one measure, as a fraction of the original model or as an absolute number."""

    value: float
    fraction: bool
    measure: str = ""

    @classmethod
    def parse(cls, measure: str, value: BudgetValue) -> Bound:
        """Read `0.4` or `"40%"` (fractions), `"120M"` or, for seconds, `"3ms"` (absolute); raises `BudgetError` on anything else."""
        example = "'3ms'" if measure == "seconds" else "'120M'"
        allowed = f"write {measure} as a fraction in (0, 1] such as 0.4 or '40%', or as an absolute number with a unit such as {example}"
        if isinstance(value, bool) or not isinstance(value, Real | str):
            raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}")
        if isinstance(value, str):
            text = value.strip()
            if text.endswith("%"):
                return cls.parse(measure, _number(text[:-1], measure, allowed) / 100)
            absolute = _absolute(measure, text)
            if absolute is not None:
                return cls(absolute, fraction=False, measure=measure)
            value = _number(text, measure, allowed)
        if not 0 < float(value) <= 1:
            raise BudgetError(f"budget {measure}={value!r} is neither a fraction in (0, 1] nor an absolute number with a unit; {allowed}")
        return cls(float(value), fraction=True, measure=measure)

    def limit(self, original: float) -> float:
        """The largest allowed value for a model that costs `original`; a whole number for all but seconds."""
        if self.measure == "seconds":
            return self.value * original if self.fraction else self.value
        return int(self.value * original + 1e-6) if self.fraction else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.fraction else amount(self.measure, self.value)


@dataclass(frozen=True)
class Budget:
    """Bounds on measures of the whole model, and on the relative error of each site."""

    bounds: tuple[tuple[str, Bound], ...] = ()
    max_error: float | None = None

    @classmethod
    def parse(cls, spec: BudgetSpec, default: str = "params") -> Budget:
        """Read `{"macs": 0.4, "bytes": "2MiB", "max_error": 0.1}`; `latency` is another word for `seconds`.

        A single value bounds the measure `default`.  Raises `BudgetError` on what it does not know.
        """
        if isinstance(spec, Budget):
            return spec
        if isinstance(spec, Real | str):
            spec = {default: spec}
        if not isinstance(spec, Mapping):
            raise BudgetError(f"budget={spec!r} is not understood; write 0.4, or a measure with its bound such as {{'macs': 0.4}}")
        bounds: list[tuple[str, Bound]] = []
        max_error: float | None = None
        for name, value in spec.items():
            measure = _ALIASES.get(name, name)
            if any(measure == given for given, _ in bounds):
                raise BudgetError(f"budget {measure} is given twice, as seconds and as latency; give it once")
            if measure == "max_error":
                max_error = _number(value, measure, "give the largest relative error of a site, in (0, 1]")
                if not 0 < max_error <= 1:
                    raise BudgetError(f"budget max_error={value!r} is outside (0, 1]; it is the largest relative error of a site")
            elif measure in MEASURES:
                bounds.append((measure, Bound.parse(measure, value)))
            else:
                raise BudgetError(f"unknown budget {measure!r}; known: {', '.join(MEASURES)}, max_error")
        if not bounds and max_error is None:
            raise BudgetError("the budget is empty; give at least one of " + ", ".join((*MEASURES, "max_error")))
        return cls(tuple(bounds), max_error)

    @property
    def measures(self) -> tuple[str, ...]:
        """The bounded measures."""
        return tuple(measure for measure, _ in self.bounds)

    def limits(self, original: Cost) -> dict[str, float]:
        """Absolute limits for a model of that cost."""
        return {measure: bound.limit(original.get(measure)) for measure, bound in self.bounds}

    def __str__(self) -> str:
        parts = [f"{measure}={bound}" for measure, bound in self.bounds]
        return ", ".join(parts + ([f"max_error={self.max_error:g}"] if self.max_error is not None else []))


BudgetSpec = Mapping[str, BudgetValue] | BudgetValue | Budget


def _absolute(measure: str, text: str) -> float | None:
    """The number that a text with a unit stands for; None for a text without one."""
    if measure == "seconds":
        match = _DURATION.fullmatch(text)
        value = float(match[1]) * _DURATIONS[match[2]] if match else 0.0
        return value if value > 0 else None
    match = _ABSOLUTE.fullmatch(text)
    return float(match[1]) * _UNITS[(match[2] or "").upper()] if match and (match[2] or text[-1] in "bB") else None


def _number(value: object, measure: str, allowed: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}") from None
