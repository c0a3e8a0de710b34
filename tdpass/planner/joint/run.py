"""Runs of layers that feed each other, with what they make on the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.planner.joint.base import Group, Network
from tdpass.planner.joint.paths import Path, find_paths
from tdpass.planner.projection import Joint
from tdpass.site import Site
from tdpass.tape import Tape

_POSITIONS = 2**15


@dataclass(frozen=True)
class Run:
    """The sites of a run, front to back, the paths between, and what each site made, a tensor per run."""

    sites: tuple[Site, ...]
    paths: tuple[Path, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    metrics: tuple[Metric, ...]
    answers: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, group: Group, network: Network) -> Run:
        """That of these sites; as many samples as give about 32,768 positions of the widest layer."""
        after = {path.first: path for path in find_paths(network.tapes[:1], network.sites)[0]}
        sites = tuple(network.sites[name] for name in group)
        most = max(site.out_positions / site.samples for site in sites)
        each = max(8, round(_POSITIONS / most / len(network.tapes)))
        answers = tuple(zip(*(_made(tape, group, each) for tape in network.tapes), strict=True))
        weights, biases = tuple(map(network.weight, group)), tuple(map(network.bias, group))
        return cls(
            sites,
            tuple(after[name] for name in group[:-1]),
            weights,
            biases,
            tuple(network.metrics[name] for name in group),
            answers,
        )

    @property
    def made(self) -> Sequence[Tensor]:
        """What the first site makes."""
        return self.answers[0]

    @property
    def outputs(self) -> tuple[Tensor | None, ...]:
        """How much the answers of each site matter, as in `Metric`."""
        return tuple(metric.outputs for metric in self.metrics)

    def joint(self, place: int, made: Sequence[Tensor]) -> Joint:
        """The joint after the site at that place, where that makes `made`."""
        read = self.sites[place + 1]
        targets = [kind_of(read).output_rows(y, read) for y in self.answers[place + 1]]
        return Joint(
            made, self.paths[place].between, targets, self.sites[place], read, self.outputs[place + 1]
        )

    def squares(self, place: int) -> Tensor:
        """The mean square of every channel that a site makes."""
        site = self.sites[place]
        return (
            torch.cat([kind_of(site).output_rows(y, site) for y in self.answers[place]])
            .double()
            .square()
            .mean(0)
        )


def _made(tape: Tape, group: Group, samples: int) -> list[Tensor]:
    """What each site of a group makes for the first samples of a recorded run."""
    playback, found = tape.play(), []
    with torch.no_grad():
        for name in group:
            y = playback.advance(tape.site_calls[name][0]).step()
            assert y is not None, "every run calls the sites of a group"
            found.append(y[:samples])
    return found
