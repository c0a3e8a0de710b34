"""Changes of modules in place that are undone where the model then answers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import nn

from tdpass.errors import TdpassError
from tdpass.models.abilities import Decline
from tdpass.models.torch.modules.in_place import Backup
from tdpass.models.torch.sites.norms import same_answers

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Answers = Callable[[], Sequence[object]]


class Change(Protocol[T_co]):
    """Something done to `modules` by `apply`, which returns what came of it.

    `path` names what changes, `reason` says why it cannot be done ("" where it can).
    """

    @property
    def path(self) -> str:
        """Name of what changes."""

    @property
    def reason(self) -> str:
        """Why it cannot be done."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """All modules that it writes to."""

    def apply(self) -> T_co:
        """Do it."""


def proved(changes: Sequence[Change[T]], answers: Answers, decline: Decline, done: str) -> list[T]:
    """What came of the changes that leave the model's answers as they are.

    All are made at once and, where the answers then differ, one by one; the others are undone, and `decline`
    is told that they are not `done`.
    """
    possible = [change for change in changes if not change.reason]
    before = answers() if possible else []
    places = range(len(possible))
    made = _made(possible, places, answers, before)
    if not made:
        made = {at: one for each in places for at, one in _made(possible, [each], answers, before).items()}
    kept = [possible[place] for place in made]
    for change in changes:
        if change not in kept:
            decline(change.path, f"not {done}: {change.reason or 'the model would answer otherwise'}")
    return list(made.values())


def _made(
    changes: Sequence[Change[T]], places: Sequence[int], answers: Answers, before: Sequence[object]
) -> dict[int, T]:
    if not places:
        return {}
    backup = Backup.of([module for place in places for module in changes[place].modules])
    made = {place: changes[place].apply() for place in places}
    try:
        same = all(same_answers(ours, theirs) for ours, theirs in zip(answers(), before, strict=True))
    except TdpassError:
        same = False
    if same:
        return made
    for entry in reversed(backup):
        entry.restore()
    return {}
