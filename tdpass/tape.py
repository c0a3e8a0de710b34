"""A tape: one run of a model, recorded call by call, that can be replayed with some layers replaced.

Recording happens at the level of torch functions while the model really runs, so control flow, reused modules and
code that no tracer understands are all fine.  A replay computes only what it needs: sensitivity analysis forks a
replay at a layer and runs the rest of the network once per candidate, without ever recomputing the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tdpass.errors import UnsupportedError
from tdpass.ops import padded_convolution

LAYER_CALLS: frozenset[Callable[..., Any]] = frozenset(
    {F.linear, torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d, padded_convolution}
)
_TRANSPOSED = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
_MUTATING_NAMES = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
_ADDITIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
_CHANNELWISE = frozenset(
    {"relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "sigmoid", "tanh", "dropout", "clamp", "clip"}
)


@dataclass(frozen=True)
class Ref:
    """The value with that number on the tape."""

    number: int


@dataclass(frozen=True)
class Call:
    """One recorded torch function call; `output` has the structure of what it returned, with `Ref` for tensors.

    Layer calls also carry their multiply-adds per sample and the shapes of their input and output.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    mutates: bool
    site: str | None = None
    macs: int = 0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def name(self) -> str:
        """The function's bare name."""
        return getattr(self.func, "__name__", str(self.func))

    def reads(self) -> Iterator[int]:
        """Numbers of the values it uses."""
        return (leaf.number for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Ref))

    def writes(self) -> Iterator[int]:
        """Numbers of the values it makes."""
        return (leaf.number for leaf in _leaves(self.output) if isinstance(leaf, Ref))


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Ref))


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


@dataclass
class Tape:
    """The recorded calls of one run; `inputs` are the values it was run on, `output` what it returned."""

    calls: list[Call]
    inputs: dict[int, Tensor]
    output: Any
    batch_size: int
    last_read: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, call in enumerate(self.calls):
            self.last_read.update((number, index) for number in call.reads())
        self.last_read.update((leaf.number, len(self.calls)) for leaf in _leaves(self.output) if isinstance(leaf, Ref))

    @property
    def site_calls(self) -> dict[str, list[int]]:
        """Where each site is called, in the order of the run."""
        found: dict[str, list[int]] = {}
        for index, call in enumerate(self.calls):
            if call.site is not None:
                found.setdefault(call.site, []).append(index)
        return found

    @property
    def macs(self) -> int:
        """Multiply-adds per sample of all linear and convolution calls."""
        return sum(call.macs for call in self.calls)

    def readers(self, number: int) -> list[int]:
        """The calls that use a value."""
        return [index for index, call in enumerate(self.calls) if number in call.reads()]

    def is_output(self, number: int) -> bool:
        """Whether the run returned that value."""
        return any(isinstance(leaf, Ref) and leaf.number == number for leaf in _leaves(self.output))

    def residual_partner(self, index: int) -> int | None:
        """The other summand, where the value made by call `index` is used once and that is in a sum."""
        number = next(self.calls[index].writes())
        readers = self.readers(number)
        if len(readers) != 1 or self.is_output(number):
            return None
        call = self.calls[readers[0]]
        summands = [arg for arg in call.args if isinstance(arg, Ref)]
        if call.name not in _ADDITIONS or len(call.args) != 2 or len(summands) != 2 or call.kwargs:
            return None
        return next((arg.number for arg in summands if arg.number != number), None)

    def channelwise_consumer(self, index: int) -> int | None:
        """The one site call that reads the value made by call `index`, through element-wise functions only."""
        number = next(self.calls[index].writes())
        while True:
            readers = self.readers(number)
            if len(readers) != 1 or self.is_output(number):
                return None
            call = self.calls[readers[0]]
            if call.site is not None:
                return readers[0] if call.args[0] == Ref(number) else None
            written = list(call.writes())
            tensors = [leaf for leaf in _leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref | Tensor)]
            if call.name not in _CHANNELWISE or len(written) != 1 or len(tensors) != 1:
                return None
            number = written[0]

    def play(self, inputs: Mapping[int, Tensor] | None = None) -> Playback:
        """Start a replay, by default on the recorded inputs."""
        return Playback(self, dict(self.inputs if inputs is None else inputs))


Replacement = Callable[[Tensor], Tensor]


@dataclass
class Playback:
    """A replay in progress: the values still needed, and the next call."""

    tape: Tape
    values: dict[int, Tensor]
    position: int = 0
    replaced: dict[str, Replacement] = field(default_factory=dict)

    def fork(self, replaced: Mapping[str, Replacement] | None = None) -> Playback:
        """A copy from here on; values are shared, since a replay never changes one in place."""
        return Playback(self.tape, dict(self.values), self.position, {**self.replaced, **(replaced or {})})

    def advance(self, index: int) -> Playback:
        """Run every call before call `index`."""
        while self.position < index:
            self._step()
        return self

    def input_of(self, index: int) -> Tensor:
        """The activation that the layer call `index` is about to read."""
        return self._fill(self.tape.calls[index].args[0])  # type: ignore[no-any-return]

    def finish(self) -> Any:
        """Run to the end; returns what the model would have returned."""
        self.advance(len(self.tape.calls))
        return self._fill(self.tape.output)

    def step(self) -> Any:
        """Run the next call; returns its result."""
        return self._step()

    def _step(self) -> Any:
        call = self.tape.calls[self.position]
        replace = self.replaced.get(call.site) if call.site is not None else None
        if replace is not None:
            result: Any = replace(self._fill(call.args[0]))
        else:
            args, kwargs = self._fill(call.args), self._fill(dict(call.kwargs))
            if call.mutates:
                args = (args[0].clone(), *args[1:])
            result = call.func(*args, **kwargs)
            if call.mutates and not isinstance(result, Tensor):
                result = args[0]
        for number, value in zip(_leaves(call.output), tree_leaves(result), strict=True):
            if isinstance(number, Ref):
                self.values[number.number] = value
        last = self.tape.last_read
        for number in {*call.reads(), *call.writes()}:
            if last.get(number, -1) <= self.position:
                self.values.pop(number, None)
        self.position += 1
        return result

    def _fill(self, tree: Any) -> Any:
        return tree_map(lambda leaf: self.values[leaf.number] if isinstance(leaf, Ref) else leaf, tree, is_leaf=_is_ref)


class _Recorder(TorchFunctionMode):
    def __init__(self, sites: Mapping[int, str], batch_size: int) -> None:
        super().__init__()
        self.sites = sites
        self.batch_size = batch_size
        self.calls: list[Call] = []
        self.numbers: dict[int, tuple[ReferenceType[Tensor], int]] = {}
        self.count = 0

    def number(self, tensor: Tensor) -> Ref:
        self.numbers[id(tensor)] = (ref(tensor), self.count)
        self.count += 1
        return Ref(self.count - 1)

    def known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        entry = self.numbers.get(id(leaf))
        return Ref(entry[1]) if entry is not None and entry[0]() is leaf else leaf

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorded_args, recorded_kwargs = tree_map(self.known, (args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        mutates = bool(args) and isinstance(args[0], Tensor) and (
            name in _MUTATING_NAMES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True or _inplace(name, args)
        )
        site, macs, shapes = self._layer(func, args, kwargs, result)
        if mutates and not isinstance(result, Tensor):
            output: Any = self.number(args[0])
        elif not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        else:
            output = tree_map(lambda leaf: self.number(leaf) if isinstance(leaf, Tensor) else leaf, result)
        if site is not None:
            recorded_args, recorded_kwargs = _positional(recorded_args, recorded_kwargs)
        self.calls.append(Call(func, recorded_args, recorded_kwargs, output, mutates, site, macs, shapes))
        return result

    def _layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> tuple[str | None, int, tuple[tuple[int, ...], tuple[int, ...]]]:
        if func not in LAYER_CALLS and func not in _TRANSPOSED:
            return None, 0, ((), ())
        x, weight = (_argument(args, kwargs, position, name) for position, name in ((0, "input"), (1, "weight")))
        macs = x.numel() * weight.numel() // weight.shape[0] if func in _TRANSPOSED else result.numel() * weight[0].numel()
        site = self.sites.get(id(weight)) if func in LAYER_CALLS else None
        return site, macs // self.batch_size, (tuple(x.shape), tuple(result.shape))


def _inplace(name: str, args: tuple[Any, ...]) -> bool:
    position = {"relu": 1, "dropout": 3, "silu": 1, "relu6": 1, "hardswish": 1}.get(name)
    return position is not None and len(args) > position and args[position] is True


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs[name]


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop("input"),), rest


def record(run: Callable[[], Any], inputs: Sequence[Tensor], sites: Mapping[int, str], *, samples: int | None = None, replayed: bool = True) -> Tape:
    """Run a model once and record it.

    `run` executes the model on `inputs` (all tensors it is fed), which hold that many `samples`, else as many as the first
    of them is long; `sites` maps `id(weight)` to a site's name.  A tape that
    is only looked at need not be `replayed`.  Raises `UnsupportedError` when a replay does not reproduce the run, for example
    because a view was changed in place.
    """
    batch_size = samples or next((int(tensor.shape[0]) for tensor in inputs if tensor.dim() > 0), 1)
    recorder = _Recorder(sites, batch_size)
    fed = {recorder.number(tensor).number: tensor for tensor in inputs}
    originals = {number: tensor.clone() for number, tensor in fed.items()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), recorder:
            result = run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    output = tree_map(recorder.known, _plain(result))
    tape = Tape(recorder.calls, originals, output, batch_size)
    if not replayed:
        return tape
    with torch.no_grad():
        again = tape.play().finish()
    for ours, theirs in zip(tree_leaves(again), tree_leaves(_plain(result)), strict=True):
        if isinstance(theirs, Tensor) and not _same(ours.double(), theirs.double()):
            raise UnsupportedError(
                "a replay of the recorded run differs from the run: the model is not deterministic, or writes through a view; put it in eval mode"
            )
    return tape


def _same(ours: Tensor, theirs: Tensor) -> bool:
    level = float(theirs.nan_to_num(0, 0, 0).abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * (level + 1), equal_nan=True)


def _plain(result: Any) -> Any:
    """Outputs of dataclass-like results (Hugging Face) as plain dicts, without empty entries."""
    if isinstance(result, Mapping):
        return {key: _plain(value) for key, value in result.items() if value is not None}
    if isinstance(result, tuple | list):
        return [_plain(value) for value in result]
    return result
