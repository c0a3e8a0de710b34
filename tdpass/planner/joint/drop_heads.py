"""drop-heads: fewer heads of an attention, the layer behind them making up for those that go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.models.streams import HeadChange
from tdpass.planner.heads import Attention
from tdpass.planner.joint.attention_change import AttentionChange
from tdpass.planner.joint.base import Group, Network, Variant, register_joint_change
from tdpass.planner.rank_plan import Choice
from tdpass.planner.surgeon import MAX_WIDTH, keep_channels, remove_channels
from tdpass.site import Site

MOST = 8


@register_joint_change
class DropHeads(AttentionChange):
    """Rows of queries, keys and values on the heads that stay, and the best output layer on them.

    Heads go one by one by structured optimal brain surgery on the output layer, as channels do in
    `prune-channels`; those that share a key and a value go together.  `channels` are the groups that stay.
    """

    name = "drop-heads"

    def fits(self, attention: Attention) -> bool:
        return attention.groups > 1 and super().fits(attention)

    def worth_trying(self, group: Group, sites: Mapping[str, Site]) -> bool:
        return sites[group[-1]].i <= MAX_WIDTH

    def reads(self, group: Group) -> tuple[str, ...]:
        return group[-1:]

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        attention = network.attentions[group[-1]]
        read, metric = network.sites[group[-1]], network.metrics[group[-1]]
        weight, own = _by_group(attention, network.weight(read.name).double(), metric)
        surgery, whole = remove_channels(weight, own), own.square(weight.flatten(1))
        for keep in _counts(attention.groups):
            error = (surgery.errors[attention.groups - keep - 1] / whole) ** 0.5 if whole > 0 else 0.0
            variant = self._variant(group, network, surgery.kept(keep), error)
            if keep == attention.groups - 1 and not network.carries(variant):
                return
            yield variant

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        return self._variant(group, network, self._kept(group, choices, network), 0.0).layers

    def heads(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, HeadChange]:
        return _counted(network.attentions[group[-1]], len(self._kept(group, choices, network)))

    def _kept(self, group: Group, choices: Sequence[Choice], network: Network) -> tuple[int, ...]:
        kept, groups = choices[-1].channels, network.attentions[group[-1]].groups
        if not kept or not all(0 <= head < groups for head in kept):
            raise PlanError(f"the plan keeps heads {kept} of {group[-1]!r}, which reads {groups}; plan again")
        return kept

    def _variant(self, group: Group, network: Network, kept: Sequence[int], error: float) -> Variant:
        attention, read = network.attentions[group[-1]], network.sites[group[-1]]
        layers = {name: _rows(attention, network, name, kept) for name in attention.makers}
        metric, whole = network.metrics[read.name], network.weight(read.name)
        columns = sorted(column for head in kept for column in attention.columns(head))
        best = keep_channels(whole.double(), metric, columns)
        bias = network.bias(read.name)
        if metric.mean is not None:
            lost = whole.double() @ metric.mean - best @ metric.mean[columns]
            bias = lost if bias is None else bias.double() + lost
        form, padded = Form("dense", (), inputs=len(columns)), torch.zeros_like(whole, dtype=best.dtype)
        padded[:, columns] = best
        layers[read.name] = Layer(form.on(read), form, {"kernel": best}, bias).to(whole.dtype)
        same = Layer(read, DENSE, {"kernel": padded}, bias).to(whole.dtype)
        errors = {**dict.fromkeys(attention.makers, 0.0), read.name: error}
        heads = _counted(attention, len(kept))
        return Variant(layers, errors, tuple(kept), replayed={read.name: same}, heads=heads)


def _counts(groups: int) -> Iterable[int]:
    """How many groups of heads may stay, most first."""
    step = max(1, groups // MOST)
    return range(groups - 1, 0, -step)


def _counted(attention: Attention, groups: int) -> dict[str, HeadChange]:
    made = {name: attention.count(groups, made=True) for name in attention.makers}
    return {**made, attention.reader: attention.count(groups, made=False)}


def _by_group(attention: Attention, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """The weight `[o, groups, columns of one]` and its metric, in that order of columns."""
    order = [column for group in range(attention.groups) for column in attention.columns(group)]
    inputs = metric.inputs
    if inputs is not None:
        inputs = inputs[order] if inputs.dim() == 1 else inputs[order][:, order]
    return weight[:, order].reshape(len(weight), attention.groups, -1), replace(metric, inputs=inputs)


def _rows(attention: Attention, network: Network, name: str, kept: Sequence[int]) -> Layer:
    gone = {row for head in range(attention.groups) if head not in kept for row in attention.rows(name, head)}
    site, weight, bias = network.sites[name], network.weight(name), network.bias(name)
    rows = [row for row in range(site.o) if row not in gone]
    form = Form("dense", (), outputs=len(rows))
    return Layer(form.on(site), form, {"kernel": weight[rows]}, None if bias is None else bias[rows])
