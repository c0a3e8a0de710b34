"""Runs that cannot be replayed call by call, repeated by running the model itself: slower, but true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tdpass.kinds import as_layer, is_layer_call, is_lookup
from tdpass.tape.calls import argument, in_parts, plain
from tdpass.tape.playback import Playback, Replacement, Tape, Watch

_LEAVING_TORCH = frozenset(
    {"numpy", "__array__", "item", "tolist", "__float__", "__int__", "__bool__", "__dlpack__"}
)

Run = Callable[[], Any]
Steer = Callable[[str, Tensor, Replacement], Tensor]


@dataclass
class LiveTape(Tape):
    """A recorded run whose playbacks run the model for real.

    Something in it is not a torch call, or chooses what runs. `run` executes the model on `fed`, `sites` maps
    `id(weight)` of what it executes to a site's name, and `apart` holds the ids of biases that are added by
    calls of their own.  Which value a call reads is known in part only, so that no two layers are taken to be
    neighbours.
    """

    run: Run = field(kw_only=True)
    fed: Sequence[Tensor] = field(kw_only=True)
    sites: Mapping[int, str] = field(kw_only=True)
    apart: frozenset[int] = field(kw_only=True, default=frozenset())

    @property
    def note(self) -> str:
        return (
            f"every candidate is tried by running the whole model, which takes longer: {self.doubt}; "
            "channel pruning between layers, changes of heads, dropped branches and batch-norm folding are left "
            "out"
        )

    def readers(self, number: int) -> list[int]:
        return []

    def is_output(self, number: int) -> bool:
        return True

    def residual_partner(self, index: int) -> int | None:
        return None

    def channelwise_consumer(self, index: int) -> int | None:
        return None

    def play(self, inputs: Mapping[int, Tensor] | None = None) -> Playback:
        return _Rerun(self, self.inputs if inputs is None else inputs)

    def place(self, index: int) -> tuple[str | None, int]:
        """The site of call `index`, and which of that site's calls it is."""
        name = self.calls[index].site
        return name, 0 if name is None else self.site_calls[name].index(index)


class _Arrived(BaseException):
    """Ends a run at the call that was asked for; no handler in a model catches it."""


@dataclass
class _Rerun:
    """A playback that runs the model from its start whenever something is asked of it."""

    tape: LiveTape
    inputs: Mapping[int, Tensor]
    replaced: dict[str, Replacement] = field(default_factory=dict)
    position: int = 0

    def fork(self, replaced: Mapping[str, Replacement] | None = None) -> _Rerun:
        return _Rerun(self.tape, self.inputs, {**self.replaced, **(replaced or {})}, self.position)

    def advance(self, index: int) -> _Rerun:
        self.position = index
        return self

    def input_of(self, index: int) -> Tensor | None:
        return next(iter(self._at(index)), None)

    def step(self) -> Tensor | None:
        return next(reversed(self._at(self.position)), None)

    def value(self, number: int) -> Tensor | None:
        return None

    def finish(self, watch: Watch | None = None) -> Any:
        def steer(name: str, x: Tensor, dense: Replacement) -> Tensor:
            y = self.replaced.get(name, dense)(x)
            if watch is None:
                return y
            y = watch(name, x, y)
            return (
                y.clone() if y.requires_grad and y.is_leaf else y
            )  # what follows may write in place, which a leaf forbids

        return plain(self._run(steer))

    def _at(self, index: int) -> tuple[Tensor, ...]:
        """Input and output of site call `index`; nothing where the run does not come there."""
        wanted, count = self.tape.place(index)
        found: list[Tensor] = []
        seen = 0

        def steer(name: str, x: Tensor, dense: Replacement) -> Tensor:
            nonlocal seen
            y = self.replaced.get(name, dense)(x)
            seen += name == wanted
            if seen > count:
                found.extend((x, y))
                raise _Arrived
            return y

        try:
            self._run(steer)
        except _Arrived:
            return tuple(found)
        return ()

    def _run(self, steer: Steer) -> Any:
        restore(self.tape.fed, self.inputs.values())
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with _Steered(self.tape.sites, self.tape.apart, steer):
                return self.tape.run()
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


class _Steered(TorchFunctionMode):
    """Hands every call of a site to `steer`.

    Lets values leave torch where gradients are recorded, which then end there.
    """

    def __init__(self, sites: Mapping[int, str], apart: frozenset[int], steer: Steer) -> None:
        super().__init__()
        self.sites, self.apart, self.steer = sites, apart, steer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        func, args, kwargs = as_layer(func, args, kwargs or {}, self.sites)
        if getattr(func, "__name__", "") in _LEAVING_TORCH:
            return func(args[0].detach(), *args[1:], **kwargs)
        return in_parts(self._call, func, args, kwargs, self.apart)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        steered = is_layer_call(func) or is_lookup(func)
        name = self.sites.get(id(argument(args, kwargs, 1, "weight"))) if steered else None
        if name is None:
            return func(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != "input"}
        return self.steer(name, argument(args, kwargs, 0, "input"), lambda x: func(x, *args[1:], **rest))


def restore(fed: Sequence[Tensor], originals: Any) -> None:
    """Undo what a run wrote into its inputs."""
    for tensor, original in zip(fed, originals, strict=True):
        if not torch.equal(tensor, original):
            tensor.copy_(original)
