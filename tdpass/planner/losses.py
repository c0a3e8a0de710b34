"""Losses of a site's candidates: measured as far as there is time, else estimated from their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tdpass.formats.layer import Layer
from tdpass.planner.candidates import Candidate, SiteFits
from tdpass.planner.effort import Deadline, Effort
from tdpass.planner.frontier import with_loss
from tdpass.planner.sensitivity import Sweep, estimate_losses, measure_losses

SWEEP_SECONDS = 240.0


@dataclass(frozen=True)
class Losses:
    """What finds the losses of `sites` sites, by a sweep over recorded runs where there are any."""

    sweep: Sweep | None
    sites: int
    effort: Effort

    def of(self, candidates: list[Candidate], fits: SiteFits, deadline: Deadline) -> list[Candidate]:
        """The candidates of a site with their losses, without those whose loss is not finite."""
        if not candidates:
            return []
        if self.sweep is None:
            return [with_loss(candidate, candidate.error**2) for candidate in candidates]

        def layers(candidate: Candidate) -> Callable[[], Mapping[str, Layer]]:
            return lambda: {fits.site.name: fits.layer(candidate.form)}

        errors = [candidate.error for candidate in candidates]
        if not self.effort.measured and fits.metric.outputs is not None:
            losses = estimate_losses(fits.metric, fits.weight, errors)
        else:
            allowed = self._allowed(self.sweep, fits, deadline) if self.effort.measured else 1
            tried = [layers(candidate) for candidate in candidates]
            losses = measure_losses(self.sweep, tried, errors, allowed, deadline)
        return [
            with_loss(candidate, loss.value, not loss.measured)
            for candidate, loss in zip(candidates, losses, strict=True)
            if math.isfinite(loss.value)
        ]

    def _allowed(self, sweep: Sweep, fits: SiteFits, deadline: Deadline) -> int:
        """How many candidates of a site there is time to measure."""
        each = max(sweep.seconds_from([fits.site.name]), 1e-9)
        return int(min(deadline.left / each, SWEEP_SECONDS / (self.sites * sweep.seconds / 2 + 1e-9)))
