"""Recording a run, at the level of torch functions and, if need be, of the operators below them.

Recording happens while the model really runs, so control flow, reused modules and code that no tracer
understands are all fine.  What leaves torch on the way (NumPy, scripted code, values read into Python) enters
the tape as a constant; a tape of which that is true is compared with the model, both with the output of every
site disturbed, before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tdpass.errors import TdpassError, UnsupportedError
from tdpass.kinds import as_layer, is_layer_call, is_lookup
from tdpass.tape.calls import Autocast, Call, Ref, argument, in_parts, leaves, mapped, plain
from tdpass.tape.live import LiveTape, Run, restore
from tdpass.tape.playback import Tape

_MUTATING_NAMES = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"})
_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "cpu"})
_ABOUT_SHAPES = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
        "is_floating_point", "is_complex",
        "is_signed", "get_device", "element_size", "__len__", "__get__", "__hash__", "__repr__",
        "is_inference", "broadcast_shapes",
    }
)  # fmt: skip
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, TdpassError)
_NOISE = 0.1
_VISIBLE = 0.02


class _Recorder(TorchFunctionMode):
    def __init__(
        self, sites: Mapping[int, str], batch_size: int, held: frozenset[int], apart: frozenset[int]
    ) -> None:
        super().__init__()
        self.sites = sites
        self.apart = apart
        self.batch_size = batch_size
        self.held = held
        self.calls: list[Call] = []
        self.numbers: dict[int, tuple[ReferenceType[Tensor], int]] = {}
        self.count = 0
        self.doubt = ""
        self.below: _Operators | None = None

    def number(self, tensor: Tensor) -> Ref:
        self.numbers[id(tensor)] = (ref(tensor), self.count)
        self.count += 1
        return Ref(self.count - 1)

    def known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        entry = self.numbers.get(id(leaf))
        if entry is not None and entry[0]() is leaf:
            return Ref(entry[1])
        if id(leaf) not in self.held:
            self.doubt = self.doubt or "a tensor that no torch call made is used while the model runs"
        return leaf

    def returned(self, leaf: Any) -> Any:
        """`known`, for what the model returns."""
        if not isinstance(leaf, Tensor | int | float | complex | str | bytes | None):
            self.doubt = (
                f"the model returns a {type(leaf).__name__}, which cannot be looked into (Hugging Face's models "
                "return tensors alone with use_cache=False)"
            )
        return self.known(leaf)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        func, args, kwargs = as_layer(func, args, kwargs or {}, self.sites)
        if self.below is None:
            return in_parts(self.call, func, args, kwargs, self.apart)
        if any(
            isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)
            for leaf in tree_leaves((args, kwargs))
        ):
            return func(*args, **kwargs)
        with self.below.hidden():
            return in_parts(self.call, func, args, kwargs, self.apart)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and record it."""
        recorded_args, recorded_kwargs = tree_map(self.known, (args, kwargs))
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _CASTS and result is args[0]:
            return result  # nothing to cast: the value, or the weight, keeps its identity
        mutates = _mutates(func, args, kwargs)
        site, shapes = self._layer(func, args, kwargs, result)
        if mutates and not isinstance(result, Tensor):
            output: Any = self.number(args[0])
        elif not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            if getattr(func, "__name__", "") not in _ABOUT_SHAPES:
                self.doubt = (
                    self.doubt
                    or f"values of tensors are read into Python ({getattr(func, '__name__', func)})"
                )
            return result
        else:
            output = tree_map(lambda leaf: self.number(leaf) if isinstance(leaf, Tensor) else leaf, result)
        recorded_kwargs.pop("out", None)  # its value is the result; a replay makes a new one
        if site is not None:
            recorded_args, recorded_kwargs = _positional(recorded_args, recorded_kwargs)
        autocast = None if isinstance(func, OpOverload) else Autocast.of((args, kwargs))
        self.calls.append(Call(func, recorded_args, recorded_kwargs, output, mutates, site, shapes, autocast))
        return result

    def _layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> tuple[str | None, tuple[tuple[int, ...], tuple[int, ...]]]:
        if not (is_layer_call(func) or is_lookup(func)):
            return None, ((), ())
        x, weight = (
            argument(args, kwargs, position, name) for position, name in ((0, "input"), (1, "weight"))
        )
        return self.sites.get(id(weight)), (tuple(x.shape), tuple(result.shape))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that are run by no torch function.

    Those of scripted code, of C++, and of functions mapped by vmap.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.depth = 0

    def hidden(self) -> _Depth:
        """While it is open, what runs belongs to a torch function that is recorded itself."""
        return _Depth(self)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return (
                func(*args, **(kwargs or {})) if self.depth else self.recorder.call(func, args, kwargs or {})
            )


class _Depth:
    def __init__(self, operators: _Operators) -> None:
        self.operators = operators

    def __enter__(self) -> None:
        self.operators.depth += 1

    def __exit__(self, *_: object) -> None:
        self.operators.depth -= 1


def _mutates(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if not args or not isinstance(args[0], Tensor):
        return False
    if isinstance(func, OpOverload):
        return func._schema.is_mutable
    name = getattr(func, "__name__", "")
    return (
        name in _MUTATING_NAMES
        or (name.endswith("_") and not name.endswith("__"))
        or kwargs.get("inplace") is True
        or _inplace(name, args)
    )


def _inplace(name: str, args: tuple[Any, ...]) -> bool:
    position = {"relu": 1, "dropout": 3, "silu": 1, "relu6": 1, "hardswish": 1}.get(name)
    return position is not None and len(args) > position and args[position] is True


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop("input"),), rest


def record(
    run: Run,
    inputs: Sequence[Tensor],
    sites: Mapping[int, str],
    *,
    samples: int | None = None,
    held: Iterable[Tensor] = (),
    apart: frozenset[int] = frozenset(),
    replayed: bool = True,
) -> Tape:
    """Run a model once and record it.

    `run` executes the model on `inputs` (all tensors it is fed), which hold that many `samples`, else as many
    as the first of them is long; `sites` maps `id(weight)` to a site's name, `held` are the tensors that the
    model holds, `apart` the ids of biases that are no part of their layer's site, so that they are added by
    calls of their own.  A tape that is only looked at need not be `replayed`.  Where no replay does what the
    model does, because the run leaves torch, writes through a view or decides by values, it is a `LiveTape`.
    Raises `UnsupportedError` for a model that is not deterministic.
    """
    size = samples or next((int(tensor.shape[0]) for tensor in inputs if tensor.dim() > 0), 1)
    constants = frozenset(map(id, held))
    originals = [tensor.clone() for tensor in inputs]
    tape, result = _recorded(run, inputs, originals, _Recorder(sites, size, constants, apart))
    if not replayed:
        return tape
    live = _live(tape, run, inputs, sites, apart)
    if _faithful(tape, live, result):
        return tape
    if tape.doubt:
        deep = _Recorder(sites, size, constants, apart)
        deep.below = _Operators(deep)
        try:
            deeper, result = _recorded(run, inputs, originals, deep)
        except _FAILURES:  # some code cannot run below a dispatch mode
            deeper = tape
        if deeper is not tape and _faithful(deeper, live, result):
            return deeper
    with torch.no_grad():
        if not _equal(live.play().finish(), result):
            raise UnsupportedError(
                "two runs on the same data differ: the model is not deterministic; put it in eval mode, or "
                "fix its seed in forward"
            )
    return live


def _recorded(
    run: Run, inputs: Sequence[Tensor], originals: Sequence[Tensor], recorder: _Recorder
) -> tuple[Tape, Any]:
    fed = [recorder.number(tensor).number for tensor in inputs]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), recorder, recorder.below or nullcontext():
            result = plain(run())
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    restore(inputs, originals)
    output = mapped(recorder.returned, result)
    return Tape(
        recorder.calls, dict(zip(fed, originals, strict=True)), output, recorder.batch_size, recorder.doubt
    ), result


def _live(
    tape: Tape, run: Run, inputs: Sequence[Tensor], sites: Mapping[int, str], apart: frozenset[int]
) -> LiveTape:
    doubt = tape.doubt or "a replay of its calls does not give its output"
    return LiveTape(
        tape.calls,
        tape.inputs,
        tape.output,
        tape.batch_size,
        doubt,
        run=run,
        fed=inputs,
        sites=sites,
        apart=apart,
    )


def _faithful(tape: Tape, live: LiveTape, result: Any) -> bool:
    """Whether replays do what the model does.

    As it is and, where there is doubt, with the output of every site disturbed.
    """
    try:
        with torch.no_grad():
            if not _equal(tape.play().finish(), result):
                return False
            return not tape.doubt or _moves_alike(
                tape.play().finish(_Disturb()), live.play().finish(_Disturb()), result
            )
    except _FAILURES:
        return False


class _Disturb:
    """Adds noise to the output of every site call, the same in every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=self.generator, dtype=torch.float32)
        return y + (_NOISE * y.float().square().mean().sqrt() * noise.to(y.device)).to(y.dtype)


def _moves_alike(ours: Any, theirs: Any, before: Any) -> bool:
    """Whether two disturbed outputs moved to the same place, to within a part of how far they moved."""
    for a, b, c in zip(leaves(ours), leaves(theirs), leaves(before), strict=True):
        if not isinstance(b, Tensor):
            if not isinstance(b, str | bytes | int | float | complex | None) or a != b:
                return False
            continue
        if a.shape != b.shape or b.shape != c.shape:
            return False
        gap, moved = (
            (left.double() - right.double()).nan_to_num(0, 0, 0) for left, right in ((a, b), (b, c))
        )
        if float(gap.norm()) > _VISIBLE * float(moved.norm()) + 1e-6 * float(
            c.double().nan_to_num(0, 0, 0).norm()
        ):
            return False
    return True


def _equal(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(leaves(ours), leaves(theirs), strict=True))
    return all(
        a.shape == b.shape and _same(a.double(), b.detach().double())
        for a, b in pairs
        if isinstance(b, Tensor)
    )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    level = float(theirs.nan_to_num(0, 0, 0).abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * (level + 1), equal_nan=True)
