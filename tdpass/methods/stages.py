"""Stages of a training run: what a method has trained, one after another, and what the stages share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from tdpass.artifact import Artifact, load_plan
from tdpass.following import Progress, silent
from tdpass.models import ExampleInputs
from tdpass.passes.plan import Plan
from tdpass.pipeline import Pipeline, PipelineSpec
from tdpass.report import TrainingRow
from tdpass.training.calls import Passes, once
from tdpass.training.loop import Data, Objective
from tdpass.training.phases import Phased
from tdpass.training.placement import world
from tdpass.training.settings import Settings
from tdpass.verbs import compress

_DECIDED = "decided.json"
Score = Callable[[nn.Module], float]
Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Stage:
    """`epochs` epochs of a copy of `model`.

    The copy, trained and in evaluation mode, is what the stage is answered with. `bind` ties the terms of a
    method to the weights of the copy, `passes` says how often a step runs it, and `teacher` is what it learns
    from where its `settings` distill.
    """

    name: str
    model: nn.Module
    settings: Settings
    epochs: int
    bind: Callable[[nn.Module], Phased] | None = None
    passes: Passes = once
    teacher: nn.Module | None = None


Stages: TypeAlias = Generator[Stage, nn.Module, Artifact]


@dataclass(frozen=True)
class Run:
    """What the stages of one run share.

    The fields are as `tdpass.train` has them, with settings that are read and complete.
    """

    model: nn.Module
    data: Data
    settings: Settings
    pretrain: int
    pretraining: Settings
    finetune: int
    finetuning: Settings
    control: bool
    objective: Objective | None
    evaluate: Score | None
    test: Score | None
    example_inputs: ExampleInputs
    calibration: object
    compression: Mapping[str, Any]
    folder: Path | None
    resume: bool
    seed: int
    parallel: Parallel | None
    checkpoint_every: int
    rounds_per_epoch: int
    log: Callable[[TrainingRow], None] | None
    note: Callable[[str], None]
    progress: Progress = silent

    def scores(self, **models: nn.Module) -> dict[str, float]:
        """What `test` says of each model, as `score_NAME`; nothing without it."""
        return (
            {}
            if self.test is None
            else {f"score_{name}": _score(self.test, model) for name, model in models.items()}
        )


def pretrained(run: Run) -> Generator[Stage, nn.Module, nn.Module]:
    """A copy of the dense model, trained from labels for as long as the run says."""
    dense = copy.deepcopy(run.model)
    if run.pretrain:
        dense = yield Stage("pretrain", dense, replace(run.pretraining, distill=0.0), run.pretrain)
    return dense


def finished(run: Run, dense: nn.Module, artifact: Artifact, epochs: int) -> Stages:
    """Fine-tuning of the result after `epochs`, the control that is trained as long, and all scores."""
    result = module_of(artifact)
    scores = run.scores(dense=dense, before_finetuning=result)
    if run.finetune:
        tuned = yield Stage("finetune", result, run.finetuning, run.finetune, teacher=dense)
        result.load_state_dict(tuned.state_dict())
        result.eval()
    if run.control and epochs + run.finetune:
        twin = yield Stage("control", dense, replace(run.settings, distill=0.0), epochs + run.finetune)
        scores |= run.scores(control=twin)
    artifact.report.checks.update(scores | run.scores(final=result))
    return artifact


def of_pipeline(run: Run, pipeline: PipelineSpec | None) -> Stages:
    """A pipeline of passes on the dense model in place of a method; None leaves the model dense."""
    dense = yield from pretrained(run)
    if pipeline is None:
        artifact = compress(dense, pipeline="", progress=False, example_inputs=run.example_inputs)
    else:
        artifact = _compressed(run, dense, Pipeline.parse(pipeline))
    return (yield from finished(run, dense, artifact, 0))


def _compressed(run: Run, dense: nn.Module, steps: Pipeline) -> Artifact:
    """What the pipeline makes of the dense model.

    A machine tells other times when it is asked again, so a run that goes on carries out the plan it had.
    """
    timed = "target" in run.compression
    kept = run.folder / _DECIDED if run.folder is not None and timed else None
    plan = load_plan(kept) if kept is not None and run.resume and kept.exists() else None
    options = dict(run.compression)
    if plan is not None:
        del options["target"]
        steps = Pipeline(tuple(step for step in steps.passes if not isinstance(step, Plan)))
    artifact = compress(
        dense,
        plan=plan,
        pipeline=steps,
        progress=run.progress,
        data=run.calibration,
        example_inputs=run.example_inputs,
        **options,
    )
    if kept is not None and plan is None and world()[0] == 0:
        artifact.plan.save(kept)
    return artifact


def module_of(artifact: Artifact) -> nn.Module:
    """The model of an artifact that came of a torch module."""
    assert isinstance(artifact.model, nn.Module)
    return artifact.model


def _score(test: Score, model: nn.Module) -> float:
    training = model.training
    with torch.no_grad():
        score = float(test(model.eval()))
    model.train(training)
    return score
