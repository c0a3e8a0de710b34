"""Numbers and foreign text the way people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdpass.form import Form
from tdpass.measures import MEASURES, Measure, measures

_PREFIXES = ("", "k", "M", "G", "T", "P")
_FIRST = ("macs", "params", "bytes")


def human(value: float, unit: str = "") -> str:
    """Three significant digits and a decimal prefix.

    >>> human(1_234_567), human(999_960), human(42), human(3_420_000, "B")
    ('1.23 M', '1.00 M', '42', '3.42 MB')
    """
    size, step = abs(value), 0
    while size >= 999.5 and step < len(_PREFIXES) - 1:
        size, step = size / 1000, step + 1
    digits = f"{size:g}" if step == 0 and size == int(size) else _three(size)
    sign = "-" if value < 0 else ""
    return f"{sign}{digits} {_PREFIXES[step]}{unit}".rstrip()


def ratio(before: float, after: float, times: str = "x") -> str:
    """How many times smaller, or a dash where there is nothing to divide.

    >>> ratio(100, 40), ratio(3000, 20), ratio(10, 0)
    ('2.50x', '150x', '-')
    """
    if before <= 0 or after <= 0:
        return "-"
    return f"{_three(before / after)}{times}"


def less(before: float, after: float, words: tuple[str, str], times: str = "x") -> tuple[str, str]:
    """How many times less or more it became, and the one of the two words that fits.

    A ratio that is written as 1.00 is no change that anybody sees.

    >>> less(100, 40, ("fewer", "more")), less(40, 100, ("fewer", "more")), less(999, 998, ("fewer", "more"))
    (('2.50x', 'fewer'), ('2.50x', 'more'), ('no', 'fewer'))
    """
    times_less = ratio(max(before, after), min(before, after), times)
    if times_less == ratio(1, 1, times):
        return "no", words[0]
    return times_less, words[after > before]


def share(part: float, whole: float) -> str:
    """A percentage, or a dash where there is no whole.

    >>> share(399, 1000)
    '39.9 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else "-"


def small(value: float) -> str:
    """An error or a loss: three significant digits, as a power of ten below a thousandth.

    >>> small(0.03124), small(1.234e-5), small(0.0), small(12.5)
    ('0.0312', '1.2e-5', '0', '12.5')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e-3:
        return f"{value:.3g}" if abs(value) < 1000 else human(value)
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def score(value: float) -> str:
    """A score: four digits, since it is compared to others much like it.

    >>> score(98.934), score(0.98934), score(0.0), score(1234.0)
    ('98.93', '0.9893', '0.000', '1.23 k')
    """
    if not math.isfinite(value):
        return "not finite"
    return f"{value:#.4g}" if abs(value) < 999.95 else human(value)


def seconds(value: float) -> str:
    """A duration.

    >>> seconds(0.0123), seconds(4.56), seconds(192)
    ('12.3 ms', '4.6 s', '3 min 12 s')
    """
    if value < 0.9995e-3:
        return f"{value * 1e6:.3g} us"
    if value < 0.9995:
        return f"{value * 1e3:.0f} ms" if value >= 0.0995 else f"{value * 1e3:.3g} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def cost_text(measure: str, value: float) -> str:
    """A cost in the unit of its measure.

    >>> cost_text("macs", 1200), cost_text("bytes", 1200)
    ('1.20 k', '1.20 kB')
    >>> cost_text("seconds", 0.0012), cost_text("joules", 0.0012)
    ('1.2 ms', '1.2mJ')
    """
    if measure == "seconds":
        return seconds(value)
    known = MEASURES.get(measure)
    return human(value, known.unit) if known.whole else known.write(value)


def shown_measures() -> list[Measure]:
    """All measures in the order in which people look for them."""
    return sorted(
        measures(), key=lambda measure: _FIRST.index(measure.name) if measure.name in _FIRST else len(_FIRST)
    )


def dims(shape: Sequence[int], times: str = "x") -> str:
    """A shape, such as 64x32x3x3."""
    return times.join(str(size) for size in shape)


def ranks(rank: Sequence[int]) -> str:
    """A rank as text, such as `8, 12`; empty for a dense layer."""
    return ", ".join(str(r) for r in rank)


def form_sizes(form: Form) -> str:
    """The rank of a form, written as `ranks` does, and the channels that are left."""
    return " ".join(part for part in (ranks(form.rank), form.channels) if part)


def in_form(form: Form) -> str:
    """A form as text, its rank written as `ranks` does."""
    return " ".join(
        part
        for part in (
            plain(form.format),
            form_sizes(form),
            *map(plain, form.numbers),
            plain(form.support),
            form.activations,
        )
        if part
    )


def plain(text: object) -> str:
    """Foreign text made safe to show: what could move a cursor or reorder a line becomes a visible mark.

    Names and messages come from model files, which may hold escape sequences, bidirectional overrides or
    broken Unicode.
    """
    return "".join(map(_visible, str(text)))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "\ufffd"


def _three(value: float) -> str:
    decimals = (value < 9.995) + (value < 99.95)
    return f"{value:.{decimals}f}"
