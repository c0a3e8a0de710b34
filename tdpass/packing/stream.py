"""Writing, reading and weighing entropy-coded integers in one way, so that both sides take the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tdpass.errors import InvalidModelError

Ints = npt.NDArray[np.int64]
BITS = 24
ONE = 1 << BITS
_WEIGHED = 1 << 20


def _coding() -> Any:
    import constriction  # noqa: PLC0415 - only packed weights need it

    return constriction.stream


class Stream(Protocol):
    """Integers one after another; `known` is what to write, and None when reading."""

    def cells(self, rates: Ints, known: Ints | None) -> Ints:
        """Bits, each a 1 with probability rate / 2^24, 0 < rate < 2^24."""

    def symbols(self, frequencies: Ints, count: int, known: Ints | None) -> Ints:
        """`count` symbols of one alphabet of at least two; frequencies are positive and add up to 2^24."""


class Writer:
    """A range encoder."""

    def __init__(self) -> None:
        self._coder = _coding().queue.RangeEncoder()

    def cells(self, rates: Ints, known: Ints | None) -> Ints:
        assert known is not None
        self._coder.encode(known.astype(np.int32), _coding().model.Categorical(perfect=False), _pairs(rates))
        return known

    def symbols(self, frequencies: Ints, count: int, known: Ints | None) -> Ints:
        assert known is not None
        self._coder.encode(known.astype(np.int32), _model(frequencies))
        return known

    def finish(self) -> bytes:
        """The words written."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class Reader:
    """A range decoder; raises `InvalidModelError` for bytes that are no whole words."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise InvalidModelError(f"its stream of {len(data)} bytes is cut off; it holds words of 4 bytes")
        self._coder = _coding().queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def cells(self, rates: Ints, known: Ints | None) -> Ints:
        return self._read(_coding().model.Categorical(perfect=False), _pairs(rates))

    def symbols(self, frequencies: Ints, count: int, known: Ints | None) -> Ints:
        return self._read(_model(frequencies), count)

    def _read(self, model: Any, more: Any) -> Ints:
        try:
            found: Ints = self._coder.decode(model, more).astype(np.int64)
        except (AssertionError, ValueError) as error:
            raise InvalidModelError(f"its stream does not decode ({error})") from None
        return found


class Scale:
    """What a writer would write, in bits."""

    def __init__(self) -> None:
        self.bits = 0.0

    def cells(self, rates: Ints, known: Ints | None) -> Ints:
        assert known is not None
        self.bits += BITS * known.size - float(np.log2(np.where(known == 1, rates, ONE - rates)).sum())
        return known

    def symbols(self, frequencies: Ints, count: int, known: Ints | None) -> Ints:
        assert known is not None
        counts = np.bincount(known, minlength=frequencies.size)
        self.bits += float((counts * (BITS - np.log2(frequencies))).sum())
        return known


# The coder takes floating-point weights, adds one to each after scaling them to 2^24 less their number.
# Weights that are integers
# of just that sum are therefore taken over as they are: every intermediate result is an integer below 2^24,
# exact in float32.
def _pairs(rates: Ints) -> npt.NDArray[np.float32]:
    pairs = np.empty((rates.size, 2), np.float32)
    pairs[:, 1] = rates - 1
    pairs[:, 0] = ONE - 1 - rates
    return pairs


def _model(frequencies: Ints) -> Any:
    return _coding().model.Categorical((frequencies - 1).astype(np.float32), perfect=False)


def learned_symbols(stream: Stream, alphabet: int, count: int, prior: int, known: Ints | None) -> Ints:
    """Symbols whose frequencies are learned as they pass, in blocks that grow with what was seen.

    f = 1 + (16 seen + prior) (2^24 - alphabet) / sum(16 seen + prior), the remainder to the most frequent
    symbol.
    """
    if alphabet < 2:
        return np.zeros(count, np.int64)
    seen = np.zeros(alphabet, np.int64)
    done, parts = 0, []
    while done < count:
        size = min(count - done, max(16, done // 8))
        weights = 16 * seen + prior
        frequencies = 1 + weights * (ONE - alphabet) // int(weights.sum())
        frequencies[int(np.argmax(frequencies))] += ONE - int(frequencies.sum())
        block = stream.symbols(frequencies, size, None if known is None else known[done : done + size])
        seen += np.bincount(block, minlength=alphabet)
        parts.append(block)
        done += size
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def weighed(alphabet: int, known: Ints, priors: Sequence[int]) -> tuple[float, int]:
    """Bits of those symbols with the best of some priors, and its index; of many, from the first of them."""
    first = known[:_WEIGHED]
    best = (math.inf, 0)
    for index, prior in enumerate(priors):
        scale = Scale()
        learned_symbols(scale, alphabet, first.size, prior, first)
        best = min(best, (scale.bits * known.size / max(1, first.size), index))
    return best
