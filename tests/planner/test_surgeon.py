"""Channel removal against direct least squares."""

from __future__ import annotations

import torch

from tdpass.formats.metric import Metric
from tdpass.planner.surgeon import keep_channels, remove_channels


def _problem() -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 54, generator=generator, dtype=torch.float64) @ torch.randn(
        54, 54, generator=generator, dtype=torch.float64
    )
    g = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    return weight, Metric(x.T @ x / 400, g.T @ g / 50)


def test_errors_are_those_of_the_best_weights_on_the_channels_kept() -> None:
    weight, metric = _problem()
    surgery = remove_channels(weight, metric)
    for keep in range(1, 6):
        channels = surgery.kept(keep)
        full = torch.zeros_like(weight)
        full[:, list(channels)] = keep_channels(weight, metric, channels)
        assert abs(
            metric.square((weight - full).flatten(1)) - surgery.errors[6 - keep - 1]
        ) < 1e-6 * metric.square(weight.flatten(1))


def test_the_first_removal_is_the_cheapest_one() -> None:
    weight, metric = _problem()

    def error(channel: int) -> float:
        kept = [c for c in range(6) if c != channel]
        full = torch.zeros_like(weight)
        full[:, kept] = keep_channels(weight, metric, kept)
        return metric.square((weight - full).flatten(1))

    assert remove_channels(weight, metric).order[0] == min(range(6), key=error)
