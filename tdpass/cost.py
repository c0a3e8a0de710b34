"""What a layer or a model costs, and the budgets put on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tdpass.errors import BudgetError

BudgetValue = float | int | str
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_ABSOLUTE = re.compile(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Cost:
    """Stored numbers, multiply-adds per sample, bytes of storage; they add up over layers."""

    params: int = 0
    macs: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.bytes - other.bytes)

    def get(self, measure: str) -> int:
        """The value of one measure by name."""
        return int(getattr(self, measure))


MEASURES: tuple[str, ...] = tuple(field.name for field in fields(Cost))


@dataclass(frozen=True)
class Bound:
    """An upper limit on one measure, as a fraction of the original model or as an absolute number."""

    value: float
    fraction: bool

    @classmethod
    def parse(cls, measure: str, value: BudgetValue) -> Bound:
        """Read `0.4` or `"40%"` (fractions) or `"120M"` (absolute); raises `BudgetError` on anything else."""
        allowed = f"write {measure} as a fraction in (0, 1] such as 0.4 or '40%', or as an absolute number with a unit such as '120M'"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}")
        if isinstance(value, str):
            text = value.strip()
            if text.endswith("%"):
                return cls.parse(measure, _number(text[:-1], measure, allowed) / 100)
            match = _ABSOLUTE.fullmatch(text)
            if match and (match[2] or text[-1] in "bB"):
                return cls(float(match[1]) * _UNITS[(match[2] or "").upper()], fraction=False)
            value = _number(text, measure, allowed)
        if not 0 < value <= 1:
            raise BudgetError(f"budget {measure}={value!r} is neither a fraction in (0, 1] nor an absolute number with a unit; {allowed}")
        return cls(float(value), fraction=True)

    def limit(self, original: int) -> int:
        """The largest allowed value for a model that costs `original`."""
        return int(self.value * original + 1e-6) if self.fraction else int(self.value)

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.fraction else f"{int(self.value):,}"


@dataclass(frozen=True)
class Budget:
    """Bounds on measures of the whole model, and on the relative error of each site."""

    bounds: tuple[tuple[str, Bound], ...] = ()
    max_error: float | None = None

    @classmethod
    def parse(cls, spec: Mapping[str, BudgetValue] | Budget) -> Budget:
        """Read `{"macs": 0.4, "bytes": "2MiB", "max_error": 0.1}`; raises `BudgetError` on what it does not know."""
        if isinstance(spec, Budget):
            return spec
        bounds: list[tuple[str, Bound]] = []
        max_error: float | None = None
        for measure, value in spec.items():
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

    def limits(self, original: Cost) -> dict[str, int]:
        """Absolute limits for a model of that cost."""
        return {measure: bound.limit(original.get(measure)) for measure, bound in self.bounds}

    def __str__(self) -> str:
        parts = [f"{measure}={bound}" for measure, bound in self.bounds]
        return ", ".join(parts + ([f"max_error={self.max_error:g}"] if self.max_error is not None else []))


def _number(value: object, measure: str, allowed: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}") from None
