"""Passes, and pipelines of them as text, list or YAML."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from tdpass.cost import Cost
from tdpass.documents import misfit, read_yaml, yaml_value
from tdpass.errors import PassError, TdpassError, UsageError
from tdpass.job import Job
from tdpass.models.base import Model
from tdpass.planner.trials import Promise
from tdpass.registry import Registry, nearest
from tdpass.report import PassRow


class Pass(ABC):
    """One rewrite of a model; a frozen dataclass whose fields are its options.

    `promise` is what it says of the network's outputs, which every run of a pipeline holds it to.  `gathers`
    has, for fields that are mappings, the words that are options of the pass and keys of that field.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise] = Promise.NONE
    gathers: ClassVar[Mapping[str, Callable[[], Sequence[str]]]] = {}

    @abstractmethod
    def run(self, model: Model, job: Job) -> bool:
        """Rewrite `model` in place, say in `job.report` what was done and what was declined and why.

        Return whether it changed.
        """

    @classmethod
    def build(cls, options: Mapping[str, object]) -> Pass:
        """The pass with these options.

        Raises `UsageError` on one that it does not take, or of the wrong type.
        """
        known = {option.name: option for option in _options(cls) if option.name not in cls.gathers}
        into = {word: name for name, words in cls.gathers.items() for word in words()}
        made: dict[str, Any] = {name: {} for name in cls.gathers}
        for key, value in options.items():
            if key not in known and key not in into:
                takes = (*into, *known)
                raise UsageError(
                    f"pass {cls.name!r} has no option {key!r}{nearest(key, takes)}; it takes: "
                    f"{', '.join(takes) or 'none'}"
                )
            wrong = misfit(cls, into.get(key, key), {key: value} if key in into else value)
            if wrong:
                such = f", such as {_show(_default(known[key]))}" if key in known else ""
                raise UsageError(f"option {key}={value!r} of pass {cls.name!r} must be of type {wrong}{such}")
            made.update({into[key]: made[into[key]] | {key: value}} if key in into else {key: value})
        return cls(**made)

    def options(self) -> dict[str, object]:
        """The options that are not as they are by default, of which `build` makes the same pass."""
        changed = {
            f.name: getattr(self, f.name)
            for f in _options(type(self))
            if getattr(self, f.name) != _default(f)
        }
        gathered = {key: value for name in self.gathers for key, value in changed.pop(name, {}).items()}
        return gathered | changed

    def __str__(self) -> str:
        options = [f"{name}={_show(value)}" for name, value in self.options().items()]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


PASSES: Registry[type[Pass]] = Registry("pass")


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by its `name`."""
    return PASSES.add(cls.name, cls)


PipelineSpec = str | Path | Sequence["str | Pass | Mapping[str, Mapping[str, object]]"]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    >>> str(Pipeline.parse("fold-batchnorm,factorize"))
    'fold-batchnorm,factorize'
    """

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, spec: PipelineSpec | Pipeline) -> Pipeline:
        """Read a list of passes: texts, passes, `{name: options}`, or a YAML file of these.

        A text is `"plan{macs=0.4},factorize"`. Raises `UsageError` on an unknown pass or option, or a value
        of the wrong type.
        """
        if isinstance(spec, Pipeline):
            return spec
        if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
            return cls.parse(_read_recipe(Path(spec)))
        items: Sequence[Any] = _split(spec) if isinstance(spec, str) else spec
        passes: list[Pass] = []
        for item in items:
            if isinstance(item, Pass):
                passes.append(item)
            elif isinstance(item, str):
                passes.extend(_from_text(text) for text in _split(item))
            elif isinstance(item, Mapping) and len(item) == 1:
                ((name, options),) = item.items()
                passes.append(PASSES.get(str(name)).build(_mapping(options, name)))
            else:
                raise UsageError(
                    f"{item!r} is not a pass; write 'name', 'name{{option=value}}' or {{name: {{option: "
                    f"value}}}}"
                )
        return cls(tuple(passes))

    def run(self, model: Model, job: Job) -> bool:
        """Run every pass on `model` in place, checking it after each; returns whether anything changed.

        After every pass the model is really run on the trials.  Raises `DifferenceError` naming the pass
        whose outputs are not what it promises, `PassError` naming a pass that fails and those before it;
        errors a user can act on keep their type.
        """
        job.begin(model)
        changed = False
        for index, step in enumerate(self.passes):
            before = ", ".join(done.name for done in self.passes[:index])
            job.notes = []
            start = time.perf_counter()
            try:
                stepped = step.run(model, job)
                if stepped:
                    model.check()
            except TdpassError:
                raise
            except Exception as error:
                place = f" after {before}" if before else ""
                raise PassError(f"{step.name} failed{place}: {type(error).__name__}: {error}") from error
            seconds = time.perf_counter() - start
            job.report.passes.append(
                PassRow(str(step), stepped, seconds, Cost(model.params(), 0, model.bytes()), tuple(job.notes))
            )
            changed = changed or stepped
            _hold(step, stepped, model, job)
        return changed

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)


def _hold(step: Pass, changed: bool, model: Model, job: Job) -> None:
    """Hold a pass to its promise on the trials."""
    if changed and step.promise is not Promise.SAME:
        job.report.checks.clear()
    assert job.trials is not None
    try:
        broken = job.trials.check(str(step), step.promise, model, job.expected)
    except Exception as error:  # noqa: BLE001 - a check that cannot be made must not cost the result
        job.report.note(f"{step} could not be checked: {type(error).__name__}: {error}")
        return
    if broken:
        job.unexpected(broken)


def _read_recipe(path: Path) -> Sequence[Any]:
    recipe = read_yaml(path, "recipe", "it is a YAML list of passes")
    steps = recipe.get("pipeline") if isinstance(recipe, dict) else recipe
    if not isinstance(steps, list):
        raise UsageError(
            f"the recipe {path} holds no list of passes; write one pass per line, '- name: {{option: value}}'"
        )
    return steps


def _split(text: str) -> list[str]:
    parts = re.split(r",(?![^{]*\})", text)
    return [part.strip() for part in parts if part.strip()]


def _from_text(text: str) -> Pass:
    match = re.fullmatch(r"([\w-]+)(?:\{([^{}]*)\})?", text)
    if match is None:
        raise UsageError(
            f"cannot read the pass {text!r}; write 'name' or 'name{{option=value,option=value}}'"
        )
    options: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, sign, value = part.partition("=")
        options[key.strip()] = _value(value, text) if sign else True
    return PASSES.get(match[1]).build(options)


def _value(text: str, where: str) -> object:
    try:
        return yaml_value(text)
    except UsageError as error:
        raise UsageError(f"cannot read the value {text!r} in {where!r}: {error}") from None


def _options(cls: type[Pass]) -> tuple[Field[Any], ...]:
    return fields(cls)  # type: ignore[arg-type]


def _mapping(options: object, name: object) -> Mapping[str, object]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise UsageError(
            f"the options {options!r} of pass {name!r} are not a mapping; write {{{name}: {{option: value}}}}"
        )
    return options


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
