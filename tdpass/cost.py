"""What a layer or a model costs, and the budgets put on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

from tdpass.documents import Plain
from tdpass.errors import BudgetError
from tdpass.measures import MEASURES, counted, measure_named, measures
from tdpass.registry import nearest

BudgetValue = float | int | str


class Cost(Plain):
    """Amounts of registered measures, such as stored numbers and multiply-adds per sample.

    They add up over layers. A measure that is not given is 0: `seconds` where nothing was timed. A difference
    may be negative, what a file says may not. Raises `UsageError` for a measure that is not registered.

    >>> cost = Cost(params=10, macs=100) + Cost(macs=20, cycles=7)
    >>> cost.macs, cost.get("cycles"), cost.get("joules")
    (120, 7, 0)
    """

    __slots__ = ("_amounts",)

    def __init__(
        self,
        params: int = 0,
        macs: int = 0,
        bytes: int = 0,  # noqa: A002
        seconds: float = 0.0,
        **others: float,
    ) -> None:
        for name in others:
            MEASURES.get(name)
        self._amounts = {"params": params, "macs": macs, "bytes": bytes, "seconds": seconds, **others}

    @classmethod
    def of(cls, amounts: Mapping[str, float]) -> Cost:
        """The cost with these amounts by measure."""
        return cls(**amounts)  # type: ignore[arg-type]

    @property
    def params(self) -> int:
        """Stored numbers."""
        return int(self._amounts["params"])

    @property
    def macs(self) -> int:
        """Multiply-adds per sample."""
        return int(self._amounts["macs"])

    @property
    def bytes(self) -> int:
        """Bytes of storage."""
        return int(self._amounts["bytes"])

    @property
    def seconds(self) -> float:
        """Seconds of a call on the target."""
        return self._amounts["seconds"]

    def get(self, measure: str) -> float:
        """The amount of one measure by name; a whole number where the measure counts.

        Raises `UsageError` for an unknown one.
        """
        return self._amounts.get(MEASURES.get(measure).name, 0)

    def replace(self, **amounts: float) -> Cost:
        """The same cost with other amounts of these measures."""
        return Cost.of({**self._amounts, **amounts})

    def recounted(self, counts: Cost) -> Cost:
        """The same cost with the measures that need no target as they are in `counts`."""
        return self.replace(**{measure: counts.get(measure) for measure in counted()})

    def plain(self) -> dict[str, float]:
        """Every amount by measure: those that any cost has, and those that were given."""
        return dict(self._amounts)

    @classmethod
    def of_plain(cls, found: object) -> Cost:
        if not isinstance(found, Mapping):
            # of a file, not of a caller
            raise ValueError(f"expected amounts by measure, not {found!r}")  # noqa: TRY004
        for name, value in found.items():
            if name not in MEASURES:
                raise ValueError(
                    f"measure {name!r} is not known; known: "
                    f"{', '.join(measure.name for measure in measures())}"
                )
            fault = MEASURES.get(name).fault(value)
            if fault:
                raise ValueError(fault)
        return cls.of(found)

    def shares(self, original: Cost) -> dict[str, float]:
        """What is left of each measure that needs no target, of those that the original has some of."""
        return {
            measure: self.get(measure) / original.get(measure)
            for measure in counted()
            if original.get(measure)
        }

    def __add__(self, other: Cost) -> Cost:
        return Cost.of({name: self.get(name) + other.get(name) for name in self._with(other)})

    def __sub__(self, other: Cost) -> Cost:
        return Cost.of({name: self.get(name) - other.get(name) for name in self._with(other)})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cost) and all(
            self.get(name) == other.get(name) for name in self._with(other)
        )

    def __hash__(self) -> int:
        return hash(frozenset((name, value) for name, value in self._amounts.items() if value))

    def __repr__(self) -> str:
        return f"Cost({', '.join(f'{name}={value}' for name, value in self._amounts.items() if value)})"

    def _with(self, other: Cost) -> Iterator[str]:
        return iter({**self._amounts, **other._amounts})


def pays(cost: Cost, dense: Cost) -> bool:
    """Whether a layer is no larger than the dense one in any measure, and smaller in one.

    The measures are those known beforehand. A table of which rows are only read has no multiply-adds to
    compare: its factors' are the price of its size.
    """
    pairs = [(cost.get(measure), dense.get(measure)) for measure in ("params", "macs") if dense.get(measure)]
    return all(ours <= theirs for ours, theirs in pairs) and any(ours < theirs for ours, theirs in pairs)


def amount(measure: str, value: float) -> str:
    """A value of a measure as text.

    >>> amount("macs", 1200000), amount("seconds", 0.00325)
    ('1,200,000', '3.25ms')
    """
    return MEASURES.get(measure).write(value)


@dataclass(frozen=True)
class Bound:
    """An upper limit on one measure, as a fraction of the original model or as an absolute number."""

    value: float
    fraction: bool
    measure: str

    @classmethod
    def parse(cls, measure: str, value: BudgetValue) -> Bound:
        """Read `0.4` or `"40%"` (fractions), `"120M"` or, for seconds, `"3ms"` (absolute).

        Raises `BudgetError` on anything else.
        """
        known = MEASURES.get(measure)
        allowed = (
            f"write {measure} as a fraction in (0, 1] such as 0.4 or '40%', or as an absolute number "
            f"with a unit such as {known.example!r}"
        )
        if isinstance(value, bool) or not isinstance(value, Real | str):
            raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}")
        if isinstance(value, str):
            text = value.strip()
            if text.endswith("%"):
                return cls.parse(measure, _number(text[:-1], measure, allowed) / 100)
            absolute = known.read(text)
            if absolute is not None:
                return cls(absolute, fraction=False, measure=measure)
            value = _number(text, measure, allowed)
        if not 0 < float(value) <= 1:
            raise BudgetError(
                f"budget {measure}={value!r} is neither a fraction in (0, 1] nor an absolute number with a "
                f"unit; {allowed}"
            )
        return cls(float(value), fraction=True, measure=measure)

    def limit(self, original: float) -> float:
        """The largest allowed value for a model that costs `original`.

        A whole number where the measure counts.
        """
        value = self.value * original if self.fraction else self.value
        return int(value + 1e-6 * self.fraction) if MEASURES.get(self.measure).whole else value

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
            raise BudgetError(
                f"budget={spec!r} is not understood; write 0.4, or a measure with its bound such as "
                f"{{'macs': 0.4}}"
            )
        bounds: list[tuple[str, Bound]] = []
        max_error: float | None = None
        for name, value in spec.items():
            measure = measure_named(name)
            if any(measure == given for given, _ in bounds):
                raise BudgetError(
                    f"budget {measure} is given twice, once as another word for it; give it once"
                )
            if measure == "max_error":
                max_error = _number(value, measure, "give the largest relative error of a site, in (0, 1]")
                if not 0 < max_error <= 1:
                    raise BudgetError(
                        f"budget max_error={value!r} is outside (0, 1]; it is the largest relative error of "
                        "a site"
                    )
            elif measure in MEASURES:
                bounds.append((measure, Bound.parse(measure, value)))
            else:
                raise BudgetError(
                    f"unknown budget {measure!r}{nearest(measure, _names())}; known: {_known()}"
                )
        if not bounds and max_error is None:
            raise BudgetError(f"the budget is empty; give at least one of {_known()}")
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


def bounded() -> list[str]:
    """The words for measures that a budget may bound."""
    return [word for measure in measures() for word in (measure.name, *measure.aliases)]


def _names() -> list[str]:
    return [*(measure.name for measure in measures()), "max_error"]


def _known() -> str:
    return ", ".join(_names())


def _number(value: object, measure: str, allowed: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BudgetError(f"budget {measure}={value!r} is not a number; {allowed}") from None
