"""The one verb, and its dry run."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypeVar

from tdpass.artifact import Artifact, load_plan
from tdpass.clock import one_thread_if_small
from tdpass.cost import Budget, BudgetSpec, Cost
from tdpass.data import calls_of
from tdpass.errors import TdpassError, UsageError
from tdpass.files import cache_folder
from tdpass.following import Progress
from tdpass.formats.base import FORMATS, Factors
from tdpass.job import Job
from tdpass.models import Batch, ExampleInputs, Model, open_model
from tdpass.models.abilities import MakesPlain
from tdpass.outcome import finished, salvaged
from tdpass.pipeline import Pipeline, PipelineSpec
from tdpass.planner.compare import compare_outputs
from tdpass.planner.divergence import Divergence
from tdpass.planner.effort import effort_named
from tdpass.planner.memory import memory_limit, within_memory
from tdpass.planner.rank_plan import RankPlan
from tdpass.progress import shown
from tdpass.report import Report
from tdpass.smallest import Kept, smallest
from tdpass.targets import Target, open_target

M = TypeVar("M", default=Any)

PLANNED = "fold-batchnorm,divide,plan,factorize,correct-bias,refit,recalibrate-batchnorm,verify"
GIVEN_PLAN = "fold-batchnorm,factorize,correct-bias,refit,recalibrate-batchnorm,verify"
ON_TARGET = (
    "fold-batchnorm,divide,plan,factorize,correct-bias,refit,recalibrate-batchnorm,fuse-kernels,verify"
)
DRY_RUN = "fold-batchnorm,divide,plan"


def compress(
    model: M | str | Path,
    budget: BudgetSpec | None = None,
    data: object = None,
    *,
    plan: RankPlan | str | Path | None = None,
    start: Mapping[str, Factors] | None = None,
    target: str | Target | None = None,
    batch: int = 1,
    threads: int | None = None,
    pipeline: PipelineSpec | Pipeline | None = None,
    example_inputs: ExampleInputs = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    overridable: Sequence[str] = (),
    formats: Sequence[str] = (),
    samples: int | None = None,
    divergence: str | Divergence = "auto",
    augmented: object = None,
    progress: Progress | bool = True,
    cache: bool | Path = True,
    effort: str = "normal",
    strict: bool = True,
    metric: Callable[[M], float] | None = None,
    max_loss: float = 0.0,
) -> Artifact[M]:
    """Make a model smaller within a budget, and say what was done.

    `model`: an `nn.Module`, `fx.GraphModule`, `ExportedProgram`, ONNX model (proto, `onnx_ir`, graphsurgeon)
    or a path; it is left untouched, and what comes back in `.model` is of the same type (for a path, what it
    holds). `budget`: bounds on `macs`, `params`, `bytes`, `seconds` or any other measure of the whole model,
    as fractions (`0.4`) or absolute (`"120M"`, `"3ms"`), and `max_error` per site; a single value bounds the
    multiply-adds where there is something to run the model on, else the parameters.  `data`: unlabelled
    calibration data (see `tdpass.data.calls_of`); without it weights are factored by themselves and a budget
    on macs needs `example_inputs`.  `plan`: carry out this plan (or its file) instead of planning. `start`:
    factors of the plan's sites, by name, which the fit goes on from instead of searching anew. `include`,
    `exclude`: name globs.  `overridable`: name globs of ONNX initializers that are inputs too and that
    callers set; all others are weights.  `formats`: restrict to these.  `pipeline`: passes as text, list or
    YAML file. `target`: plan on times measured on `cpu`, `cpu:openvino` or `cuda`, or on a modelled machine
    such as `systolic:gemmini`, for calls of `batch` samples on `threads` threads (default: as many as torch
    uses); no site is then made dearer there, and a model that is not cheaper is given back as it was.
    `augmented`: data for re-estimating batch-norm statistics.  `cache`: False, or a folder for planning
    results. `effort`: `fast` plans from the metric alone, on fewer samples, `normal` measures losses for
    about a minute of one core (for a model of up to 1 GMAC a sample, in proportion above), `thorough`
    measures all that fit in four; how long it takes is said when planning begins. `samples`: how many of the
    data to use, by default 512, and with `fast` as many up to 128 as there is time for. `progress`: False is
    silent, True shows bars on stderr (lines now and then where that is no terminal), a function is called
    instead. `metric`: instead of a budget, a function of the model, of which more is better; the smallest
    model is looked for whose metric is at most `max_loss` below the dense model's, by bisection over budgets
    on what a single value bounds. `strict`: False makes a note of a result that differs from the original by
    more than the plan expects, which else is an error.

    Raises `BudgetError` when the budget cannot be met (naming the smallest reachable), `DifferenceError` for
    such a result (naming the pass that did it), `InvalidModelError`, `PlanError`, `UsageError`.  An error
    found after the plan was carried out holds what was made in `.artifact`.
    """
    steps = Pipeline.parse(
        _usual_passes(plan is not None, target is not None) if pipeline is None else pipeline
    )
    setting = _Setting(
        target=target,
        batch=batch,
        threads=threads,
        include=include,
        exclude=exclude,
        overridable=overridable,
        formats=formats,
        samples=samples,
        divergence=divergence,
        augmented=augmented,
        progress=progress,
        cache=cache,
        effort=effort,
        start=start or {},
        strict=strict,
    )
    if metric is None:
        return _run(model, budget, data, plan, steps, example_inputs, setting)
    if budget is not None or plan is not None:
        raise UsageError("metric= looks for the smallest budget itself; leave budget= and plan= out")
    kept, dense = Kept(metric, max_loss), open_model(model, example_inputs, overridable).clone().unwrap()
    quiet = replace(setting, progress=False)
    with shown(progress) as bars:
        return smallest(
            lambda share: _run(model, share, data, None, steps, example_inputs, quiet),
            dense,
            kept,
            lambda done, of: bars("budgets tried", done, of),
        )


def make_plan(
    model: M | str | Path,
    budget: BudgetSpec | None,
    data: object = None,
    *,
    target: str | Target | None = None,
    batch: int = 1,
    threads: int | None = None,
    pipeline: PipelineSpec | Pipeline | None = None,
    example_inputs: ExampleInputs = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    overridable: Sequence[str] = (),
    formats: Sequence[str] = (),
    samples: int | None = None,
    divergence: str | Divergence = "auto",
    progress: Progress | bool = True,
    cache: bool | Path = True,
    effort: str = "normal",
) -> Artifact[M]:
    """Plan only: `.plan` and `.report` of the result say what `compress` would do.

    `.model` is the model as it was.
    """
    steps = Pipeline.parse(pipeline if pipeline is not None else DRY_RUN)
    setting = _Setting(
        target=target,
        batch=batch,
        threads=threads,
        include=include,
        exclude=exclude,
        overridable=overridable,
        formats=formats,
        samples=samples,
        divergence=divergence,
        progress=progress,
        cache=cache,
        effort=effort,
    )
    return _run(model, budget, data, None, steps, example_inputs, setting)


def verify(
    reference: object,
    candidate: object,
    data: object = None,
    *,
    example_inputs: ExampleInputs = None,
    samples: int = 512,
    divergence: str | Divergence = "auto",
) -> dict[str, float]:
    """How far one model's outputs are from another's on the same data; both may come through any front end.

    Returns `divergence`, `relative_difference`, `max_difference`, `samples`, `same_class` for class scores,
    and of several outputs each as well, such as `divergence[boxes]`: see `compare_outputs`. Raises
    `UsageError` when there is nothing to run them on.
    """
    first, second = open_model(reference, example_inputs), open_model(candidate, example_inputs)
    example = first.example() or second.example()
    if data is None and example is None:
        raise UsageError(
            "there is nothing to run the models on; pass data= or example_inputs= (--data, --input)"
        )
    batches, _ = _batches(first, data if data is not None else example, samples)
    wish = divergence if isinstance(divergence, Divergence) else Divergence(divergence)
    references = [wish.outputs(first.run(batch)) for batch in batches]
    outputs = (wish.outputs(second.run(batch)) for batch in batches)
    return compare_outputs(
        zip(references, outputs, strict=True), wish.fit(references), sum(batch.size for batch in batches)
    )


@dataclass(frozen=True)
class _Setting:
    target: str | Target | None
    batch: int
    threads: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    overridable: Sequence[str]
    formats: Sequence[str]
    samples: int | None
    divergence: str | Divergence
    progress: Progress | bool
    cache: bool | Path
    effort: str
    augmented: object = None
    start: Mapping[str, Factors] = field(default_factory=dict)
    strict: bool = True


def _run(
    given: object,
    budget: BudgetSpec | None,
    data: object,
    plan: RankPlan | str | Path | None,
    steps: Pipeline,
    example_inputs: ExampleInputs,
    setting: _Setting,
) -> Artifact:
    runs = data is not None or example_inputs is not None
    limits = None if budget is None else Budget.parse(budget, default="macs" if runs else "params")
    decided = load_plan(plan) if isinstance(plan, str | Path) else plan
    effort = effort_named(setting.effort)
    for name in setting.formats:
        FORMATS.get(name)
    opened = open_model(given, example_inputs, setting.overridable)
    cache = _cache(setting.cache)
    target = None if setting.target is None else open_target(setting.target, opened.frontend, cache)
    memory = memory_limit()
    samples = effort.samples if setting.samples is None else setting.samples
    given_batches, notes = _batches(opened, data, samples)
    batches, cut = within_memory(opened, given_batches, memory)
    model = opened.clone()
    plain = model.make_plain() if steps.passes and isinstance(model, MakesPlain) else ()
    model.check()
    example = next(iter(batches), None)
    if example is None and not model.macs():
        example = model.example()
    if example is not None:
        model.observe(*(batches or [example]))
    if setting.samples is None:
        batches = effort.of(model.macs()).for_calibration(batches)
    report = _new_report(given, model)
    made = f"weights that were computed from other parameters are parameters now: {', '.join(plain)}"
    for note in (*model.signature().notes, *notes, *cut, *([made] if plain else [])):
        report.note(note)
    job = Job(
        report=report,
        batches=batches,
        augmented=None if setting.augmented is None else calls_of(opened, setting.augmented, sys.maxsize)[0],
        budget=limits,
        plan=decided,
        include=tuple(setting.include),
        exclude=tuple(setting.exclude),
        formats=tuple(setting.formats),
        divergence=setting.divergence
        if isinstance(setting.divergence, Divergence)
        else Divergence(setting.divergence),
        cache=cache,
        effort=setting.effort,
        start=setting.start,
        original=report.original,
        given=opened,
        strict=setting.strict,
        target=target,
        batch=_count("batch", setting.batch),
        threads=torch.get_num_threads() if setting.threads is None else _count("threads", setting.threads),
    )
    try:
        with (
            one_thread_if_small(model.macs() if target is None else 0),
            shown(setting.progress) as job.progress,
        ):
            steps.run(model, job)
            return finished(opened, model, job)
    except TdpassError as error:
        error.artifact = salvaged(model, job)
        raise


def _usual_passes(planned: bool, timed: bool) -> str:
    if planned:
        return GIVEN_PLAN
    return ON_TARGET if timed else PLANNED


def _cache(wanted: bool | Path) -> Path | None:
    """The folder of planning results."""
    if not isinstance(wanted, bool):
        return wanted
    return cache_folder() if wanted else None


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} is not a whole number of at least 1")
    return value


def _batches(model: Model, data: object, samples: int) -> tuple[list[Batch], list[str]]:
    """Calibration data as calls that the model takes, and what is to be said of it."""
    return ([], []) if data is None else calls_of(model, data, samples)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} {'thread' if count == 1 else 'threads'}"


def _new_report(given: object, model: Model) -> Report:
    name = str(given) if isinstance(given, str | Path) else type(given).__name__
    return Report(
        model=name,
        frontend=model.frontend,
        machine=f"{platform.machine()}, {_threads()}, torch {torch.__version__}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        original=Cost(model.params(), model.macs(), model.bytes()),
        declined=dict(model.declined()),
    )
