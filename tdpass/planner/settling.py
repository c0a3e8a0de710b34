"""Settling: the losses that a choice rests on are measured if estimated, and the choice is made again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tdpass.form import Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import Layer
from tdpass.planner.candidates import Candidate, SiteFits
from tdpass.planner.effort import Deadline
from tdpass.planner.sensitivity import Sweep

Fitted = Callable[[Sequence[str]], Iterable[SiteFits]]


@dataclass
class Settling:
    """Measures the losses of chosen candidates, for so many seconds of one core from the first time on.

    `begin` starts a sweep over the calibration runs anew, `fitted` fits sites by name, of which `held` are at
    hand; `keep` puts the candidates of a site with what was measured into the cache.
    """

    begin: Callable[[], Sweep]
    fitted: Fitted
    keep: Callable[[str, list[Candidate]], None]
    seconds: float
    held: dict[str, SiteFits] = field(default_factory=dict)
    deadline: Deadline | None = field(default=None, init=False)

    def losses(self, chosen: Mapping[str, Candidate]) -> dict[str, float]:
        """What was measured of these candidates by site, front to back, as far as there is time."""
        self.deadline = self.deadline or Deadline(time.process_time() + self.seconds)
        missing = [name for name in chosen if name not in self.held]
        self.held |= {fits.site.name: fits for fits in self.fitted(missing)} if missing else {}
        known = [name for name in self.held if name in chosen]
        if not known or self.deadline.left <= 0:
            return {}
        sweep, found = self.begin(), dict[str, float]()
        for name in sorted(known, key=sweep.place):
            if self.deadline.left > 0:
                found[name] = max(0.0, sweep.loss({name: self._layer(name, chosen[name])}))
        return found

    def _layer(self, name: str, candidate: Candidate) -> Layer:
        form = candidate.form
        plain = form if form.encoded else Form(FORMATS.get(form.format).chain.name, form.rank)
        return self.held[name].layer(plain)
