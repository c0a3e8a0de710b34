"""prune-channels: fewer channels between two sites, the second making up for those that go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.planner.joint.base import Group, JointChange, Network, Variant, register_joint_change
from tdpass.planner.joint.pairs import find_pairs
from tdpass.planner.rank_plan import Choice
from tdpass.planner.surgeon import MAX_WIDTH, keep_channels, remove_channels
from tdpass.site import Site
from tdpass.tape import Tape

KEEP_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.375, 0.25)


@register_joint_change
class PruneChannels(JointChange):
    """W1[kept, :] and the best W2 on the kept channels.

    W2 is found by least squares in the second site's metric; its bias takes up what the mean output lost.
    Channels go one by one by structured optimal brain surgery, see `tdpass.planner.surgeon`.
    """

    name = "prune-channels"

    def __init__(self, keep: Sequence[float] = KEEP_SHARES) -> None:
        self.keep = tuple(keep)

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        return [*find_pairs(tapes, sites)]

    def worth_trying(self, group: Group, sites: Mapping[str, Site]) -> bool:
        return sites[group[-1]].weights // sites[group[-1]].o <= MAX_WIDTH

    def reads(self, group: Group) -> tuple[str, ...]:
        return group[-1:]

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        read, metric = network.sites[group[-1]], network.metrics[group[-1]]
        weight = network.weight(read.name).double()
        surgery = remove_channels(weight, metric)
        whole = metric.square(weight.flatten(1))
        for keep in sorted({max(1, round(read.i * share)) for share in self.keep} - {read.i}, reverse=True):
            channels = surgery.kept(keep)
            error = (surgery.errors[read.i - keep - 1] / whole) ** 0.5 if whole > 0 else 0.0
            errors = {**dict.fromkeys(group[:-1], 0.0), read.name: error}
            yield Variant(_pruned(group, network, channels), errors, channels)

    def planned(self, choices: Sequence[Choice]) -> bool:
        *made, read = choices
        count = len(read.channels)
        return read.form.inputs == count and all(
            choice.channels == read.channels and choice.form.outputs == count for choice in made
        )

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        channels, read = choices[-1].channels, network.sites[group[-1]]
        if not all(0 <= channel < read.i for channel in channels):
            raise PlanError(
                f"the plan keeps channels {channels} of site {read.name!r}, which has {read.i}; plan again"
            )
        return _pruned(group, network, channels)


def _pruned(group: Group, network: Network, channels: Sequence[int]) -> dict[str, Layer]:
    *made, read = (network.sites[name] for name in group)
    metric, index = network.metrics[read.name], torch.tensor(list(channels))
    second, second_bias = network.weight(read.name).double(), network.bias(read.name)
    kept = keep_channels(second, metric, channels)
    if metric.mean is not None:
        lost = second.flatten(1) @ metric.mean - kept.flatten(1) @ metric.mean.reshape(read.i, -1)[
            index
        ].reshape(-1)
        second_bias = lost if second_bias is None else second_bias.double() + lost
    makes, reads = Form("dense", (), outputs=len(channels)), Form("dense", (), inputs=len(channels))
    layers: dict[str, Layer] = {}
    for site in made:
        weight, bias = network.weight(site.name), network.bias(site.name)
        kept_bias = None if bias is None else bias[index]
        layers[site.name] = Layer(makes.on(site), makes, {"kernel": weight[index]}, kept_bias).to(
            weight.dtype
        )
    last = Layer(reads.on(read), reads, {"kernel": kept}, second_bias)
    return {**layers, read.name: last.to(network.weight(read.name).dtype)}
