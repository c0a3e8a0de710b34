"""drop-branch: a residual branch that is left out, but for its mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.kinds import kind_of
from tdpass.planner.joint.base import Group, JointChange, Network, Variant, register_joint_change
from tdpass.planner.joint.pairs import Pair, find_pairs
from tdpass.planner.rank_plan import Choice
from tdpass.site import Site
from tdpass.tape import Tape

_NOTHING_READ = Form("dense", (), inputs=0)


@register_joint_change
class DropBranch(JointChange):
    """No site of the branch reads anything; the last, whose output enters the sum, answers with its mean."""

    name = "drop-branch"

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        pairs = find_pairs(tapes, sites)
        found = [_branches(tape, sites, pairs) for tape in tapes]
        return [branch for branch in found[0] if all(branch in others for others in found[1:])]

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        yield Variant(_dropped(group, network), dict.fromkeys(group, 1.0))

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        return _dropped(group, network)


def _branches(tape: Tape, sites: Mapping[str, Site], pairs: Sequence[Pair]) -> list[Group]:
    """Residual branches of sites only, each from its first site to the one whose output enters the sum."""
    before = {consumer: producer for producer, consumer in pairs}
    branches: list[Group] = []
    for name, indices in tape.site_calls.items():
        if len(indices) == 1 and name in sites and tape.residual_partner(indices[0]) is not None:
            branch = [name]
            while branch[0] in before:
                branch.insert(0, before[branch[0]])
            whole = all(kind_of(sites[part]).reaches(sites[part]) is not None for part in branch)
            if whole and not any(sites[part].table for part in branch):
                branches.append(tuple(branch))
    return branches


def _dropped(branch: Group, network: Network) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name in branch:
        site = network.sites[name]
        bias = _mean_output(site, network.tapes) if name == branch[-1] else torch.zeros(site.o)
        layers[name] = Layer(_NOTHING_READ.on(site), _NOTHING_READ, {}, bias.to(network.weight(name).dtype))
    return layers


def _mean_output(site: Site, tapes: Sequence[Tape]) -> Tensor:
    total, count = torch.zeros(site.o, dtype=torch.float64), 0
    for tape in tapes:
        with torch.no_grad():
            y = tape.play().advance(tape.site_calls[site.name][0]).step()
        assert y is not None
        rows = kind_of(site).output_rows(y, site)
        total += rows.double().sum(0)
        count += rows.shape[0]
    return total / max(count, 1)
