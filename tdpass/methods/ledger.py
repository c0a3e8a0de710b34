"""What a target told in a training run, so that the run pays the same prices when it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tdpass.documents import Document, register_document
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.form import Form
from tdpass.site import Site
from tdpass.training.placement import from_first, world

FILE = "prices.json"

_PRICES = register_document(
    Document(
        "table of prices of a training run",
        dict[str, dict[str, float]],
        UsageError,
        "train from the beginning in another folder",
        finite=False,
    )
)


class Ledger:
    """Amounts by site and form, each asked for once; with a folder, `keep` writes them there.

    What is measured tells something else every time and choices follow from it, so a run that goes on after
    its cache of timings is lost, or on another machine, must read what it was told.  Of several processes all
    go by what the first was told.  Raises `UsageError` for a file that is no such table.
    """

    def __init__(self, folder: Path | None = None, resume: bool = False) -> None:
        self._path = None if folder is None else folder / FILE
        self._told: dict[str, dict[str, float]] = from_first(_read(self._path) if resume else {})
        self._changed = False

    def amounts(
        self,
        site: Site,
        forms: Sequence[Form],
        ask: Callable[[Sequence[Form]], Sequence[float]],
        how: str = "",
    ) -> list[float]:
        """What the site costs in each form, asked for where it is not known.

        `how` it was asked keeps answers apart.
        """
        told, keys = self._told.setdefault(site.name, {}), {form: f"{form}{how}" for form in forms}
        missing = [form for form, key in keys.items() if key not in told]
        if missing:
            answers = [float(amount) for amount in ask(missing)]
            told |= from_first(dict(zip([keys[form] for form in missing], answers, strict=True)))
            self._changed = True
        return [told[keys[form]] for form in forms]

    def keep(self) -> None:
        """Write down what was told since the last time."""
        if self._changed and self._path is not None and world()[0] == 0:
            write_text(self._path, _PRICES.text(self._told) + "\n")
        self._changed = False


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    return {} if path is None or not path.exists() else _PRICES.load(path)
