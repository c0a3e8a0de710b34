"""A rank plan: what every site becomes, what that costs and how wrong it is expected to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tdpass.cost import Cost
from tdpass.documents import Amount, Count, Document, Size, register_document
from tdpass.errors import PlanError
from tdpass.files import write_text
from tdpass.form import DENSE, Form, Formed
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import check_form, cost_of, storage_of
from tdpass.kinds import plain_site
from tdpass.measures import counted
from tdpass.notebook import table
from tdpass.report import SiteRow

VERSION = 1


@dataclass(frozen=True)
class Choice(Formed):
    """What one site, a weight of that shape in so many groups, becomes.

    `error` is the relative error of the weight in the metric of the plan, `loss` the expected increase of the
    network's divergence from the original.  `joint` is the change that it takes part in together with other
    sites, if any, and `channels` are those that this keeps between them; files of version 1 leave `joint`
    out.  `given` is the form that the site came in, as text, whose cost `dense` is.  `fingerprint` identifies
    the site's weight where names differ, `guarantee` is what theory says of the error.  On a target the costs
    hold measured seconds, `kernel` is the runtime they were measured in and `predicted` what was expected
    before.
    """

    site: str
    shape: tuple[Size, ...]
    form: Form
    cost: Cost
    dense: Cost
    error: Amount = 0.0
    loss: float = 0.0
    reason: str = ""
    guarantee: str = ""
    fingerprint: str = ""
    channels: tuple[Count, ...] = ()
    kernel: str = ""
    predicted: Amount = 0.0
    groups: Size = 1
    joint: str = ""
    given: str = str(DENSE)

    def __post_init__(self) -> None:
        if self.form.narrow and not self.joint:
            object.__setattr__(self, "joint", "prune-channels" if self.channels else "drop-branch")

    def within(self, then: Choice | None) -> Choice:
        """This choice, of fewer channels, with what the dense layer that it left became."""
        if then is None or then.kept_dense:
            return self
        return replace(
            self,
            form=then.form.left_of(self.form),
            cost=then.cost,
            loss=self.loss + then.loss,
            error=then.error,
            reason=then.reason,
            guarantee=then.guarantee,
        )

    @property
    def seconds(self) -> float:
        """Measured time; 0 where nothing was timed."""
        return self.cost.seconds

    @property
    def dense_seconds(self) -> float:
        """Measured time of the dense layer; 0 where nothing was timed."""
        return self.dense.seconds

    @property
    def kept_dense(self) -> bool:
        """Whether the site is a dense layer in the end."""
        return self.form == DENSE

    @property
    def kept(self) -> bool:
        """Whether the site is left in the form that it came in."""
        return str(self.form) == self.given


@dataclass(frozen=True, repr=False)
class RankPlan:
    """Choices for all sites under a budget.

    A JSON file that applies to the torch model and to its ONNX export alike. `original` is the cost of the
    model that came in, `prepared` that of the model that was planned on, where passes before changed it: a
    folded batch-norm stores less, or a bias more.
    """

    choices: tuple[Choice, ...]
    original: Cost
    budget: str = ""
    metric: str = "weights"
    divergence: str = ""
    declined: Mapping[str, str] = field(default_factory=dict)
    prepared: Cost | None = None

    @property
    def planned(self) -> Cost:
        """Cost of the whole model once the plan is carried out."""
        return (self.prepared or self.original) + sum(
            (choice.cost - choice.dense for choice in self.choices), Cost()
        )

    @property
    def loss(self) -> float:
        """Summed expected loss increase."""
        return sum(choice.loss for choice in self.choices)

    def __repr__(self) -> str:
        counted = Counter(choice.format for choice in self)
        formats = ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))
        measures = ", ".join(
            f"{name} {share:.0%}" for name, share in self.planned.shares(self.original).items()
        )
        return (
            f"<RankPlan: {len(self.choices)} sites ({formats or 'none'}), "
            f"{measures or 'nothing counted'} of the original>"
        )

    def _repr_html_(self) -> str:
        """The plan's table for a notebook."""
        rows = [
            (choice.site, "x".join(map(str, choice.shape)), choice.form, f"{choice.error:.2g}", choice.reason)
            for choice in self
        ]
        return table(repr(self).strip("<>"), ("site", "shape", "form", "error", "reason"), rows)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def after(self, done: Sequence[Choice]) -> RankPlan:
        """This plan for the model as it was before those choices were carried out, which it then holds too.

        A site of both has fewer channels by the choice that was carried out, and factors of what is left of
        it.
        """
        saved = sum((choice.cost - choice.dense for choice in done), Cost())
        now = {choice.site: choice for choice in self.choices}
        both = [choice.within(now.pop(choice.site, None)) for choice in done]
        choices = (*both, *now.values())
        return replace(self, choices=choices, prepared=(self.prepared or self.original) - saved)

    def rows(self) -> list[SiteRow]:
        """The choices as a report shows them."""
        return [
            SiteRow(
                c.site,
                c.shape,
                c.form,
                c.dense,
                c.cost,
                c.error,
                c.loss,
                c.guarantee,
                c.reason,
                c.kernel,
                c.predicted,
            )
            for c in self
        ]

    def get(self, site: str) -> Choice | None:
        """The choice for a site, by name."""
        return next((choice for choice in self.choices if choice.site == site), None)

    def renamed(self, names: Mapping[str, str]) -> RankPlan:
        """The same plan with sites renamed, for a model that names them differently."""
        return replace(
            self,
            choices=tuple(
                replace(choice, site=names.get(choice.site, choice.site)) for choice in self.choices
            ),
        )

    def to_json(self) -> str:
        """The plan as text."""
        return _PLAN.text(self)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> RankPlan:
        """Read a plan; raises `PlanError` on anything that is not one."""
        return _PLAN.parse(text, source)

    @classmethod
    def load(cls, path: Path | str) -> RankPlan:
        """Read a plan file; raises `PlanError` when it is missing or damaged."""
        return _PLAN.load(Path(path))


def _check_sound(plan: RankPlan) -> None:
    """Raises `ValueError` where what a plan says of its costs contradicts its shapes and ranks, or itself."""
    names = [choice.site for choice in plan]
    if len(set(names)) < len(names):
        raise ValueError(f"site {next(name for name in names if names.count(name) > 1)!r} is decided twice")
    for choice in plan:
        fault = _fault(choice)
        if fault:
            raise ValueError(f"site {choice.site!r} {fault}")
    if min(plan.planned.get(measure) for measure in counted()) < 0:
        raise ValueError(f"its choices save more than the original model's {plan.original}")


def _fault(choice: Choice) -> str:
    """What contradicts itself; the bias that a layer gains, or loses with its channels, may be counted."""
    if not 2 <= len(choice.shape) <= 5:
        return f"has shape {choice.shape}, which is no weight's"
    outputs = choice.shape[0]
    site = replace(plain_site(choice.site, choice.shape), groups=choice.groups)
    try:
        given = Form.parse(choice.given)
        if given.format not in FORMATS or choice.format not in FORMATS:
            return ""  # the pass that carries it out lists those it knows
        check_form(site, given)
        weights = cost_of(site, given).params
        if not weights <= choice.dense.params <= weights + outputs:
            return f"of shape {choice.shape} has {weights} weights, not {choice.dense.params}"
        if choice.kept:
            same = all(choice.cost.get(measure) == choice.dense.get(measure) for measure in counted())
            return "" if same else f"is left as '{choice.form}', at another cost"
        check_form(site, choice.form)
    except PlanError as error:
        return f"does not fit: {error}"
    cost = cost_of(site, choice.form)
    stored = cost.params
    if abs(choice.cost.params - stored) > outputs:
        return f"takes {stored} numbers as '{choice.form}', not {choice.cost.params}"
    orders = sum(part.bytes for part in storage_of(site, choice.form).order_parts().values())
    sizes = (choice.cost.bytes, choice.cost.bytes + orders)  # earlier versions did not count orders
    if choice.form.encoded:
        bias = (choice.cost.params - stored) * choice.dense.bytes // choice.dense.params
        known = cost.bytes + bias in sizes
        return "" if known else f"takes {choice.cost.bytes} bytes, which is not what '{choice.form}' stores"
    plain = choice.dense.bytes * choice.cost.params
    same = any((size - orders) * choice.dense.params == plain for size in sizes)
    if not same and not given.encoded:
        return (
            f"takes {choice.cost.bytes} bytes for {choice.cost.params} numbers, dense "
            f"{choice.dense.bytes} for {choice.dense.params}"
        )
    return ""


_PLAN = register_document(
    Document(
        "tdpass plan",
        RankPlan,
        PlanError,
        "write one with `tdpass plan -o plan.json`",
        VERSION,
        sound=_check_sound,
    )
)
