"""Joint changes as the knapsack chooses among them, with their losses, and as a plan has them carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tdpass.following import Progress
from tdpass.formats.layer import Layer, cost_of
from tdpass.models.streams import HeadChange
from tdpass.planner.candidates import Candidate, bias_cost
from tdpass.planner.divergence import FittedDivergence
from tdpass.planner.effort import Allowance
from tdpass.planner.frontier import with_loss
from tdpass.planner.joint.base import JOINT_CHANGES, Carries, Group, JointChange, Network, Variant, always
from tdpass.planner.moments import stream_metrics
from tdpass.planner.rank_plan import Choice
from tdpass.planner.sensitivity import Loss, Sweep, measure_losses
from tdpass.site import Site
from tdpass.tape import Tape

Read = Callable[[str], Tensor]
ReadBias = Callable[[str], Tensor | None]
Made = tuple[JointChange, Group]


@dataclass(frozen=True)
class JointOption:
    """Candidates for the sites of one change, none without the others; `channels` are kept between them."""

    parts: Mapping[str, Candidate]
    loss: float
    channels: tuple[int, ...] = ()
    change: str = ""


@dataclass(frozen=True)
class Together:
    """The layers of the sites of one change, and what the model must be told of their heads."""

    layers: Mapping[str, Layer]
    heads: Mapping[str, HeadChange]


def joint_options(
    sites: Mapping[str, Site],
    weight: Read,
    bias: ReadBias,
    tapes: Sequence[Tape],
    sweep: Sweep,
    tick: Progress,
    seconds: float = math.inf,
    changes: Sequence[JointChange] = (),
    carries: Carries = always,
) -> list[JointOption]:
    """All joint options of `changes`, or of all that are offered, with their losses.

    As many of these are measured as there are seconds of one core for, one of each group at least.
    `carries` tells whether the model can have a variant in place.
    """
    tried = changes or [change for change in JOINT_CHANGES if change.offered]
    found = [made for made in _everywhere(tapes, sites, tried) if made[0].worth_trying(made[1], sites)]
    network = _observed(found, sites, weight, bias, tapes, sweep.divergence, carries)
    calls = tapes[0].site_calls
    allowance = Allowance(seconds, {str(number): 1.0 for number in range(len(found))})
    options: list[JointOption] = []
    for done, (change, group) in enumerate(sorted(found, key=lambda made: calls[made[1][0]][0])):
        deadline = allowance.take(str(done))
        variants = list(change.variants(group, network))
        layers = [partial(_layers, variant) for variant in variants]
        errors = [max(variant.errors.values()) for variant in variants]
        losses = measure_losses(sweep, layers, errors, len(variants), deadline) if variants else []
        finite = [
            (variant, loss)
            for variant, loss in zip(variants, losses, strict=True)
            if math.isfinite(loss.value)
        ]
        options += [_option(change, variant, loss, sites) for variant, loss in finite]
        tick("trying changes of several layers", done + 1, len(found))
    return options


def joint_layers(
    chosen: Mapping[str, Choice],
    sites: Mapping[str, Site],
    weight: Read,
    bias: ReadBias,
    tapes: Sequence[Tape],
    divergence: FittedDivergence,
    carries: Carries = always,
) -> Iterator[Together]:
    """What the sites become that a plan changes together, group by group.

    Groups that the network lacks are left out.  Raises `UsageError` for an unknown change.
    """
    named = [JOINT_CHANGES.get(name) for name in dict.fromkeys(choice.joint for choice in chosen.values())]
    found = [made for made in _everywhere(tapes, sites, named) if _planned(made, chosen)]
    network = _observed(found, sites, weight, bias, tapes, divergence, carries)
    for change, group in found:
        choices = [chosen[name] for name in group]
        yield Together(change.carry_out(group, choices, network), change.heads(group, choices, network))


def _everywhere(
    tapes: Sequence[Tape], sites: Mapping[str, Site], changes: Sequence[JointChange]
) -> list[Made]:
    # of options that cost and lose the same the knapsack takes the first: channels rather than branches
    return [(change, group) for change in reversed(changes) for group in change.find(tapes, sites)]


def _planned(made: Made, chosen: Mapping[str, Choice]) -> bool:
    change, group = made
    choices = [chosen[name] for name in group if name in chosen and chosen[name].joint == change.name]
    return len(choices) == len(group) and change.planned(choices)


def _observed(
    found: Sequence[Made],
    sites: Mapping[str, Site],
    weight: Read,
    bias: ReadBias,
    tapes: Sequence[Tape],
    divergence: FittedDivergence,
    carries: Carries,
) -> Network:
    read = dict.fromkeys(name for change, group in found for name in change.reads(group))
    metrics = {
        site.name: metric
        for site, metric in stream_metrics(tapes, [sites[name] for name in read], divergence)
    }
    return Network(sites, weight, bias, tapes, metrics, carries)


def _option(change: JointChange, variant: Variant, loss: Loss, sites: Mapping[str, Site]) -> JointOption:
    """The option with its loss, which the last of its parts bears: a plan adds up those of its sites."""
    parts = {
        name: _candidate(sites[name], layer, variant.errors[name]) for name, layer in variant.layers.items()
    }
    last = list(parts)[-1]
    parts[last] = with_loss(parts[last], loss.value, not loss.measured)
    return JointOption(parts, loss.value, variant.channels, change.name)


def _candidate(site: Site, layer: Layer, error: float) -> Candidate:
    return Candidate(layer.form, cost_of(site, layer.form) + bias_cost(site, layer.bias), error)


def _layers(variant: Variant) -> Mapping[str, Layer]:
    return variant.replayed or variant.layers
