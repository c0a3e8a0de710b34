"""Options that change neighbouring sites together: channels pruned between two layers, residual branches dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.base import FORMATS, Layer
from tdpass.formats.metric import Metric
from tdpass.kinds import kind_of
from tdpass.planner.candidates import Candidate, bias_cost, with_loss
from tdpass.planner.effort import Allowance
from tdpass.planner.moments import stream_metrics
from tdpass.planner.sensitivity import Loss, Sweep, measure_losses
from tdpass.planner.surgeon import MAX_WIDTH, Surgery, keep_channels, remove_channels
from tdpass.site import Site
from tdpass.tape import Call, Tape

KEEP_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.375, 0.25)

Read = Callable[[str], Tensor]
ReadBias = Callable[[str], Tensor | None]
Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class JointOption:
    """Candidates for several sites that only make sense together; `channels` are those kept between two of them."""

    parts: Mapping[str, Candidate]
    loss: float
    channels: tuple[int, ...] = ()


Layers = Callable[[], Mapping[str, Layer]]
Trial = Callable[[], list[tuple[JointOption, Layers]]]


@dataclass(frozen=True)
class Chain:
    """`producer` feeds `consumer` alone, through element-wise functions without parameters."""

    producer: str
    consumer: str


def find_chains(tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Chain]:
    """Pairs of sites whose channels in between can be removed, in every run, front to back."""
    found = [_chains(tape, sites) for tape in tapes]
    return [chain for chain in found[0] if all(chain in others for others in found[1:])]


def _chains(tape: Tape, sites: Mapping[str, Site]) -> list[Chain]:
    once = {indices[0]: name for name, indices in tape.site_calls.items() if len(indices) == 1 and name in sites}
    chains: list[Chain] = []
    for index, name in sorted(once.items()):
        reader = tape.channelwise_consumer(index)
        if reader in once and _meet(sites[name], tape.calls[index], sites[once[reader]], tape.calls[reader]):
            chains.append(Chain(name, once[reader]))
    return chains


def _meet(made: Site, making: Call, read: Site, reading: Call) -> bool:
    """Whether the channels that one call makes are those that the other sums over: as many, and on the same axis, since sizes of others may equal them."""
    whole = made.groups == read.groups == 1
    return whole and made.o == read.i and made.channel_axis(len(making.shapes[1])) == read.channel_axis(len(reading.shapes[0]))


def find_branches(tapes: Sequence[Tape], sites: Mapping[str, Site], chains: Sequence[Chain]) -> list[tuple[str, ...]]:
    """Residual branches made of sites only, in every run, each from its first site to the one whose output enters the sum."""
    found = [_branches(tape, sites, chains) for tape in tapes]
    return [branch for branch in found[0] if all(branch in others for others in found[1:])]


def _branches(tape: Tape, sites: Mapping[str, Site], chains: Sequence[Chain]) -> list[tuple[str, ...]]:
    before = {chain.consumer: chain.producer for chain in chains}
    branches: list[tuple[str, ...]] = []
    for name, indices in tape.site_calls.items():
        if len(indices) == 1 and name in sites and tape.residual_partner(indices[0]) is not None:
            branch = [name]
            while branch[0] in before:
                branch.insert(0, before[branch[0]])
            if all(kind_of(sites[part]).reaches(sites[part]) is not None for part in branch):
                branches.append(tuple(branch))
    return branches


def joint_options(
    sites: Mapping[str, Site], weight: Read, bias: ReadBias, tapes: Sequence[Tape], sweep: Sweep, tick: Tick, seconds: float = math.inf
) -> list[JointOption]:
    """All joint options with their losses, as many of them measured as there are seconds of one core for, one of each chain at least."""
    tape = tapes[0]
    every = find_chains(tapes, sites)
    chains = [chain for chain in every if sites[chain.consumer].weights // sites[chain.consumer].o <= MAX_WIDTH]
    branches = find_branches(tapes, sites, every)
    metrics = {site.name: metric for site, metric in stream_metrics(tapes, [sites[chain.consumer] for chain in chains], sweep.divergence)}
    jobs: list[tuple[int, Trial]] = [
        (tape.site_calls[chain.producer][0], partial(_prune, chain, sites, weight, bias, metrics[chain.consumer])) for chain in chains
    ]
    jobs += [(tape.site_calls[branch[0]][0], partial(_drop, branch, sites, weight, tapes)) for branch in branches]
    allowance = Allowance(seconds, {str(number): 1.0 for number in range(len(jobs))})
    found: list[JointOption] = []
    for done, (_, make) in enumerate(sorted(jobs, key=lambda job: job[0])):
        deadline = allowance.take(str(done))
        options, layers = zip(*made, strict=True) if (made := make()) else ((), ())
        errors = [max(part.error for part in option.parts.values()) for option in options]
        losses = measure_losses(sweep, layers, errors, len(options), deadline) if options else []
        found += [_with_loss(option, loss) for option, loss in zip(options, losses, strict=True) if math.isfinite(loss.value)]
        tick("trying pruned and dropped branches", done + 1, len(jobs))
    return found


def _with_loss(option: JointOption, loss: Loss) -> JointOption:
    """The option with its loss, which the last of its parts bears: a plan adds up those of its sites."""
    last = list(option.parts)[-1]
    return replace(option, parts={**option.parts, last: with_loss(option.parts[last], loss.value, not loss.measured)}, loss=loss.value)


def prune_layers(chain: Chain, sites: Mapping[str, Site], weight: Read, bias: ReadBias, metric: Metric, channels: Sequence[int]) -> dict[str, Layer]:
    """The two layers with only `channels` between them; the second makes up for the others as well as it can."""
    made, read = sites[chain.producer], sites[chain.consumer]
    index = torch.tensor(list(channels))
    first, first_bias = weight(made.name), bias(made.name)
    second, second_bias = weight(read.name).double(), bias(read.name)
    kept = keep_channels(second, metric, channels)
    if metric.mean is not None:
        lost = second.flatten(1) @ metric.mean - kept.flatten(1) @ metric.mean.reshape(read.i, -1)[index].reshape(-1)
        second_bias = lost if second_bias is None else second_bias.double() + lost
    kept_bias = None if first_bias is None else first_bias[index]
    return {
        made.name: Layer(made, _pruned(len(channels), made.i), {"kept": first[index]}, kept_bias).to(first.dtype),
        read.name: Layer(read, _pruned(read.o, len(channels)), {"kept": kept}, second_bias).to(first.dtype),
    }


def _pruned(outputs: int, inputs: int) -> Form:
    return Form("pruned", (outputs, inputs))


def _prune(chain: Chain, sites: Mapping[str, Site], weight: Read, bias: ReadBias, metric: Metric) -> list[tuple[JointOption, Layers]]:
    read = sites[chain.consumer]
    w = weight(read.name).double()
    surgery: Surgery = remove_channels(w, metric)
    whole = metric.square(w.flatten(1))
    found: list[tuple[JointOption, Layers]] = []
    for keep in sorted({max(1, round(read.i * share)) for share in KEEP_SHARES} - {read.i}, reverse=True):
        channels = surgery.kept(keep)
        layers = prune_layers(chain, sites, weight, bias, metric, channels)
        error = (surgery.errors[read.i - keep - 1] / whole) ** 0.5 if whole > 0 else 0.0
        parts = {name: _candidate(layer, error if name == read.name else 0.0) for name, layer in layers.items()}
        found.append((JointOption(parts, 0.0, channels), partial(_same, layers)))
    return found


def drop_layers(branch: Sequence[str], sites: Mapping[str, Site], weight: Read, tapes: Sequence[Tape]) -> dict[str, Layer]:
    """Constant layers for a whole branch; the last answers with its mean output."""
    layers: dict[str, Layer] = {}
    for name in branch:
        total, count = torch.zeros(sites[name].o, dtype=torch.float64), 0
        if name == branch[-1]:
            for tape in tapes:
                index = tape.site_calls[name][0]
                with torch.no_grad():
                    playback = tape.play().advance(index)
                    y = playback.step()
                assert y is not None
                rows = kind_of(sites[name]).output_rows(y, sites[name])
                total += rows.double().sum(0)
                count += rows.shape[0]
        layers[name] = Layer(sites[name], Form("constant", ()), {}, (total / max(count, 1)).to(weight(name).dtype))
    return layers


def _drop(branch: Sequence[str], sites: Mapping[str, Site], weight: Read, tapes: Sequence[Tape]) -> list[tuple[JointOption, Layers]]:
    layers = drop_layers(branch, sites, weight, tapes)
    return [(JointOption({name: _candidate(layer, 1.0) for name, layer in layers.items()}, 0.0), partial(_same, layers))]


def _same(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    return layers


def _candidate(layer: Layer, error: float) -> Candidate:
    fmt = FORMATS.get(layer.format)
    return Candidate(layer.form, fmt.cost(layer.site, layer.rank) + bias_cost(layer.site, layer.bias), error)
