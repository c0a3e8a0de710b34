"""`torch.compile(model, backend="tdpass")`: chains of small layers become one operator each, the rest goes to inductor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tdpass.artifact import load_plan
from tdpass.cost import Budget, Cost
from tdpass.errors import UsageError
from tdpass.models.derived import DERIVED
from tdpass.models.graph_draft import Compiled, Draft, Inner
from tdpass.models.graph_factorize import Decide, Decision, factorize
from tdpass.models.graph_fuse import fuse_chains
from tdpass.models.graph_layers import read_link
from tdpass.planner.cache import digest
from tdpass.planner.rank_plan import RankPlan
from tdpass.verbs import BudgetSpec, make_plan

NAME, GROUP = "tdpass", "torch_dynamo_backends"
log = logging.getLogger("tdpass.backend")


@dataclass(frozen=True)
class Options:
    """What `options=` takes.

    `inner`: what compiles the rewritten graph, "inductor" or "eager".  `measure`: fuse only where that was measured to be
    faster.  `channels_last`: lay images with their channels innermost where the chains are faster so.  `plan`, a plan or
    its file: factor dense weights as it says.  `budget`: plan on the weights of each graph alone, for bounds on `params` or `bytes`
    (of the linear and convolution weights of that graph) or `max_error`.
    """

    inner: str = "inductor"
    measure: bool = True
    channels_last: bool = True
    plan: RankPlan | str | Path | None = None
    budget: BudgetSpec = None

    def __post_init__(self) -> None:
        if self.inner not in _INNER:
            raise UsageError(f"option inner={self.inner!r} of the backend is not known; it is one of {', '.join(_INNER)}")
        for name in ("measure", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"option {name}={getattr(self, name)!r} of the backend must be true or false")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Read what was passed to `torch.compile`; raises `UsageError` for a name that is not an option."""
        known = cls.__dataclass_fields__
        for name in given or {}:
            if name not in known:
                raise UsageError(f"the backend has no option {name!r}; it takes: {', '.join(known)}")
        return cls(**(given or {}))


def tdpass_backend(graph_module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Compiled:
    """Compile a graph that Dynamo recorded; what `torch.compile` calls.

    Exact unless `plan` or `budget` is given.  Weights may be edited, loaded or replaced afterwards: what is derived from them is
    made anew at the next call, without compiling again.  A graph that computes gradients is compiled as it is.
    """
    chosen = Options.of(options)
    if mode not in (None, "default"):
        raise UsageError(f"mode={mode!r} is inductor's; this backend takes options={{...}}, or wrap the model for inductor instead")
    inner = _INNER[chosen.inner]
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in example_inputs):
        log.warning("a graph that computes gradients is left as it is; call the model under torch.no_grad() to have it rewritten")
        return inner(graph_module, example_inputs)
    draft = Draft(graph_module, example_inputs)
    if not draft.rewritable:
        log.info("a graph whose weights are not at hand is left as it is")
        return inner(graph_module, example_inputs)
    factored = 0
    decide = _decisions(draft, chosen)
    if decide is not None:
        factored = factorize(draft, decide)
        log.info("%d layers factored", factored)
    fused = fuse_chains(draft, measure=chosen.measure, channels_last=chosen.channels_last)
    return draft.compile(inner) if fused or factored else inner(graph_module, example_inputs)


def invalidate(model: nn.Module | None = None) -> None:
    """Forget what was derived from a model's weights, or from all: needed after `weight.data.copy_(...)`, which leaves no trace."""
    DERIVED.clear(None if model is None else [*model.parameters(), *model.buffers()])


def register() -> None:
    """Make the backend known by its name, unless an installed entry point does."""
    if any(entry.name == NAME for entry in entry_points(group=GROUP)):
        return
    from torch._dynamo.backends import registry  # noqa: PLC0415 - takes seconds to import, and is only needed where nothing is installed

    if NAME not in registry._BACKENDS and NAME not in registry._COMPILER_FNS:  # noqa: SLF001 - there is no public way to ask
        registry.register_backend(tdpass_backend, name=NAME)


def _inductor(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 - takes seconds to import

    compiled: Any = compile_fx(graph_module, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


def _eager(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    del example_inputs
    return graph_module.forward


_INNER: dict[str, Inner] = {"inductor": _inductor, "eager": _eager}


def _decisions(draft: Draft, options: Options) -> Decide | None:
    """What each weight becomes: matched by its content, else by the path of its module; None where nothing was asked for."""
    if options.plan is None and options.budget is None:
        return None
    plan = _plan_weights(draft, options.budget) if options.plan is None else options.plan
    plan = load_plan(plan) if isinstance(plan, str | Path) else plan
    prints = {choice.fingerprint: choice for choice in plan if choice.fingerprint}
    names = {choice.site: choice for choice in plan}

    def decide(path: str, weight: Tensor) -> Decision | None:
        choice = prints.get(digest(weight)) or names.get(path)
        if choice is None or choice.kept_dense or choice.shape != tuple(weight.shape):
            return None
        if choice.channels or choice.format == "constant":
            log.warning("%s stays dense: it was planned together with other layers; compress the model with tdpass.compress instead", path)
            return None
        return choice.format, choice.rank

    return decide


def _plan_weights(draft: Draft, budget: BudgetSpec) -> RankPlan:
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
    return make_plan(nn.ModuleList(layers.values()), limits).plan if layers else RankPlan((), Cost())


def _holder(weight: nn.Parameter) -> nn.Module:
    """A module that the planner can read a weight from."""
    if weight.dim() == 2:
        module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
        module = cls(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")  # type: ignore[arg-type]
    module.weight = weight
    return module
