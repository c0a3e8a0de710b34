"""Cascaded projection: the channels between layers projected to few, by projections that are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from tdpass.artifact import Artifact
from tdpass.data import calls_of
from tdpass.digest import digest
from tdpass.errors import UsageError
from tdpass.following import followed
from tdpass.form import DENSE, Form
from tdpass.formats.layer import Layer, cost_of, dense_cost
from tdpass.job import Job
from tdpass.methods.base import Method, register_method
from tdpass.methods.calibrated import metrics_of
from tdpass.methods.reconstruction import Reconstruction, Supervised
from tdpass.models import open_model
from tdpass.models.abilities import FoldsBatchNorm
from tdpass.models.base import Model
from tdpass.pipeline import Pass
from tdpass.planner.candidates import bias_cost
from tdpass.planner.joint import Network
from tdpass.planner.joint.project_channels import NARROWINGS, ProjectChannels
from tdpass.planner.joint.run import Run
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.training.phases import Phase
from tdpass.training.placement import bare
from tdpass.training.stiefel import NarrowBias, NarrowWeight, Projection
from tdpass.training.terms import Term
from tdpass.verbs import compress

Start = Literal["principal", "norm", "taylor", "median"]


@register_method
@dataclass
class CascadedProjection(Method):
    """min f(P) + gamma sum_l ||Y_l+1 - Y_l+1(P_l)||^2 / ||Y_l+1||^2 over all P_l with P_l^T P_l = I.

    Minnehan, Savakis: Cascaded Projection: End-to-End Network Compression and Acceleration, CVPR 2019.
    P_l[n, r] projects the n channels between two layers: the first becomes P^T W, the second, on what comes
    through the nonlinearity, W P.  P is the polar factor of a free matrix Q (`Polar`), and gradient steps are
    on Q.  Every layer behind a projection is also held to what the dense model's answers on the calibration
    data, `gamma` strong (`Reconstruction`).  At the end the projections are multiplied into the weights: the
    result is a narrower dense network, which is then fine-tuned as any other.

    `width` is the share of channels left at every joint of the runs of layers that feed each other alone, as
    the pass `project-channels` finds them; batch-norms between them are folded first.  `start` says what Q
    begins from: principal directions, or the channels that a criterion selects.  With `train_weights` those
    learn too; else only the projections do.
    """

    name = "cascaded-projection"

    width: float = 0.5
    rounds: int = 10
    gamma: float = 1.0
    start: Start = "taylor"
    train_weights: bool = False
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    runs: list[Run] = field(default_factory=list, init=False, repr=False)
    projections: dict[str, Projection] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.width < 1:
            raise UsageError(
                f"width={self.width} is no share of the channels to be left; give one between 0 and 1, such "
                "as 0.5"
            )
        if self.start not in get_args(Start):
            raise UsageError(
                f"start={self.start!r} is unknown to {self.name}; known: {', '.join(get_args(Start))}"
            )
        if self.gamma < 0:
            raise UsageError(f"gamma={self.gamma} is the weight of a term in the loss; give 0 or more")

    def choose(self, model: nn.Module) -> None:
        if self.example is None:
            raise UsageError(
                f"{self.name} needs to see the model running; pass example_inputs, and calibration data to "
                "start from"
            )
        self.given = copy.deepcopy(model)
        self.folded = open_model(copy.deepcopy(model).eval(), self.example)
        self.folded.observe(self.example)
        if isinstance(self.folded, FoldsBatchNorm):
            self.folded.fold_batchnorm()
        data = [self.example] if self.calibration is None else calls_of(self.folded, self.calibration)[0]
        sites = {site.name: site for site in self.folded.sites() if site.name in self.sites}
        tapes, change = [self.folded.record(batch) for batch in data], ProjectChannels()
        groups = change.find(tapes, sites)
        self.reasons = dict(change.declined(tapes, sites))
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            raise UsageError(
                f"no site feeds another alone, so there is no channel to project ({why}); leave more sites "
                "in, or train another method"
            )
        together = [sites[name] for group in groups for name in group]
        metrics = metrics_of(self.folded, together, data, self.progress)
        network = Network(sites, self.folded.weight, self.folded.bias, tapes, metrics)
        self.runs = [Run.of(group, network) for group in groups]

    def restructured(self, model: nn.Module) -> nn.Module:
        folded: nn.Module = self.folded.unwrap()  # type: ignore[assignment]
        network = copy.deepcopy(folded).train(model.training)
        for parameter in network.parameters():
            parameter.requires_grad_(self.train_weights and parameter.requires_grad)
        for run in followed("projecting channels", self.runs, self.progress):
            projections = [self._started(run, place) for place in range(len(run.paths))]
            for place, site in enumerate(run.sites):
                before = projections[place - 1] if place else None
                after = projections[place] if place < len(projections) else None
                _narrow(
                    network.get_submodule(site.name),
                    after,
                    before,
                    run.paths[place - 1].spread if place else 1,
                )
        return network

    def _started(self, run: Run, place: int) -> Projection:
        count = max(1, round(self.width * run.sites[place].o))
        (mix, *_) = NARROWINGS[self.start]().starts(run, place, run.joint(place, run.answers[place]), count)
        return Projection(mix.T.to(run.weights[place]).contiguous())

    def parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        self.projections = _projections(
            model, [site.name for run in self.runs for site in run.sites[:-1]], self.name
        )
        return {name: projection.q for name, projection in self.projections.items()}

    def phases(self) -> Sequence[Phase]:
        return [Phase("project", self.rounds, self._begin)]

    def _begin(self) -> list[Term]:
        joints = {
            run.sites[place + 1].name: Supervised(
                run.joint(place, run.answers[place]),
                self.projections[run.sites[place].name],
                run.weights[place + 1],
                run.biases[place + 1],
            )
            for run in self.runs
            for place in range(len(run.paths))
        }
        return [Reconstruction(joints, self.gamma)]

    @torch.no_grad()
    def close(self, model: nn.Module) -> Artifact:
        trained = self.template.filled(model)
        layers = {
            site.name: _narrowed(trained, run, place)
            for run in self.runs
            for place, site in enumerate(run.sites)
        }
        dense = copy.deepcopy(self.given).eval()
        kept = {name: value for name, value in trained.state_dict().items() if "parametrizations" not in name}
        dense.load_state_dict(
            {name: kept.get(name, value) for name, value in dense.state_dict().items()}
            if self.train_weights
            else dense.state_dict()
        )
        artifact = compress(
            dense,
            pipeline=["fold-batchnorm", _PutIn(layers)],
            example_inputs=self.example,
            cache=False,
            progress=self.progress,
        )
        for name, reason in self.reasons.items():
            artifact.report.decline(name, f"its channels stay: {reason}")
        return artifact


def _narrow(module: Any, after: Projection | None, before: Projection | None, spread: int) -> None:
    """Let a module's weight and bias be narrower ones, made of what they are at every use."""
    parametrize.register_parametrization(module, "weight", NarrowWeight(after, before, spread), unsafe=True)
    if after is None:
        return
    if module.bias is None:
        weight = module.parametrizations["weight"].original
        module.register_parameter("bias", nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False))
    parametrize.register_parametrization(module, "bias", NarrowBias(after), unsafe=True)


def _projections(model: nn.Module, names: Sequence[str], method: str) -> dict[str, Projection]:
    """The projection behind each of these sites; raises `UsageError` for a model without."""
    found: dict[str, Projection] = {}
    for name in names:
        try:
            made: Any = bare(model).get_submodule(f"{name}.parametrizations.weight.0".removeprefix("."))
            found[name] = made.after
        except AttributeError:
            raise UsageError(
                f"the model projects no channels of {name!r}; attach {method} to the module that prepare() "
                "returned"
            ) from None
    return found


def _narrowed(trained: nn.Module, run: Run, place: int) -> Layer:
    """The layer that a site of a run has become."""
    site, module = run.sites[place], trained.get_submodule(run.sites[place].name)
    kernel, bias = module.weight, module.bias
    assert isinstance(kernel, torch.Tensor)
    form = Form(
        "dense",
        (),
        inputs=kernel.shape[1] if place else None,
        outputs=kernel.shape[0] if place < len(run.paths) else None,
    )
    return Layer(
        form.on(site),
        form,
        {"kernel": kernel.detach().contiguous()},
        bias.detach() if isinstance(bias, torch.Tensor) else None,
    )


@dataclass(frozen=True)
class _PutIn(Pass):
    """The layers as they are."""

    layers: Mapping[str, Layer]
    name = "project"

    def run(self, model: Model, job: Job) -> bool:
        choices, prepared = [], job.prepared(model)
        for site in (
            site for site in model.sites() if site.name in self.layers or model.layer(site.name) is None
        ):
            dense, layer = dense_cost(site), self.layers.get(site.name)
            form = DENSE if layer is None else layer.form
            cost = dense if layer is None else cost_of(site, form) + bias_cost(site, layer.bias)
            joint, print_ = "" if layer is None else ProjectChannels.name, digest(model.weight(site.name))
            choices.append(
                Choice(
                    site.name,
                    site.shape,
                    form,
                    cost,
                    dense,
                    joint=joint,
                    fingerprint=print_,
                    groups=site.groups,
                )
            )
            if layer is not None:
                model.replace(site.name, layer)
        job.plan = RankPlan(tuple(choices), job.original, prepared=prepared)
        job.report.sites = job.plan.rows()
        return bool(self.layers)

    def __str__(self) -> str:
        return self.name
