"""A rank plan: what every site becomes, what that costs and how wrong it is expected to be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tdpass.cost import Cost
from tdpass.errors import PlanError
from tdpass.files import read_json, write_text
from tdpass.report import SiteRow

DENSE = "dense"
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What one site becomes.

    `error` is the relative error of the weight in the metric of the plan, `loss` the expected increase of the network's
    divergence from the original, `channels` the channels kept where the site was pruned together with a neighbour,
    `fingerprint` identifies the site's weight where names differ, `guarantee` is what theory says of the error.  On a target
    the costs hold measured seconds, `kernel` is the runtime they were measured in and `predicted` what was expected before.
    """

    site: str
    shape: tuple[int, ...]
    format: str
    rank: tuple[int, ...]
    cost: Cost
    dense: Cost
    error: float = 0.0
    loss: float = 0.0
    reason: str = ""
    guarantee: str = ""
    fingerprint: str = ""
    channels: tuple[int, ...] = ()
    kernel: str = ""
    predicted: float = 0.0

    @property
    def seconds(self) -> float:
        """Measured time; 0 where nothing was timed."""
        return self.cost.seconds

    @property
    def dense_seconds(self) -> float:
        """Measured time of the dense layer; 0 where nothing was timed."""
        return self.dense.seconds

    @property
    def kept_dense(self) -> bool:
        """Whether the site is left as it is."""
        return self.format == DENSE


@dataclass(frozen=True)
class RankPlan:
    """Choices for all sites under a budget; a JSON file that applies to the torch model and to its ONNX export alike."""

    choices: tuple[Choice, ...]
    original: Cost
    budget: str = ""
    metric: str = "weights"
    divergence: str = ""
    declined: Mapping[str, str] = field(default_factory=dict)

    @property
    def planned(self) -> Cost:
        """Cost of the whole model once the plan is carried out."""
        return self.original + sum((choice.cost - choice.dense for choice in self.choices), Cost())

    @property
    def loss(self) -> float:
        """Summed expected loss increase."""
        return sum(choice.loss for choice in self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def rows(self) -> list[SiteRow]:
        """The choices as a report shows them."""
        return [
            SiteRow(c.site, c.shape, c.format, c.rank, c.dense, c.cost, c.error, c.loss, c.guarantee, c.reason, c.kernel, c.predicted) for c in self
        ]

    def get(self, site: str) -> Choice | None:
        """The choice for a site, by name."""
        return next((choice for choice in self.choices if choice.site == site), None)

    def renamed(self, names: Mapping[str, str]) -> RankPlan:
        """The same plan with sites renamed, for a model that names them differently."""
        return replace(self, choices=tuple(replace(choice, site=names.get(choice.site, choice.site)) for choice in self.choices))

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> RankPlan:
        """Read a plan; raises `PlanError` on anything that is not one."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{source} is not JSON ({error}); write one with `tdpass plan -o plan.json`") from None
        if not isinstance(record, dict) or record.pop("version", None) != VERSION:
            raise PlanError(f"{source} is not a tdpass plan of version {VERSION}; write one with `tdpass plan -o plan.json`")
        try:
            choices = tuple(_choice(item) for item in record.pop("choices"))
            return cls(choices=choices, original=Cost(**record.pop("original")), **record)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{source} is damaged: {error}; plan again") from None

    @classmethod
    def load(cls, path: Path | str) -> RankPlan:
        """Read a plan file; raises `PlanError` when it is missing or damaged."""
        return cls.from_json(read_json(Path(path), PlanError), str(path))


def _choice(item: Mapping[str, Any]) -> Choice:
    fields = dict(item)
    for name in ("shape", "rank", "channels"):
        values = tuple(fields.get(name, ()))
        if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 for value in values):
            raise ValueError(f"{name} {values} of site {item.get('site')!r} must be whole numbers")
        fields[name] = values
    return Choice(**{**fields, "cost": Cost(**fields["cost"]), "dense": Cost(**fields["dense"])})
