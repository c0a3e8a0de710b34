"""Columns of a data set of the Hugging Face hub, as the kind that their type says."""

from __future__ import annotations

from typing import Any

from tdpass.errors import InvalidModelError, UsageError
from tdpass.optional import optional
from tdpass.raw.base import RAW_KINDS, Reader, spread

PREFIX = "hf:"
_SPLITS = ("train", "validation", "test")


def splits_of(name: str) -> Any:
    """The splits of a data set on the hub, by name; raises `UsageError`, `InvalidModelError`."""
    library = optional("datasets", "datasets", f"the data set {name!r}")
    try:
        return library.load_dataset(name)
    # whatever the hub, the network or the set's own script has to say
    except Exception as error:  # noqa: BLE001
        raise InvalidModelError(
            f"the data set {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from None


def from_hub(text: str, reader: Reader, most: int) -> object:
    """Calibration data of the first column that is pictures, sound or text.

    Raises `UsageError`, `InvalidModelError`.
    """
    name = text.removeprefix(PREFIX)
    splits = splits_of(name)
    rows = next((splits[split] for split in _SPLITS if split in splits), None)
    if rows is None:
        raise UsageError(f"the data set {name!r} has none of the splits {', '.join(_SPLITS)}")
    kinds = {column: _type_of(kind) for column, kind in rows.features.items()}
    for kind in RAW_KINDS:
        column = next((column for column, feature in kinds.items() if feature == kind.feature), None)
        if column is not None:
            chosen = rows.select(spread(range(len(rows)), most))
            return kind.made(list(chosen[column]), reader)
    told = ", ".join(f"{column} ({feature})" for column, feature in kinds.items())
    raise UsageError(f"the data set {name!r} has no column of pictures, sound or text, but {told}")


def _type_of(feature: Any) -> str:
    """The type of a column; `Value` is one of text alone."""
    kind = type(feature).__name__
    return kind if kind != "Value" or feature.dtype in ("string", "large_string") else str(feature.dtype)
