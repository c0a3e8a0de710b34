"""Changes of modules in place that are undone where the model then answers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import nn

from tdpass.errors import TdpassError
from tdpass.models.torch.in_place import Backup
from tdpass.models.torch.norms import same_answers

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


def proved(changes: Sequence[Change[T]], answers: Answers) -> dict[int, T]:
    """What came, by place, of the changes that leave the model's answers as they are.

    All are made at once and, where the answers then differ, one by one; the others are undone.
    """
    if not changes:
        return {}
    before = answers()
    places = range(len(changes))
    together = _made(changes, places, answers, before)
    if together:
        return together
    return {place: made for each in places for place, made in _made(changes, [each], answers, before).items()}


def _made(
    changes: Sequence[Change[T]], places: Sequence[int], answers: Answers, before: Sequence[object]
) -> dict[int, T]:
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
