"""All values of a recorded run at hand at once, for runs of a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tdpass.tape import Call, Ref, Tape, leaves, mapped


@dataclass
class Values:
    """The values of a run by number."""

    tape: Tape
    by_number: dict[int, Tensor]

    @classmethod
    def of(cls, tape: Tape) -> Values:
        """Those of a run that is repeated call by call."""
        found = cls(tape, dict(tape.inputs))
        for _ in found.steps():
            pass
        return found

    def steps(self, *, forget: bool = False) -> Iterator[Call]:
        """Repeat the run; every call once its values are there.

        Where values are to be forgotten they are kept for as long as they are read.
        """
        last = self.tape.last_read
        for place, call in enumerate(self.tape.calls):
            with torch.no_grad():
                self._keep(call, self.called(call))
            yield call
            for number in {*call.reads(), *call.writes()} if forget else ():
                if last.get(number, -1) <= place:
                    self.by_number.pop(number, None)

    def called(self, call: Call, others: Mapping[int, Tensor] = {}) -> Any:
        """What a call answers, with `others` in the place of tensors, by `key_of`."""

        def filled(leaf: Any) -> Any:
            if not isinstance(leaf, Ref | Tensor):
                return leaf
            given = others.get(key_of(leaf))
            return self.at(leaf) if given is None else given

        args, kwargs = mapped(filled, (call.args, dict(call.kwargs)))
        if call.mutates:
            args = (args[0].clone(), *args[1:])
        with call.context():
            result = call.func(*args, **kwargs)
        return args[0] if call.mutates and not isinstance(result, Tensor) else result

    def at(self, leaf: Ref | Tensor) -> Tensor:
        """The tensor that a leaf of a call stands for."""
        return self.by_number[leaf.number] if isinstance(leaf, Ref) else leaf

    def _keep(self, call: Call, result: Any) -> None:
        for number, value in zip(leaves(call.output), tree_leaves(result), strict=True):
            if isinstance(number, Ref):
                self.by_number[number.number] = value


def key_of(leaf: Ref | Tensor) -> int:
    """A key for a leaf: values of the run below zero, tensors of the model by their id."""
    return -1 - leaf.number if isinstance(leaf, Ref) else id(leaf)


def operands(call: Call) -> list[Ref | Tensor]:
    """The tensors that a call reads, values of the run and of the model, each once."""
    found = [leaf for leaf in leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Ref | Tensor)]
    return list({key_of(leaf): leaf for leaf in found}.values())


def written(call: Call) -> list[Ref]:
    """What a call makes."""
    return [leaf for leaf in leaves(call.output) if isinstance(leaf, Ref)]
