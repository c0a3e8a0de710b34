"""How far one network's outputs are from another's; no labels needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor

from tdpass.errors import InvalidModelError, UsageError
from tdpass.planner.answers import Answers
from tdpass.planner.comparisons import COMPARISONS, Comparison

AUTO = "auto"
ONLY_OUTPUT = "output"

Outputs = Mapping[str, Tensor]
T = TypeVar("T")


def divergences() -> tuple[str, ...]:
    """The names of a wish."""
    return AUTO, *COMPARISONS.names()


@dataclass(frozen=True)
class Divergence:
    """How the outputs of a network are to be compared: a wish, which `fit` makes a comparison of.

    Every floating-point output counts, or what `select` makes of what the model returns.  `name` is the
    comparison of all of them, `measures` that of single ones, `weights` how much they count (1 unless given;
    0 leaves one out), both by name or glob. Outputs are named as in the dict that the model returns, by their
    place in a tuple, or "output" where there is one.

    `auto` recognises, from the original's outputs on all data: values that sum to one along an axis
    (`kl_probabilities`), their logarithms (`kl`), vectors of length one (`cosine`), values mostly at the ends
    of [0, 1] (`kl_bernoulli`).  Else an output [samples, classes] that is the only one is class scores (`kl`)
    unless the spreads of its columns differ by more than 30, or all are positive and above one; [samples,
    positions, classes], or one of several [samples, classes], is where its softmax says something, not the
    same everywhere, and classes compete, or where its name ends in "logits".  All others: `mse`.
    """

    name: str = AUTO
    select: Callable[[object], object] | None = None
    measures: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.measures.values()):
            if name not in divergences():
                raise UsageError(f"unknown divergence {name!r}; known: {', '.join(divergences())}")
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise UsageError(
                    f"the weight {weight!r} of output {name!r} is negative or infinite; 1 is usual, 0 "
                    "leaves it out"
                )

    def outputs(self, returned: object) -> dict[str, Tensor]:
        """The floating-point tensors that a model returned, by name; complex ones as pairs of real numbers.

        Raises `InvalidModelError` where there is none.
        """
        found = {
            name or ONLY_OUTPUT: value
            for name, value in _tensors(returned if self.select is None else self.select(returned))
        }
        if not found:
            raise InvalidModelError(
                "the model returns no floating-point tensor to compare; "
                "pass divergence=Divergence('mse', select=...)"
            )
        return found

    def fit(self, references: Sequence[Outputs]) -> FittedDivergence:
        """The comparison of each output, its scales taken over all calls at once; empty without calls.

        Raises `UsageError` where `measures` or `weights` name an output that does not exist.
        """
        if not references:
            return FittedDivergence(self, {})
        names = list(dict.fromkeys(name for call in references for name in call))
        for pattern in (*self.measures, *self.weights):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"the divergence speaks of output {pattern!r}; the model's outputs: {', '.join(names)}"
                )
        counted = [name for name in names if _chosen(self.weights, name, 1.0) > 0]
        if not counted:
            raise UsageError("the weights of all outputs are 0; leave at least one above it")
        comparisons: dict[str, WeightedComparison] = {}
        for name in counted:
            answers = Answers(name, tuple(call[name].detach().cpu() for call in references if name in call))
            wish = _chosen(self.measures, name, self.name)
            compared = COMPARISONS.get(_recognised(answers, len(counted) == 1) if wish == AUTO else wish)
            comparisons[name] = WeightedComparison(compared.fit(answers), _chosen(self.weights, name, 1.0))
        return FittedDivergence(self, comparisons)


@dataclass(frozen=True)
class WeightedComparison:
    """One output's part: its comparison and its weight."""

    comparison: Comparison
    weight: float


@dataclass(frozen=True)
class FittedDivergence:
    """The divergence from one network's outputs: the weighted mean over outputs of the mean over rows.

    `wish` is what it was fitted from, `comparisons` the comparison of each output.
    """

    wish: Divergence
    comparisons: Mapping[str, WeightedComparison]

    def outputs(self, returned: object) -> dict[str, Tensor]:
        """The floating-point tensors that a model returned, by name."""
        return self.wish.outputs(returned)

    def mean(self, pairs: Iterable[tuple[Outputs, Outputs]]) -> float:
        """The divergence over calls, each given as the outputs of the original and of the other network."""
        tally = Tally(self)
        for reference, outputs in pairs:
            tally.add(reference, outputs)
        return tally.mean

    def pairs(self, reference: Outputs, outputs: Outputs) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, reference and output of everything that counts, in float64 and of one shape.

        By name, or by place where the names are not the same.  Raises `InvalidModelError` where the outputs
        do not correspond.
        """
        named = reference.keys() <= outputs.keys()
        if not named and len(reference) != len(outputs):
            raise InvalidModelError(
                f"the models do not return the same outputs: {', '.join(reference)} and {', '.join(outputs)}"
            )
        others = [outputs[name] for name in reference] if named else list(outputs.values())
        for (name, ours), theirs in zip(reference.items(), others, strict=True):
            if ours.numel() != theirs.numel():
                shapes = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
                raise InvalidModelError(
                    f"output {name!r} has the shapes {shapes}; "
                    "compare what comes before it with divergence=Divergence(select=...)"
                )
            if name in self.comparisons:
                yield name, ours.detach().cpu().double(), theirs.detach().cpu().double().reshape(ours.shape)

    def probe(self, outputs: Outputs, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A random direction for each output of a call of `samples` samples, for the Gauss-Newton metric G.

        As long as the outputs count: half of E[(sum of probe . d)^2] is `samples` times the divergence where
        outputs move by d.
        """
        whole = sum(one.weight for one in self.comparisons.values())
        directions: dict[str, Tensor] = {}
        for name, value in outputs.items():
            if name not in self.comparisons:
                continue
            weight, comparison = self.comparisons[name].weight / whole, self.comparisons[name].comparison
            length = math.sqrt(2 * weight * comparison.gain * samples / max(comparison.count(value), 1))
            directions[name] = comparison.probe(value, generator) * length
        return directions

    def __str__(self) -> str:
        """The comparison's name, or, of several outputs, each with its outputs."""
        if len(self.comparisons) == 1:
            return next(iter(self.comparisons.values())).comparison.name
        outputs: dict[str, list[str]] = {}
        for name, one in self.comparisons.items():
            outputs.setdefault(one.comparison.name, []).append(name)
        return "; ".join(f"{name} of {_listed(names)}" for name, names in outputs.items())


@dataclass
class Tally:
    """Sums of a divergence while calls come in."""

    fitted: FittedDivergence
    sums: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        """Count one call."""
        for name, ours, theirs in self.fitted.pairs(reference, outputs):
            values = self.fitted.comparisons[name].comparison.rows(ours, theirs)
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
            self.rows[name] = self.rows.get(name, 0) + values.numel()

    @property
    def means(self) -> dict[str, float]:
        """Mean over the rows of each output."""
        return {name: total / max(self.rows[name], 1) for name, total in self.sums.items()}

    @property
    def mean(self) -> float:
        """Weighted mean over the outputs that came in; 0 before any."""
        weights = {name: self.fitted.comparisons[name].weight for name in self.sums}
        whole = sum(weights.values())
        return sum(weights[name] / whole * value for name, value in self.means.items())


def _recognised(answers: Answers, alone: bool) -> str:
    """The comparison for an output of which nothing but its values and name is known."""
    if answers.probability_axis() is not None:
        return "kl_probabilities"
    if answers.log_probability_axis() is not None:
        return "kl"
    if answers.has_unit_rows():
        return "cosine"
    if answers.is_yes_or_no():
        return "kl_bernoulli"
    return "kl" if _is_class_scores(answers, alone) else "mse"


def _is_class_scores(answers: Answers, alone: bool) -> bool:
    if answers.dim not in (2, 3) or answers.size(-1) < 2:
        return False
    if answers.name.endswith("logits"):
        return True
    return answers.may_be_classes() if answers.dim == 2 and alone else answers.must_be_classes()


def _tensors(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested dicts, tuples, lists and dataclasses, each with its path."""
    if isinstance(tree, Tensor):
        if tree.is_complex():
            tree = torch.view_as_real(tree)
        if tree.is_floating_point():
            yield path, tree.reshape(1) if tree.dim() == 0 else tree
        return
    for name, part in _parts(tree):
        yield from _tensors(part, f"{path}.{name}" if path else name)


def _parts(tree: object) -> list[tuple[str, object]]:
    if isinstance(tree, Mapping):
        return [(str(name), part) for name, part in tree.items()]
    if isinstance(tree, tuple | list):
        return [(str(place), part) for place, part in enumerate(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(entry.name, getattr(tree, entry.name)) for entry in dataclasses.fields(tree)]
    return []


def _chosen(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the name itself, else of the first glob that fits."""
    if name in patterns:
        return patterns[name]
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
