"""Training with a method from beginning to end: stages, control, report."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import TypeIs

from tdpass.artifact import Artifact
from tdpass.errors import UsageError
from tdpass.files import write_text
from tdpass.layers.factorized import rebuild_while_training
from tdpass.methods.base import METHODS, Method, make_method
from tdpass.methods.same_run import check_same_run
from tdpass.models import ExampleInputs
from tdpass.pipeline import PipelineSpec
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

Score = Callable[[nn.Module], float]
Parallel = Literal["ddp", "fsdp2"]
SettingsSpec = Settings | Mapping[str, Any] | None
LARGE_GAP = 0.2  # residual at the end of ADMM from which on the final projection costs more than training gained


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
    folder: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    parallel: Parallel | None = None,
    checkpoint_every: int = 0,
    rounds_per_epoch: int = 1,
    log: Callable[[TrainingRow], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Train a copy of a model into a smaller one, and say what each epoch and the whole did.

    `data` yields (inputs, targets) and has a length.  Stages: `pretrain` epochs of the dense model; the rounds of `method` (an
    object, a name, or `{name: options}`), `rounds_per_epoch` of them in each epoch, and its `finish`, or a pipeline of passes,
    both of which may use `calibration` data; `finetune` epochs of what came out; and with `control` the dense model once more
    for as many epochs, learning from labels only, since an accuracy gain means nothing without it.  `settings` hold for the
    method, and where `pretraining` and `finetuning` do not say otherwise for these.

    `evaluate(model)` scores every epoch (on data that is not the test data), `test(model)` the dense, the control and the final
    model once.  With a `folder` checkpoints and log.csv are written there, and `resume` goes on from them.  Under torchrun every
    process calls this with its own share of the data; `parallel` is `ddp` or `fsdp2`.

    Raises `UsageError`, `TrainingError`, `BudgetError`.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"train takes an nn.Module, not a {type(model).__name__}; convert the model, or compress it without training")
    if pretrain < 0 or finetune < 0:
        raise UsageError(f"pretrain={pretrain} and finetune={finetune} are epochs; give 0 or more")
    base = Settings.parse(settings)
    run = _Run(data, objective, evaluate, None if folder is None else Path(folder), resume, seed, parallel, checkpoint_every, rounds_per_epoch, log, note)
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "method": make_method(method) if _is_method(method) else method,
            "settings": base,
            "pretrain": pretrain,
            "pretraining": Settings.parse(pretraining, base),
            "finetune": finetune,
            "finetuning": Settings.parse(finetuning, base),
            "control": control,
            "rounds_per_epoch": rounds_per_epoch,
            "seed": seed,
        }
        check_same_run(run.folder, "run.json", facts, resume)
    torch.manual_seed(seed)
    dense = copy.deepcopy(model)
    if pretrain:
        dense = run.stage("pretrain", dense, replace(Settings.parse(pretraining, base), distill=0.0), pretrain)
    artifact, epochs = _compressed(dense, method, base, run, example_inputs, calibration, finetune)
    scores = {} if test is None else {"score_dense": _score(test, dense), "score_before_finetuning": _score(test, artifact.model)}
    if finetune:
        tuned = run.stage("finetune", _module(artifact), Settings.parse(finetuning, base), finetune, teacher=dense)
        _module(artifact).load_state_dict(tuned.state_dict())
        _module(artifact).eval()
    if control and epochs + finetune:
        twin = run.stage("control", dense, replace(base, distill=0.0), epochs + finetune)
        scores |= {} if test is None else {"score_control": _score(test, twin)}
    if test is not None:
        scores["score_final"] = _score(test, artifact.model)
    artifact.report.checks.update(scores)
    artifact.report.training = run.rows
    broken = destroyed(artifact.report)
    if broken:
        artifact.report.notes.insert(0, broken)
    return artifact


@dataclass
class _Run:
    """What the stages of one run share."""

    data: Data
    objective: Objective | None
    evaluate: Score | None
    folder: Path | None
    resume: bool
    seed: int
    parallel: Parallel | None
    checkpoint_every: int
    rounds_per_epoch: int
    listener: Callable[[TrainingRow], None] | None
    note: Callable[[str], None]
    rows: list[TrainingRow] = field(default_factory=list)

    def stage(self, name: str, model: nn.Module, settings: Settings, epochs: int, method: Method | None = None, teacher: nn.Module | None = None) -> nn.Module:
        """A trained copy of the model."""
        torch.manual_seed(self.seed + sum(map(ord, name)))
        template, trained = None if method is not None else Template(model), copy.deepcopy(model)
        if settings.rebuild:
            rebuild_while_training(trained)
        wrapped = _wrapped(trained, self.parallel)
        optimizer, schedule = settings.make_optimizer(wrapped), settings.make_schedule()
        phased = method.bind(wrapped) if method is not None else Phased([Phase("train", epochs * self.rounds_per_epoch, tuple)])
        phased.average = Average(wrapped, settings.average) if settings.average else None
        terms: list[Term] = [phased]
        if teacher is not None and settings.distill:
            terms.append(Distillation(copy.deepcopy(teacher), settings.distill, settings.temperature, settings.compile))
        before = list(self.rows)
        loop = Loop(
            stage=name,
            model=wrapped,
            data=self.data,
            optimizer=optimizer,
            objective=self.objective or cross_entropy(settings.label_smoothing),
            epochs=epochs,
            rate=phased.rate(schedule),
            terms=tuple(terms),
            clip=settings.clip,
            autocast=settings.bf16,
            compiled=settings.compile,
            evaluate=self.evaluate,
            folder=None if self.folder is None else self.folder / name,
            checkpoint_every=self.checkpoint_every,
            rounds_per_epoch=self.rounds_per_epoch,
            log=lambda row: self._take(row, [*before, *loop.rounds]),
            note=self.note,
        )
        self.rows = [*before, *loop.run(self.resume)]
        return (wrapped if template is None else template.filled(wrapped)).eval()

    def _take(self, row: TrainingRow, rows: Sequence[TrainingRow]) -> None:
        if self.folder is not None and world()[0] == 0:
            write_text(self.folder / "log.csv", log_table(rows))
        if self.listener is not None:
            self.listener(row)


def _compressed(
    dense: nn.Module,
    method: Method | Mapping[str, Any] | PipelineSpec | None,
    settings: Settings,
    run: _Run,
    example: ExampleInputs,
    calibration: object,
    finetune: int,
) -> tuple[Artifact, int]:
    """What the method or the pipeline makes of the dense model, and the epochs that took."""
    if method is None:
        return compress(dense, pipeline="", example_inputs=example), 0
    if not _is_method(method):
        return compress(dense, pipeline=method, data=calibration, example_inputs=example), 0
    made = make_method(method)
    if finetune and made.final:
        raise UsageError(f"{made.name} ends with weights where they shall stay, finetune={finetune} epochs would move them; give its own phases more rounds")
    made.prepare(dense, example, calibration)
    epochs = made.epochs(run.rounds_per_epoch)
    trained = run.stage("method", dense, settings, epochs, made, teacher=dense)
    name, gap = max(made.residuals().items(), key=lambda item: item[1], default=("", 0.0))
    if gap > LARGE_GAP and not made.final:
        run.note(f"the last projection moves {name!r} by {gap:.2f} of its norm; a larger last rho, or more rounds, would leave it less to do")
    return made.finish(trained), epochs


def _is_method(method: object) -> TypeIs[Method | Mapping[str, Any] | str]:
    """Whether it names or is a training method, not a pipeline."""
    return isinstance(method, Method | Mapping) or (isinstance(method, str) and method in METHODS)


def _wrapped(model: nn.Module, parallel: Parallel | None) -> nn.Module:
    if parallel is None:
        return model
    if world()[1] == 1 and not torch.distributed.is_initialized():
        raise UsageError(f"parallel={parallel!r} needs several processes; start with torchrun and torch.distributed.init_process_group()")
    if parallel == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - takes most of a second, which one process need not spend

    fully_shard(model)
    return model


def _module(artifact: Artifact) -> nn.Module:
    assert isinstance(artifact.model, nn.Module)
    return artifact.model


def _score(test: Score, model: object) -> float:
    assert isinstance(model, nn.Module)
    training = model.training
    with torch.no_grad():
        score = float(test(model.eval()))
    model.train(training)
    return score


def log_table(rows: Sequence[TrainingRow]) -> str:
    """The log as CSV, a column per weight for its residual."""
    names = sorted({name for row in rows for name in row.residuals})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["stage", "epoch", "loss", "rate", "seconds", "score", *(f"residual {name}" for name in names)])
    for row in rows:
        residuals = [f"{row.residuals[name]:.5g}" if name in row.residuals else "" for name in names]
        score = "" if row.score is None else f"{row.score:.6g}"
        table.writerow([row.stage, row.epoch, f"{row.loss:.6g}", f"{row.rate:.5g}", f"{row.seconds:.2f}", score, *residuals])
    return text.getvalue()
