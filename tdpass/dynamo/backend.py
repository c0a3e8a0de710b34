"""`torch.compile(model, backend="tdpass")`.

Chains of small layers become one operator each, the rest goes to inductor.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tdpass.artifact import load_plan
from tdpass.cost import Budget, BudgetSpec, Cost
from tdpass.digest import digest
from tdpass.dynamo.draft import Compiled, Draft, Inner
from tdpass.dynamo.factorize import Decide, factorize
from tdpass.dynamo.frozen import FROZEN, constants, forget, freeze
from tdpass.dynamo.fuse import fuse_chains
from tdpass.dynamo.links import read_link
from tdpass.errors import UsageError
from tdpass.form import Form
from tdpass.kinds import plain_module
from tdpass.layers.derived import DERIVED
from tdpass.planner.rank_plan import RankPlan
from tdpass.verbs import make_plan

NAME, GROUP = "tdpass", "torch_dynamo_backends"
_REGISTRY = "torch._dynamo.backends.registry"
log = logging.getLogger("tdpass.backend")


@dataclass(frozen=True)
class Options:
    """What `options=` takes.

    `inner`: what compiles the rewritten graph, "inductor" or "eager".  `measure`: fuse only where that was
    measured to be faster.  `alone`: with `measure`, single layers too, whose packed weights are a second copy
    in memory.  `freeze`: weights are constants, taken as they are when the graph is compiled; edited ones are
    taken anew after `tdpass.invalidate(model)`. `channels_last`: lay images with their channels innermost
    where the chains are faster so.  `plan`, a plan or its file: factor dense weights as it says.  `budget`:
    plan on the weights of each graph alone, for bounds on `params` or `bytes` (of the linear and convolution
    weights of that graph) or `max_error`.
    """

    inner: str = "inductor"
    measure: bool = True
    alone: bool = True
    freeze: bool = False
    channels_last: bool = True
    plan: RankPlan | str | Path | None = None
    budget: BudgetSpec | None = None

    def __post_init__(self) -> None:
        if self.inner not in _INNER:
            raise UsageError(
                f"option inner={self.inner!r} of the backend is not known; it is one of {', '.join(_INNER)}"
            )
        for name in ("measure", "alone", "freeze", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(
                    f"option {name}={getattr(self, name)!r} of the backend must be true or false"
                )

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Read what was passed to `torch.compile`; raises `UsageError` for a name that is not an option."""
        known = cls.__dataclass_fields__
        for name in given or {}:
            if name not in known:
                raise UsageError(f"the backend has no option {name!r}; it takes: {', '.join(known)}")
        return cls(**(given or {}))


def tdpass_backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile a graph that Dynamo recorded; what `torch.compile` calls.

    Exact unless `plan` or `budget` is given.  Weights may be edited, loaded or replaced afterwards: what is
    derived from them is made anew at the next call, without compiling again, unless `freeze` is set.  A graph
    that computes gradients is compiled as it is.
    """
    chosen = Options.of(options)
    if mode not in (None, "default"):
        raise UsageError(
            f"mode={mode!r} is inductor's; this backend takes options={{...}}, or wrap the model for "
            "inductor instead"
        )
    inner = _INNER[chosen.inner]
    if torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    ):
        log.warning(
            "a graph that computes gradients is left as it is; call the model under torch.no_grad() to have "
            "it rewritten"
        )
        return inner(graph_module, example_inputs)
    draft = Draft(graph_module, example_inputs, frozen=chosen.freeze)
    if not draft.rewritable:
        log.info("a graph whose weights are not at hand is left as it is")
        return inner(graph_module, example_inputs)
    factored = 0
    decide = _decisions(draft, chosen)
    if decide is not None:
        factored = factorize(draft, decide)
        log.info("%d layers factored", factored)
    fixed = constants(draft) if chosen.freeze else []
    fused = fuse_chains(
        draft,
        measure=chosen.measure,
        channels_last=chosen.channels_last,
        alone=chosen.alone and chosen.measure,
    )
    if fixed and (run := freeze(draft, fixed, inner)) is not None:
        return run
    return draft.compile(inner) if fused or factored else inner(graph_module, example_inputs)


def invalidate(model: nn.Module | None = None) -> None:
    """Forget what was derived from a model's weights, or from all.

    Needed after `weight.data.copy_(...)`, which leaves no trace, and after every edit of frozen weights: the
    next call compiles with them as they are then.
    """
    weights = None if model is None else [*model.parameters(), *model.buffers()]
    DERIVED.clear(weights)
    forget(weights)


def register() -> None:
    """Make the backend known by its name, unless an installed entry point does.

    Torch's registry is not imported for it, which takes seconds.
    """
    if any(entry.name == NAME for entry in entry_points(group=GROUP)):
        return
    if _REGISTRY in sys.modules:
        _register_in(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


def _register_in(registry: Any) -> None:
    if NAME not in registry._BACKENDS and NAME not in registry._COMPILER_FNS:
        registry.register_backend(tdpass_backend, name=NAME)


class _OnImport(MetaPathFinder):
    """Registers the backend when torch imports its registry, then is gone.

    Finds that module as it would be found without it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads the registry as its own loader does, and registers the backend in it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register_in(module)


def _inductor(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor import config as inductor_config  # noqa: PLC0415 - takes seconds to import
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    modes: tuple[AbstractContextManager[object], ...] = ()
    if FROZEN in graph_module.meta:  # as an option of torch.compile it would come too late
        modes = (inductor_config.patch(freezing=True), torch.no_grad())
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        compiled: Any = compile_fx(graph_module, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


def _eager(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    del example_inputs
    return graph_module.forward


_INNER: dict[str, Inner] = {"inductor": _inductor, "eager": _eager}


def _decisions(draft: Draft, options: Options) -> Decide | None:
    """What each weight becomes: matched by its content, else by the path of its module.

    None where nothing was asked for.
    """
    if options.plan is None and options.budget is None:
        return None
    plan = _plan_weights(draft, options.budget) if options.plan is None else options.plan
    plan = load_plan(plan) if isinstance(plan, str | Path) else plan
    prints = {choice.fingerprint: choice for choice in plan if choice.fingerprint}
    names = {choice.site: choice for choice in plan}

    def decide(path: str, weight: Tensor) -> Form | None:
        choice = prints.get(digest(weight)) or names.get(path)
        if choice is None or choice.kept_dense or choice.shape != tuple(weight.shape):
            return None
        if choice.joint:
            log.warning(
                "%s stays dense: it was planned together with other layers; compress the model with "
                "tdpass.compress instead",
                path,
            )
            return None
        return choice.form

    return decide


def _plan_weights(draft: Draft, budget: BudgetSpec | None) -> RankPlan:
    """A plan for the weights that the graph's layers read, by themselves."""
    limits = budget if isinstance(budget, Budget) else Budget.parse(budget or {})
    stored = draft.stored
    layers: dict[int, nn.Module] = {}
    for node in draft.graph.nodes:
        link = read_link(node, stored)
        weight = None if link is None else draft.value_of(link.weight)
        if link is None or not isinstance(weight, nn.Parameter) or link.transposed or link.groups != 1:
            continue
        layers.setdefault(id(weight), _holder(weight))
    return (
        make_plan(nn.ModuleList(layers.values()), limits, progress=False).plan
        if layers
        else RankPlan((), Cost())
    )


def _holder(weight: nn.Parameter) -> nn.Module:
    """A module that the planner can read a weight from."""
    module = plain_module(tuple(weight.shape))
    module.weight = weight
    return module
