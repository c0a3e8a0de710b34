"""The training loop: epochs over data, terms around every step, checkpoints, a log."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tdpass.errors import TrainingError, UsageError
from tdpass.following import Progress, silent
from tdpass.report import TrainingRow
from tdpass.training.calls import Passes, call, class_scores, once
from tdpass.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    random_state,
    read_facts,
    restore_random_state,
    save_checkpoint,
    tensors_in,
)
from tdpass.training.compiled import forward_of, refused
from tdpass.training.learning import make_room, optimizer_tensors
from tdpass.training.placement import bare
from tdpass.training.residuals import Watch
from tdpass.training.terms import Hooks, Term

_LOOK_EVERY = 100  # steps between looks at the loss: each waits for the device
Objective = Callable[[Any, Any], Tensor]
Data = Iterable[Any]


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy of class scores `[n, classes]` (further axes between are positions) and class numbers."""

    def objective(outputs: Any, targets: Any) -> Tensor:
        scores = class_scores(outputs)
        scores = scores.flatten(0, -2) if scores.dim() > 2 else scores
        return F.cross_entropy(scores, targets.flatten(), label_smoothing=label_smoothing)

    return objective


@dataclass
class Loop:
    """`epochs` passes over `data` with one optimizer.

    `data` yields (inputs, targets) and has a length; each epoch iterates it anew, after `set_epoch` where it,
    its data set or a sampler has one.  `passes` runs the model, once a step or more often.  `rate(progress)`
    is the learning rate when the share `progress` of all steps is over, as a factor on what each parameter
    group had at the start.  A checkpoint is written to `folder` after every epoch, and every
    `checkpoint_every` steps.
    On a CPU, and with data that draws from torch's, numpy's or Python's global generators, from torch
    generators that the DataLoader, its samplers or its data set hold, or from none, a resumed run repeats bit
    by bit what the interrupted one would have done.
    """

    stage: str
    model: nn.Module
    data: Data
    optimizer: Optimizer
    objective: Objective
    epochs: int
    rate: Callable[[float], float]
    terms: tuple[Term, ...] = ()
    passes: Passes = once
    clip: float | None = None
    autocast: bool = False
    compiled: bool = False
    evaluate: Callable[[nn.Module], float] | None = None
    folder: Path | None = None
    checkpoint_every: int = 0
    rounds_per_epoch: int = 1
    log: Callable[[TrainingRow], None] = lambda line: None
    note: Callable[[str], None] = lambda text: None
    progress: Progress = silent
    watch: Watch = field(default_factory=Watch)
    rounds: list[TrainingRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.per_epoch = len(self.data)  # type: ignore[arg-type]
        except TypeError:
            raise UsageError(
                f"training data of type {type(self.data).__name__} has no length; give a DataLoader or a "
                "list of (inputs, targets)"
            ) from None
        if self.epochs < 0 or not 1 <= self.rounds_per_epoch <= self.per_epoch:
            sizes = f"{self.epochs} epochs of {self.per_epoch} batches in {self.rounds_per_epoch} rounds"
            raise UsageError(f"{sizes} make no training; give at least one batch to each round")
        self._base = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._device = next(self.model.parameters()).device
        self._generators = _generators_of(self.data)
        self._forward = forward_of(self.model, self.compiled)

    def run(self, resume: bool = False) -> list[TrainingRow]:
        """Train, from the newest checkpoint in `folder` where `resume` is set and there is one.

        Returns the log. Raises `TrainingError` when the loss is not finite, ADMM diverges, or a checkpoint
        does not fit.
        """
        hooks = Hooks(
            self.optimizer, self.terms, self._round_starts, max(1, self.epochs * self.rounds_per_epoch)
        )
        try:
            started = self._resume(hooks) if resume and self.folder is not None else None
            for epoch in range(hooks.steps // self.per_epoch, self.epochs):
                self._epoch(epoch, hooks, started)
                started = None
            for term in self.terms:
                term.end()
        finally:
            hooks.remove()
        return self.rounds

    def _round_starts(self, step: int) -> bool:
        inside = step % self.per_epoch
        return any(
            inside == self.per_epoch * k // self.rounds_per_epoch for k in range(self.rounds_per_epoch)
        )

    def _epoch(self, epoch: int, hooks: Hooks, resumed: Mapping[str, Any] | None) -> None:
        start = time.perf_counter()
        done = hooks.steps - epoch * self.per_epoch
        if resumed is not None:
            restore_random_state(resumed["epoch_random"], self._generators)
        at_start = random_state(self._generators)
        total = torch.tensor(
            resumed["total"] if resumed is not None and done else 0.0,
            dtype=torch.float64,
            device=self._device,
        )
        self.model.train()
        batches = self._batches(epoch)
        for _ in islice(batches, done):
            pass
        if done and resumed is not None:  # at its beginning the data draws as it did
            restore_random_state(resumed["random"], self._generators)
        for index, (inputs, targets) in enumerate(batches, done):
            with refused():
                total += self._step(hooks.steps / (self.per_epoch * self.epochs), inputs, targets)
            if index % _LOOK_EVERY == 0:
                self._check(total)
            self.progress(f"train ({self.stage})", hooks.steps, self.per_epoch * self.epochs)
            if (
                self.checkpoint_every
                and hooks.steps % self.checkpoint_every == 0
                and index + 1 < self.per_epoch
            ):
                self._save(hooks, at_start, float(total))
        if hooks.steps != (epoch + 1) * self.per_epoch:
            raise UsageError(
                f"the data gave {hooks.steps - epoch * self.per_epoch} batches in epoch {epoch}, its length "
                f"says {self.per_epoch}"
            )
        self._check(total)
        self._close_epoch(epoch, float(total) / self.per_epoch, start)
        self._save(hooks, random_state(self._generators), 0.0)

    def _close_epoch(self, epoch: int, loss: float, start: float) -> None:
        residuals = {name: value for term in self.terms for name, value in term.residuals().items()}
        self.watch.check(residuals)
        score = None
        if self.evaluate is not None:  # on every process: a sharded model needs them all
            state = random_state(self._generators)
            self.model.eval()
            with torch.no_grad():
                score = float(self.evaluate(self.model))
            restore_random_state(state, self._generators)
        rate = self.rate(min(1.0, (epoch + 1) / self.epochs)) * self._base[0]
        line = TrainingRow(
            self.stage, epoch, loss, rate, time.perf_counter() - start, score, residuals, self._memory()
        )
        self.rounds.append(line)
        self.log(line)

    def _step(self, progress: float, inputs: Any, targets: Any) -> Tensor:
        factor = self.rate(progress)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = factor * base
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        passes = self.passes(
            partial(call, self._forward), inputs, lambda outputs: self._loss(inputs, outputs, targets)
        )
        while (loss := self._next(passes)) is not None:
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        if not losses:
            raise UsageError(
                f"a step of stage {self.stage!r} gave no loss; its passes must yield at least one"
            )
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return sum(losses[1:], losses[0])

    def _next(self, passes: Iterator[Tensor]) -> Tensor | None:
        with torch.autocast(self._device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return next(passes, None)

    def _loss(self, inputs: Any, outputs: Any, targets: Any) -> Tensor:
        """The task's loss of one run of the model, with what the terms add."""
        loss = self.objective(outputs, targets) * (1 - sum(term.replaces for term in self.terms))
        for term in self.terms:
            extra = term.loss(inputs, outputs)
            loss = loss if extra is None else loss + extra
        return loss

    def _check(self, total: Tensor) -> None:
        if not math.isfinite(float(total)):
            raise TrainingError(
                f"the loss of stage {self.stage!r} is no longer finite; lower the learning rate, clip "
                "gradients, or start from trained weights"
            )

    def _batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        for holder in _holders(self.data):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise UsageError(
                    f"a training batch of type {type(batch).__name__} is not understood; give pairs of "
                    "(inputs, targets)"
                )
            yield _on(batch[0], self._device), _on(batch[1], self._device)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in bare(self.model).state_dict().items()}
        held = optimizer_tensors(self.optimizer, dict(bare(self.model).named_parameters()))
        tensors |= {f"optimizer.{key}": value for key, value in held.items()}
        for index, term in enumerate(self.terms):
            tensors |= {
                f"term.{index}.{key}": value
                for key, value in term.state().items()
                if isinstance(value, Tensor)
            }
        return tensors

    def _memory(self) -> int:
        """Bytes that stay from step to step; of a sharded model, over all processes."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        besides = [tensor for name, tensor in self._tensors().items() if not name.startswith("model.")]
        return sum(
            tensor.nbytes
            for tensor in (*self.model.parameters(), *self.model.buffers(), *gradients, *besides)
        )

    def _save(self, hooks: Hooks, epoch_random: Mapping[str, Any], total: float) -> None:
        if self.folder is None:
            return
        facts = {
            "steps": hooks.steps,
            "round": hooks.round,
            "total": total,
            "random": random_state(self._generators),
            "epoch_random": dict(epoch_random),
            "watch": self.watch.history,
            "rounds": [asdict(line) for line in self.rounds],
            "terms": [
                {key: value for key, value in term.state().items() if not isinstance(value, Tensor)}
                for term in self.terms
            ],
        }
        save_checkpoint(self.folder, hooks.steps, self._tensors(), facts)

    def _resume(self, hooks: Hooks) -> Mapping[str, Any] | None:
        assert self.folder is not None
        path, complaints = newest_checkpoint(self.folder)
        for text in complaints:
            self.note(text)
        if path is None:
            return None
        facts = read_facts(path)
        try:
            self._take_over(path, facts, hooks)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise TrainingError(
                f"checkpoint {path} was not written by this method and settings ({what}); train from the "
                "beginning in another folder"
            ) from None
        self.note(f"going on from {path.name}, epoch {hooks.steps // self.per_epoch}")
        return facts

    def _take_over(self, path: Path, facts: Mapping[str, Any], hooks: Hooks) -> None:
        restore_random_state(facts["epoch_random"], self._generators)
        restore_random_state(facts["random"], self._generators)
        for term, own in zip(self.terms, facts["terms"], strict=True):
            term.resume_at(own)
        layout = {
            key.removeprefix("optimizer."): value
            for key, value in tensors_in(path).items()
            if key.startswith("optimizer.")
        }
        make_room(self.optimizer, dict(bare(self.model).named_parameters()), layout)
        tensors = self._tensors()
        load_checkpoint(path, tensors)
        for index, (term, own) in enumerate(zip(self.terms, facts["terms"], strict=True)):
            term.load_state(
                {
                    **own,
                    **{
                        key: tensors[f"term.{index}.{key}"]
                        for key, value in term.state().items()
                        if isinstance(value, Tensor)
                    },
                }
            )
        hooks.steps, hooks.round = facts["steps"], facts["round"]
        self.watch.history = facts["watch"]
        self.rounds = [TrainingRow(**line) for line in facts["rounds"]]


def _holders(data: Any) -> list[Any]:
    """Data, such as a DataLoader, with its data set and its samplers, each once."""
    batches = getattr(data, "batch_sampler", None)
    parts = (getattr(data, name, None) for name in ("sampler", "dataset"))
    found = (data, *parts, batches, getattr(batches, "sampler", None))
    return list({id(part): part for part in found if part is not None}.values())


def _generators_of(data: Any) -> list[torch.Generator]:
    found = (value for holder in _holders(data) for value in getattr(holder, "__dict__", {}).values())
    return list(dict.fromkeys(value for value in found if isinstance(value, torch.Generator)))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _on(entry, device) for key, entry in value.items()}
    return [_on(entry, device) for entry in value] if isinstance(value, tuple | list) else value
