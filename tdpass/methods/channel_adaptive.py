"""Channel-adaptive networks: one set of weights that runs at several widths and ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.data import calls_of
from tdpass.errors import InvalidModelError, UsageError
from tdpass.layers.adaptive import Adaptive, dial_of, estimate_statistics, hold_bits
from tdpass.layers.dial import Adaptation, AdaptiveForm, Cut
from tdpass.layers.upper_bits import LEAST_BITS, MOST_BITS
from tdpass.methods.base import Method, register_method
from tdpass.methods.stages import Run, Stages, module_of
from tdpass.methods.trainable import trainable
from tdpass.models import Batch, open_model
from tdpass.models.torch.sites.adapting import adapt
from tdpass.models.torch.sites.norms import batchnorms, same_answers
from tdpass.planner.joint.channel_groups import ChannelGroups, channel_groups
from tdpass.site import Site
from tdpass.training.calls import class_scores
from tdpass.training.phases import Phase
from tdpass.verbs import compress

_EXCLUDE = "exclude the layers whose sizes its code relies on"
_SAMPLES = 2048  # from which statistics are estimated


@register_method
@dataclass
class ChannelAdaptive(Method):
    """min sum_w f(W[w]): a network whose layers also run with the middle ceil(w C) of their channels.

    All run on one set of weights. Yang, Angizi, Fan: A Flexible Processing-in-Memory Accelerator for Dynamic
    Channel-Adaptive Deep Neural Networks, ASP-DAC 2020, after Yu et al.: Slimmable Neural Networks, ICLR
    2019.  A step runs the whole network, the narrowest, and `random` others (the sandwich rule of Yu, Huang:
    Universally Slimmable Networks, ICCV 2019); these learn, for the share `distill`, what the whole one
    answers to the same batch: (1 - a) f + a T^2 KL.  Batch-norms have a scale and a shift per width, and
    statistics per setting, which `finish` estimates anew on calibration data.  Which channels shrink together
    follows from a recorded run (`channel_groups`), and is proved by holding every width against the whole
    network with all else at zero.

    With more than one share in `ranks` every layer is factored at the largest rank that costs no more than
    the layer, factors in order of importance, and also runs with the first ones only: rank = share * width *
    largest.

    With `bits`, such as (8, 16), `finish` leaves weights that are integers of the most bits, with a scale per
    row, and every setting also runs with their upper bits only: the fixed-point forms of one set of weights.

    In a loop of one's own, `passes` gives the losses of a step:

    >>> loss_of = lambda scores: cross_entropy(scores, targets)  # doctest: +SKIP
    >>> for loss in method.passes(network, inputs, loss_of):  # doctest: +SKIP
    ...     loss.backward()
    """

    name = "channel-adaptive"
    final = True

    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    ranks: Sequence[float] = (1.0,)
    bits: Sequence[int] = ()
    rounds: int = 20
    random: int = 2
    distill: float = 1.0
    temperature: float = 1.0
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for option, values in (("widths", self.widths), ("ranks", self.ranks)):
            if (
                not values
                or 1.0 not in values
                or len(set(values)) < len(values)
                or not all(0 < value <= 1 for value in values)
            ):
                raise UsageError(
                    f"{option}={tuple(values)} are no shares of the whole; give different numbers above 0 "
                    "and up to 1, with 1 among them"
                )
        if len(self.widths) * len(self.ranks) < 2:
            raise UsageError(
                f"widths={tuple(self.widths)}, ranks={tuple(self.ranks)} are one setting; give more widths "
                "or ranks"
            )
        if len(set(self.bits)) < len(self.bits) or not all(
            LEAST_BITS <= bits <= MOST_BITS for bits in self.bits
        ):
            raise UsageError(
                f"bits={tuple(self.bits)} are no numbers of bits; give different ones from {LEAST_BITS} to "
                f"{MOST_BITS}, or none for floating-point numbers"
            )
        if not (0 <= self.distill <= 1 and self.temperature > 0 and self.random >= 0):
            options = f"distill={self.distill}, temperature={self.temperature}, random={self.random}"
            raise UsageError(
                f"{options} do not fit; distill is a share of the loss, the temperature above 0, and random "
                "a number of settings"
            )

    def restructured(self, model: nn.Module) -> nn.Module:
        if self.example is None:
            raise UsageError(
                f"{self.name} needs to see the model running to know which channels belong together; pass "
                "example_inputs="
            )
        adaptation, self.why = self._proved_adaptation(model)
        if len(self.ranks) == 1 and not any(form.shrinks for form in adaptation.layers.values()):
            reasons = "; ".join(f"{name}: {why}" for name, why in self.why.items())
            raise UsageError(
                f"no layer can have fewer channels ({reasons}); give several ranks, which need none, as in "
                "ranks=[0.5, 1.0]"
            )
        return adapt(copy.deepcopy(model), adaptation)

    def _proved_adaptation(self, model: nn.Module) -> tuple[Adaptation, dict[str, str]]:
        """What the layers and batch-norms are at each width, and by site why all its channels stay.

        Groups of channels that the model's code does not run with fewer of are found one by one, where the
        model does not run with all of them narrowed together.
        """
        assert self.example is not None
        opened = open_model(model, self.example)
        tape = opened.record(self.example)
        chosen = trainable(opened, self.include, self.exclude)
        sites = {site.name: site for site in chosen if _alone(model, site.name)}
        found = (channel_groups(tape, sites, pads=pads) for pads in (True, False))
        groups = next((groups for groups in found if self._runs(model, sites, groups)), None)
        if groups is None:
            groups = channel_groups(tape, sites, pads=False)
            for number in sorted(groups.shrinking()):
                if not self._runs(model, sites, groups.alone(number)):
                    groups.keep(number, "the model does not run with fewer of them as with the same at zero")
            if not self._runs(model, sites, groups):
                raise UsageError(
                    f"the model does not run with fewer channels as it does with these at zero; {_EXCLUDE}"
                )
        why = {name: groups.whole[number] for name, number in groups.makes.items() if number in groups.whole}
        return self._adaptation(model, sites, groups), why

    def _runs(self, model: nn.Module, sites: Mapping[str, Site], groups: ChannelGroups) -> bool:
        return self._proved(model, self._adaptation(model, sites, groups))

    def _adaptation(self, model: nn.Module, sites: Mapping[str, Site], groups: ChannelGroups) -> Adaptation:
        widths, ranks = sorted(self.widths), sorted(self.ranks)
        layers = {name: self._form(sites[name], groups, widths) for name in groups.makes}
        norms = {}
        for norm, path in batchnorms(model).items():
            number = groups.norms.get(id(norm.running_mean))
            if number is not None:
                norms[path] = _cuts(groups, number, int(norm.num_features), widths)  # type: ignore[arg-type]
        return Adaptation(tuple(widths), tuple(ranks), layers, norms)

    def _form(self, site: Site, groups: ChannelGroups, widths: Sequence[float]) -> AdaptiveForm:
        inputs = _cuts(groups, groups.reads[site.name], site.i, widths)
        outputs = _cuts(groups, groups.makes[site.name], site.o, widths)
        largest = site.weights // (site.o + site.weights // site.o)
        if len(self.ranks) == 1 or site.groups > 1 or largest < 2:
            return AdaptiveForm("dense", 0, inputs, outputs)
        return AdaptiveForm("channel_svd" if site.axes else "svd", largest, inputs, outputs)

    def _proved(self, model: nn.Module, adaptation: Adaptation) -> bool:
        """Whether every width answers as the whole network does with all other channels at zero."""
        assert self.example is not None
        dense = {name: replace(form, format="dense", rank=0) for name, form in adaptation.layers.items()}
        network = adapt(copy.deepcopy(model), replace(adaptation, ranks=(1.0,), layers=dense))
        opened, dial = open_model(network), dial_of(network)
        try:
            for width in range(dial.places):
                with dial.at(width):
                    narrow = opened.run(self.example)
                if not same_answers(open_model(_masked(model, adaptation, width)).run(self.example), narrow):
                    return False
        except InvalidModelError:
            return False
        return True

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        layers = [module for module in model.modules() if isinstance(module, Adaptive)]
        if not layers:
            raise UsageError(
                f"the model has one width; attach {self.name} to the module that prepare() returned"
            )
        self.dial = layers[0].dial
        return {f"{layer.site.name}.{name}": getattr(layer, name) for layer in layers for name in layer.names}

    def phases(self) -> Sequence[Phase]:
        return [Phase("widths", self.rounds, tuple)]

    def passes(
        self, forward: Callable[[Any], Any], inputs: Any, loss: Callable[[Any], Tensor]
    ) -> Iterator[Tensor]:
        whole = forward(inputs)
        yield loss(whole)
        teacher = (
            F.log_softmax(class_scores(whole).detach().float() / self.temperature, -1)
            if self.distill
            else None
        )
        others = torch.randperm(max(0, self.dial.places - 2))[: self.random] + 1
        for place in (0, *others.tolist()):
            with self.dial.at(place):
                answer = forward(inputs)
                yield loss(answer) if teacher is None else self._learned(answer, teacher, loss)

    def _learned(self, answer: Any, teacher: Tensor, loss: Callable[[Any], Tensor]) -> Tensor:
        student = F.log_softmax(class_scores(answer).float() / self.temperature, -1).flatten(0, -2)
        apart = F.kl_div(student, teacher.flatten(0, -2), reduction="batchmean", log_target=True)
        return (1 - self.distill) * loss(answer) + self.distill * self.temperature**2 * apart

    @torch.no_grad()
    def close(self, model: nn.Module) -> Artifact:
        trained = self.template.filled(model).eval()
        if self.calibration is not None:
            opened = open_model(trained, self.example)
            batches, _ = calls_of(opened, self.calibration, _SAMPLES)
            estimate_statistics(trained, partial(_run_all, trained, batches))
        if self.bits:
            hold_bits(trained, self.bits)
        artifact = compress(
            trained, pipeline="", example_inputs=self.example, cache=False, progress=self.progress
        )
        artifact.report.original = self.original
        artifact.report.declined = {
            name: f"all its channels stay: {reason}" for name, reason in self.why.items()
        }
        dial = dial_of(module_of(artifact))
        for place in range(dial.places):
            with dial.at(place):
                artifact.report.checks[f"macs_{_label(dial.adaptation, place)}"] = float(
                    artifact.opened.count(self.example).per_sample
                )
        return artifact

    def stages(self, run: Run) -> Stages:
        artifact = yield from super().stages(run)
        result = module_of(artifact)
        dial = dial_of(result)
        for place in range(dial.places):
            label = _label(dial.adaptation, place)
            with dial.at(place):
                artifact.report.checks |= run.scores(**{label: result})
                for bits in dial.adaptation.bits[:-1]:
                    with dial.in_bits(bits):
                        artifact.report.checks |= run.scores(**{f"{label}_bits_{bits}": result})
        return artifact


def _run_all(model: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        model(*batch.args, **batch.kwargs)


def _label(adaptation: Adaptation, place: int) -> str:
    """The width, and the share of the rank where there are several."""
    width, share = divmod(place, len(adaptation.ranks))
    ranks = f"_rank_{adaptation.ranks[share]:g}" if len(adaptation.ranks) > 1 else ""
    return f"width_{adaptation.widths[width]:g}{ranks}"


def _cuts(groups: ChannelGroups, number: int, size: int, widths: Sequence[float]) -> tuple[Cut, ...]:
    """The channels in use at each width, of an axis of that size."""
    if not groups.shrinks(number):
        return tuple(Cut(0, size) for _ in widths)
    channels = groups.channels.get(groups.of(number), size)
    spread = size // channels
    return tuple(
        Cut(spread * cut.first, spread * cut.count) for cut in (_middle(channels, width) for width in widths)
    )


def _middle(channels: int, width: float) -> Cut:
    """The middle ceil(width C) channels, or one more where else there were not as many on both sides."""
    wanted = max(1, -int(-channels * width // 1))
    count = min(channels, wanted + (channels - wanted) % 2)
    return Cut((channels - count) // 2, count)


def _alone(model: nn.Module, name: str) -> bool:
    """Whether no other module holds the weight, and the layer pads with zeros."""
    layer = model.get_submodule(name)
    holders = sum(tensor is layer.weight for _, tensor in model.named_parameters(remove_duplicate=False))
    return holders == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"


@torch.no_grad()
def _masked(model: nn.Module, adaptation: Adaptation, width: int) -> nn.Module:
    """The whole network with all at zero that is not in use at a width."""
    network = copy.deepcopy(model)
    for path, form in adaptation.layers.items():
        layer: Any = network.get_submodule(path)
        inputs, outputs = form.inputs[width], form.outputs[width]
        _outside(layer.weight, outputs, 0)
        if inputs.first + inputs.count <= layer.weight.shape[1]:
            _outside(layer.weight, inputs, 1)
        if layer.bias is not None:
            _outside(layer.bias, outputs, 0)
    for path, cuts in adaptation.norms.items():
        norm: Any = network.get_submodule(path)
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                _outside(tensor, cuts[width], 0)
    return network


def _outside(tensor: Tensor, cut: Cut, axis: int) -> None:
    """Set to zero what is not in use."""
    kept = cut.of(tensor, axis).clone()
    cut.of(tensor.zero_(), axis).copy_(kept)
