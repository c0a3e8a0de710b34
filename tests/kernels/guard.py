"""Tensors at an inaccessible page, so that the machine stops a kernel that reads or writes past them.

`python guard.py [operator ...]` runs every case with everything it reads and writes guarded at the end, then
at the start.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

Side = Literal["end", "start"]
_EMPTY, _NO_ACCESS = torch.empty, 0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory for tensors of one run; every tensor ends, or starts, at a page that no one may touch."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.maps: list[tuple[mmap.mmap, int, int]] = []

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """An uninitialized tensor, in that memory format."""
        like = _EMPTY(shape, dtype=dtype, memory_format=memory_format, device="meta")
        size, page = like.numel() * dtype.itemsize, mmap.PAGESIZE
        if size == 0:
            return torch.zeros(shape, dtype=dtype)
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        closed, first = (address + room, room - size) if self.side == "end" else (address, page)
        if _LIBC.mprotect(closed, page, _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect failed")
        self.maps.append((memory, closed, page))
        flat = torch.frombuffer(memory, dtype=dtype, count=like.numel(), offset=first)
        return flat.as_strided(like.shape, like.stride())

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor without gaps, its order of axes kept."""
        last = (
            tensor.dim() == 4
            and tensor.is_contiguous(memory_format=torch.channels_last)
            and not tensor.is_contiguous()
        )
        return self.empty(
            tuple(tensor.shape), tensor.dtype, torch.channels_last if last else torch.contiguous_format
        ).copy_(tensor)

    def close(self) -> None:
        """Open the pages again; the memory goes with the last tensor."""
        for _, closed, page in self.maps:
            _LIBC.mprotect(closed, page, mmap.PROT_READ | mmap.PROT_WRITE)

    @contextmanager
    def outputs(self) -> Iterator[None]:
        """Within it, what torch allocates by `torch.empty`, `new_empty` and `clone` is guarded too."""

        def empty(
            size: Any,
            *,
            dtype: torch.dtype = torch.float32,
            memory_format: Any = torch.contiguous_format,
            **_: object,
        ) -> Tensor:
            return self.empty(tuple(size), dtype, memory_format)

        def new_empty(tensor: Tensor, size: Any, *, dtype: torch.dtype | None = None) -> Tensor:
            return self.empty(tuple(size), dtype or tensor.dtype)

        def clone(tensor: Tensor, **_: object) -> Tensor:
            return self.copy(tensor)

        with (
            mock.patch("torch.empty", empty),
            mock.patch.object(Tensor, "new_empty", new_empty),
            mock.patch.object(Tensor, "clone", clone),
        ):
            yield


def main(names: list[str]) -> None:
    """Every case of these operators, or of all; says what runs, so that the last line tells what died."""
    from cases import CASES, cases_of
    from setting import arguments, assert_close, exact, map_tensors, run_native

    from tdpass.kernels.base import OPS

    sides: tuple[Side, ...] = ("end", "start")
    for name in names or CASES:
        op = OPS.get(name)
        for case in cases_of(name):
            for dtype in case.dtypes:
                args = arguments(op, case, dtype)
                wanted = exact(op, args)
                for side in sides:
                    sys.stdout.write(f"{name} {case.name} {dtype} {side}\n")
                    sys.stdout.flush()
                    memory = Guarded(side)
                    guarded = map_tensors(memory.copy, args)
                    with memory.outputs():
                        got = run_native(op, guarded)
                    assert_close([tensor.double() for tensor in got], wanted, case.allowed(dtype))
                    memory.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    main(sys.argv[1:])
