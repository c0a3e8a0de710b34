"""Tasks that a network learned one after another, and the one file that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor

from tdpass.documents import Count, Document, Size, register_document
from tdpass.errors import InvalidModelError
from tdpass.models import check_digest
from tdpass.models.torch.saving.tensor_file import write_tensors

Ranks = Literal["equal", "fisher"]
_KEY = "tdpass.tasks"
_PARTS = ("u", "v", "s", "own")


@dataclass(frozen=True)
class Task:
    """What a network learned for one task.

    Its new columns and its selector per site, and all that is not factored, by name.
    """

    u: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    s: Mapping[str, Tensor]
    own: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it under names of two parts, such as `u/conv1`."""
        return {f"{part}/{name}": value for part in _PARTS for name, value in getattr(self, part).items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Task:
        """What `tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        return cls(**parts)

    def memory(self) -> dict[str, int]:
        """Bytes of the columns, of the selectors, and of what is the task's own: biases, norms and head."""
        size = {part: sum(value.nbytes for value in getattr(self, part).values()) for part in _PARTS}
        return {"columns": size["u"] + size["v"], "selectors": size["s"], "own": size["own"]}


@dataclass(frozen=True)
class Growing:
    """How many columns a first and a further task have, their division, and the sites that they are in."""

    first_rank: Size
    step_rank: Size
    ranks: Ranks
    sites: tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    growing: Growing
    tasks: Count


_KEPT = register_document(
    Document(
        "file of tasks", _Kept, InvalidModelError, "write it again with IncrementalTasks.save", version=1
    )
)


def write_tasks(path: Path, growing: Growing, tasks: Sequence[Task]) -> None:
    """Write all tasks into one safetensors file, to a temporary name first."""
    tensors = {
        f"{number}/{name}": value.cpu()
        for number, task in enumerate(tasks)
        for name, value in task.tensors().items()
    }
    write_tensors(path, tensors, {_KEY: _KEPT.text(_Kept(growing, len(tasks)))})


def read_tasks(path: Path) -> tuple[Growing, list[Task]]:
    """What `write_tasks` wrote; raises `InvalidModelError` for a file that is damaged or another."""
    text = check_digest(path).get(_KEY)
    if text is None:
        raise InvalidModelError(f"{path} holds no tasks; it was not written by IncrementalTasks.save")
    kept = _KEPT.parse(text, f"what {path} carries")
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    tasks = []
    for number in range(kept.tasks):
        start = f"{number}/"
        tasks.append(
            Task.of_tensors(
                {name.removeprefix(start): value for name, value in held.items() if name.startswith(start)}
            )
        )
    return kept.growing, tasks
