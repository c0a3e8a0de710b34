"""What a training method is: phases of terms around any training loop, and an artifact at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from tdpass.artifact import Artifact
from tdpass.cost import Cost
from tdpass.documents import misfit
from tdpass.errors import BudgetError, TrainingError, UsageError
from tdpass.following import Progress, silent
from tdpass.methods.ledger import Ledger
from tdpass.methods.stages import Run, Stage, Stages, finished, pretrained
from tdpass.methods.trainable import closed, trainable
from tdpass.models import ExampleInputs, open_model
from tdpass.registry import Registry, nearest
from tdpass.site import Site
from tdpass.training.calls import once
from tdpass.training.phases import Phase, Phased
from tdpass.training.placement import Template, bare, whole
from tdpass.training.terms import Hooks


class Method(ABC):
    """A published way to train a model into a smaller one.

    A subclass per file, registered with `register_method`. In a loop of one's own, three lines:

    >>> method = AdmmTT(budget={"params": 0.3}, rounds=20)         # doctest: +SKIP
    >>> method.attach(model, optimizer, every=len(loader))          # doctest: +SKIP
    >>> artifact = method.finish(model)                             # doctest: +SKIP

    A round begins every `every` optimizer steps.  Sites are named by globs in `include` and `exclude`.
    `tdpass.train` does the same with a loop, checkpoints and a report.
    """

    name: ClassVar[str]
    final: ClassVar[bool] = False  # whether training on would undo what `finish` gives
    grouped: ClassVar[bool] = False  # whether layers of several groups are trained too, depthwise ones say
    include: Sequence[str]
    exclude: Sequence[str]
    sites: dict[str, Site]
    weights: dict[str, nn.Parameter]
    template: Template
    phased: Phased | None = None
    ledger: Ledger | None = None
    progress: Progress = staticmethod(silent)
    _hooks: Hooks | None = None

    def prepare(
        self, model: nn.Module, example_inputs: ExampleInputs = None, calibration: object = None
    ) -> nn.Module:
        """Find the sites, while the weights still lie on one device; returns the module to train.

        That is the model itself, or for a method that trains something else in its place (`restructured`)
        another module: make the optimizer for what is returned, and give that to `attach` and `finish`.
        `calibration` is data for methods that plan or factor on it.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{self.name} trains an nn.Module, not a {type(model).__name__}; for other models, compress "
                "without training"
            )
        opened = open_model(model, example_inputs)
        if example_inputs is not None:
            example = opened.example()
            assert example is not None
            opened.observe(example)
        chosen = trainable(opened, self.include, self.exclude, self.grouped)
        if not chosen:
            names = ", ".join(site.name for site in opened.sites()) or "none"
            raise UsageError(
                f"include={tuple(self.include)}, exclude={tuple(self.exclude)} leave no site to train; the "
                f"model has: {names}{closed(opened)}"
            )
        self.sites = {site.name: site for site in chosen}
        self.example = opened.example()
        self.calibration = calibration
        self.original = Cost(opened.params(), opened.macs(), opened.bytes())
        try:
            self.choose(model)
            network = self.restructured(model)
        except (BudgetError, UsageError) as error:
            raise type(error)(f"{error}{closed(opened)}") from error
        self.template = Template(network)
        return network

    def choose(self, model: nn.Module) -> None:  # noqa: B027  # a method may have nothing to choose
        """Decide what is decided before training; `sites` are known, `weights` are not yet bound."""

    def restructured(self, model: nn.Module) -> nn.Module:
        """The module that is trained in place of the model.

        The model itself unless a method says otherwise.
        """
        return model

    def stages(self, run: Run) -> Stages:
        """What is trained one after another: the dense model, the method, what came out, and the control.

        A method with other stages yields its own; each is answered with the trained copy of the stage's
        model.
        """
        if run.finetune and self.final:
            many = f"finetune={run.finetune} epochs would move them"
            raise UsageError(
                f"{self.name} ends with weights where they shall stay, {many}; give its own phases more "
                "rounds"
            )
        dense = yield from pretrained(run)
        self.ledger, self.progress = Ledger(run.folder, run.resume), run.progress
        network = self.prepare(dense, run.example_inputs, run.calibration)
        self.ledger.keep()
        epochs = self.epochs(run.rounds_per_epoch)
        trained = yield Stage("method", network, run.settings, epochs, self.bind, self.passes, teacher=dense)
        for text in self.remarks():
            run.note(text)
        return (yield from finished(run, dense, self.finish(trained), epochs))

    def passes(
        self, forward: Callable[[Any], Any], inputs: Any, loss: Callable[[Any], Tensor]
    ) -> Iterator[Tensor]:
        """The runs of the model that a step takes, as `tdpass.training.calls.once` describes them."""
        return once(forward, inputs, loss)

    def remarks(self) -> Sequence[str]:
        """What is to be said of the training before `finish`."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What was decided while training, as JSON values, for a checkpoint."""
        return {}

    def recall(self, facts: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what was decided before an interruption."""

    def bind(self, model: nn.Module) -> Phased:
        """Tie the method to the weights of a module, of the structure that `prepare` returned.

        Gives its phases as one term.
        """
        self.weights = self.parameters_of(model)
        self.phased = Phased(self.phases(), self._kept_facts, self.recall)
        return self.phased

    def _kept_facts(self) -> dict[str, Any]:
        """What a checkpoint holds, after what it follows from is written down."""
        if self.ledger is not None:
            self.ledger.keep()
        return self.facts()

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the method trains, by name: the weights of its sites."""
        return self.weights_of(model)

    def weights_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the sites; raises `UsageError` for a model that has not all of them."""
        parameters = dict(bare(model).named_parameters(remove_duplicate=False))
        names = {site: f"{site}.weight" if site else "weight" for site in self.sites}
        missing = [name for name in names.values() if name not in parameters]
        if missing:
            raise UsageError(
                f"the model has no parameter {missing[0]!r}; attach to the module that prepare() returned"
            )
        return {site: parameters[name] for site, name in names.items()}

    def whole_weights(self) -> dict[str, Tensor]:
        """The bound weights as they are now, each in full; a collective call where they are sharded."""
        return {name: whole(weight.detach()) for name, weight in self.weights.items()}

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int,
        example_inputs: ExampleInputs = None,
        calibration: object = None,
    ) -> None:
        """Act around every step of `optimizer`, with a round every `every` steps (an epoch's, usually).

        Prepares the model where that was not done; raises `UsageError` for a method that trains another
        module in its place.
        """
        if self._hooks is not None:
            raise UsageError(f"{self.name} is attached already; finish it first, or make another")
        if not hasattr(self, "sites"):
            self._prepare_in_place(model, example_inputs, calibration)
        phased = self.bind(model)
        if not phased.rounds:
            raise UsageError(
                f"{self.name} has no rounds to train in; give at least one of its phases a round; "
                "tdpass.train factors directly without"
            )
        self._hooks = Hooks(optimizer, [phased], lambda step: step % every == 0, phased.rounds)

    def _prepare_in_place(self, model: nn.Module, example_inputs: ExampleInputs, calibration: object) -> None:
        if self.prepare(model, example_inputs, calibration) is not model:
            raise UsageError(
                f"{self.name} trains another module in the model's place; call network = "
                "method.prepare(model, example_inputs), "
                "make the optimizer for its parameters, and attach and finish the network"
            )

    def finish(self, model: nn.Module) -> Artifact:
        """Project once more, let go of the optimizer, and return the compressed copy with plan and report.

        Raises `TrainingError` where the method was never attached.
        """
        if self.phased is None:
            raise TrainingError(
                f"{self.name} has trained nothing; attach it before the loop and finish it after"
            )
        said = [*self._missed(self._hooks), *self.remarks()]
        if self._hooks is not None:
            self.phased.end()
            self._hooks.remove()
            self._hooks = None
        artifact = self.close(model)
        artifact.report.notes[:0] = said
        return artifact

    def _missed(self, hooks: Hooks | None) -> list[str]:
        """What of the training never happened."""
        found = [
            name
            for name, weight in self.weights.items()
            if not (weight.requires_grad if hooks is None else hooks.moves(weight))
        ]
        said = [
            f"{self.name} did not train {name}: it is frozen, or no parameter of the optimizer; it is "
            "projected as it was"
            for name in found
        ]
        if hooks is not None and hooks.round < hooks.rounds:
            reason = (
                f"in {hooks.steps} steps"
                if hooks.steps
                else "for the optimizer it is attached to made no step"
            )
            ran = f"{hooks.round} of the {hooks.rounds} rounds of {self.name} ran, {reason}"
            said.append(
                f"{ran}: the last projection does what is left; attach the optimizer that trains, and train "
                "for all rounds"
            )
        return said

    def epochs(self, rounds_per_epoch: int = 1) -> int:
        """Epochs that the rounds of all phases take.

        Raises `UsageError` where they do not fill the last one.
        """
        rounds = Phased(self.phases()).rounds
        if rounds % rounds_per_epoch:
            raise UsageError(
                f"the {rounds} rounds of {self.name} do not fill epochs of {rounds_per_epoch}; let its "
                "phases have a multiple of that"
            )
        return rounds // rounds_per_epoch

    def at_most(self, epochs: int, rounds_per_epoch: int = 1) -> Self:
        """The same in so many epochs at most, and an epoch for each `rounds_per_epoch` phases.

        Its phases keep their shares of the rounds, one at least.  These are the option `rounds`, or where a
        method has none the options that its phases are named after.
        """
        counts = {phase.name: phase.rounds for phase in self.phases() if phase.rounds}
        allowed = max(epochs, -(-len(counts) // rounds_per_epoch)) * rounds_per_epoch
        whole = sum(counts.values())
        if whole <= allowed:
            return self
        fewer = {name: max(1, count * allowed // whole) for name, count in counts.items()}
        fewer[max(fewer, key=fewer.__getitem__)] += allowed - sum(fewer.values())
        known = {option.name for option in fields(self)}  # type: ignore[arg-type]
        options = {"rounds" if "rounds" in known else name: count for name, count in fewer.items()}
        return replace(self, **options)  # type: ignore[type-var]

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """What happens in which rounds; `weights` are bound."""

    @abstractmethod
    def close(self, model: nn.Module) -> Artifact:
        """The artifact of a trained module, which is left as it is."""

    def residuals(self) -> Mapping[str, float]:
        """||W - Z|| / ||W|| of each weight at the last projection."""
        return {} if self.phased is None else self.phased.residuals()


METHODS: Registry[type[Method]] = Registry("training method")


def register_method(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its `name`."""
    return METHODS.add(cls.name, cls)


def make_method(spec: Method | Mapping[str, Any] | str) -> Method:
    """A method as it is, by name, or as a recipe has it: `{"admm-tt": {"budget": {"params": 0.3}}}`.

    Raises `UsageError`.
    """
    if isinstance(spec, Method):
        return spec
    named = {spec: {}} if isinstance(spec, str) else spec
    name, options = next(iter(named.items())) if len(named) == 1 else ("", {})
    cls = METHODS.get(str(name))
    given: Any = {} if options is None else options
    if not isinstance(given, Mapping):
        raise UsageError(
            f"the options {given!r} of method {name!r} are not a mapping; write {{{name}: {{option: value}}}}"
        )
    # every method is a dataclass
    known = {option.name for option in fields(cls) if option.init}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise UsageError(
                f"method {name!r} has no option {key!r}{nearest(str(key), known)}; it takes: {takes}"
            )
        wrong = misfit(cls, key, value)
        if wrong:
            raise UsageError(f"option {key}={value!r} of method {name!r} must be of type {wrong}")
    try:
        return cls(**given)
    except TypeError as error:
        raise UsageError(
            f"method {name!r} cannot be made from {dict(given)!r}: {str(error).partition('() ')[2] or error}"
        ) from None
