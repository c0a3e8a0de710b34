"""narrow-heads: attention over fewer channels in every head, as the pass `slice-heads` makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.models.streams import HeadChange, NewLayer
from tdpass.planner.heads import Attention, Bases, Bonds, find_bases, narrowed
from tdpass.planner.joint.attention_change import AttentionChange
from tdpass.planner.joint.base import Group, Network, Variant, register_joint_change
from tdpass.planner.joint.prune_channels import KEEP_SHARES
from tdpass.planner.rank_plan import Choice
from tdpass.site import Site


@register_joint_change
class NarrowHeads(AttentionChange):
    """`Q M` and `K N`, `V M` and `W_o N`: the mixtures of channels whose products are closest on the data.

    Where the model's own scale of scores follows the width of heads, queries are scaled back.  Where a rotary
    embedding turns queries and keys, values alone are narrower.
    """

    name = "narrow-heads"

    def fits(self, attention: Attention) -> bool:
        return attention.even or attention.mixable == (attention.values,)

    def takes(self, attention: Attention) -> Group:
        makers = (side.site for bond in attention.mixable for side in (bond.left, bond.right))
        return tuple(dict.fromkeys((*makers, attention.reader)))

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        attention = network.attentions[group[-1]]
        bases, width = _bases(attention, network), attention.values.width
        counts = sorted({max(1, round(share * width)) for share in KEEP_SHARES} - {width}, reverse=True)
        for rescales in (False, True):
            made = [_variant(group, network, bases, count, rescales=rescales) for count in counts]
            if made and network.carries(made[0]):
                yield from made
                return

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        return self._planned(group, choices, network).layers

    def heads(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, HeadChange]:
        return self._planned(group, choices, network).heads

    def _planned(self, group: Group, choices: Sequence[Choice], network: Network) -> Variant:
        attention = network.attentions[group[-1]]
        read, width = network.sites[group[-1]], attention.values.width
        left = choices[-1].form.inputs or 0
        count, rest = divmod(left * width, read.i)
        if rest or not 0 < count < width:
            raise PlanError(
                f"the plan leaves {left} channels of what {read.name!r} reads, which are no whole heads of "
                f"less than {width}; plan again"
            )
        bases = _bases(attention, network)
        made = [_variant(group, network, bases, count, rescales=rescales) for rescales in (False, True)]
        for variant in made:
            if network.carries(variant):
                return variant
        raise PlanError(f"the heads that {read.name!r} reads cannot be narrower in this model; plan for it")


def _bonds(attention: Attention) -> Bonds:
    return replace(attention.bonds, found=attention.mixable)


def _bases(attention: Attention, network: Network) -> Bases:
    return find_bases(_bonds(attention), network.tapes)


def _variant(group: Group, network: Network, bases: Bases, count: int, *, rescales: bool) -> Variant:
    attention = network.attentions[group[-1]]
    bonds, width = _bonds(attention), attention.values.width
    scale = (count / width) ** 0.5 if rescales else 1.0
    small, same = narrowed(bonds, bases, count, scale=scale), narrowed(bonds, bases, count, padded=True)
    keys = {name: id(bonds.layers[name][0]) for name in group}
    layers = {name: _layer(network.sites[name], small.layers[key]) for name, key in keys.items()}
    replayed = {name: _layer(network.sites[name], same.layers[key]) for name, key in keys.items()}
    # no error of one layer says what scores lose; the share that goes orders the variants
    errors = dict.fromkeys(group, 1 - count / width)
    return Variant(layers, errors, (), replayed, {name: small.heads[key] for name, key in keys.items()})


def _layer(site: Site, new: NewLayer) -> Layer:
    outputs, inputs = new.weight.shape
    form = Form(
        "dense",
        (),
        inputs=inputs if inputs < site.i else None,
        outputs=outputs if outputs < site.o else None,
    )
    return Layer(form.on(site), form, {"kernel": new.weight}, new.bias)
