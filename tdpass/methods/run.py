"""Training with a method from beginning to end: stages, control, report."""

from __future__ import annotations

import copy
import csv
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import TypeIs

from tdpass.artifact import Artifact
from tdpass.clock import one_thread_if_small
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.following import Progress
from tdpass.layers.factorized import rebuild_while_training
from tdpass.loggers import Logger, started
from tdpass.methods.base import METHODS, Method, make_method
from tdpass.methods.same_run import check_same_run, plain_facts
from tdpass.methods.stages import Parallel, Run, Score, Stage, Stages, of_pipeline
from tdpass.models import ExampleInputs, open_model
from tdpass.pipeline import PipelineSpec
from tdpass.progress import shown
from tdpass.registry import nearest
from tdpass.report import TrainingRow
from tdpass.training.averaging import Average
from tdpass.training.distillation import Distillation
from tdpass.training.loop import Data, Loop, Objective, cross_entropy
from tdpass.training.phases import Phase, Phased
from tdpass.training.placement import Template, world
from tdpass.training.settings import Settings
from tdpass.training.terms import Term
from tdpass.verbs import compress
from tdpass.views.training import destroyed

SettingsSpec = Settings | Mapping[str, Any] | None
# what a run gives a pipeline itself
_OF_THE_RUN = (
    "model",
    "budget",
    "data",
    "plan",
    "start",
    "pipeline",
    "example_inputs",
    "progress",
    "metric",
    "max_loss",
)
# what another run in the same folder must have been started with
_TOLD = (
    "settings",
    "pretrain",
    "pretraining",
    "finetune",
    "finetuning",
    "control",
    "rounds_per_epoch",
    "seed",
    "compression",
)


def train(
    model: nn.Module,
    data: Data,
    method: Method | Mapping[str, Any] | PipelineSpec | None = None,
    *,
    settings: SettingsSpec = None,
    pretrain: int = 0,
    pretraining: SettingsSpec = None,
    finetune: int = 0,
    finetuning: SettingsSpec = None,
    control: bool = True,
    objective: Objective | None = None,
    evaluate: Score | None = None,
    test: Score | None = None,
    example_inputs: ExampleInputs = None,
    calibration: object = None,
    compression: Mapping[str, Any] | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    parallel: Parallel | None = None,
    checkpoint_every: int = 0,
    rounds_per_epoch: int = 1,
    log: Callable[[TrainingRow], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    loggers: Sequence[str | Logger] = (),
    progress: Progress | bool = True,
) -> Artifact:
    """Train a copy of a model into a smaller one, and say what each epoch and the whole did.

    `data` yields (inputs, targets) and has a length.  Stages: `pretrain` epochs of the dense model; the
    rounds of `method` (an object, a name, or `{name: options}`), `rounds_per_epoch` of them in each epoch,
    and its `finish`, or a pipeline of passes, both of which may use `calibration` data, the pipeline with the
    options of `tdpass.compress` that `compression` names (a `target`, a `batch`); `finetune` epochs of what
    came out; and with `control` the dense model once more for as many epochs, learning from labels only,
    since an accuracy gain means nothing without it.  `settings` hold for the method, and where `pretraining`
    and `finetuning` do not say otherwise for these.

    `evaluate(model)` scores every epoch (on data that is not the test data), `test(model)` the dense, the
    control and the final model once.  With a `folder` checkpoints and log.csv are written there, and `resume`
    goes on from them.  `loggers` show the epochs elsewhere too: `tensorboard`, `wandb` or a `Logger`.
    `progress`: False is silent, True shows bars on stderr, a function is called with what is done, how much
    of it, and of how much.  Under torchrun every process calls this with its own share of the data; `parallel`
    is `ddp` or `fsdp2`.

    Raises `UsageError`, `TrainingError`, `BudgetError`.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"train takes an nn.Module, not a {type(model).__name__}; convert the model, or compress it "
            "without training"
        )
    if pretrain < 0 or finetune < 0:
        raise UsageError(f"pretrain={pretrain} and finetune={finetune} are epochs; give 0 or more")
    base = Settings.parse(settings)
    run = Run(
        model=model,
        data=data,
        settings=base,
        pretrain=pretrain,
        pretraining=Settings.parse(pretraining, base),
        finetune=finetune,
        finetuning=Settings.parse(finetuning, base),
        control=control,
        objective=objective,
        evaluate=evaluate,
        test=test,
        example_inputs=example_inputs,
        calibration=calibration,
        compression=_compression(compression, is_pipeline=not _is_method(method) and method is not None),
        folder=None if folder is None else Path(folder),
        resume=resume,
        seed=seed,
        parallel=parallel,
        checkpoint_every=checkpoint_every,
        rounds_per_epoch=rounds_per_epoch,
        log=log,
        note=note,
    )
    made = make_method(method) if _is_method(method) else method
    facts = {"method": made, **{name: getattr(run, name) for name in _TOLD}}
    if run.folder is not None:
        check_same_run(run.folder, "run.json", facts, resume)
    macs = _macs(run)
    torch.manual_seed(seed)
    first = world()[0] == 0
    with (
        started(loggers if first else (), run.folder, plain_facts(facts)) as running,
        one_thread_if_small(macs),
        shown(progress if first else False) as said,
    ):
        run = replace(run, progress=said)
        trainer = _Trainer(run, running)
        artifact = trainer.carry_out(made.stages(run) if isinstance(made, Method) else of_pipeline(run, made))
        while running:
            running.pop().finish(artifact.report)
    artifact.report.training = trainer.rows
    broken = destroyed(artifact.report)
    if broken:
        artifact.report.notes.insert(0, broken)
    return artifact


@dataclass
class _Trainer:
    """Trains the stages of a run and keeps its log."""

    run: Run
    loggers: Sequence[Logger] = ()
    rows: list[TrainingRow] = field(default_factory=list)

    def carry_out(self, stages: Stages) -> Artifact:
        """Train stage after stage, each answered with what it trained; returns what they end in."""
        try:
            stage = next(stages)
            while True:
                stage = stages.send(self.trained(stage))
        except StopIteration as end:
            artifact: Artifact = end.value
            return artifact

    def trained(self, stage: Stage) -> nn.Module:
        """A trained copy of the stage's model."""
        run, settings = self.run, stage.settings
        torch.manual_seed(run.seed + sum(map(ord, stage.name)))
        template, copied = Template(stage.model), copy.deepcopy(stage.model)
        if settings.rebuild:
            rebuild_while_training(copied)
        wrapped = _wrapped(copied, run.parallel)
        optimizer, schedule = settings.make_optimizer(wrapped), settings.make_schedule()
        plain = Phase("train", stage.epochs * run.rounds_per_epoch, tuple)
        phased = Phased([plain]) if stage.bind is None else stage.bind(wrapped)
        phased.average = Average(wrapped, settings.average) if settings.average else None
        terms: list[Term] = [phased]
        if stage.teacher is not None and settings.distill:
            terms.append(
                Distillation(
                    copy.deepcopy(stage.teacher), settings.distill, settings.temperature, settings.compile
                )
            )
        before = list(self.rows)
        loop = Loop(
            stage=stage.name,
            model=wrapped,
            data=run.data,
            optimizer=optimizer,
            objective=run.objective or cross_entropy(settings.label_smoothing),
            epochs=stage.epochs,
            rate=phased.rate(schedule),
            terms=tuple(terms),
            passes=stage.passes,
            clip=settings.clip,
            autocast=settings.bf16,
            compiled=settings.compile,
            evaluate=run.evaluate,
            folder=None if run.folder is None else run.folder / stage.name,
            checkpoint_every=run.checkpoint_every,
            rounds_per_epoch=run.rounds_per_epoch,
            log=lambda row: self._take(row, [*before, *loop.rounds]),
            note=run.note,
            progress=run.progress,
        )
        self.rows = [*before, *loop.run(run.resume)]
        return template.filled(wrapped).eval()

    def _take(self, row: TrainingRow, rows: Sequence[TrainingRow]) -> None:
        if self.run.folder is not None and world()[0] == 0:
            write_text(self.run.folder / "log.csv", log_table(rows))
        if self.run.log is not None:
            self.run.log(row)
        for logger in self.loggers:
            logger.row(row)


def _macs(run: Run) -> int:
    """Multiply-adds per sample, 0 where there is nothing to run the model on."""
    opened = open_model(run.model, run.example_inputs)
    example = opened.example()
    if run.example_inputs is None or example is None:
        return 0
    opened.observe(example)
    return opened.macs()


def _compression(options: Mapping[str, Any] | None, is_pipeline: bool) -> Mapping[str, Any]:
    """The options of a pipeline that the run does not give itself; raises `UsageError`."""
    options = options or {}
    if options and not is_pipeline:
        raise UsageError(
            f"compression={dict(options)} are options of a pipeline, and the method is none; give them to the "
            "method"
        )
    known = [name for name in inspect.signature(compress).parameters if name not in _OF_THE_RUN]
    for name in options:
        if name not in known:
            raise UsageError(
                f"compression has an unknown option {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            )
    return options


def _is_method(method: object) -> TypeIs[Method | Mapping[str, Any] | str]:
    """Whether it names or is a training method, not a pipeline."""
    return isinstance(method, Method | Mapping) or (isinstance(method, str) and method in METHODS)


def _wrapped(model: nn.Module, parallel: Parallel | None) -> nn.Module:
    if parallel is None:
        return model
    if world()[1] == 1 and not torch.distributed.is_initialized():
        raise UsageError(
            f"parallel={parallel!r} needs several processes; start with torchrun and "
            "torch.distributed.init_process_group()"
        )
    if parallel == "ddp":
        return DistributedDataParallel(model)
    # takes most of a second, which one process need not spend
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    fully_shard(model)
    return model


def log_table(rows: Sequence[TrainingRow]) -> str:
    """The log as CSV, a column per weight for its residual."""
    names = sorted({name for row in rows for name in row.residuals})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            "stage",
            "epoch",
            "loss",
            "rate",
            "seconds",
            "score",
            "memory",
            *(f"residual {name}" for name in names),
        ]
    )
    for row in rows:
        residuals = [f"{row.residuals[name]:.5g}" if name in row.residuals else "" for name in names]
        score = "" if row.score is None else f"{row.score:.6g}"
        table.writerow(
            [
                row.stage,
                row.epoch,
                f"{row.loss:.6g}",
                f"{row.rate:.5g}",
                f"{row.seconds:.2f}",
                score,
                row.memory,
                *residuals,
            ]
        )
    return text.getvalue()
