"""What a joint change is: one that several sites take part in, and that none of them can make alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from tdpass.formats.layer import Layer
from tdpass.formats.metric import Metric
from tdpass.models.streams import HeadChange
from tdpass.planner.heads import Attention, find_attentions
from tdpass.planner.rank_plan import Choice
from tdpass.registry import Registry
from tdpass.site import Site
from tdpass.tape import Tape

Group = tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One way to make a change: the layer of every site, front to back, and its relative error in the metric.

    `channels` are those kept between the sites, where the change chooses among them.  Where calls between
    the sites say how many channels there are, `replayed` are layers of the same function that a recorded run
    can be repeated with, and `heads` what the model must be told.
    """

    layers: Mapping[str, Layer]
    errors: Mapping[str, float]
    channels: tuple[int, ...] = ()
    replayed: Mapping[str, Layer] = field(default_factory=dict)
    heads: Mapping[str, HeadChange] = field(default_factory=dict)


Carries = Callable[[Variant], bool]


def always(variant: Variant) -> bool:
    """Any model can have layers with fewer channels where nothing says how many there are."""
    return not variant.heads


@dataclass(frozen=True)
class Network:
    """A network as joint changes see it: its sites by name, their dense weights and biases, recorded runs.

    `metrics` holds the errors' metric of every site that some change `reads`; `carries` tells whether the
    model can have a variant in place and then answers as it should.
    """

    sites: Mapping[str, Site]
    weight: Callable[[str], Tensor]
    bias: Callable[[str], Tensor | None]
    tapes: Sequence[Tape]
    metrics: Mapping[str, Metric]
    carries: Carries = always

    @cached_property
    def attentions(self) -> Mapping[str, Attention]:
        """The attentions of the first run by the layer that reads their heads."""
        return find_attentions(self.tapes[0], self.sites)


class JointChange(ABC):
    """A change of several sites; a subclass per file, registered with `register_joint_change` by its `name`.

    A layer that it makes may have fewer channels than its site, as `Form.inputs` and `Form.outputs` say:
    `site` of the layer is then `form.on(site)`.  It costs what its layers cost in their forms.  In a plan,
    the choice of every site that takes part says its form, `joint`, the name of the change, and the
    `channels` of the variant; matrices that a change computes are computed again from the data when the plan
    is carried out, as factors are.  `offered` says whether planning tries it where no change is asked for,
    `uncarried` why a group has no variants where the model has to carry them.
    """

    name: ClassVar[str]
    offered: ClassVar[bool] = True
    uncarried: ClassVar[str] = ""

    def declined(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> Mapping[str, str]:
        """Why sites take no part in it, by name, where it can say so."""
        return {}

    @abstractmethod
    def find(self, tapes: Sequence[Tape], sites: Mapping[str, Site]) -> list[Group]:
        """The groups of sites that it may be made to, in every run; each from front to back."""

    def worth_trying(self, group: Group, sites: Mapping[str, Site]) -> bool:
        """Whether planning should look at a group at all."""
        return True

    def reads(self, group: Group) -> tuple[str, ...]:
        """The sites of a group whose metric it needs."""
        return ()

    @abstractmethod
    def variants(self, group: Group, network: Network) -> Iterable[Variant]:
        """What planning may choose among."""

    def planned(self, choices: Sequence[Choice]) -> bool:
        """Whether a plan makes the change to a group with these choices, each of which names it."""
        return True

    @abstractmethod
    def carry_out(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, Layer]:
        """The layers of a group as the plan has them; raises `PlanError` for a plan that does not fit."""

    def heads(self, group: Group, choices: Sequence[Choice], network: Network) -> Mapping[str, HeadChange]:
        """What the model must be told of heads where the plan is carried out, by site."""
        return {}


JOINT_CHANGES: Registry[JointChange] = Registry("joint change")


def register_joint_change(cls: type[JointChange]) -> type[JointChange]:
    """Class decorator: make a joint change known by its `name`."""
    JOINT_CHANGES.add(cls.name, cls())
    return cls
