"""project-channels: fewer channels between layers that follow each other.

They are mixtures of those that were there, or a selection of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tdpass.errors import PlanError
from tdpass.form import Form
from tdpass.formats.layer import Layer
from tdpass.planner.joint.base import Group, JointChange, Network, Variant, register_joint_change
from tdpass.planner.joint.paths import find_paths, runs_of
from tdpass.planner.joint.prune_channels import KEEP_SHARES
from tdpass.planner.joint.run import Run
from tdpass.planner.projection import STEPS, Joint, Projected, principal, refined, selection, solved
from tdpass.planner.rank_plan import Choice
from tdpass.planner.surgeon import MAX_WIDTH, remove_channels
from tdpass.site import Site
from tdpass.tape import Tape

_ROUGH_STEPS = 16


class _Narrowing(JointChange):
    """A run of layers with fewer channels between them.

    Each feeds the next alone through functions that treat channels apart. `W1' = A W1` makes mixtures `A z +
    c` of the channels z of a layer, and the next layer becomes the `W2', d` that answers best to what comes
    of them: least squares on the calibration data, against what it answered before.  Joints follow each other
    front to back, each fitted on what the layers before it really make.  The result is dense and narrower;
    nothing is put between its layers. `keep` are the shares of channels that planning tries, the same at
    every joint of a run.
    """

    offered = False
    steps: ClassVar[int] = 0

    def __init__(self, keep: Sequence[float] = KEEP_SHARES) -> None:
        self.keep = tuple(keep)

    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        return [
            (run[0].first, *(path.second for path in run)) for run in runs_of(find_paths(tapes, sites)[0])
        ]

    def declined(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> Mapping[str, str]:
        return find_paths(tapes, sites)[1]

    def reads(self, group: Group) -> tuple[str, ...]:
        return group

    def variants(self, group: Group, network: Network) -> Iterator[Variant]:
        run = Run.of(group, network)
        for share in sorted(set(self.keep), reverse=True):
            widths = [max(1, round(site.o * share)) for site in run.sites[:-1]]
            if any(width < site.o for width, site in zip(widths, run.sites, strict=False)):
                yield self._narrowed(run, widths, min(self.steps, _ROUGH_STEPS))

    def planned(self, choices: Sequence[Choice]) -> bool:
        return all(choice.form.outputs is not None for choice in choices[:-1])

    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        run, widths = Run.of(group, network), [choice.form.outputs or 0 for choice in choices[:-1]]
        for width, site in zip(widths, run.sites, strict=False):
            if not 1 <= width <= site.o:
                raise PlanError(
                    f"the plan keeps {width} channels of site {site.name!r}, which has {site.o}; plan again"
                )
        return self._narrowed(run, widths, self.steps).layers

    @abstractmethod
    def starts(self, run: Run, place: int, joint: Joint, count: int) -> list[Tensor]:
        """Mixtures `[count, n]` to begin from at a joint of the run; the one that answers best is taken."""

    def _narrowed(self, run: Run, widths: Sequence[int], steps: int) -> Variant:
        layers: dict[str, Layer] = {}
        errors = {run.sites[0].name: 0.0}
        kernel, bias, made, inputs = run.weights[0].double(), run.biases[0], run.made, None
        for place, width in enumerate(widths):
            first, second = run.sites[place : place + 2]
            joint = run.joint(place, made)
            found = self._fitted(run, place, joint, width, steps)
            form = Form("dense", (), inputs=inputs, outputs=width)
            shift = found.shift if bias is None else found.shift + found.mix @ bias.double()
            layers[first.name] = _layer(
                first, form, torch.tensordot(found.mix, kernel, dims=1), shift, run.weights[place]
            )
            errors[second.name] = found.error
            made, kernel, bias, inputs = joint.answers(found), found.kernel, found.bias, found.kernel.shape[1]
        last = run.sites[-1]
        layers[last.name] = _layer(last, Form("dense", (), inputs=inputs), kernel, bias, run.weights[-1])
        return Variant(layers, errors)

    def _fitted(self, run: Run, place: int, joint: Joint, width: int, steps: int) -> Projected:
        tried = [solved(joint, mix) for mix in self.starts(run, place, joint, width)]
        return refined(joint, min(tried, key=lambda each: each.error), steps)


def _layer(site: Site, form: Form, kernel: Tensor, bias: Tensor | None, like: Tensor) -> Layer:
    return Layer(form.on(site), form, {"kernel": kernel}, bias).to(like.dtype)


@register_joint_change
class ProjectChannels(_Narrowing):
    """Learned projection: mixtures refined on what the next layer answers.

    They begin from the better of principal and selected channels. Cascaded Projection (Minnehan and Savakis,
    CVPR 2019) without labels.  What is selected survives a nonlinearity as it is, and mixtures do not, which
    is why a selection is mostly the better start.
    """

    name = "project-channels"
    steps = STEPS

    def starts(self, run: Run, place: int, joint: Joint, count: int) -> list[Tensor]:
        return [
            principal(joint, count),
            _selected(_by_surgery(run, place, count) or _by_score(taylor(run, place), count), joint),
        ]


@register_joint_change
class PrincipalChannels(_Narrowing):
    """The principal directions of what a layer makes; nothing is refined."""

    name = "principal-channels"

    def starts(self, run: Run, place: int, joint: Joint, count: int) -> list[Tensor]:
        return [principal(joint, count)]


class _Selecting(_Narrowing):
    """The channels with the highest scores, as structured filter pruning keeps them."""

    @abstractmethod
    def scores(self, run: Run, place: int) -> Tensor:
        """How much each channel that a layer of the run makes is worth."""

    def starts(self, run: Run, place: int, joint: Joint, count: int) -> list[Tensor]:
        return [_selected(_by_score(self.scores(run, place), count), joint)]


@register_joint_change
class SelectByNorm(_Selecting):
    """sum |W1[c]| (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""

    name = "select-by-norm"

    def scores(self, run: Run, place: int) -> Tensor:
        return run.weights[place].flatten(1).abs().sum(1)


@register_joint_change
class SelectByTaylor(_Selecting):
    """E[z_c^2] G_cc: the squared first-order change without a channel (Molchanov et al. 2017), no labels."""

    name = "select-by-taylor"

    def scores(self, run: Run, place: int) -> Tensor:
        return taylor(run, place)


@register_joint_change
class SelectByMedian(_Selecting):
    """sum_d ||W1[c] - W1[d]||: others can stand for what lies near the geometric median.

    He et al., FPGM, 2019.
    """

    name = "select-by-median"

    def scores(self, run: Run, place: int) -> Tensor:
        rows = run.weights[place].flatten(1).double()
        return torch.cdist(rows, rows).sum(1)


NARROWINGS: Mapping[str, type[_Narrowing]] = {
    "learned": ProjectChannels,
    "principal": PrincipalChannels,
    "norm": SelectByNorm,
    "taylor": SelectByTaylor,
    "median": SelectByMedian,
}
"""The changes by what `project-channels{how=...}` calls them."""


def taylor(run: Run, place: int) -> Tensor:
    """E[z_c^2] G_cc for every channel of what a layer of the run makes."""
    outputs = run.outputs[place]
    squares = run.squares(place)
    return squares if outputs is None else squares * outputs.diagonal().to(squares)


def _by_surgery(run: Run, place: int, count: int) -> tuple[int, ...]:
    """What structured optimal brain surgery on the next layer leaves.

    Nothing where that layer is too wide for it.
    """
    read, metric = run.sites[place + 1], run.metrics[place + 1]
    width = read.weights // read.o
    if width > MAX_WIDTH or metric.inputs is None or metric.inputs.dim() == 1:
        return ()
    weight = run.weights[place + 1].double().reshape(read.o, run.sites[place].o, -1)
    return remove_channels(weight, metric).kept(count)


def _by_score(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.double().argsort(descending=True, stable=True)[:count].tolist()))


def _selected(channels: Sequence[int], joint: Joint) -> Tensor:
    return selection(channels, joint.first.o)
