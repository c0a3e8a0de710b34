"""Incremental tasks: one network learns task after task by a few more columns each, and forgets nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from tdpass.artifact import Artifact
from tdpass.cost import Cost
from tdpass.errors import InvalidModelError, TrainingError, UsageError
from tdpass.files import check_writable
from tdpass.following import Progress
from tdpass.form import DENSE, Form
from tdpass.formats.base import FORMATS
from tdpass.formats.layer import cost_of, dense_cost
from tdpass.methods.kept_tasks import Growing, Ranks, Task, read_tasks, write_tasks
from tdpass.methods.run import SettingsSpec, train
from tdpass.methods.stages import Score, module_of
from tdpass.methods.trainable import as_stored
from tdpass.models import ExampleInputs, open_model
from tdpass.planner.rank_plan import Choice, RankPlan
from tdpass.report import TrainingRow
from tdpass.site import Site, selects
from tdpass.training.columns import Growth, new_columns, ranks_by_fisher, with_columns
from tdpass.training.loop import Data, Objective, cross_entropy
from tdpass.training.parametrized import dense_values
from tdpass.training.placement import Template
from tdpass.training.singular import SingularValues
from tdpass.verbs import compress

_FORMATS = ("channel_svd", "svd")
_SAME_MODEL = "give the model that the tasks were begun with"


class IncrementalTasks:
    """W_t = U_{1:t} diag(s_t) V_{1:t}^T.

    Task t adds columns to U and V, and weighs all of them by its own s_t. Hyder, Shao, Hou, Markopoulos,
    Prater-Bennette, Asif: Incremental Task Learning with Incremental Rank Updates, ECCV 2022. Columns of
    earlier tasks stay as they are; biases, norms and the head (the last site, unless `head` names another)
    are each task's own, so a task answers forever as it did when it was learned. The matrix of a convolution
    is W[o, (i h w)].

    >>> tasks = IncrementalTasks(model, first_rank=11, step_rank=1, path="t.safetensors")  # doctest: +SKIP
    >>> tasks.add_task(batches, epochs=10)  # doctest: +SKIP
    >>> network = tasks.use_task(0)  # doctest: +SKIP

    The first task has `first_rank` columns in every layer and begins as the model is; each further one adds
    `step_rank`, or with `ranks="fisher"` as many numbers where they lower the loss most (`ranks_by_fisher`).
    With a `path` every finished task is written there, to a temporary name first: one that is killed leaves
    those before it.  Which task an input belongs to is the caller's to know.  Raises `UsageError` for ranks
    below one, and for globs that leave no site.
    """

    def __init__(
        self,
        model: nn.Module,
        first_rank: int,
        step_rank: int,
        *,
        ranks: Ranks = "equal",
        head: str | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_inputs: ExampleInputs = None,
        path: Path | str | None = None,
    ) -> None:
        if min(first_rank, step_rank) < 1 or ranks not in get_args(Ranks):
            options = f"first_rank={first_rank}, step_rank={step_rank}, ranks={ranks!r}"
            raise UsageError(
                f"{options} add no columns; ranks are at least 1, divided as one of: "
                f"{', '.join(get_args(Ranks))}"
            )
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"tasks are learned by an nn.Module, not by a {type(model).__name__}; give the torch model"
            )
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.exists():
            raise UsageError(
                f"{self.path} exists; go on from it with IncrementalTasks.load, or name another file"
            )
        if self.path is not None:
            check_writable(self.path)
        sites = _sites(model, example_inputs)
        last = list(sites)[-1] if head is None and sites else head
        chosen = [name for name in sites if name != last and selects(name, include, exclude)]
        if not chosen:
            raise UsageError(
                f"head={last!r}, include={tuple(include)}, exclude={tuple(exclude)} leave no site to "
                f"factor; the model has: {', '.join(sites)}"
            )
        self.first_rank, self.step_rank, self.ranks, self.example = (
            first_rank,
            step_rank,
            ranks,
            example_inputs,
        )
        self.model = Template(model).filled(model)
        self._take({name: sites[name] for name in chosen})
        self.tasks: list[Task] = []
        self.training: list[TrainingRow] = []

    def __len__(self) -> int:
        return len(self.tasks)

    def add_task(
        self,
        data: Data,
        epochs: int = 10,
        *,
        settings: SettingsSpec = None,
        objective: Objective | None = None,
        evaluate: Score | None = None,
        folder: Path | str | None = None,
        resume: bool = False,
        checkpoint_every: int = 0,
        seed: int = 0,
        log: Callable[[TrainingRow], None] | None = None,
        progress: Progress | bool = True,
    ) -> int:
        """Learn one more task from (inputs, targets); returns its number, the first being 0.

        It is trained as `tdpass.train` trains, with checkpoints of this task in `folder`, and kept when that
        is over; `training` is its log.  Raises `UsageError`, `TrainingError`.
        """
        if self.path is not None:
            check_writable(self.path)
        torch.manual_seed(seed)
        network = with_columns(self.model, self._growths(data, objective or cross_entropy()))
        artifact = train(
            network, data, settings=settings, pretrain=epochs, control=False, objective=objective,
            evaluate=evaluate,
            folder=folder, resume=resume, checkpoint_every=checkpoint_every, seed=seed, log=log,
            progress=progress,
        )  # fmt: skip
        trained = module_of(artifact)
        layers = new_columns(trained, self.sites)
        parts = {
            part: {name: getattr(layer, part).detach().clone() for name, layer in layers.items()}
            for part in ("u", "v", "s")
        }
        learned = Task(**parts, own=dense_values(trained, self.own))
        if not all(bool(torch.isfinite(value).all()) for value in learned.tensors().values()):
            raise TrainingError(
                "the task ended in numbers that are not finite and is not kept; lower the learning rate, or "
                "clip gradients"
            )
        if self.path is not None:
            write_tasks(self.path, self._growing, [*self.tasks, learned])
        self.tasks.append(learned)
        self.training = artifact.report.training
        return len(self.tasks) - 1

    def use_task(self, task: int) -> nn.Module:
        """The network of a task, in evaluation mode.

        A low-rank model of its own, which shares nothing with others.
        """
        return module_of(self.artifact(task))

    def artifact(self, task: int) -> Artifact:
        """A task's network with plan and report, as `compress` gives it.

        To save, to export, to run by kernels. Raises `UsageError` for a task that was not learned.
        """
        learned = self._learned(task)
        weights = {self._weights[name]: self._weight(name, task) for name in self.sites}
        dense = self._template.holding({**weights, **_copies(learned.own)}, training=False)
        plan = RankPlan(tuple(self._choice(name, task) for name in self.sites), Cost(), metric="weights")
        return compress(
            dense, plan=plan, pipeline="factorize", example_inputs=self.example, cache=False, progress=False
        )

    def memory(self, task: int) -> dict[str, int]:
        """Bytes that a task added: `columns`, `selectors`, and its `own` biases, norms and head.

        Raises `UsageError` as `artifact` does.
        """
        return self._learned(task).memory()

    def save(self, path: Path | str) -> None:
        """Write all tasks into one safetensors file, to a temporary name first."""
        write_tasks(Path(path), self._growing, self.tasks)

    @classmethod
    def load(
        cls, path: Path | str, model: nn.Module, *, example_inputs: ExampleInputs = None
    ) -> IncrementalTasks:
        """The tasks in a file, for a model as they were begun with; further tasks are written there too.

        Raises `InvalidModelError` for a damaged file, or one that does not fit the model.
        """
        path, sites = Path(path), _sites(model, example_inputs)
        growing, tasks = read_tasks(path)
        strange = [name for name in growing.sites if name not in sites]
        if strange:
            raise InvalidModelError(
                f"{path} has columns for {strange[0]!r}, which is no site of this model; {_SAME_MODEL}"
            )
        others = [name for name in sites if name not in growing.sites]
        made = cls(
            model,
            growing.first_rank,
            growing.step_rank,
            ranks=growing.ranks,
            head="",
            exclude=others,
            example_inputs=example_inputs,
        )
        for task in tasks:
            made.tasks.append(task)
            made._check_shapes(path)
        made.path = path
        return made

    def _learned(self, task: int) -> Task:
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < len(self.tasks):
            known = f"0 to {len(self.tasks) - 1}" if self.tasks else "none yet; call add_task"
            raise UsageError(f"there is no task {task!r}; learned are {known}")
        return self.tasks[task]

    def _take(self, sites: Mapping[str, Site]) -> None:
        """Which weights are factored, and what is each task's own."""
        self.sites = dict(sites)
        self.formats = {
            name: next(form for form in _FORMATS if FORMATS.get(form).fits(site))
            for name, site in sites.items()
        }
        self._template = Template(self.model)
        names = {id(tensor): name for name, tensor in self.model.named_parameters()}
        self._weights = {name: names[id(self.model.get_submodule(name).weight)] for name in sites}
        self._growing = Growing(self.first_rank, self.step_rank, self.ranks, tuple(sites))
        self.own = [name for name in self._template.names if name not in self._weights.values()]

    def _growths(self, data: Data, objective: Objective) -> dict[str, Growth]:
        if not self.tasks:
            return {
                name: Growth(site, self.formats[name], min(self.first_rank, self._full(name)))
                for name, site in self.sites.items()
            }
        old = {name: self._columns(name, len(self.tasks) - 1) for name in self.sites}
        scales = {name: float(self.tasks[0].s[name].abs().mean()) for name in self.sites}
        growths = {
            name: Growth(site, self.formats[name], self.step_rank, old[name], scales[name])
            for name, site in self.sites.items()
        }
        if self.ranks == "equal":
            return growths
        found = ranks_by_fisher(with_columns(self.model, growths), growths, data, objective)
        return {name: replace(growth, rank=found[name]) for name, growth in growths.items()}

    def _full(self, name: str) -> int:
        site = self.sites[name]
        return min(site.o, site.weights // site.o)

    def _columns(self, name: str, task: int) -> tuple[Tensor, Tensor]:
        """All columns of U and of V up to a task's own."""
        until = self.tasks[: task + 1]
        return torch.cat([each.u[name] for each in until], 1), torch.cat([each.v[name] for each in until], 1)

    def _weight(self, name: str, task: int) -> Tensor:
        u, v = self._columns(name, task)
        weight: Tensor = SingularValues(self.sites[name], self.formats[name])(u, self.tasks[task].s[name], v)
        return weight

    def _choice(self, name: str, task: int) -> Choice:
        site, rank = self.sites[name], len(self.tasks[task].s[name])
        form = Form(self.formats[name], (rank,)) if rank < self._full(name) else DENSE
        return Choice(name, site.shape, form, cost_of(site, form), dense_cost(site), reason=f"task {task}")

    def _check_shapes(self, path: Path) -> None:
        """Raises `InvalidModelError` unless the last task is one of this model."""
        task = self.tasks[-1]
        own = {
            name: tensor.shape
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if name in self.own
        }
        fits = {name: value.shape for name, value in task.own.items()} == own and all(
            self._columns(name, len(self.tasks) - 1)[0].shape == (site.o, len(task.s[name]))
            for name, site in self.sites.items()
        )
        if not fits:
            raise InvalidModelError(
                f"task {len(self.tasks) - 1} in {path} is not of this model; {_SAME_MODEL}"
            )


def _sites(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Site]:
    """The sites whose weight is one matrix as it is stored, in the order of a run where there is one."""
    opened = open_model(model, example_inputs)
    return {
        site.name: site
        for site in opened.sites()
        if as_stored(site)
        and opened.layer(site.name) is None
        and any(FORMATS.get(form).fits(site) for form in _FORMATS)
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
