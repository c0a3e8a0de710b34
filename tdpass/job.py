"""What the passes of one run share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tdpass.cost import Budget, Cost
from tdpass.errors import DifferenceError, InvalidModelError, UnsupportedError
from tdpass.following import Progress, followed, silent
from tdpass.form import DENSE, Form
from tdpass.formats.base import Factors
from tdpass.formats.layer import dense_cost
from tdpass.models.abilities import SettlesChannels, TimesRecurrentNodes
from tdpass.models.base import Batch, Model
from tdpass.planner.divergence import Divergence, FittedDivergence, Outputs
from tdpass.planner.effort import RATE
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.planner.trials import Trials
from tdpass.report import Report, SiteRow
from tdpass.site import Site
from tdpass.tape import Tape
from tdpass.targets import Target


@dataclass
class Job:
    """What the passes of one run share beside the model.

    `batches` is the calibration data, `tapes` the recorded runs of the still dense model on them (made on
    first use, and before any site is replaced), `plan` what the planner decided.  `progress(what, done, of)`
    is called now and then. `effort` is how much time planning may take, `pace` the seconds that a multiply-add
    of the model takes, found when it first runs on the calibration data. `given` is the model as the user gave
    it, `expected` the loss that the plan expects on the calibration data where it was made on them; with
    `strict` a difference that was not to be expected is an error, else a note. `start` holds factors of sites
    from which a search goes on.  `target` is the machine to plan for, where the model is called with `batch`
    samples and `threads` threads, and `dense` the model as it was when it was timed there.
    """

    report: Report
    batches: Sequence[Batch] = ()
    augmented: Iterable[Batch] | None = None
    budget: Budget | None = None
    plan: RankPlan | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    divergence: Divergence = field(default_factory=Divergence)
    progress: Progress = silent
    cache: Path | None = None
    effort: str = "normal"
    pace: float = 1 / RATE
    original: Cost = field(default_factory=Cost)
    target: Target | None = None
    batch: int = 1
    threads: int = 1
    start: Mapping[str, Factors] = field(default_factory=dict)
    dense: Model | None = None
    given: Model | None = None
    expected: float | None = None
    strict: bool = True
    notes: list[str] = field(default_factory=list)
    recorded: list[Tape] = field(default_factory=list)
    trials: Trials | None = None
    lost: float = 0.0
    smaller: bool = False
    settled: dict[str, Form] = field(default_factory=dict)

    def begin(self, model: Model) -> None:
        """Run the model on the trials, before any pass has touched it."""
        self.given = self.given or model.clone()
        if self.trials is None:
            self.trials = Trials.of(
                self.given, self.batches, self.fitted_divergence if self.batches else None
            )

    def tapes(self, model: Model) -> list[Tape]:
        """Recorded runs of the dense model on the calibration data, one per batch."""
        if not self.recorded and self.batches:
            self.recorded = list(self._record(model))
            for note in dict.fromkeys(tape.note for tape in self.recorded if tape.note):
                self.report.note(note)
            if self.trials is not None:
                self.trials.record(model)
        return self.recorded

    def _record(self, model: Model) -> Iterator[Tape]:
        for batch in followed("recording runs of the model", self.batches, self.progress):
            yield model.record(batch)

    @cached_property
    def references(self) -> list[Outputs]:
        """What the model as given really answers on the calibration data, one entry per batch."""
        began = time.process_time()
        found = [_kept(self.divergence.outputs(self._run_given(batch))) for batch in self.batches]
        macs = self.original.macs * sum(batch.size for batch in self.batches)
        self.pace = (time.process_time() - began) / macs if macs else self.pace
        return found

    @cached_property
    def fitted_divergence(self) -> FittedDivergence:
        """The divergence from the original's outputs, fitted to them once, so that all passes go by it."""
        return self.divergence.fit(self.references)

    def _run_given(self, batch: Batch) -> object:
        assert self.given is not None, "a pipeline has begun"
        try:
            return self.given.run(batch)
        except UnsupportedError as error:
            self.report.note(
                f"a recorded run stands for the original, which cannot be run here as it is deployed: {error}"
            )
            return self.given.record(batch).play().finish()

    def unexpected(self, text: str) -> None:
        """Say that the result differs from what was to be expected.

        Raises `DifferenceError`, or where that is allowed makes a note.
        """
        if self.strict:
            raise DifferenceError(
                f"{text}; exclude the layers at fault, or take the result as it is with strict=False "
                "(--no-strict)"
            )
        self.report.note(text)

    def room(self, model: Model) -> dict[str, float]:
        """What may still be added to the model's parameters and bytes within the budget, by measure."""
        limits = {} if self.budget is None else self.budget.limits(self.original)
        held = {"params": model.params, "bytes": model.bytes}
        return {measure: limits[measure] - count() for measure, count in held.items() if measure in limits}

    def prepared(self, model: Model) -> Cost:
        """The cost of the model that planning begins with.

        Passes before may have folded batch-norms or narrowed layers.
        """
        layers = [layer for site in model.sites() if (layer := model.layer(site.name)) is not None]
        narrowed = self.batches and (self.smaller or any(layer.form.narrow for layer in layers))
        macs = model.count(self.batches[0]).per_sample if narrowed else self.original.macs
        return self.original.recounted(Cost(model.params(), macs, model.bytes()))

    def rewritten(self, model: Model, before: Mapping[str, Site]) -> None:
        """Go on with another dense model than before, of the same sites; runs are recorded anew."""
        self.recorded, self.smaller = [], True
        if self.trials is not None:
            self.trials.record(model)
        answers = [self.divergence.outputs(model.run(batch)) for batch in self.batches]
        self.lost = self.expected = self.fitted_divergence.mean(
            list(zip(self.references, answers, strict=True))
        )
        sites = [site for site in model.sites() if site.name in before]
        self.report.sites = [_narrowed(before[site.name], site) for site in sites]

    def settle(self, model: Model) -> bool:
        """Let layers with fewer channels be dense layers of the model; whether there were any.

        They can then be planned and factored.
        """
        before = {site.name: site for site in model.sites()}
        found = model.settle_channels() if isinstance(model, SettlesChannels) and self.batches else {}
        if found:
            self.settled.update(found)
            self.rewritten(model, before)
        return bool(found)

    def form_of(self, model: Model, name: str) -> Form:
        """The form that a site is in."""
        layer = model.layer(name)
        return self.settled.get(name, DENSE) if layer is None else layer.form

    def carried_out(self, model: Model) -> list[Choice]:
        """What the plan has sites become together that they are already."""
        here = {site.name for site in model.sites()}
        joint = [choice for choice in self.plan or () if choice.joint and choice.site in here]
        return [choice for choice in joint if self.form_of(model, choice.site) == choice.form]

    def one_call(self, model: Model) -> Batch | None:
        """One call as it will be made; None where there is nothing to call the model with."""
        example = self.batches[0] if self.batches else model.example()
        return None if example is None else example.resized(model.signature().fixed_batch() or self.batch)

    def note_recurrent(self, model: Model) -> None:
        """Say how long recurrent nodes whose steps have factors take, where that is longer than before."""
        call = self.one_call(model) if isinstance(model, TimesRecurrentNodes) else None
        if call is None or not isinstance(model, TimesRecurrentNodes):
            return
        try:
            for name, dense, seconds in model.recurrent_times(call):
                if seconds > dense:
                    self.note(
                        f"recurrent node {name!r} takes {seconds / dense:.2f} times as long with factors in "
                        f"its steps, {1e6 * seconds:.0f} us instead of {1e6 * dense:.0f}; fuse-kernels "
                        "behind it runs them as one operator, or exclude its hidden sites"
                    )
        except InvalidModelError as error:
            self.note(f"recurrent nodes with factors in their steps were not timed: {error}")

    def note(self, text: str) -> None:
        """Say something about the pass that is running."""
        self.notes.append(text)


def _narrowed(before: Site, after: Site) -> SiteRow:
    form = Form(
        "dense",
        (),
        inputs=after.i if after.i < before.i else None,
        outputs=after.o if after.o < before.o else None,
    )
    return SiteRow(before.name, before.shape, form, dense_cost(before), dense_cost(after), 0.0, 0.0)


def _kept(outputs: Outputs) -> Outputs:
    """Copies, since a model may answer with a view of its input."""
    return {name: value.clone() for name, value in outputs.items()}
