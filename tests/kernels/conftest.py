"""How tests make the Triton kernels serve operators, and compile them for devices that are not here."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tdpass.errors import KernelError
from tdpass.kernels import native
from tdpass.kernels.gpu import serving


@dataclass
class Compiled:
    """Of each kernel that was launched, the most shared memory and the assembly of every launch."""

    shared: dict[str, int] = field(default_factory=dict)
    assembly: dict[str, list[str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def library() -> str:
    """The operators for ONNX Runtime."""
    try:
        return str(native.onnx_ops_path())
    except KernelError as error:
        pytest.skip(str(error))


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel runs with its default configuration."""
    monkeypatch.setenv("TDPASS_TUNE", "0")


@pytest.fixture
def here(untuned: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators use the kernels, also under the interpreter, and multiply float32 as it is."""
    monkeypatch.setattr(serving, "available", lambda: True)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def compiled_for(untuned: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Compiled]:
    """Called with a compute capability, launches compile for it and nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tdpass.kernels.gpu import language

    def start(capability: int) -> Compiled:
        found = Compiled()

        def compiled(kernel: JITFunction, grid: object) -> object:
            def launch(*args: object, **options: object) -> None:
                made = kernel.run(*args, grid=grid, warmup=True, **options)
                found.shared[kernel.__name__] = max(
                    found.shared.get(kernel.__name__, 0), made.metadata.shared
                )
                found.assembly.setdefault(kernel.__name__, []).append(made.asm["ptx"])

            return launch

        chip = GPUTarget("cuda", capability, 32)
        target = types.SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_target=lambda: chip,
            get_current_stream=lambda _: 0,
        )
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        monkeypatch.setattr(JITFunction, "__getitem__", compiled)
        monkeypatch.setattr(language, "on_this_device", lambda _: True)
        monkeypatch.setattr(driver, "_active", target)
        return found

    return start
